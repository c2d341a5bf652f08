// SPDX-License-Identifier: Apache-2.0
//
// Attention on every target against an oracle in double, within derived bounds
// (support/attention_problem.hpp). Which tokens a query sees: masks, windows, ranges.
#include "attention_problem.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

using kv1::attention_mask;
using kv1::kv_format;
using kv1_test::check;
using kv1_test::in_format;
using kv1_test::problem;
using kv1_test::tally;

TEST_CASE("a sliding window hides what lies before it", "[attention]") {
    tally t;
    std::uint64_t seed = 960;
    for (const std::size_t window : {std::size_t{1}, std::size_t{17}, std::size_t{300}, std::size_t{5000}})
        for (const kv_format f : {kv_format::affine2, kv_format::binary, kv_format::fp32}) {
            check(in_format(f, {.tokens = 700, .queries = 3, .window = window}), ++seed, t);
            check(
                in_format(f, {.tokens = 90, .queries = 5, .mask = attention_mask::none(), .window = window}),
                ++seed, t);
        }
    // many rows, and ranges that begin with the window
    check({.key_dim = 16, .value_dim = 16, .tokens = 200, .queries = 60, .window = 40}, ++seed, t);
    check({.key_dim = 16, .value_dim = 16, .tokens = 6000, .page_tokens = 48, .window = 4500}, ++seed, t);
    // positions past the cached tokens: the window may see nothing
    check({.tokens = 50, .queries = 3, .mask = attention_mask::causal_from(70), .window = 22}, ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a range of tokens is attended alone", "[attention]") {
    tally t;
    std::uint64_t seed = 990;
    for (const kv1::token_range range :
         {kv1::token_range{0, 0}, kv1::token_range{0, 30}, kv1::token_range{31, 33}, kv1::token_range{17, 90},
          kv1::token_range{64, 1000}, kv1::token_range{500, 600}})
        for (const kv_format f : {kv_format::affine2, kv_format::affine3, kv_format::fp32})
            check(in_format(f, {.tokens = 100, .queries = 2, .range = range}), ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("many causal queries each see the tokens up to their own", "[attention]") {
    tally t;
    for (const std::size_t queries : {std::size_t{5}, std::size_t{40}, std::size_t{90}})
        check({.key_dim = 20,
               .value_dim = 20,
               .kv_heads = 2,
               .group = 2,
               .tokens = 90,
               .page_tokens = 32,
               .queries = queries},
              1000 + queries, t);
    check({.group = 7,
           .tokens = 150,
           .page_tokens = 64,
           .queries = 30,
           .key_format = kv_format::affine4,
           .value_format = kv_format::fp16},
          1001, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("causal_from places the queries anywhere, past the end too", "[attention]") {
    tally t;
    for (const std::size_t first : {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{16},
                                    std::size_t{40}, std::size_t{69}, std::size_t{70}, std::size_t{1000}})
        check({.key_dim = 20,
               .value_dim = 20,
               .tokens = 70,
               .page_tokens = 16,
               .queries = 5,
               .mask = attention_mask::causal_from(first)},
              1100 + first, t);
    // more queries than tokens
    check({.tokens = 3, .page_tokens = 16, .queries = 20, .mask = attention_mask::causal_from(0)}, 1120, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("without a mask every query sees every token", "[attention]") {
    tally t;
    check({.tokens = 70, .queries = 5, .mask = attention_mask::none()}, 1201, t);
    check({.tokens = 3, .queries = 40, .mask = attention_mask::none()}, 1202, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("an explicit mask hides what it says, and rows that see nothing are zero", "[attention]") {
    tally t;
    kv1_test::generator g(13);
    for (const std::size_t keys : {std::size_t{1}, std::size_t{7}, std::size_t{33}, std::size_t{70}})
        for (const double density : {0.0, 0.1, 0.5, 1.0})
            for (const kv_format f : {kv_format::affine2, kv_format::affine3, kv_format::fp32}) {
                constexpr std::size_t queries = 6;
                std::vector<std::uint8_t> visible(queries * keys);
                for (auto& v : visible)
                    v = g.chance(density) ? static_cast<std::uint8_t>(g.between(1, 255)) : 0;
                std::fill_n(visible.begin() + static_cast<std::ptrdiff_t>(2 * keys), keys, std::uint8_t{0});
                const problem p{.key_dim = 20,
                                .value_dim = 24,
                                .kv_heads = 2,
                                .group = 3,
                                .tokens = 70,
                                .page_tokens = 16,
                                .queries = queries,
                                .key_format = f,
                                .value_format = f,
                                .mask = attention_mask::explicit_for_last(keys, visible)};
                check(p, 1300 + keys, t);
            }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a mask over a long sequence reaches all ranges", "[attention]") {
    tally t;
    kv1_test::generator g(14);
    std::vector<std::uint8_t> visible(2 * 5000);
    for (std::size_t i = 0; i < visible.size(); ++i)
        visible[i] = i < 5000                              ? g.chance(0.3)
                     : i % 5000 >= 2048 && i % 5000 < 4096 ? 0
                                                           : 1; // row 1: a hidden range
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 5000,
           .page_tokens = 64,
           .queries = 2,
           .mask = attention_mask::explicit_for_last(5000, visible)},
          1401, t);
    std::fill(visible.begin(), visible.begin() + 5000, std::uint8_t{0});
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 5000,
           .page_tokens = 64,
           .queries = 2,
           .mask = attention_mask::explicit_for_last(5000, visible)},
          1402, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a token tree is attended branch by branch", "[attention]") {
    const std::vector<std::uint8_t> visible =
        kv1::tree_mask(std::vector<std::int32_t>{-1, 0, 0, 1, 2, -1, 5});
    tally t;
    check({.tokens = 47,
           .page_tokens = 16,
           .queries = 7,
           .mask = attention_mask::explicit_for_last(7, visible)},
          1501, t);
    check(
        {.tokens = 7, .page_tokens = 16, .queries = 7, .mask = attention_mask::explicit_for_last(7, visible)},
        1502, t);
    KV1_REQUIRE_CLEAN(t);
}
