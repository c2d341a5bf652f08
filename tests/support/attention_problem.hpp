// SPDX-License-Identifier: Apache-2.0
//
// An attention problem: random tokens in a cache, queries, and a check of every target against the oracle in
// double, within derived bounds (attention_oracle.hpp).
#pragma once

#include "attention_oracle.hpp"
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/schedule.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kv1_test {

/// What is attended, and how.
struct problem {
    std::size_t key_dim = 32, value_dim = 32, kv_heads = 1, group = 2, tokens = 50, page_tokens = 32,
                queries = 1;
    kv1::kv_format key_format = kv1::kv_format::affine2, value_format = kv1::kv_format::affine2;
    kv1::attention_mask mask = kv1::attention_mask::causal();
    std::optional<float> scale = std::nullopt;
    float key_mean = 0.0f, value_mean = 0.0f; // offsets that all values share
    kv1::token_range range = {};
    std::size_t window = 0;
    float soft_cap = 0.0f;
    bool alibi = false, sink_logits = false;
    std::size_t key_group = 0, value_group = 0; // channels that share metadata
    kv1::quantization_axis key_axis = kv1::quantization_axis::per_token;
    bool values_in_keys = false;
};

/// The problem with keys and values in one format.
[[nodiscard]] inline problem in_format(kv1::kv_format format, problem p) {
    p.key_format = p.value_format = format;
    return p;
}

[[nodiscard]] inline std::string describe(const problem& p) {
    return std::string(to_string(p.key_format)) + " x " + std::string(to_string(p.value_format)) + ", dims " +
           std::to_string(p.key_dim) + " and " + std::to_string(p.value_dim) + ", " +
           std::to_string(p.kv_heads) + " x " + std::to_string(p.group) + " heads, " +
           std::to_string(p.queries) + " queries, " + std::to_string(p.tokens) + " tokens, pages of " +
           std::to_string(p.page_tokens) + ", groups of " + std::to_string(p.key_group) + " and " +
           std::to_string(p.value_group) +
           (p.key_axis == kv1::quantization_axis::per_channel ? ", keys per channel" : "") +
           (p.values_in_keys ? ", values in keys" : "");
}

/// Position of query i of m among n tokens.
[[nodiscard]] inline std::int64_t position_of(const problem& p, std::size_t i) {
    return static_cast<std::int64_t>(i) +
           (p.mask.first_position()
                ? static_cast<std::int64_t>(*p.mask.first_position())
                : static_cast<std::int64_t>(p.tokens) - static_cast<std::int64_t>(p.queries));
}

/// The tokens that query i sees, from the documentation of the masks and options.
[[nodiscard]] inline std::vector<std::size_t> seen_by(const problem& p, std::size_t i) {
    const kv1::attention_mask& mask = p.mask;
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
[[nodiscard]] std::vector<T> as(const std::vector<float>& x) {
    std::vector<T> y;
    for (const float v : x)
        y.push_back(static_cast<T>(v));
    return y;
}

[[nodiscard]] inline kv1::layer_description layer_of(const problem& p) {
    kv1::layer_description l{p.kv_heads, p.key_dim, p.value_dim, p.key_format, p.value_format};
    l.key_group = p.key_group;
    l.value_group = p.value_group;
    l.key_axis = p.key_axis;
    l.values_in_keys = p.values_in_keys;
    return l;
}

/// A cache with one sequence of one layer, filled with random tokens, and queries for it.
struct world {
    problem p;
    kv1::kv_cache cache;
    kv1::sequence_id id;
    std::vector<float> queries, slopes, sink_logits;

    world(const problem& what, std::uint64_t seed)
        : p(what), cache(kv1::uniform_cache(1, layer_of(p), p.tokens + 2 * p.page_tokens, p.page_tokens)) {
        generator g(seed);
        const kv1::sequence_id other = cache.create_sequence();
        id = cache.create_sequence();
        const auto fill = [&](kv1::sequence_id sequence, std::size_t n) {
            const auto k = normal_values(g, n * p.kv_heads * p.key_dim, 1.0f, p.key_mean);
            if (p.values_in_keys) {
                cache.append(sequence, 0, {k.data(), n, p.kv_heads, p.key_dim});
                return;
            }
            const auto v = normal_values(g, n * p.kv_heads * p.value_dim, 1.0f, p.value_mean);
            cache.append(sequence, 0, {k.data(), n, p.kv_heads, p.key_dim},
                         {v.data(), n, p.kv_heads, p.value_dim});
        };
        fill(other, 1); // so that blocks are not the sequence's page numbers
        fill(id, p.tokens);
        queries = normal_values(g, p.queries * heads() * p.key_dim);
        for (std::size_t h = 0; h < heads(); ++h)
            slopes.push_back(std::exp2(-static_cast<float>(1 + h % 8)));
        sink_logits = normal_values(g, heads(), 2.0f);
    }
    [[nodiscard]] std::size_t heads() const { return p.kv_heads * p.group; }
    /// Where ranges of tokens begin that are attended to apart, and chunks in them.
    struct starts {
        std::vector<std::size_t> ranges, chunk_starts;
    };
    [[nodiscard]] starts starts_of() const {
        namespace detail = kv1::detail;
        const kv1::page_layout& layout = cache.layout(0);
        std::size_t front = p.tokens, reach = 0;
        for (std::size_t i = 0; i < p.queries; ++i)
            if (const std::vector<std::size_t> seen = seen_by(p, i); !seen.empty()) {
                front = std::min(front, seen.front());
                reach = std::max(reach, seen.back() + 1);
            }
        starts found;
        if (p.mask.explicit_keys() != 0) { // the split does not look into explicit masks
            front = p.range.first;
            reach = std::min(p.tokens, p.range.last);
        }
        if (front >= reach)
            return found;
        const detail::attention_split split =
            detail::split_attention(layout, p.queries * p.group, p.kv_heads, front, reach);
        for (std::size_t r = 0; r < split.ranges; ++r) {
            const std::size_t begin = split.first_token + r * split.range_tokens;
            const std::size_t end = std::min(reach, begin + split.range_tokens);
            found.ranges.push_back(begin);
            for (std::size_t first = begin; first < end; first = detail::chunk_end(layout, first, end))
                found.chunk_starts.push_back(first);
        }
        return found;
    }
    [[nodiscard]] kv1::attention_options options(kv1::precision mode, std::span<float> lse) const {
        kv1::attention_options o{.scale = p.scale, .mask = p.mask, .mode = mode, .log_sum_exp = lse};
        o.range = p.range;
        o.window = p.window;
        o.soft_cap = p.soft_cap;
        if (p.alibi)
            o.alibi_slopes = slopes;
        if (p.sink_logits)
            o.sink_logits = sink_logits;
        return o;
    }
    [[nodiscard]] float scale() const {
        return p.scale ? *p.scale : 1.0f / std::sqrt(static_cast<float>(p.key_dim));
    }

    /// Rows [query][head] of the oracle, for queries as given in type Q, on the target in use.
    template <class Q>
    [[nodiscard]] std::vector<expected_row> expected(kv1::precision mode) const {
        std::vector<expected_row> rows(p.queries * heads());
        const starts begin = starts_of();
        for (std::size_t kv = 0; kv < p.kv_heads; ++kv) {
            const cached_side keys(cache, id, 0, kv1::kv_side::key, kv);
            const cached_side values(cache, id, 0, kv1::kv_side::value, kv);
            for (std::size_t i = 0; i < p.queries; ++i) {
                const std::vector<std::size_t> seen = seen_by(p, i);
                for (std::size_t h = kv * p.group; h < (kv + 1) * p.group; ++h) {
                    std::vector<float> q(p.key_dim);
                    for (std::size_t c = 0; c < p.key_dim; ++c)
                        q[c] = static_cast<float>(static_cast<Q>(queries[(i * heads() + h) * p.key_dim + c]));
                    rows[i * heads() + h] = expect_row(
                        q, scale(), keys, values, seen, begin.chunk_starts, mode,
                        {.soft_cap = p.soft_cap,
                         .alibi_slope = p.alibi ? slopes[h] : 0.0f,
                         .position = static_cast<double>(position_of(p, i)),
                         .sink_logit = p.sink_logits ? std::optional(sink_logits[h]) : std::nullopt,
                         .range_starts = begin.ranges});
                }
            }
        }
        return rows;
    }
};

/// Attends with queries of type Q and outputs of type O on every target, fast and exact, and holds the
/// results to their bounds.
template <class Q = float, class O = float>
void check(const problem& p, std::uint64_t seed, tally& t) {
    const world w(p, seed);
    const std::vector<Q> q = as<Q>(w.queries);
    const std::size_t rows = p.queries * w.heads();
    for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
        std::vector<expected_row> by_target[2]; // without pairs, with them
        for_each_target([&](kv1::target target) {
            std::vector<expected_row>& expected = by_target[kv1::detail::takes_pairs(target)];
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
                const expected_row& e = expected[r];
                const auto wrong = [&](const char* what, double found, double wanted, double bound) {
                    t.expect(false, describe(p), mode == kv1::precision::fast ? "fast" : "exact",
                             to_string(target), what, "row", r, "is", found, "not", wanted, "+-", bound);
                };
                for (std::size_t c = 0; c < p.value_dim; ++c) {
                    const double found = static_cast<float>(out[r * p.value_dim + c]);
                    for (const bounded_row* row : {&e.truth, &e.path}) {
                        const double bound = row->out_bound[c] +
                                             output_rounding<O>(std::fabs(row->out[c]) + row->out_bound[c]);
                        if (std::fabs(found - row->out[c]) <= bound)
                            t.expect(true);
                        else
                            wrong(row == &e.truth ? "against the truth" : "against the path", found,
                                  row->out[c], bound);
                    }
                }
                if (std::isinf(e.truth.lse)) {
                    if (lse[r] != -std::numeric_limits<float>::infinity())
                        wrong("log-sum-exp", lse[r], e.truth.lse, 0.0);
                    continue;
                }
                for (const bounded_row* row : {&e.truth, &e.path})
                    if (!(std::fabs(lse[r] - row->lse) <= row->lse_bound))
                        wrong("log-sum-exp", lse[r], row->lse, row->lse_bound);
            }
        });
    }
}

} // namespace kv1_test
