// SPDX-License-Identifier: Apache-2.0
//
// A slot store with an engine's books beside it, and attention by the definition: in double, over what the store says
// that its slots hold.
#pragma once

#include "compare.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/slot_store.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

namespace kv1_test {

/// Vectors of some tokens, [tokens][kv_heads][channels].
struct slot_vectors {
    std::vector<float> keys, values;
    std::size_t tokens, kv_heads, key_dim, value_dim;
    bool has_values;

    slot_vectors(generator& g, const kv1::layer_description& l, std::size_t n)
        : keys(normal_values(g, n * l.kv_heads * l.key_dim)),
          values(normal_values(g, n * l.kv_heads * l.value_dim)), tokens(n), kv_heads(l.kv_heads),
          key_dim(l.key_dim), value_dim(l.value_dim), has_values(!l.values_in_keys) {}
    [[nodiscard]] kv1::tensor_view key_view(std::size_t first, std::size_t n) const {
        return {keys.data() + first * kv_heads * key_dim, n, kv_heads, key_dim};
    }
    [[nodiscard]] kv1::tensor_view value_view(std::size_t first, std::size_t n) const {
        return has_values
                   ? kv1::tensor_view{values.data() + first * kv_heads * value_dim, n, kv_heads, value_dim}
                   : kv1::slot_store::nothing();
    }
};

/// Numbers first, first + 1, ...
[[nodiscard]] inline std::vector<std::uint32_t> numbers_from(std::size_t first, std::size_t n) {
    std::vector<std::uint32_t> x(n);
    std::iota(x.begin(), x.end(), static_cast<std::uint32_t>(first));
    return x;
}
[[nodiscard]] inline std::vector<std::uint32_t> shuffled(generator& g, std::vector<std::uint32_t> x) {
    for (std::size_t i = x.size(); i > 1; --i)
        std::swap(x[i - 1], x[g.below(i)]);
    return x;
}

/// A position for each slot. In most places slots that follow each other have positions that do.
[[nodiscard]] inline std::vector<std::int32_t> positions_by_slot(std::span<const std::uint32_t> slots) {
    std::vector<std::int32_t> p;
    for (const std::uint32_t s : slots)
        p.push_back(static_cast<std::int32_t>(s % 23 == 0 ? s * 977 % 5000 : s + s / 64 * 300));
    return p;
}

/// The slots of a view, in order, from its documentation.
[[nodiscard]] inline std::vector<std::uint32_t> slots_of(const kv1::slot_view& v, std::size_t page_tokens) {
    std::vector<std::uint32_t> slots;
    for (std::size_t c = 0; c < v.size(); ++c)
        switch (v.kind()) {
        case kv1::slot_view_kind::range:
            slots.push_back(static_cast<std::uint32_t>(v.first() + c));
            break;
        case kv1::slot_view_kind::list:
            slots.push_back(v.items()[c]);
            break;
        case kv1::slot_view_kind::table:
            slots.push_back(
                static_cast<std::uint32_t>(v.items()[c / page_tokens] * page_tokens + c % page_tokens));
            break;
        }
    return slots;
}

/// What a query's head adds to the score of a column; -infinity: it does not see the column.
using added_score = std::function<double(std::size_t query, std::size_t head, std::size_t column)>;

/// The same of a mask and options, from their documentation. Additive masks are given as floats.
[[nodiscard]] inline added_score added_by(const kv1::slot_stream& s, const kv1::slot_attention_options& o,
                                          std::span<const float> additive = {}) {
    const std::size_t n = s.slots.size(), m = s.queries;
    return [=](std::size_t i, std::size_t h, std::size_t c) -> double {
        constexpr double hidden = -std::numeric_limits<double>::infinity();
        const kv1::slot_mask& mask = s.mask;
        const bool by_position = mask.kind() == kv1::slot_mask_kind::by_position;
        const double own = by_position ? mask.query_positions()[i]
                                       : static_cast<double>(n + i) - static_cast<double>(m),
                     at = by_position ? mask.column_positions()[c] : static_cast<double>(c);
        const double slope = o.alibi_slopes.empty() ? 1.0 : static_cast<double>(o.alibi_slopes[h]);
        switch (mask.kind()) {
        case kv1::slot_mask_kind::none:
            break;
        case kv1::slot_mask_kind::causal:
            if (at > own)
                return hidden;
            break;
        case kv1::slot_mask_kind::by_position:
            if (at < 0 || at > own)
                return hidden;
            break;
        case kv1::slot_mask_kind::bytes:
            if (mask.visible()[i * static_cast<std::size_t>(mask.query_stride()) + c] == 0)
                return hidden;
            break;
        case kv1::slot_mask_kind::additive: {
            const float x =
                additive[static_cast<std::size_t>(static_cast<std::ptrdiff_t>(i) * mask.query_stride() +
                                                  static_cast<std::ptrdiff_t>(h) * mask.head_stride()) +
                         c];
            return std::isinf(x) ? hidden : slope * static_cast<double>(x);
        }
        }
        if (o.window != 0 && at < own + 1 - static_cast<double>(o.window))
            return hidden;
        return o.alibi_slopes.empty() ? 0.0 : slope * (at - own);
    };
}

/// Holds the exact path's outputs of one stream to the definition. Bounds: a score is a sum of D products, and so is a
/// rotated query or key before it, so it is off by at most e = gamma(2 D + 8) |q| |k| scale, and by 2 u for each term that
/// is added; soft caps make no error larger. A mean that turns adds waves of D / 2 pairs, each with 3 roundings and sines
/// and cosines to 16 u, of amplitudes that are at most |q| |mean| scale together (and as much again for shares of other
/// channels): 2 u (24 + 3 D / 2) of that.
/// All weights then carry a factor of at most e^(2 e + 20 u), the roundings
/// of their own exponentials, rescalings and joins included, and an exponent's rounding of 1.25 u times its size. Sums
/// of N weighted values add gamma(N + 64) of their vector's norm, since they may be rotated back.
class slot_oracle {
public:
    slot_oracle(const kv1::slot_store& store, std::size_t layer) : store_(store), layer_(layer) {}

