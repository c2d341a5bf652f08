// SPDX-License-Identifier: Apache-2.0
//
// Values that lie in keys: attention is that over the same values stored apart, bit for bit, and within the
// bounds of attention over what is read.
#include "attention_problem.hpp"
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using kv1::kv_format;
using kv1::kv_side;
using kv1_test::problem;
using kv1_test::same_bits;

namespace {

struct shape {
    std::size_t kv_heads, key_dim, value_dim, group, tokens, page_tokens, query_heads;
};

// Rows of one side of layer 0, all KV heads: [token][head].
struct rows {
    std::vector<std::byte> packed;
    std::vector<kv1::float16> scales, minima;
    [[nodiscard]] kv1::const_row_buffers view() const { return {packed, scales, minima}; }
};

rows exported(const kv1::kv_cache& cache, kv1::sequence_id id, kv_side side) {
    const kv1::layer_description& l = cache.description().layers[0];
    const bool keys = side == kv_side::key;
    const kv_format f = keys ? l.key_format : l.value_format;
    const std::size_t dim = keys ? l.key_dim : l.value_dim, width = kv1::packed_bytes(f, dim),
                      metadata = kv1::row_bytes(f, dim) - width, n = cache.length(id, 0);
    const std::size_t groups = l.key_group == 0 ? 1 : dim / l.key_group;
    const std::size_t scales = metadata >= 2 ? groups : 0, minima = metadata == 4 ? groups : 0;
    rows r{std::vector<std::byte>(n * l.kv_heads * width), std::vector<kv1::float16>(n * l.kv_heads * scales),
           std::vector<kv1::float16>(n * l.kv_heads * minima)};
    for (std::size_t t = 0; t < n; ++t)
        for (std::size_t h = 0; h < l.kv_heads; ++h) {
            const std::size_t at = t * l.kv_heads + h;
            cache.export_rows(id, 0, side, h, t, 1,
                              {std::span(r.packed).subspan(at * width, width),
                               std::span(r.scales).subspan(at * scales, scales),
                               std::span(r.minima).subspan(at * minima, minima)});
        }
    return r;
}

kv1::layer_description in_keys(const shape& s, kv_format f) {
    kv1::layer_description l = kv1::latent_layer(s.key_dim, s.value_dim, f);
    l.kv_heads = s.kv_heads;
    l.key_group = l.value_group = s.group;
    return l;
}

// A layer as described, and one of the same rows that stores its values apart, attend alike on every target.
void compare_with_values_apart(const kv1::layer_description& together, const shape& s, std::uint64_t seed) {
    INFO(to_string(together.key_format)
         << ", " << s.kv_heads << " x " << s.key_dim << " with " << s.value_dim << ", groups of " << s.group
         << ", " << s.tokens << " tokens, pages of " << s.page_tokens);
    kv1::layer_description apart = together;
    apart.values_in_keys = false;
    apart.value_encoding.hadamard = together.key_encoding.hadamard;
    apart.value_encoding.levels = together.key_encoding.levels;
    for (std::size_t at = 0; at < together.key_encoding.means.size(); at += s.key_dim)
        for (std::size_t c = 0; c < s.value_dim; ++c)
            apart.value_encoding.means.push_back(together.key_encoding.means[at + c]);
    kv1::kv_cache a(kv1::uniform_cache(1, together, s.tokens + s.page_tokens, s.page_tokens));
    kv1::kv_cache b(kv1::uniform_cache(1, apart, s.tokens + s.page_tokens, s.page_tokens));
    const kv1::sequence_id x = a.create_sequence(), y = b.create_sequence();
    kv1_test::generator g(seed);
    const auto k = kv1_test::normal_values(g, s.tokens * s.kv_heads * s.key_dim);
    const auto q = kv1_test::normal_values(g, 2 * s.query_heads * s.key_dim, 2.0f);
    a.append(x, 0, {k.data(), s.tokens, s.kv_heads, s.key_dim});
    const rows keys = exported(a, x, kv_side::key), values = exported(a, x, kv_side::value);
    b.append_rows(y, 0, s.tokens, keys.view(), values.view());

    for (std::size_t h = 0; h < s.kv_heads; ++h) {
        std::vector<float> all(s.tokens * s.key_dim), first(s.tokens * s.value_dim), stored(first.size());
        a.read(x, 0, kv_side::key, h, 0, s.tokens, all);
        a.read(x, 0, kv_side::value, h, 0, s.tokens, first);
        b.read(y, 0, kv_side::value, h, 0, s.tokens, stored);
        REQUIRE(same_bits(first, stored));
        for (std::size_t t = 0; t < s.tokens; ++t)
            REQUIRE(same_bits(std::span(all).subspan(t * s.key_dim, s.value_dim),
                              std::span(first).subspan(t * s.value_dim, s.value_dim)));
    }
    kv1_test::for_each_target([&](kv1::target) {
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
            std::vector<float> out(2 * s.query_heads * s.value_dim, 7.0f), wanted(out.size()),
                lse(2 * s.query_heads), wanted_lse(lse.size());
            a.attend(x, 0, {q.data(), 2, s.query_heads, s.key_dim},
                     {out.data(), 2, s.query_heads, s.value_dim}, {.mode = mode, .log_sum_exp = lse});
            b.attend(y, 0, {q.data(), 2, s.query_heads, s.key_dim},
                     {wanted.data(), 2, s.query_heads, s.value_dim},
                     {.mode = mode, .log_sum_exp = wanted_lse});
            REQUIRE(same_bits(out, wanted));
            REQUIRE(same_bits(lse, wanted_lse));
        }
    });
}

} // namespace

