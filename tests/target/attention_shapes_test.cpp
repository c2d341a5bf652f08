// SPDX-License-Identifier: Apache-2.0
//
// Attention on every target against an oracle in double, within derived bounds
// (support/attention_problem.hpp). Shapes: formats, head dims, heads, groups, tokens and pages.
#include "attention_problem.hpp"
#include "formats.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

using kv1::attention_mask;
using kv1::kv_format;
using kv1_test::check;
using kv1_test::in_format;
using kv1_test::tally;

TEST_CASE("every pair of K and V formats is attended within its bounds", "[attention]") {
    tally t;
    std::uint64_t seed = 100;
    for (const kv_format k : kv1::all_kv_formats)
        for (const kv_format v : kv1::all_kv_formats)
            check({.key_dim = 36,
                   .value_dim = 20,
                   .kv_heads = 2,
                   .group = 3,
                   .tokens = 61,
                   .page_tokens = 32,
                   .queries = 2,
                   .key_format = k,
                   .value_format = v},
                  ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("metadata by groups of channels are attended within bounds", "[attention]") {
    using enum kv_format;
    tally t;
    std::uint64_t seed = 150;
    for (const kv_format f : kv1_test::fitted_formats())
        for (const std::size_t rows : {1u, 4u, 5u, 7u}) // one tile, two that differ
            check(in_format(f, {.key_dim = 96,
                                .value_dim = 128,
                                .kv_heads = 2,
                                .group = rows,
                                .tokens = 85,
                                .page_tokens = 48,
                                .key_group = 32,
                                .value_group = 64}),
                  ++seed, t);
    // one side alone; many groups; several chunks, masks, everything that scores go through
    check({.key_dim = 128, .value_dim = 64, .group = 4, .tokens = 40, .key_group = 64}, ++seed, t);
    check({.key_dim = 64, .value_dim = 128, .group = 4, .tokens = 40, .value_group = 32}, ++seed, t);
    check({.key_dim = 576,
           .value_dim = 512,
           .group = 3,
           .tokens = 20,
           .key_format = compact3,
           .key_group = 32,
           .value_group = 32},
          ++seed, t);
    check({.key_dim = 64,
           .value_dim = 64,
           .group = 3,
           .tokens = 1200,
           .page_tokens = 64,
           .queries = 5,
           .window = 700,
           .soft_cap = 8.0f,
           .alibi = true,
           .sink_logits = true,
           .key_group = 32,
           .value_group = 32},
          ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("keys per channel are attended within bounds, with an open page and without", "[attention]") {
    using enum kv_format;
    constexpr auto per_channel = kv1::quantization_axis::per_channel;
    tally t;
    std::uint64_t seed = 700;
    for (const kv_format f : kv1_test::fitted_formats(4))
        for (const std::size_t rows : {1u, 4u, 5u, 7u}) // one tile, two that differ
            for (const std::size_t tokens : {32u, 96u, 85u, 20u})
                check(in_format(f, {.key_dim = 72,
                                    .value_dim = 40,
                                    .kv_heads = 2,
                                    .group = rows,
                                    .tokens = tokens,
                                    .page_tokens = 32,
                                    .key_mean = 1.0f,
                                    .key_axis = per_channel}),
                      ++seed, t);
    // head dims that fill no lane; pages that cut granules of values; plain values
    for (const std::size_t dim : {1u, 8u, 20u, 128u, 576u})
        check({.key_dim = dim,
               .value_dim = dim,
               .group = 3,
               .tokens = 100,
               .page_tokens = 48,
               .value_format = dim == 20 ? fp16 : binary,
               .key_axis = per_channel},
              ++seed, t);
    // several chunks, ranges, and everything that scores go through
    check({.key_dim = 32, .value_dim = 32, .group = 2, .tokens = 5000, .key_axis = per_channel}, ++seed, t);
    check({.key_dim = 64,
           .value_dim = 64,
           .group = 3,
           .tokens = 1200,
           .page_tokens = 64,
           .queries = 5,
           .window = 700,
           .soft_cap = 8.0f,
           .alibi = true,
           .sink_logits = true,
           .key_axis = per_channel},
          ++seed, t);
    const std::vector<std::uint8_t> visible = {1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1};
    check({.group = 2,
           .tokens = 70,
           .queries = 2,
           .mask = attention_mask::explicit_for_last(6, visible),
           .key_axis = per_channel},
          ++seed, t);
    check({.group = 2, .tokens = 70, .range = {33, 66}, .key_axis = per_channel}, ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("head dims from 1 to 576 are attended, K and V alike or not", "[attention]") {
    tally t;
    std::uint64_t seed = 200;
    constexpr std::size_t dims[] = {1, 8, 32, 64, 80, 96, 128, 192, 256, 576};
    for (std::size_t i = 0; i < std::size(dims); ++i)
        for (const kv_format f : kv1::all_kv_formats) {
            const std::size_t other = dims[(i + 3) % std::size(dims)];
            check(in_format(f, {.key_dim = dims[i], .value_dim = dims[i], .group = 4, .tokens = 40}), ++seed,
                  t);
            check(
                in_format(
                    f, {.key_dim = dims[i], .value_dim = other, .group = 1, .tokens = 33, .page_tokens = 16}),
                ++seed, t);
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("the widest head dim is attended", "[attention]") {
    tally t;
    for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::affine3, kv_format::fp16})
        check(in_format(f, {.key_dim = 4096, .value_dim = 4096, .group = 2, .tokens = 19, .page_tokens = 16}),
              250, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("any number of query heads shares a KV head", "[attention]") {
    tally t;
    std::uint64_t seed = 300;
    for (const std::size_t group : {std::size_t{1}, std::size_t{2}, std::size_t{4}, std::size_t{7},
                                    std::size_t{8}, std::size_t{16}, std::size_t{20}})
        for (const kv_format f : kv1::all_kv_formats)
            for (const std::size_t queries : {std::size_t{1}, std::size_t{3}})
                check(in_format(f, {.key_dim = 48,
                                    .value_dim = 40,
                                    .kv_heads = 2,
                                    .group = group,
                                    .tokens = 37,
                                    .page_tokens = 64,
                                    .queries = queries}),
                      ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("any number of tokens is attended, whatever the page size", "[attention]") {
    tally t;
    for (std::size_t n = 1; n <= 200; ++n) {
        constexpr std::size_t pages[] = {16, 32, 48, 64, 128, 256};
        check({.group = 1, .tokens = n, .page_tokens = pages[n % 6], .queries = 1 + n % 2 * (n > 1)}, 400 + n,
              t);
        check({.key_dim = 16,
               .value_dim = 16,
               .group = 2,
               .tokens = n,
               .page_tokens = pages[(n + 2) % 6],
               .key_format = kv1::all_kv_formats[n % kv1::all_kv_formats.size()],
               .value_format = kv1::all_kv_formats[n / 8 % kv1::all_kv_formats.size()]},
              600 + n, t);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("long sequences are split into ranges whose partial results are merged", "[attention]") {
    tally t;
    check({.key_dim = 32, .value_dim = 48, .group = 2, .tokens = 5000, .page_tokens = 64}, 801, t);
    check({.key_dim = 32,
           .value_dim = 32,
           .group = 4,
           .tokens = 5000,
           .page_tokens = 48,
           .queries = 3,
           .key_format = kv_format::affine4,
           .value_format = kv_format::affine3},
          802, t);
    check({.key_dim = 16,
           .value_dim = 16,
           .kv_heads = 2,
           .group = 1,
           .tokens = 5000,
           .page_tokens = 128,
           .key_format = kv_format::fp16,
           .value_format = kv_format::scaled_binary},
          803, t);
    // no query sees the last range
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 5000,
           .page_tokens = 64,
           .queries = 2,
           .mask = attention_mask::causal_from(2046)},
          804, t);
    // the first query sees one range, the second sees two
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 5000,
           .page_tokens = 64,
           .queries = 2,
           .mask = attention_mask::causal_from(2047)},
          805, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a common offset of keys and values does not spoil the fast path", "[attention]") {
    tally t;
    std::uint64_t seed = 900;
    for (const kv_format f : {kv_format::affine8, kv_format::affine4, kv_format::affine3, kv_format::affine2})
        for (const float mean : {-30.0f, 5.0f, 1000.0f})
            check(in_format(f, {.tokens = 300,
                                .page_tokens = 128,
                                .key_mean = mean > 100.0f ? 0.0f : mean,
                                .value_mean = mean}),
                  ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("chunks cross pages of any size", "[attention]") {
    tally t;
    std::uint64_t seed = 950;
    for (const std::size_t page : {std::size_t{16}, std::size_t{48}, std::size_t{64}, std::size_t{1024}})
        for (const kv_format f : {kv_format::affine2, kv_format::affine3, kv_format::binary, kv_format::fp16})
            check(in_format(
                      f, {.key_dim = 16, .value_dim = 40, .group = 5, .tokens = 1300, .page_tokens = page}),
                  ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}