    /// first: the stream's first query in the tensors.
    void check(const kv1::slot_stream& s, const kv1::slot_attention_options& o, const added_score& added,
               std::span<const float> queries, std::size_t heads, std::span<const float> outputs,
               std::size_t first) const {
        const kv1::layer_description& l = store_.description().layers[layer_];
        const std::vector<std::uint32_t> slots = slots_of(s.slots, store_.description().page_tokens);
        const std::size_t n = slots.size(), d = l.key_dim, dv = l.value_dim, group = heads / l.kv_heads;
        const double scale =
            o.scale ? static_cast<double>(*o.scale) : 1.0 / std::sqrt(static_cast<double>(d));
        constexpr double hidden = -std::numeric_limits<double>::infinity();
        for (std::size_t kv = 0; kv < l.kv_heads; ++kv) {
            std::vector<float> keys(n * d), values(n * dv);
            store_.read(layer_, kv1::kv_side::key, kv, slots, keys);
            store_.read(layer_, kv1::kv_side::value, kv, slots, values);
            double mean = 0.0;
            for (std::size_t k = 0; kv1::keeps_positions(l) && k < d; ++k)
                mean += std::pow(static_cast<double>(l.key_encoding.means[kv * d + k]), 2);
            const double wave =
                kv1_test::unit_roundoff * 2 * (24 + 1.5 * static_cast<double>(d)) * std::sqrt(mean);
            for (std::size_t i = 0; i < s.queries; ++i)
                for (std::size_t h = kv * group; h < (kv + 1) * group; ++h) {
                    const float* q = queries.data() + ((first + i) * heads + h) * d;
                    std::vector<double> scores(n, hidden);
                    double top = hidden, error = 0.0;
                    for (std::size_t c = 0; c < n; ++c) {
                        const double bias = added(i, h, c);
                        if (bias == hidden)
                            continue;
                        double sum = 0.0, qq = 0.0, kk = 0.0;
                        for (std::size_t k = 0; k < d; ++k) {
                            const double a = static_cast<double>(q[k]),
                                         b = static_cast<double>(keys[c * d + k]);
                            sum += a * b;
                            qq += a * a;
                            kk += b * b;
                        }
                        double score = sum * scale;
                        if (o.soft_cap > 0.0f)
                            score = static_cast<double>(o.soft_cap) *
                                    std::tanh(score / static_cast<double>(o.soft_cap));
                        scores[c] = score + bias;
                        error = std::max(error, gamma(2.0 * static_cast<double>(d) + 8) * std::sqrt(qq * kk) *
                                                        std::fabs(scale) +
                                                    wave * std::sqrt(qq) * std::fabs(scale) +
                                                    8 * unit_roundoff * (std::fabs(score) + std::fabs(bias)));
                        top = std::max(top, scores[c]);
                    }
                    const bool has_sink = !o.sink_logits.empty();
                    const double sink = has_sink ? static_cast<double>(o.sink_logits[h]) : hidden;
                    const double whole_top = std::max(top, sink);
                    double denominator = has_sink ? std::exp(sink - whole_top) : 0.0, farthest = 0.0;
                    std::vector<double> out(dv), size(dv);
                    for (std::size_t c = 0; c < n; ++c) {
                        if (scores[c] == hidden)
                            continue;
                        const double w = std::exp(scores[c] - whole_top);
                        // weights below e^-60 of the largest are nothing, whatever their exponent is rounded to
                        farthest = std::max(farthest, std::min(60.0, whole_top - scores[c]));
                        denominator += w;
                        for (std::size_t k = 0; k < dv; ++k) {
                            out[k] += w * static_cast<double>(values[c * dv + k]);
                            size[k] += w * std::fabs(static_cast<double>(values[c * dv + k]));
                        }
                    }
                    const double exponent =
                        2 * error + 20 * unit_roundoff +
                        2 * unit_roundoff * (farthest + 2 * std::fabs(whole_top > hidden ? whole_top : 0.0));
                    double norm = 0.0; // of sums, which are rotated back
                    for (const double x : size)
                        norm += x * x;
                    const double sums = gamma(static_cast<double>(n) + 64) * std::sqrt(norm);
                    for (std::size_t k = 0; k < dv; ++k) {
                        const double wanted = denominator > 0 ? out[k] / denominator : 0.0,
                                     bound = denominator > 0
                                                 ? (std::expm1(2 * exponent) * size[k] + sums) / denominator
                                                 : 0.0;
                        const double found = static_cast<double>(outputs[((first + i) * heads + h) * dv + k]);
                        if (!(std::fabs(found - wanted) <= bound)) {
                            CAPTURE(i, h, k, found, wanted, bound, n);
                            REQUIRE(std::fabs(found - wanted) <= bound);
                        }
                    }
                    if (o.log_sum_exp.empty())
                        continue;
                    const double lse = static_cast<double>(o.log_sum_exp[(first + i) * heads + h]);
                    if (denominator == 0) {
                        REQUIRE(lse == hidden);
                        continue;
                    }
                    const double wanted = whole_top + std::log(denominator);
                    const double bound = exponent + gamma(static_cast<double>(n) + 64) +
                                         8 * unit_roundoff * (std::fabs(wanted) + 1);
                    if (!(std::fabs(lse - wanted) <= bound)) {
                        CAPTURE(i, h, lse, wanted, bound, n);
                        REQUIRE(std::fabs(lse - wanted) <= bound);
                    }
                }
        }
    }

private:
    const kv1::slot_store& store_;
    std::size_t layer_;
};

} // namespace kv1_test
