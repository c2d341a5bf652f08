// SPDX-License-Identifier: Apache-2.0
//
// What metadata by groups of channels take off the error of a vector of 128 channels, and what they cost.
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

namespace {

constexpr std::size_t dim = 128;

// Normal channels, of which the first `outliers`, spread over the vector, are ten times larger.
std::vector<float> channels(std::size_t vectors, std::size_t outliers, std::uint64_t seed) {
    kv1_test::generator g(seed);
    std::vector<float> x = kv1_test::normal_values(g, vectors * dim);
    for (std::size_t i = 0; i < vectors; ++i)
        for (std::size_t k = 0; k < outliers; ++k)
            x[i * dim + (5 + 37 * k) % dim] *= 10.0f;
    return x;
}

// Squared error of what a cache gives back, in parts of the values' squares.
double stored_error(const std::vector<float>& x, kv1::kv_format f, const kv1::vector_encoding& e,
                    std::size_t group) {
    const std::size_t n = x.size() / dim;
    kv1::layer_description l{1, dim, dim, f, kv1::kv_format::affine2};
    l.key_encoding = e;
    l.key_group = group;
    kv1::kv_cache cache(kv1::uniform_cache(1, l, n));
    const kv1::sequence_id id = cache.create_sequence();
    cache.append(id, 0, {x.data(), n, 1, dim}, {x.data(), n, 1, dim});
    std::vector<float> y(x.size());
    cache.read(id, 0, kv1::kv_side::key, 0, 0, n, y);
    double error = 0.0, energy = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double v = x[i], off = v - static_cast<double>(y[i]);
        error += off * off;
        energy += v * v;
    }
    return error / energy;
}

} // namespace

TEST_CASE("smaller groups leave less error, most where channels differ", "[cache]") {
    for (const kv1::kv_format f : {kv1::kv_format::affine2, kv1::kv_format::compact2})
        for (const kv1::level_choice levels :
             {kv1::level_choice::min_max, kv1::level_choice::least_squares}) {
            const kv1::vector_encoding e{levels};
            const std::vector<float> even = channels(256, 0, 1), uneven = channels(256, 2, 2);
            double gain[2] = {};
            for (const std::vector<float>* x : {&even, &uneven}) {
                const double all = stored_error(*x, f, e, 0), two = stored_error(*x, f, e, 64),
                             four = stored_error(*x, f, e, 32);
                INFO(to_string(f) << " " << all << " " << two << " " << four);
                REQUIRE(all == stored_error(*x, f, e, dim));
                REQUIRE(two < all);
                REQUIRE(four < two);
                gain[x == &uneven] = all / four;
            }
            REQUIRE(gain[1] > gain[0]);
        }
}

TEST_CASE("table of errors by group size", "[.][group-table]") {
    struct line {
        const char* name;
        kv1::kv_format format;
        kv1::vector_encoding encoding;
    };
    using enum kv1::level_choice;
    const line lines[] = {
        {"affine2, min/max", kv1::kv_format::affine2, {min_max}},
        {"affine2, least squares", kv1::kv_format::affine2, {least_squares}},
        {"affine2, least squares, rotated", kv1::kv_format::affine2, {least_squares, dim}},
        {"compact2, least squares", kv1::kv_format::compact2, {least_squares}},
        {"compact2, least squares, rotated", kv1::kv_format::compact2, {least_squares, dim}}};
    for (const std::size_t outliers : {std::size_t{0}, std::size_t{2}, std::size_t{8}}) {
        const std::vector<float> x = channels(8192, outliers, 10 + outliers);
        std::printf("%zu channels ten times larger\n", outliers);
        for (const line& l : lines) {
            std::printf("  %-34s", l.name);
            for (const std::size_t group : {std::size_t{128}, std::size_t{64}, std::size_t{32}})
                std::printf("  %zu bytes %.4f", kv1::row_bytes(l.format, dim, group),
                            stored_error(x, l.format, l.encoding, group));
            std::printf("\n");
        }
    }
}
