// SPDX-License-Identifier: Apache-2.0
//
// Attention on every target against an oracle in double, within derived bounds
// (support/attention_oracle.hpp).
#include "attention_oracle.hpp"
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

using kv1::attention_mask;
using kv1::kv_format;
using kv1::precision;
using kv1_test::tally;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

struct problem {
    std::size_t key_dim = 32, value_dim = 32, kv_heads = 1, group = 2, tokens = 50, page_tokens = 32,
                queries = 1;
    kv_format key_format = kv_format::affine2, value_format = kv_format::affine2;
    attention_mask mask = attention_mask::causal();
    std::optional<float> scale = std::nullopt;
    float key_mean = 0.0f, value_mean = 0.0f; // offsets that all values share
    kv1::token_range range = {};
    std::size_t window = 0;
    float soft_cap = 0.0f;
    bool alibi = false, sinks = false;
    std::size_t key_group = 0, value_group = 0; // channels that share metadata
    kv1::quantization_axis key_axis = kv1::quantization_axis::per_token;
};

std::string describe(const problem& p) {
    return std::string(to_string(p.key_format)) + " x " + std::string(to_string(p.value_format)) + ", dims " +
           std::to_string(p.key_dim) + " and " + std::to_string(p.value_dim) + ", " +
           std::to_string(p.kv_heads) + " x " + std::to_string(p.group) + " heads, " +
           std::to_string(p.queries) + " queries, " + std::to_string(p.tokens) + " tokens, pages of " +
           std::to_string(p.page_tokens) + ", groups of " + std::to_string(p.key_group) + " and " +
           std::to_string(p.value_group) +
           (p.key_axis == kv1::quantization_axis::per_channel ? ", keys per channel" : "");
}

// Position of query i of m among n tokens.
std::int64_t position_of(const problem& p, std::size_t i) {
    return static_cast<std::int64_t>(i) +
           (p.mask.first_position()
                ? static_cast<std::int64_t>(*p.mask.first_position())
                : static_cast<std::int64_t>(p.tokens) - static_cast<std::int64_t>(p.queries));
}

// The tokens that query i sees, from the documentation of the masks and options.
std::vector<std::size_t> seen_by(const problem& p, std::size_t i) {
    const attention_mask& mask = p.mask;
    const std::size_t m = p.queries, n = p.tokens;
    std::vector<std::size_t> tokens;
    for (std::size_t t = p.range.first; t < std::min(n, p.range.last); ++t) {
        bool sees = p.window == 0 ||
                    static_cast<std::int64_t>(t) > position_of(p, i) - static_cast<std::int64_t>(p.window);
        if (mask.is_causal())
            sees = sees && (mask.first_position() ? t <= *mask.first_position() + i : t <= n - m + i);
        else if (const std::size_t first = n - mask.explicit_keys(); t >= first && mask.explicit_keys() != 0)
            sees = sees && mask.visible()[i * mask.explicit_keys() + t - first] != 0;
        if (sees)
            tokens.push_back(t);
    }
    return tokens;
}

template <class T>
std::vector<T> as(const std::vector<float>& x) {
    std::vector<T> y;
    for (const float v : x)
        y.push_back(static_cast<T>(v));
    return y;
}

kv1::layer_description layer_of(const problem& p) {
    kv1::layer_description l{p.kv_heads, p.key_dim, p.value_dim, p.key_format, p.value_format};
    l.key_group = p.key_group;
    l.value_group = p.value_group;
    l.key_axis = p.key_axis;
    return l;
}

// A cache with one sequence of one layer, filled with random tokens, and queries for it.
struct world {
    problem p;
    kv1::kv_cache cache;
    kv1::sequence_id id;
    std::vector<float> queries, slopes, sinks;