TEST_CASE("values in keys attend as the same values stored apart, bit for bit", "[attention][latent]") {
    // tokens of one chunk, where chunks are shorter than those of values apart
    for (const kv_format f : kv1::all_kv_formats) {
        for (const shape& s : {shape{1, 576, 512, 0, 30, 16, 9}, shape{2, 20, 13, 0, 100, 16, 4},
                               shape{1, 130, 130, 0, 60, 48, 3}, shape{1, 40, 16, 0, 700, 64, 2},
                               shape{1, 1, 1, 0, 33, 16, 1}})
            compare_with_values_apart(in_keys(s, f), s, 1);
        const auto kind = kv1::detail::traits_of(f).metadata;
        if (kind == kv1::detail::metadata_kind::scale_and_minimum ||
            kind == kv1::detail::metadata_kind::compact)
            for (const shape& s : {shape{1, 96, 64, 32, 100, 48, 5}, shape{2, 192, 64, 64, 40, 32, 2}})
                compare_with_values_apart(in_keys(s, f), s, 2);
    }
}

TEST_CASE("values in keys that are rotated, centred and fitted attend as values stored apart",
          "[attention][latent]") {
    using kv1::level_choice;
    const shape s{2, 96, 64, 0, 75, 48, 6};
    kv1_test::generator g(3);
    const std::vector<float> means = kv1_test::normal_values(g, 2 * 96);
    for (const kv_format f : {kv_format::affine2, kv_format::compact4, kv_format::codebook2,
                              kv_format::affine3, kv_format::codebook4})
        for (const std::size_t hadamard : {std::size_t{0}, std::size_t{32}}) {
            kv1::layer_description l = in_keys(s, f);
            l.key_encoding = {level_choice::least_squares, hadamard, means};
            compare_with_values_apart(l, s, 4);
        }
    std::vector<float> ones(2 * 96 * 96);
    for (std::size_t h = 0; h < 2; ++h)
        for (std::size_t c = 0; c < 96; ++c)
            ones[(h * 96 + c) * 96 + c] = 1.0f;
    kv1::layer_description weighted = in_keys(s, kv_format::affine4);
    weighted.key_encoding = {level_choice::least_squares, 32, {}, ones};
    compare_with_values_apart(weighted, s, 5);
}

TEST_CASE("attention over values in keys is within its bounds on every target", "[attention][latent]") {
    kv1_test::tally t;
    // chunks shorter than 512 tokens, in formats of 4 bits and more
    for (const kv_format f : kv1::all_kv_formats)
        kv1_test::check(kv1_test::in_format(f, {.key_dim = 288,
                                                .value_dim = 256,
                                                .group = 3,
                                                .tokens = 600,
                                                .page_tokens = 64,
                                                .values_in_keys = true}),
                        1, t);
    // DeepSeek's shape
    kv1_test::check(kv1_test::in_format(kv_format::affine2, {.key_dim = 576,
                                                             .value_dim = 512,
                                                             .group = 128,
                                                             .tokens = 150,
                                                             .scale = 0.0722f,
                                                             .values_in_keys = true}),
                    2, t);
    // ranges of tokens, each with a partial result
    kv1_test::check(kv1_test::in_format(kv_format::compact2, {.key_dim = 48,
                                                              .value_dim = 32,
                                                              .group = 2,
                                                              .tokens = 4200,
                                                              .page_tokens = 48,
                                                              .window = 4150,
                                                              .values_in_keys = true}),
                    3, t);
    kv1_test::check<kv1::float16, kv1::bfloat16>(
        kv1_test::in_format(kv_format::affine4, {.key_dim = 96,
                                                 .value_dim = 64,
                                                 .group = 5,
                                                 .tokens = 90,
                                                 .queries = 3,
                                                 .soft_cap = 4.0f,
                                                 .sink_logits = true,
                                                 .key_group = 32,
                                                 .value_group = 32,
                                                 .values_in_keys = true}),
        4, t);
    KV1_REQUIRE_CLEAN(t);
}
