// SPDX-License-Identifier: Apache-2.0
//
// Masks as values; what they do is tested with attention itself.
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/attention.hpp>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

using kv1::attention_mask;
using kv1::errc;

TEST_CASE("masks say what they were made of", "[mask]") {
    STATIC_REQUIRE(attention_mask::causal().is_causal());
    STATIC_REQUIRE_FALSE(attention_mask::causal().first_position().has_value());
    STATIC_REQUIRE(attention_mask::causal_from(7).is_causal());
    STATIC_REQUIRE(attention_mask::causal_from(7).first_position() == 7u);
    STATIC_REQUIRE(attention_mask::causal_from(0).first_position() == 0u);
    STATIC_REQUIRE_FALSE(attention_mask::none().is_causal());
    STATIC_REQUIRE(attention_mask::none().explicit_keys() == 0);
    const std::array<std::uint8_t, 6> visible{1, 0, 1, 1, 1, 0};
    const attention_mask mask = attention_mask::explicit_for_last(3, visible);
    REQUIRE_FALSE(mask.is_causal());
    REQUIRE(mask.explicit_keys() == 3);
    REQUIRE(mask.visible().data() == visible.data());
}

TEST_CASE("the options default to a causal mask, the fast path and 1/sqrt(head_dim)", "[mask]") {
    const kv1::attention_options options;
    REQUIRE(options.mask.is_causal());
    REQUIRE(options.mode == kv1::precision::fast);
    REQUIRE_FALSE(options.scale.has_value());
    REQUIRE(options.log_sum_exp.empty());
}

TEST_CASE("a chain as a tree gives the causal mask", "[mask]") {
    const std::vector<std::uint8_t> visible = kv1::tree_mask(std::array{-1, 0, 1, 2});
    REQUIRE(visible ==
            std::vector<std::uint8_t>{1, 0, 0, 0, /**/ 1, 1, 0, 0, /**/ 1, 1, 1, 0, /**/ 1, 1, 1, 1});
}

TEST_CASE("branches of a tree do not see each other", "[mask]") {
    //    0   3
    //   1 2  4
    const std::vector<std::uint8_t> visible = kv1::tree_mask(std::array{-1, 0, 0, -1, 3});
    REQUIRE(visible == std::vector<std::uint8_t>{1, 0, 0, 0, 0, //
                                                 1, 1, 0, 0, 0, //
                                                 1, 0, 1, 0, 0, //
                                                 0, 0, 0, 1, 0, //
                                                 0, 0, 0, 1, 1});
}

TEST_CASE("a token of a random tree sees itself and its ancestors and nothing else", "[mask]") {
    kv1_test::generator g(1);
    for (int round = 0; round < 50; ++round) {
        const std::size_t m = g.between(1, 40);
        std::vector<std::int32_t> parents(m);
        for (std::size_t i = 0; i < m; ++i)
            parents[i] = static_cast<std::int32_t>(g.between(0, i)) - 1;
        const std::vector<std::uint8_t> visible = kv1::tree_mask(parents);
        for (std::size_t i = 0; i < m; ++i) {
            std::vector<std::uint8_t> ancestors(m, 0);
            for (auto at = static_cast<std::int32_t>(i); at >= 0; at = parents[static_cast<std::size_t>(at)])
                ancestors[static_cast<std::size_t>(at)] = 1;
            const auto row = std::span(visible).subspan(i * m, m);
            REQUIRE(std::vector<std::uint8_t>(row.begin(), row.end()) == ancestors);
        }
    }
}

TEST_CASE("a block sees all of itself and what comes before it", "[mask]") {
    // text, an image of three, text, an image of two
    const std::vector<std::uint8_t> visible = kv1::block_mask(std::array{-1, 0, 0, 0, -1, 7, 7});
    REQUIRE(visible == std::vector<std::uint8_t>{1, 0, 0, 0, 0, 0, 0, //
                                                 1, 1, 1, 1, 0, 0, 0, //
                                                 1, 1, 1, 1, 0, 0, 0, //
                                                 1, 1, 1, 1, 0, 0, 0, //
                                                 1, 1, 1, 1, 1, 0, 0, //
                                                 1, 1, 1, 1, 1, 1, 1, //
                                                 1, 1, 1, 1, 1, 1, 1});
    REQUIRE(kv1::block_mask(std::span<const std::int32_t>{}).empty());
}

TEST_CASE("an empty tree has an empty mask", "[mask]") {
    REQUIRE(kv1::tree_mask(std::span<const std::int32_t>{}).empty());
}

TEST_CASE("parents that are not before their child are refused with the token", "[mask]") {
    const auto refused = [](std::vector<std::int32_t> parents, std::int64_t token) {
        const auto mask = kv1::try_tree_mask(parents);
        REQUIRE(mask.code() == errc::invalid_argument);
        REQUIRE(mask.reason().where().token == token);
        REQUIRE_THROWS_AS(kv1::tree_mask(parents), kv1::error);
    };
    refused({0}, 0);
    refused({-1, 1}, 1);
    refused({-1, 0, 7}, 2);
    refused({-1, -2}, 1);
    refused({-1, 0, 2147483647}, 2);
    refused({-2147483647 - 1}, 0);
}