    world(const problem& what, std::uint64_t seed)
        : p(what), cache(kv1::uniform_cache(1, layer_of(p), p.tokens + 2 * p.page_tokens, p.page_tokens)) {
        kv1_test::generator g(seed);
        const kv1::sequence_id other = cache.create_sequence();
        id = cache.create_sequence();
        const auto fill = [&](kv1::sequence_id sequence, std::size_t n) {
            const auto k = kv1_test::normal_values(g, n * p.kv_heads * p.key_dim, 1.0f, p.key_mean);
            const auto v = kv1_test::normal_values(g, n * p.kv_heads * p.value_dim, 1.0f, p.value_mean);
            cache.append(sequence, 0, {k.data(), n, p.kv_heads, p.key_dim},
                         {v.data(), n, p.kv_heads, p.value_dim});
        };
        fill(other, 1); // so that blocks are not the sequence's page numbers
        fill(id, p.tokens);
        queries = kv1_test::normal_values(g, p.queries * heads() * p.key_dim);
        for (std::size_t h = 0; h < heads(); ++h)
            slopes.push_back(std::exp2(-static_cast<float>(1 + h % 8)));
        sinks = kv1_test::normal_values(g, heads(), 2.0f);
    }
    [[nodiscard]] std::size_t heads() const { return p.kv_heads * p.group; }
    // Where blocks of weights begin: by the split into ranges, and the rule for blocks within a range.
    [[nodiscard]] std::vector<std::size_t> block_starts() const {
        namespace detail = kv1::detail;
        const kv1::page_layout& layout = cache.layout(0);
        std::size_t front = p.tokens, reach = 0;
        for (std::size_t i = 0; i < p.queries; ++i)
            if (const std::vector<std::size_t> seen = seen_by(p, i); !seen.empty()) {
                front = std::min(front, seen.front());
                reach = std::max(reach, seen.back() + 1);
            }
        std::vector<std::size_t> starts;
        if (p.mask.explicit_keys() != 0) { // the split does not look into explicit masks
            front = p.range.first;
            reach = std::min(p.tokens, p.range.last);
        }
        if (front >= reach)
            return starts;
        const detail::attention_split split =
            detail::split_attention(layout, p.queries * p.group, p.kv_heads, front, reach);
        for (std::size_t r = 0; r < split.ranges; ++r) {
            const std::size_t begin = split.first_token + r * split.range_tokens;
            const std::size_t end = std::min(reach, begin + split.range_tokens);
            for (std::size_t first = begin; first < end;
                 first = detail::block_end(p.page_tokens, detail::granule_of(layout.values()), first, end))
                starts.push_back(first);
        }
        return starts;
    }
    [[nodiscard]] kv1::attention_options options(precision mode, std::span<float> lse) const {
        kv1::attention_options o{.scale = p.scale, .mask = p.mask, .mode = mode, .log_sum_exp = lse};
        o.range = p.range;
        o.window = p.window;
        o.soft_cap = p.soft_cap;
        if (p.alibi)
            o.alibi_slopes = slopes;
        if (p.sinks)
            o.sinks = sinks;
        return o;
    }
    [[nodiscard]] float scale() const {
        return p.scale ? *p.scale : 1.0f / std::sqrt(static_cast<float>(p.key_dim));
    }

    // Rows [query][head] of the oracle, for queries as given in type Q, on the target in use.
    template <class Q>
    [[nodiscard]] std::vector<kv1_test::expected_row> expected(precision mode) const {
        std::vector<kv1_test::expected_row> rows(p.queries * heads());
        const std::vector<std::size_t> starts = block_starts();
        for (std::size_t kv = 0; kv < p.kv_heads; ++kv) {
            const kv1_test::cached_side keys(cache, id, 0, kv1::kv_side::key, kv);
            const kv1_test::cached_side values(cache, id, 0, kv1::kv_side::value, kv);
            for (std::size_t i = 0; i < p.queries; ++i) {
                const std::vector<std::size_t> seen = seen_by(p, i);
                for (std::size_t h = kv * p.group; h < (kv + 1) * p.group; ++h) {
                    std::vector<float> q(p.key_dim);
                    for (std::size_t c = 0; c < p.key_dim; ++c)
                        q[c] = static_cast<float>(static_cast<Q>(queries[(i * heads() + h) * p.key_dim + c]));
                    rows[i * heads() + h] =
                        kv1_test::expect_row(q, scale(), keys, values, seen, starts, mode,
                                             {.soft_cap = p.soft_cap,
                                              .alibi_slope = p.alibi ? slopes[h] : 0.0f,
                                              .position = static_cast<double>(position_of(p, i)),
                                              .sink = p.sinks ? std::optional(sinks[h]) : std::nullopt});
                }
            }
        }
        return rows;
    }
};

