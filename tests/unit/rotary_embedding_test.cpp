// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding as data: pairs of channels, frequencies, and the definition of a turn.
#include "random.hpp"

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>

#include <kv1/rotary_embedding.hpp>

#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace {

kv1::rotary_embedding embedding(kv1::rotary_pairs pairs, std::size_t channels, std::size_t first_channel) {
    return {kv1::rotary_frequencies(10000.0, channels), pairs, first_channel};
}

} // namespace

TEST_CASE("pairs are the halves of the channels that turn, or neighbours", "[rotary]") {
    const kv1::rotary_embedding halves = embedding(kv1::rotary_pairs::half_split, 8, 3);
    CHECK(halves.channels() == 8);
    CHECK(halves.first_of(1) == 4);
    CHECK(halves.second_of(1) == 8);
    const kv1::rotary_embedding neighbours = embedding(kv1::rotary_pairs::interleaved, 8, 3);
    CHECK(neighbours.first_of(1) == 5);
    CHECK(neighbours.second_of(1) == 6);
    CHECK(kv1::rotary_embedding{}.empty());
    CHECK_FALSE(halves.empty());
}

TEST_CASE("plain frequencies fall from 1 by a constant factor", "[rotary]") {
    const std::vector<float> f = kv1::rotary_frequencies(1.0e6, 64);
    REQUIRE(f.size() == 32);
    CHECK(f[0] == 1.0f);
    CHECK(f[16] == Catch::Approx(1.0e-3));
    CHECK(f[31] == Catch::Approx(1.0e-6 * std::pow(10.0, 6.0 / 32.0)));
}

TEST_CASE("a pair turns by its frequency times the position, and other channels stand still", "[rotary]") {
    kv1_test::generator g(301);
    for (const kv1::rotary_pairs pairs : {kv1::rotary_pairs::half_split, kv1::rotary_pairs::interleaved})
        for (const std::int64_t position : {0, 1, 777, 262144}) {
            const kv1::rotary_embedding e = embedding(pairs, 12, 2);
            const std::vector<float> values = kv1_test::normal_values(g, 16);
            const std::vector<double> x(values.begin(), values.end());
            std::vector<double> y = x;
            kv1::apply_rotary(e, std::span(y), position);
            for (const std::size_t c : {0u, 1u, 14u, 15u})
                CHECK(y[c] == x[c]);
            for (std::size_t j = 0; j < 6; ++j) {
                const std::size_t a = e.first_of(j), b = e.second_of(j);
                const std::complex<double> expected =
                    std::complex<double>(x[a], x[b]) *
                    std::polar(1.0, static_cast<double>(e.frequencies[j]) * static_cast<double>(position));
                CHECK(std::abs(std::complex<double>(y[a], y[b]) - expected) < 1e-12);
            }
            kv1::apply_rotary(e, std::span(y), -position);
            for (std::size_t c = 0; c < 16; ++c)
                CHECK(std::fabs(y[c] - x[c]) < 1e-12);
        }
}

TEST_CASE("dot products of turned queries and keys see distances alone", "[rotary]") {
    kv1_test::generator g(302);
    const kv1::rotary_embedding e = embedding(kv1::rotary_pairs::half_split, 32, 0);
    const std::vector<float> query = kv1_test::normal_values(g, 32), key = kv1_test::normal_values(g, 32);
    const auto dot_at = [&](std::int64_t of_query, std::int64_t of_key) {
        std::vector<double> q(query.begin(), query.end()), k(key.begin(), key.end());
        kv1::apply_rotary(e, std::span(q), of_query);
        kv1::apply_rotary(e, std::span(k), of_key);
        double sum = 0.0;
        for (std::size_t c = 0; c < 32; ++c)
            sum += q[c] * k[c];
        return sum;
    };
    CHECK(dot_at(100, 58) == Catch::Approx(dot_at(42, 0)).epsilon(1e-10));
    CHECK(dot_at(100042, 100000) == Catch::Approx(dot_at(42, 0)).epsilon(1e-8));
}
