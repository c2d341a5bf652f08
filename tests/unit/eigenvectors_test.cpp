// SPDX-License-Identifier: Apache-2.0
//
// Eigenvectors of symmetric matrices, those without full rank and with equal eigenvalues included.
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/eigenvectors.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

namespace {

// V is orthogonal, V M V^T is the diagonal matrix that is left, and its numbers fall. Each of some 10 sweeps turns a
// row n times, each time with a rounding of 2^-53.
void check(const std::vector<double>& m, std::size_t n) {
    std::vector<double> left = m, v(n * n);
    kv1::detail::symmetric_eigenvectors(left, n, v);
    double norm = 0.0;
    for (const double x : m)
        norm += x * x;
    norm = std::sqrt(norm);
    const double rounding = 100.0 * static_cast<double>(n) * 0x1p-53;
    bool orthogonal = true, diagonal = true, falling = true;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) {
            double unit = 0.0, turned = 0.0;
            for (std::size_t a = 0; a < n; ++a) {
                unit += v[i * n + a] * v[j * n + a];
                for (std::size_t b = 0; b < n; ++b)
                    turned += v[i * n + a] * m[a * n + b] * v[j * n + b];
            }
            orthogonal = orthogonal && std::fabs(unit - (i == j ? 1.0 : 0.0)) <= rounding;
            diagonal = diagonal && std::fabs(turned - (i == j ? left[i * n + i] : 0.0)) <= rounding * norm;
            falling = falling && (i != j || i == 0 || left[i * n + i] <= left[(i - 1) * n + i - 1]);
        }
    CHECK(orthogonal);
    CHECK(diagonal);
    CHECK(falling);
}

std::vector<double> gram(kv1_test::generator& g, std::size_t n, std::size_t rank) {
    const std::vector<float> x = kv1_test::normal_values(g, rank * n);
    std::vector<double> m(n * n);
    for (std::size_t r = 0; r < rank; ++r)
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < n; ++j)
                m[i * n + j] += static_cast<double>(x[r * n + i]) * static_cast<double>(x[r * n + j]);
    return m;
}

} // namespace

TEST_CASE("eigenvectors make a symmetric matrix diagonal", "[eigenvectors]") {
    kv1_test::generator g(1);
    for (const std::size_t n : {1u, 2u, 3u, 17u, 64u})
        for (const std::size_t rank : {std::size_t{0}, std::size_t{1}, n / 2 + 1, 3 * n})
            check(gram(g, n, rank), n);
    for (int trial = 0; trial < 20; ++trial) { // not of squares
        const std::size_t n = g.between(1, 20);
        std::vector<double> m(n * n);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j)
                m[i * n + j] = m[j * n + i] = static_cast<double>(g.normal());
        check(m, n);
    }
}

TEST_CASE("eigenvectors of equal eigenvalues are orthogonal, too", "[eigenvectors]") {
    constexpr std::size_t n = 8;
    std::vector<double> m(n * n, 1.0); // one eigenvalue of 8 + 2, seven of 2
    for (std::size_t i = 0; i < n; ++i)
        m[i * n + i] += 2.0;
    check(m, n);
    std::vector<double> wide(n * n); // numbers that lie 30 decades apart
    for (std::size_t i = 0; i < n; ++i)
        wide[i * n + i] = std::pow(10.0, 15.0 - 4.0 * static_cast<double>(i));
    check(wide, n);
}

TEST_CASE("an eigenvector's largest number is positive", "[eigenvectors]") {
    std::vector<double> m{2.0, -1.0, -1.0, 2.0}, v(4);
    kv1::detail::symmetric_eigenvectors(m, 2, v);
    CHECK(m[0] == 3.0);
    CHECK(m[3] == 1.0);
    CHECK(std::fmax(v[0], v[1]) > 0.7);
    CHECK(std::fmin(v[2], v[3]) > 0.7);
}