template <class Q = float, class O = float>
void check(const problem& p, std::uint64_t seed, tally& t) {
    const world w(p, seed);
    const std::vector<Q> q = as<Q>(w.queries);
    const std::size_t rows = p.queries * w.heads();
    for (const precision mode : {precision::fast, precision::exact}) {
        std::vector<kv1_test::expected_row> by_target[2]; // without pairs, with them
        kv1_test::for_each_target([&](kv1::target target) {
            std::vector<kv1_test::expected_row>& expected = by_target[kv1::detail::takes_pairs(target)];
            if (expected.empty())
                expected = w.expected<Q>(mode);
            std::vector<O> out(rows * p.value_dim, static_cast<O>(777.0f));
            std::vector<float> lse(rows, 777.0f);
            const kv1::status s =
                w.cache.try_attend(w.id, 0, {q.data(), p.queries, w.heads(), p.key_dim},
                                   {out.data(), p.queries, w.heads(), p.value_dim}, w.options(mode, lse));
            INFO(describe(p) << ": " << s.message());
            REQUIRE(s);
            for (std::size_t r = 0; r < rows; ++r) {
                const kv1_test::expected_row& e = expected[r];
                const auto wrong = [&](const char* what, double found, double wanted, double bound) {
                    t.expect(false, describe(p), mode == precision::fast ? "fast" : "exact",
                             to_string(target), what, "row", r, "is", found, "not", wanted, "+-", bound);
                };
                for (std::size_t c = 0; c < p.value_dim; ++c) {
                    const double found = static_cast<float>(out[r * p.value_dim + c]);
                    for (const kv1_test::bounded_row* row : {&e.truth, &e.path}) {
                        const double bound =
                            row->out_bound[c] +
                            kv1_test::output_rounding<O>(std::fabs(row->out[c]) + row->out_bound[c]);
                        if (std::fabs(found - row->out[c]) <= bound)
                            t.expect(true);
                        else
                            wrong(row == &e.truth ? "against the truth" : "against the path", found,
                                  row->out[c], bound);
                    }
                }
                if (std::isinf(e.truth.lse)) {
                    if (lse[r] != -infinity)
                        wrong("log-sum-exp", lse[r], e.truth.lse, 0.0);
                    continue;
                }
                for (const kv1_test::bounded_row* row : {&e.truth, &e.path})
                    if (!(std::fabs(lse[r] - row->lse) <= row->lse_bound))
                        wrong("log-sum-exp", lse[r], row->lse, row->lse_bound);
            }
        });
    }
}

} // namespace

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
    for (const kv_format f : {affine2, affine3, affine4, affine8, compact2, compact3, compact4, codebook2})
        for (const std::size_t rows : {1u, 4u, 5u, 7u}) // one tile, two that differ
            check({.key_dim = 96,
                   .value_dim = 128,
                   .kv_heads = 2,
                   .group = rows,
                   .tokens = 85,
                   .page_tokens = 48,
                   .key_format = f,
                   .value_format = f,
                   .key_group = 32,
                   .value_group = 64},
                  ++seed, t);
    // one side alone; many groups; several blocks of weights, masks, everything that scores go through
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
           .sinks = true,
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
    for (const kv_format f : {affine2, affine3, affine4, compact2, compact3, compact4, codebook2})
        for (const std::size_t rows : {1u, 4u, 5u, 7u}) // one tile, two that differ
            for (const std::size_t tokens : {32u, 96u, 85u, 20u})
                check({.key_dim = 72,
                       .value_dim = 40,
                       .kv_heads = 2,
                       .group = rows,
                       .tokens = tokens,
                       .page_tokens = 32,
                       .key_format = f,
                       .value_format = f,
                       .key_mean = 1.0f,
                       .key_axis = per_channel},
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
    // several blocks of weights, ranges, and everything that scores go through
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
           .sinks = true,
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
            check({.key_dim = dims[i],
                   .value_dim = dims[i],
                   .group = 4,
                   .tokens = 40,
                   .key_format = f,
                   .value_format = f},
                  ++seed, t);
            check({.key_dim = dims[i],
                   .value_dim = other,
                   .group = 1,
                   .tokens = 33,
                   .page_tokens = 16,
                   .key_format = f,
                   .value_format = f},
                  ++seed, t);
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("the widest head dim is attended", "[attention]") {
    tally t;
    for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::affine3, kv_format::fp16})
        check({.key_dim = 4096,
               .value_dim = 4096,
               .group = 2,
               .tokens = 19,
               .page_tokens = 16,
               .key_format = f,
               .value_format = f},
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
                check({.key_dim = 48,
                       .value_dim = 40,
                       .kv_heads = 2,
                       .group = group,
                       .tokens = 37,
                       .page_tokens = 64,
                       .queries = queries,
                       .key_format = f,
                       .value_format = f},
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
            check({.tokens = 300,
                   .page_tokens = 128,
                   .key_format = f,
                   .value_format = f,
                   .key_mean = mean > 100.0f ? 0.0f : mean,
                   .value_mean = mean},
                  ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("blocks of weights cross pages of any size", "[attention]") {
    tally t;
    std::uint64_t seed = 950;
    for (const std::size_t page : {std::size_t{16}, std::size_t{48}, std::size_t{64}, std::size_t{1024}})
        for (const kv_format f : {kv_format::affine2, kv_format::affine3, kv_format::binary, kv_format::fp16})
            check({.key_dim = 16,
                   .value_dim = 40,
                   .group = 5,
                   .tokens = 1300,
                   .page_tokens = page,
                   .key_format = f,
                   .value_format = f},
                  ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a sliding window hides what lies before it", "[attention]") {
    tally t;
    std::uint64_t seed = 960;
    for (const std::size_t window : {std::size_t{1}, std::size_t{17}, std::size_t{300}, std::size_t{5000}})
        for (const kv_format f : {kv_format::affine2, kv_format::binary, kv_format::fp32}) {
            check({.tokens = 700, .queries = 3, .key_format = f, .value_format = f, .window = window}, ++seed,
                  t);
            check({.tokens = 90,
                   .queries = 5,
                   .key_format = f,
                   .value_format = f,
                   .mask = attention_mask::none(),
                   .window = window},
                  ++seed, t);
        }
    // many rows, and ranges that begin with the window
    check({.key_dim = 16, .value_dim = 16, .tokens = 200, .queries = 60, .window = 40}, ++seed, t);
    check({.key_dim = 16, .value_dim = 16, .tokens = 6000, .page_tokens = 48, .window = 4500}, ++seed, t);
    // positions past the cached tokens: the window may see nothing
    check({.tokens = 50, .queries = 3, .mask = attention_mask::causal_from(70), .window = 22}, ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("logits are capped, biased by distance, and joined by a sink", "[attention]") {
    tally t;
    std::uint64_t seed = 970;
    for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::fp16})
        for (const std::size_t tokens : {std::size_t{40}, std::size_t{700}}) {
            const problem p{.group = 3, .tokens = tokens, .queries = 2, .key_format = f, .value_format = f};
            for (const float cap : {0.5f, 3.0f, 50.0f}) {
                problem capped = p;
                capped.soft_cap = cap;
                check(capped, ++seed, t);
            }
            problem biased = p, sunk = p;
            biased.alibi = sunk.sinks = true;
            check(biased, ++seed, t);
            biased.mask = attention_mask::none();
            check(biased, ++seed, t);
            check(sunk, ++seed, t);
            problem all = p;
            all.soft_cap = 4.0f;
            all.alibi = all.sinks = true;
            all.window = 33;
            check(all, ++seed, t);
        }
    // merged ranges: the sink counts once
    check({.key_dim = 16,
           .value_dim = 16,
           .group = 1,
           .tokens = 4500,
           .page_tokens = 64,
           .alibi = true,
           .sinks = true},
          ++seed, t);
    // a sink and no token
    check({.tokens = 50, .queries = 2, .mask = attention_mask::causal_from(70), .window = 3, .sinks = true},
          ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("a range of tokens is attended alone", "[attention]") {
    tally t;
    std::uint64_t seed = 990;
    for (const kv1::token_range range :
         {kv1::token_range{0, 0}, kv1::token_range{0, 30}, kv1::token_range{31, 33}, kv1::token_range{17, 90},
          kv1::token_range{64, 1000}, kv1::token_range{500, 600}})
        for (const kv_format f : {kv_format::affine2, kv_format::affine3, kv_format::fp32})
            check({.tokens = 100, .queries = 2, .key_format = f, .value_format = f, .range = range}, ++seed,
                  t);
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

TEST_CASE("an empty cache gives zeros and minus infinity", "[attention]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, {2, 8, 8}, 16, 16));
    const kv1::sequence_id id = cache.create_sequence();
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<float> q(3 * 4 * 8, 1.0f), out(3 * 4 * 8, 7.0f), lse(12, 7.0f);
        for (const attention_mask& mask : {attention_mask::none(), attention_mask::causal_from(5)}) {
            cache.attend(id, 0, {q.data(), 3, 4, 8}, {out.data(), 3, 4, 8},
                         {.mask = mask, .log_sum_exp = lse});
            REQUIRE(std::all_of(out.begin(), out.end(), [](float x) { return x == 0.0f; }));
            REQUIRE(std::all_of(lse.begin(), lse.end(), [](float x) { return x == -infinity; }));
        }
    });
}

TEST_CASE("no query is no work", "[attention]") {
    kv1::kv_cache cache(kv1::uniform_cache(1, {2, 8, 8}, 16, 16));
    const kv1::sequence_id id = cache.create_sequence();
    REQUIRE(cache.try_attend(id, 0, {static_cast<const float*>(nullptr), 0, 4, 8},
                             {static_cast<float*>(nullptr), 0, 4, 8}));
}

TEST_CASE("the softmax scale is the caller's where one is given: large, tiny, zero, negative",
          "[attention]") {
    tally t;
    std::uint64_t seed = 1600;
    for (const float scale : {0.0f, 1e-20f, 0.01f, 1.0f, 8.0f, -0.5f})
        for (const kv_format f : {kv_format::affine2, kv_format::affine8, kv_format::binary, kv_format::fp32})
            check({.tokens = 100, .key_format = f, .value_format = f, .scale = scale}, ++seed, t);
    KV1_REQUIRE_CLEAN(t);
}

TEMPLATE_TEST_CASE("queries and outputs may be of any scalar type", "[attention]", float, kv1::float16,
                   kv1::bfloat16) {
    tally t;
    for (const kv_format f : {kv_format::affine2, kv_format::fp16}) {
        const problem p{.key_dim = 40,
                        .value_dim = 24,
                        .kv_heads = 2,
                        .group = 3,
                        .tokens = 70,
                        .queries = 3,
                        .key_format = f,
                        .value_format = f};
        check<TestType, float>(p, 1701, t);
        check<TestType, kv1::float16>(p, 1702, t);
        check<TestType, kv1::bfloat16>(p, 1703, t);
        // merged outputs are stored elsewhere
        check<TestType, kv1::float16>({.key_dim = 16,
                                       .value_dim = 16,
                                       .group = 1,
                                       .tokens = 4500,
                                       .page_tokens = 64,
                                       .key_format = f,
                                       .value_format = f},
                                      1704, t);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("strides of queries and outputs are obeyed, and nothing else is written", "[attention]") {
    const world w({.key_dim = 20, .value_dim = 12, .kv_heads = 2, .group = 3, .tokens = 30, .queries = 4},
                  1800);
    const std::size_t heads = w.heads();
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<float> plain(4 * heads * 12);
        w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 20}, {plain.data(), 4, heads, 12});
        // head-major queries with gaps; outputs from the last token to the first
        std::vector<float> q(heads * 4 * 23, std::numeric_limits<float>::quiet_NaN());
        for (std::size_t i = 0; i < 4; ++i)
            for (std::size_t h = 0; h < heads; ++h)
                std::copy_n(w.queries.begin() + static_cast<std::ptrdiff_t>((i * heads + h) * 20), 20,
                            q.begin() + static_cast<std::ptrdiff_t>((h * 4 + i) * 23));
        const auto token_stride = static_cast<std::ptrdiff_t>(heads * 15 + 2);
        std::vector<float> out(4 * (heads * 15 + 2), 777.0f);
        w.cache.attend(w.id, 0, {q.data(), 4, heads, 20, 23, 4 * 23},
                       {out.data() + 3 * token_stride, 4, heads, 12, -token_stride, 15});
        std::size_t untouched = 0;
        for (std::size_t i = 0; i < 4; ++i)
            for (std::size_t at = 0; at < heads * 15 + 2; ++at) {
                const float x = out[(3 - i) * (heads * 15 + 2) + at];
                if (at % 15 < 12 && at / 15 < heads)
                    REQUIRE(x == plain[(i * heads + at / 15) * 12 + at % 15]);
                else
                    untouched += x == 777.0f ? 1u : 0u;
            }
        REQUIRE(untouched == 4 * (heads * 3 + 2));
    });
}

TEST_CASE("a NaN or infinity in a query spoils its own row and no other", "[attention]") {
    for (const kv_format f :
         {kv_format::affine2, kv_format::affine8, kv_format::fp32, kv_format::scaled_binary})
        for (const std::size_t tokens : {std::size_t{40}, std::size_t{4100}}) {
            if (tokens > 1000 && f != kv_format::affine2)
                continue;
            const world w({.key_dim = 20,
                           .value_dim = 12,
                           .group = 5,
                           .tokens = tokens,
                           .page_tokens = 64,
                           .queries = 2,
                           .key_format = f,
                           .value_format = f},
                          1900);
            kv1_test::for_each_target([&](kv1::target) {
                for (const precision mode : {precision::fast, precision::exact})
                    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
                        std::vector<float> clean(2 * 5 * 12), spoilt(2 * 5 * 12), lse(10), spoilt_lse(10);
                        w.cache.attend(w.id, 0, {w.queries.data(), 2, 5, 20}, {clean.data(), 2, 5, 12},
                                       {.mode = mode, .log_sum_exp = lse});
                        std::vector<float> q = w.queries;
                        q[3 * 20 + 7] = bad; // row 3
                        w.cache.attend(w.id, 0, {q.data(), 2, 5, 20}, {spoilt.data(), 2, 5, 12},
                                       {.mode = mode, .log_sum_exp = spoilt_lse});
                        for (std::size_t r = 0; r < 10; ++r) {
                            if (r == 3)
                                continue;
                            REQUIRE(kv1_test::same_bits(std::span(clean).subspan(r * 12, 12),
                                                        std::span(spoilt).subspan(r * 12, 12)));
                            REQUIRE(lse[r] == spoilt_lse[r]);
                        }
                    }
            });
        }
}

TEST_CASE("the result is the same bits for any number of workers", "[attention]") {
    for (const std::size_t tokens : {std::size_t{100}, std::size_t{4500}}) {
        const world w({.key_dim = 24,
                       .value_dim = 20,
                       .kv_heads = 2,
                       .group = 3,
                       .tokens = tokens,
                       .page_tokens = 64,
                       .queries = 4},
                      2000);
        const std::size_t heads = w.heads();
        kv1_test::for_each_target([&](kv1::target) {
            for (const precision mode : {precision::fast, precision::exact}) {
                std::vector<float> alone(4 * heads * 20), lse(4 * heads);
                w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 24}, {alone.data(), 4, heads, 20},
                               {.mode = mode, .log_sum_exp = lse});
                for (const std::size_t workers : {std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
                    std::vector<float> out(4 * heads * 20), out_lse(4 * heads);
                    kv1_test::thread_executor run(workers);
                    w.cache.attend(w.id, 0, {w.queries.data(), 4, heads, 24}, {out.data(), 4, heads, 20},
                                   {.mode = mode, .log_sum_exp = out_lse}, run);
                    REQUIRE(kv1_test::same_bits(out, alone));
                    REQUIRE(kv1_test::same_bits(out_lse, lse));
                    REQUIRE(run.tasks() >= 2);
                }
            }
        });
    }
}

TEST_CASE("what is attended does not depend on how many tokens were appended at once", "[attention]") {
    kv1_test::generator g(21);
    const auto k = kv1_test::normal_values(g, 100 * 32), v = kv1_test::normal_values(g, 100 * 32),
               q = kv1_test::normal_values(g, 4 * 32);
    kv1_test::for_each_target([&](kv1::target) {
        kv1::kv2_cache whole(kv1::uniform_cache(1, {1, 32, 32}, 128)),
            pieces(kv1::uniform_cache(1, {1, 32, 32}, 128));
        const auto a = whole.create_sequence(), b = pieces.create_sequence();
        whole.append(a, 0, {k.data(), 100, 1, 32}, {v.data(), 100, 1, 32});
        for (std::size_t t = 0; t < 100; ++t)
            pieces.append(b, 0, {k.data() + t * 32, 1, 1, 32}, {v.data() + t * 32, 1, 1, 32});
        std::vector<float> x(4 * 32), y(4 * 32);
        whole.attend(a, 0, {q.data(), 1, 4, 32}, {x.data(), 1, 4, 32});
        pieces.attend(b, 0, {q.data(), 1, 4, 32}, {y.data(), 1, 4, 32});
        REQUIRE(kv1_test::same_bits(x, y));
    });
}
