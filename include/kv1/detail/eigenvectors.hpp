// SPDX-License-Identifier: Apache-2.0
//
// Eigenvectors of a small symmetric matrix, by Jacobi's method: rotations of two rows and columns at a time,
// each of which makes one element beside the diagonal zero, until all of them are (Golub and Van Loan, Matrix
// Computations, 8.5). 128 channels take 8 to 10 sweeps of 8,128 rotations, a few hundredths of a second.
#pragma once

#include <kv1/detail/config.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// vectors, [n][n], becomes orthogonal: row i is an eigenvector of the symmetric matrix m, [n][n], and rows are
// in descending order of eigenvalues. A row's largest component is positive, so that the rows do not depend on
// how they were found. m becomes diagonal. O(n^3) a sweep.
inline void symmetric_eigenvectors(std::span<double> m, std::size_t n, std::span<double> vectors) noexcept {
    constexpr int most_sweeps = 60; // of which 10 are enough
    for (std::size_t i = 0; i < n * n; ++i)
        vectors[i] = i / n == i % n ? 1.0 : 0.0;
    double* const a = m.data();
    double largest_value = 0.0;
    for (std::size_t i = 0; i < n; ++i)
        largest_value = (std::max)(largest_value, std::fabs(a[i * n + i]));
    const double negligible = 0.1 * std::numeric_limits<double>::epsilon() * largest_value;
    const auto turn = [n](double* x, double* y, double c, double s) noexcept {
        for (std::size_t i = 0; i < n; ++i) {
            const double xi = x[i], yi = y[i];
            x[i] = c * xi - s * yi;
            y[i] = s * xi + c * yi;
        }
    };
    for (int sweep = 0; sweep < most_sweeps; ++sweep) {
        bool turned = false;
        for (std::size_t p = 0; p + 1 < n; ++p)
            for (std::size_t q = p + 1; q < n; ++q) {
                const double off = a[p * n + q], pp = a[p * n + p], qq = a[q * n + q];
                if (std::fabs(off) <= negligible)
                    continue;
                turned = true;
                const double tau = (qq - pp) / (2.0 * off);
                const double t = (tau < 0.0 ? -1.0 : 1.0) / (std::fabs(tau) + std::hypot(1.0, tau));
                const double c = 1.0 / std::hypot(1.0, t), s = t * c;
                turn(a + p * n, a + q * n, c, s);
                for (std::size_t i = 0; i < n; ++i) { // columns are what rows are
                    if (i == p || i == q)
                        continue;
                    a[i * n + p] = a[p * n + i];
                    a[i * n + q] = a[q * n + i];
                }
                a[p * n + p] = pp - t * off;
                a[q * n + q] = qq + t * off;
                a[p * n + q] = a[q * n + p] = 0.0;
                turn(vectors.data() + p * n, vectors.data() + q * n, c, s);
            }
        if (!turned)
            break;
    }
    for (std::size_t i = 0; i < n; ++i) {
        std::size_t largest = i;
        for (std::size_t k = i + 1; k < n; ++k)
            if (a[k * n + k] > a[largest * n + largest])
                largest = k;
        std::swap(a[i * n + i], a[largest * n + largest]);
        double* const row = vectors.data() + i * n;
        for (std::size_t k = 0; largest != i && k < n; ++k)
            std::swap(row[k], vectors[largest * n + k]);
        std::size_t main = 0;
        for (std::size_t k = 1; k < n; ++k)
            if (std::fabs(row[k]) > std::fabs(row[main]))
                main = k;
        const double sign = row[main] < 0.0 ? -1.0 : 1.0;
        for (std::size_t k = 0; k < n; ++k)
            row[k] *= sign;
    }
}

} // namespace kv1::inline KV1_ABI::detail
