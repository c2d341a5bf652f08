// SPDX-License-Identifier: Apache-2.0
//
// Attention of one query row in double precision, from what the cache says it holds, with bounds on how far a kernel
// may be off. The bounds are derived, not tuned.
//
// expect_row() gives two rows, each with its bounds:
//
//   truth  attention by its definition. On the fast path its bounds hold the rounding to 8 bits.
//   path   what the path that was asked for computes, step by step. On the fast path it takes the very codes that the
//          path's definition gives, so a kernel agrees with it up to fp32 rounding. On the exact path it is the truth.
//
// u = 2^-24 is half a unit in the last place of fp32. gamma(n) = n u / (1 - n u) bounds the relative error of n
// roundings in a row. D is the number of channels, N the number of tokens.
//
// Exact path.
//
//   score   A sum of D products of fp32 numbers: |error| <= gamma(D + 3) sum |q_d k_d|. The 3 are the scaled query and
//           the last additions of the padded sum.
//   weight  exp(score - maximum), times exp(m - m') for every later chunk whose maximum m' is larger than the m before
//           it. Each subtraction rounds its result, and the results add up to (final maximum - score). They are taken
//           in units of log2, by a constant that is 0.22 u off. So the exponent's error is at most
//           1.25 u (maximum - score). Each exp and each product adds a rounding of its own. Together:
//           weight = true weight * e^h, |h| <= H_t.
//   output  Sums of N terms add gamma(N + chunks), the division adds 2 u. With normalized weights w,
//           sum w e^h (v - out) / sum w e^h bounds the output's error.
//
// Fast path.
//
//   score        Codes i of the query satisfy |q_d - step i_d| <= step / 2, and meet bases as well as levels. So a
//                score moves by at most step / 2 * sum |k_d|. With 1.27 the largest channel of a query, the step is
//                0.01.
//   pairs        The share of a channel pair moves by slope * R' / 255, R' = m max R / 127 (detail/kernels/pairs.inl).
//   weight       Codes j of a chunk's weights carry what they leave: |p slope - step j| <= step. The chunk's step
//                changes by what is left at its end. A weight whose quotient lies so near to a tie that fp32 rounding
//                may decide it is allowed either code.
//   log-sum-exp  What the scores of a range are off by on the whole is estimated and taken off it
//                (detail/kernels/correct.inl). The estimate lies between the errors of scores (correct_range() in
//                integer_path.hpp). So no error there is more than twice the largest of a score.
#pragma once

#include "compare.hpp"
#include "integer_path.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace kv1_test {

/// Relative error of an fp32 exp: xsimd's and the C library's are within 2 units in the last place.
inline constexpr double exp_error = 4 * unit_roundoff;

/// One KV head's K or V as the cache holds it: values, and the affine form value = slope * level + base.
struct cached_side {
    bool coded = false;
    std::size_t dim = 0;
    std::size_t groups = 1;            // of channels, each with metadata of its own
    std::vector<float> values;         // [token][channel]
    std::vector<double> slope, centre; // [token][group]: centre = base + z slope
    std::vector<float> off_centre;     // [token][channel]: l - z, exact
    double half_level = 0.0;           // z
    int bits = 0;                      // of a code
    bool codebook = false;
    // keys quantized per channel: of full pages scales and minima [page][channel], in place of slope and
    // centre; tokens from `sealed` on are fp16
    bool per_channel = false;
    std::size_t page_tokens = 0, sealed = 0;
    std::vector<float> scales, minima;

    cached_side() = default;
    template <class Cache>
    cached_side(const Cache& cache, kv1::sequence_id id, std::size_t layer, kv1::kv_side side,
                std::size_t head) {
        const kv1::layer_description& l = cache.description().layers[layer];
        const bool keys = side == kv1::kv_side::key;
        const kv1::kv_format f = keys ? l.key_format : l.value_format;
        dim = keys ? l.key_dim : l.value_dim;
        if (const std::size_t group = keys ? l.key_group : l.value_group; group != 0)
            groups = dim / group;
        const std::size_t n = cache.length(id, layer), group_dim = dim / groups;
        values.resize(n * dim);
        cache.read(id, layer, side, head, 0, n, values);
        coded = f != kv1::kv_format::fp32 && f != kv1::kv_format::fp16;
        if (!coded)
            return;
        if (keys && l.key_axis == kv1::quantization_axis::per_channel) {
            read_pages(cache, id, layer, head, f);
            return;
        }
        const std::size_t width = kv1::packed_bytes(f, dim), metadata = kv1::row_bytes(f, dim) - width;
        std::vector<std::byte> packed(n * width);
        std::vector<kv1::float16> stored_scales(metadata >= 2 ? n * groups : 0),
            stored_minima(metadata == 4 ? n * groups : 0);
        cache.export_rows(id, layer, side, head, 0, n, {packed, stored_scales, stored_minima});
        bits = kv1::detail::traits_of(f).code_bits;
        codebook = kv1::info_of(f).codebook;
        const double z = !codebook ? 0.5 * static_cast<double>((1 << bits) - 1) : bits == 2 ? 7.0 : 18.0;
        half_level = z;
        off_centre.resize(n * dim);
        for (std::size_t t = 0; t < n * groups; ++t) { // and group
            double s = 1.0, base = 0.0;
            if (kv1::detail::traits_of(f).metadata == kv1::detail::metadata_kind::compact) {
                const kv1::detail::affine_map p =
                    kv1::detail::decode_metadata(f, {stored_scales[t].bits(), 0});
                s = p.slope;
                base = p.base;
            } else if (metadata == 4) {
                s = static_cast<float>(stored_scales[t]);
                base = static_cast<float>(stored_minima[t]);
            } else if (metadata == 2) {
                s = 2.0 * static_cast<float>(stored_scales[t]);
                base = -static_cast<float>(stored_scales[t]);
            }
            slope.push_back(s);
            centre.push_back(base + z * s);
            for (std::size_t c = 0; c < group_dim; ++c) {
                const auto wide = static_cast<std::size_t>(bits);
                unsigned code = 0;
                for (std::size_t b = 0; b < wide; ++b) {
                    const std::size_t at = (t % groups * group_dim + c) * wide + b;
                    code |= (std::to_integer<unsigned>(packed[t / groups * width + at / 8]) >> (at % 8) & 1u)
                            << b;
                }
                constexpr std::array of_2_bits{0u, 5u, 9u, 14u};
                constexpr std::array of_4_bits{0u,  4u,  7u,  9u,  11u, 13u, 15u, 17u,
                                               19u, 21u, 23u, 25u, 27u, 29u, 32u, 36u};
                const unsigned level = !codebook ? code : bits == 2 ? of_2_bits[code] : of_4_bits[code];
                off_centre[t * group_dim + c] = static_cast<float>(level - z);
            }
        }
    }

private:
    template <class Cache>
    void read_pages(const Cache& cache, kv1::sequence_id id, std::size_t layer, std::size_t head,
                    kv1::kv_format f) {
        const kv1::section_layout& section = cache.layout(layer).keys();
        const kv1::detail::format_traits traits = section.traits();
        per_channel = true;
        page_tokens = section.tokens;
        sealed = cache.length(id, layer) / page_tokens * page_tokens;
        bits = traits.code_bits;
        codebook = traits.codebook();
        half_level = 0.5 * traits.top_level();
        std::vector<std::int32_t> indptr(2), indices(cache.count_blocks({&id, 1}, layer)), last(1);
        cache.export_block_tables({&id, 1}, layer, {indptr, indices, last});
        off_centre.resize(sealed * dim);
        for (std::size_t p = 0; p < sealed / page_tokens; ++p) {
            const std::byte* page = cache.page(layer, head, static_cast<std::uint32_t>(indices[p])).data();
            for (std::size_t c = 0; c < dim; ++c) {
                const kv1::detail::affine_map pair =
                    kv1::detail::decode_metadata(f, kv1::detail::load_channel_metadata(section, page, c));
                scales.push_back(pair.slope);
                minima.push_back(pair.base);
                for (std::size_t t = 0; t < page_tokens; ++t)
                    off_centre[(p * page_tokens + t) * dim + c] = static_cast<float>(
                        traits.level(kv1::detail::load_code(section, page, t, c)) - half_level);
            }
        }
    }
};

/// One output row and its log-sum-exp, with the largest errors they may have.
struct bounded_row {
    std::vector<double> out, out_bound;
    double lse = -std::numeric_limits<double>::infinity();
    double lse_bound = 0.0;
};

/// What a query row must give: `truth` by the definition of attention, `path` by the definition of the
/// precision asked for (on the exact path the two are one).
struct expected_row {
    bounded_row truth, path;
};

/// The optional arguments of one row.
struct row_options {
    float soft_cap = 0.0f;
    float alibi_slope = 0.0f;
    double position = 0.0; // of the query, for the slope
    std::optional<float> sink_logit;
    // where ranges of tokens begin that are attended to apart, ascending
    std::span<const std::size_t> range_starts = {};
};

namespace oracle {

// A query in pairs of channels, as detail/kernels/pairs.inl defines it: float by float, since a multiplier is
// rounded up and a table's entry to the nearest.
struct paired_query {
    double step = 0.0, multiplier_sum = 0.0, half_steps = 0.0; // of all pairs: the largest errors
    std::vector<double> centred;                               // [pair][16]: multiplier * (t - 255 / 2)
    std::array<float, 4> levels{};                             // of codes, about their middle

    paired_query() = default;
    paired_query(std::span<const float> q, bool codebook)
        : levels(codebook ? std::array{-7.0f, -2.0f, 2.0f, 7.0f} : std::array{-1.5f, -0.5f, 0.5f, 1.5f}) {
        const auto at = [&](std::size_t i) { return i < q.size() ? q[i] : 0.0f; };
        const std::size_t pairs = (q.size() + 1) / 2;
        float widest = 0.0f;
        for (std::size_t p = 0; p < pairs; ++p)
            widest = std::max(widest, std::fabs(at(2 * p)) + std::fabs(at(2 * p + 1)));
        const float half = levels[3], top = half * widest;
        step = static_cast<double>(top / 127.0f * (2.0f / 255.0f));
        for (std::size_t p = 0; p < pairs; ++p) {
            const float a = at(2 * p), b = at(2 * p + 1);
            const float reach = half * (std::fabs(a) + std::fabs(b));
            const float m = top > 0.0f ? std::min(std::ceil(reach * (127.0f / top)), 127.0f) : 0.0f;
            const float inverse = m > 0.0f ? 127.5f / (m * (top / 127.0f)) : 0.0f;
            const float first = a * inverse, second = b * inverse;
            for (int c = 0; c < 16; ++c) {
                const float t = std::fma(second, levels[static_cast<std::size_t>(c >> 2)],
                                         std::fma(first, levels[static_cast<std::size_t>(c & 3)], 127.5f));
                centred.push_back(static_cast<double>(m) * (static_cast<double>(std::nearbyint(t)) - 127.5));
            }
            multiplier_sum += static_cast<double>(m);
            half_steps += static_cast<double>(m) * step * (0.5 + 255 * gamma(8));
        }
    }
    // off: levels of the channels of a token, about their middle
    [[nodiscard]] double dot(const float* off, std::size_t channels) const {
        // code 0 past the last channel
        const auto code = [&](std::size_t c) -> std::size_t {
            return c < channels ? static_cast<std::size_t>(std::find(levels.begin(), levels.end(), off[c]) -
                                                           levels.begin())
                                : 0;
        };
        double sum = 0.0;
        for (std::size_t c = 0; c < channels; c += 2)
            sum += centred[c * 8 + code(c) + 4 * code(c + 1)];
        return sum;
    }
};

struct weights {
    std::vector<double> w;                   // not normalized: exp(score - maximum)
    std::vector<double> h;                   // bound on the exponent's error
    double sum = 0.0, low = 0.0, high = 0.0; // of w, w e^-h, w e^h
    double maximum = 0.0;
};

inline weights softmax(const std::vector<double>& scores, const std::vector<double>& errors, double chunks) {
    weights r;
    r.maximum = *std::max_element(scores.begin(), scores.end());
    const double largest = *std::max_element(errors.begin(), errors.end());
    for (std::size_t t = 0; t < scores.size(); ++t) {
        r.w.push_back(std::exp(scores[t] - r.maximum));
        r.h.push_back(errors[t] + 1.25 * unit_roundoff * (r.maximum - scores[t] + errors[t] + largest) +
                      1.01 * (chunks + 2) * (exp_error + unit_roundoff));
        r.sum += r.w[t];
        r.low += r.w[t] * std::exp(-r.h[t]);
        r.high += r.w[t] * std::exp(r.h[t]);
    }
    return r;
}

// Soft cap and slope: neither makes an error larger, both round. tanh is within 4 units of 2^-24.
inline void apply(const row_options& o, double token, double& score, double& error) {
    if (o.soft_cap > 0.0f) {
        error += 2 * unit_roundoff * std::fabs(score);
        score = o.soft_cap * std::tanh(score / o.soft_cap);
        error += 5 * unit_roundoff * std::fabs(score) + 0x1p-149;
    }
    if (o.alibi_slope != 0.0f) {
        const double bias = o.alibi_slope * (token - o.position);
        score += bias;
        error += unit_roundoff * (std::fabs(bias) + std::fabs(score));
    }
}

// The share of the sink logit in the denominator: its logit and the maximum are both rounded to units of log2.
inline double add_sink_logit(const row_options& o, weights& r, double largest_error) {
    if (!o.sink_logit)
        return 0.0;
    const double w = std::exp(*o.sink_logit - r.maximum);
    const double h = 1.25 * unit_roundoff * (2 * std::fabs(*o.sink_logit) + 2 * std::fabs(r.maximum)) +
                     largest_error + 4 * exp_error;
    r.sum += w;
    r.low += w * std::exp(-h);
    r.high += w * std::exp(h);
    return w * std::expm1(h);
}

inline void bound_lse(const weights& w, double additions, bounded_row& row) {
    const double denominator = std::log(w.sum);
    row.lse = w.maximum + denominator;
    row.lse_bound = std::max(std::log(w.high / w.sum), std::log(w.sum / w.low)) + gamma(additions) +
                    exp_error * (std::fabs(denominator) + 1.0) +
                    2 * unit_roundoff * (std::fabs(row.lse) + std::fabs(w.maximum));
}

// A query against keys quantized per channel, page by page: rows of the query times a page's scales.
class channel_queries {
public:
    // q: scaled, one row
    channel_queries(const cached_side& keys, const std::vector<float>& q, bool paired)
        : keys_(keys), paired_(paired) {
        for (std::size_t p = 0; p < keys.sealed / keys.page_tokens; ++p) {
            page& at = pages_.emplace_back();
            float top = 0.0f;
            for (std::size_t c = 0; c < keys.dim; ++c) {
                at.row.push_back(q[c] * keys.scales[p * keys.dim + c]);
                at.sum += at.row[c];
                at.magnitude += std::fabs(at.row[c]);
                at.shift += static_cast<double>(q[c]) * keys.minima[p * keys.dim + c];
                at.shift_magnitude += std::fabs(static_cast<double>(q[c]) * keys.minima[p * keys.dim + c]);
                top = std::max(top, std::fabs(at.row[c]));
            }
            const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
            at.step = top / 127.0f;
            for (const float x : at.row) {
                at.codes.push_back(std::nearbyint(x * inverse));
                at.code_sum += at.codes.back();
            }
            if (paired)
                at.pairs = paired_query(at.row, keys.codebook);
        }
    }

    struct score {
        double value, rounding;   // of the path
        double query_error = 0.0; // how far rounding the query may move it
    };
    // terms: additions of a sum over channels. A key that is read is a rounded sum, and the score one of two.
    [[nodiscard]] score exact(std::size_t t, double terms) const {
        const page& p = pages_[t / keys_.page_tokens];
        double sum = p.shift, magnitude = p.shift_magnitude;
        for (std::size_t c = 0; c < keys_.dim; ++c) {
            const double product = p.row[c] * (off(t)[c] + keys_.half_level);
            sum += product;
            magnitude += std::fabs(product);
        }
        return {sum, gamma(terms + 4) * magnitude + terms * 0x1p-149};
    }
    [[nodiscard]] score fast(std::size_t t, double terms) const {
        const page& p = pages_[t / keys_.page_tokens];
        double integer = paired_ ? p.pairs.dot(off(t), keys_.dim) : 0.0, deviation = 0.0;
        for (std::size_t c = 0; c < keys_.dim; ++c) {
            integer += paired_ ? 0.0 : p.codes[c] * off(t)[c];
            deviation += std::fabs(off(t)[c]);
        }
        const double step = paired_ ? p.pairs.step : p.step, first = step * integer,
                     second = keys_.half_level * p.sum;
        const double taken_off =
            paired_ ? 127.5 * p.pairs.multiplier_sum : keys_.half_level * std::fabs(p.code_sum);
        return {first + second + p.shift,
                gamma(7) * std::fabs(first) + gamma(6) * step * taken_off +
                    gamma(terms + 4) * (keys_.half_level * p.magnitude + p.shift_magnitude) +
                    terms * 0x1p-149,
                paired_ ? p.pairs.half_steps : p.step * (0.5 + 127 * gamma(4)) * deviation};
    }

private:
    struct page {
        std::vector<float> row;
        std::vector<double> codes;
        double step = 0.0, sum = 0.0, magnitude = 0.0, code_sum = 0.0, shift = 0.0, shift_magnitude = 0.0;
        paired_query pairs;
    };
    [[nodiscard]] const float* off(std::size_t t) const { return &keys_.off_centre[t * keys_.dim]; }

    const cached_side& keys_;
    bool paired_;
    std::vector<page> pages_;
};

} // namespace oracle

/// On the target in use. query: the row as given, widened to fp32; tokens: those it sees, ascending;
/// chunk_starts: where chunks begin, whose weights are rounded together, ascending.
inline expected_row expect_row(std::span<const float> query, float scale, const cached_side& keys,
                               const cached_side& values, std::span<const std::size_t> tokens,
                               std::span<const std::size_t> chunk_starts, kv1::precision mode,
                               const row_options& options = {}) {
    const std::size_t n = tokens.size(), d = keys.dim, channels = values.dim;
    expected_row r;
    for (bounded_row* row : {&r.truth, &r.path}) {
        row->out.assign(channels, 0.0);
        row->out_bound.assign(channels, 0.0);
    }
    if (n == 0) {
        if (options.sink_logit)
            for (bounded_row* row : {&r.truth, &r.path}) {
                row->lse = *options.sink_logit;
                row->lse_bound = 4 * unit_roundoff * std::fabs(row->lse);
            }
        return r;
    }
    const auto chunk_of = [&](std::size_t t) {
        return static_cast<std::size_t>(std::upper_bound(chunk_starts.begin(), chunk_starts.end(), t) -
                                        chunk_starts.begin());
    };
    const auto chunks = static_cast<double>(chunk_of(tokens.back()) + 2);
    const bool fast_keys = mode == kv1::precision::fast && keys.coded;
    const bool fast_values = mode == kv1::precision::fast && values.coded;

    // the query as the kernels prepare it, group by group
    const kv1::target used =
        keys.per_channel ? kv1::detail::without_pairs(kv1::current_target()) : kv1::current_target();
    const bool paired = fast_keys && keys.bits == 2 && kv1::detail::takes_pairs(used);
    std::vector<float> q(query.begin(), query.end());
    std::vector<double> i(d);
    struct query_part {
        double step = 0.0, sum = 0.0, magnitude = 0.0, code_sum = 0.0;
        oracle::paired_query pairs;
    };
    std::vector<query_part> parts(keys.groups);
    const std::size_t part_dim = d / keys.groups;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        query_part& part = parts[p];
        const std::span<float> own(q.data() + p * part_dim, part_dim);
        float top = 0.0f;
        for (float& x : own) {
            x *= scale;
            top = std::max(top, std::fabs(x));
            part.sum += x;
            part.magnitude += std::fabs(x);
        }
        const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        part.step = top / 127.0f;
        for (std::size_t c = 0; c < part_dim; ++c) {
            i[p * part_dim + c] = std::nearbyint(own[c] * inverse);
            part.code_sum += i[p * part_dim + c];
        }
        if (paired)
            part.pairs = oracle::paired_query(own, keys.codebook);
        else if (fast_keys)
            part.sum = static_cast<float>(part.step) * static_cast<float>(part.code_sum);
    }
    std::optional<oracle::channel_queries> channels_of_keys;
    if (keys.per_channel)
        channels_of_keys.emplace(keys, q, paired);

    // scores: exact ones with the error of summing, and of rounding the query; and the path's own
    std::vector<double> scores(n), rounding(n), query_error(n), path_scores(n), path_rounding(n);
    const double terms = static_cast<double>(d) + 35; // padding to a multiple of 32, and 3
    for (std::size_t k = 0; k < n; ++k) {
        const std::size_t t = tokens[k];
        double sum = 0.0, magnitude = 0.0;
        for (std::size_t c = 0; c < d; ++c) {
            const double product = static_cast<double>(q[c]) * keys.values[t * d + c];
            sum += product;
            magnitude += std::fabs(product);
        }
        // q is the rounded product of query and scale: one more rounding, already counted
        scores[k] = sum;
        rounding[k] = gamma(terms) * magnitude + terms * 0x1p-149;
        path_scores[k] = sum;
        path_rounding[k] = rounding[k];
        if (keys.per_channel && t < keys.sealed) {
            rounding[k] = channels_of_keys->exact(t, terms).rounding;
            const auto path =
                fast_keys ? channels_of_keys->fast(t, terms) : channels_of_keys->exact(t, terms);
            path_scores[k] = fast_keys ? path.value : sum;
            path_rounding[k] = path.rounding;
            query_error[k] = path.query_error + path.rounding + rounding[k];
            continue;
        }
        query_error[k] = rounding[k]; // of fp16 beside codes
        if (!fast_keys || keys.per_channel)
            continue;
        path_scores[k] = 0.0;
        path_rounding[k] = terms * 0x1p-149;
        query_error[k] = unit_roundoff * magnitude;
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const query_part& part = parts[p];
            const std::size_t at = t * keys.groups + p;
            const float* off = &keys.off_centre[at * part_dim];
            double integer = paired ? part.pairs.dot(off, part_dim) : 0.0;
            for (std::size_t c = 0; c < part_dim && !paired; ++c)
                integer += i[p * part_dim + c] * off[c];
            const double own_step = paired ? part.pairs.step : part.step;
            const double first = keys.slope[at] * own_step * integer, second = keys.centre[at] * part.sum;
            path_scores[k] += first + second;
            // centre is one rounded sum of two numbers that may cancel
            const double terms_of_centre =
                std::fabs(keys.centre[at]) + 2 * keys.slope[at] * 255.0 * unit_roundoff;
            // step * z * sum i, or step * 255/2 * sum m, is rounded before it is taken off the sum of
            // products: at most 5 half units; scores of groups are added to each other
            const double taken_off =
                paired ? 127.5 * part.pairs.multiplier_sum : keys.half_level * std::fabs(part.code_sum);
            const auto additions = static_cast<double>(parts.size() - 1);
            path_rounding[k] += gamma(6 + additions) * std::fabs(first) +
                                gamma(5 + additions) * keys.slope[at] * own_step * taken_off +
                                gamma(terms) * terms_of_centre * part.magnitude +
                                gamma(3 + additions) * std::fabs(second);
            // |q - step i| <= step / 2, and what rounding of step and inverse adds at 127 steps; a key's
            // value is itself a rounded slope * c + base
            double length = 0.0;
            for (std::size_t c = p * part_dim; c < (p + 1) * part_dim; ++c)
                length += std::fabs(keys.values[t * d + c]);
            query_error[k] +=
                paired ? keys.slope[at] * part.pairs.half_steps : part.step * (0.5 + 127 * gamma(4)) * length;
            // the scores by which sums are corrected may meet the query in steps of a 254th, as two sums
            rounding[k] += part.step * (0.5 / 254.0 + 127 * gamma(4)) * length;
        }
        query_error[k] += path_rounding[k];
        rounding[k] += 2.0 * path_rounding[k];
    }
    std::vector<double>& truth_rounding = fast_keys ? query_error : rounding;
    std::vector<double> exact_scores = scores;
    for (std::size_t k = 0; k < n; ++k) {
        const auto token = static_cast<double>(tokens[k]);
        if (fast_keys)
            oracle::apply(options, token, exact_scores[k], rounding[k]);
        oracle::apply(options, token, scores[k], truth_rounding[k]);
        oracle::apply(options, token, path_scores[k], path_rounding[k]);
    }
    // the correction of each range's sum; how far off it may be is no error of the weights within the range
    std::vector<double> shift_bound(n);
    for (std::size_t first = 0; fast_keys && first < n;) {
        const auto range_of = [&](std::size_t t) {
            return std::upper_bound(options.range_starts.begin(), options.range_starts.end(), t);
        };
        std::size_t last = first;
        while (last < n && range_of(tokens[last]) == range_of(tokens[first]))
            ++last;
        const auto part = [&](const std::vector<double>& x) {
            return std::span(x).subspan(first, last - first);
        };
        const oracle::range_correction c =
            oracle::correct_range(part(exact_scores), part(rounding), part(path_scores), part(path_rounding));
        const double largest = *std::max_element(query_error.begin() + static_cast<std::ptrdiff_t>(first),
                                                 query_error.begin() + static_cast<std::ptrdiff_t>(last));
        for (std::size_t k = first; k < last; ++k) {
            path_scores[k] += c.value;
            path_rounding[k] += shift_bound[k] = c.bound;
            query_error[k] += largest + c.rounding;
        }
        first = last;
    }
    oracle::weights truth = oracle::softmax(scores, truth_rounding, chunks);
    oracle::weights path = oracle::softmax(path_scores, path_rounding, chunks);
    const double truth_sink = oracle::add_sink_logit(
        options, truth, *std::max_element(truth_rounding.begin(), truth_rounding.end()));
    const double path_sink =
        oracle::add_sink_logit(options, path, *std::max_element(path_rounding.begin(), path_rounding.end()));
    const double additions = static_cast<double>(n) + 3 * chunks + 8, g = gamma(additions);
    oracle::bound_lse(truth, additions, r.truth);
    oracle::bound_lse(path, additions, r.path);

    // the truth
    std::vector<double>& out = r.truth.out;
    for (std::size_t k = 0; k < n; ++k)
        for (std::size_t c = 0; c < channels; ++c)
            out[c] += truth.w[k] / truth.sum * values.values[tokens[k] * channels + c];
    for (std::size_t c = 0; c < channels; ++c)
        r.truth.out_bound[c] += truth_sink * std::fabs(out[c]) / truth.low;
    for (std::size_t k = 0; k < n; ++k)
        for (std::size_t c = 0; c < channels; ++c) {
            const double v = values.values[tokens[k] * channels + c];
            r.truth.out_bound[c] +=
                (truth.w[k] * std::expm1(truth.h[k]) * std::fabs(v - out[c]) +
                 g * truth.w[k] * std::exp(truth.h[k]) * (std::fabs(v) + std::fabs(out[c]))) /
                truth.low;
        }
    if (!fast_values) {
        if (!fast_keys) {
            r.path = r.truth;
            return r;
        }
        for (std::size_t k = 0; k < n; ++k)
            for (std::size_t c = 0; c < channels; ++c)
                r.path.out[c] += path.w[k] / path.sum * values.values[tokens[k] * channels + c];
        for (std::size_t c = 0; c < channels; ++c)
            r.path.out_bound[c] += path_sink * std::fabs(r.path.out[c]) / path.low;
        for (std::size_t k = 0; k < n; ++k)
            for (std::size_t c = 0; c < channels; ++c) {
                const double v = values.values[tokens[k] * channels + c];
                r.path.out_bound[c] +=
                    (path.w[k] * std::expm1(path.h[k]) * std::fabs(v - r.path.out[c]) +
                     g * path.w[k] * std::exp(path.h[k]) * (std::fabs(v) + std::fabs(r.path.out[c]))) /
                    path.low;
            }
        return r;
    }

    // the integer path of values, chunk by chunk and group by group
    const std::size_t group_dim = channels / values.groups;
    std::vector<double> numerator(channels, 0.0), error(channels, 0.0), coarse(channels, 0.0),
        magnitude(channels, 0.0);
    double denominator_error = path_sink;
    for (std::size_t k = 0; k < n; ++k)
        denominator_error += path.w[k] * std::expm1(path.h[k]);
    for (std::size_t first = 0; first < n;) {
        std::size_t last = first;
        while (last < n && chunk_of(tokens[last]) == chunk_of(tokens[first]))
            ++last;
        for (std::size_t p = 0; p < values.groups; ++p) {
            double largest = 0.0, h = 0.0;
            for (std::size_t k = first; k < last; ++k) {
                largest = std::max(largest, path.w[k] * values.slope[tokens[k] * values.groups + p]);
                h = std::max(h, path.h[k] - shift_bound[k]);
            }
            // the largest weight, to which a carry may add one
            const double top_code = values.half_level > 127.0 ? 126.0 : 254.0;
            const double weight_step = largest / top_code;
            const std::size_t first_channel = p * group_dim, end_channel = first_channel + group_dim;
            std::vector<double> sum(channels, 0.0), other(channels, 0.0), codes;
            double total = 0.0;
            for (std::size_t k = first; k < last && largest > 0.0; ++k)
                total += path.w[k] * values.slope[tokens[k] * values.groups + p] / weight_step;
            oracle::weight_rounding rounded(total, 2 * std::expm1(h) + gamma(additions));
            for (std::size_t k = first; k < last; ++k) {
                const std::size_t t = tokens[k] * values.groups + p;
                const double quotient = largest > 0.0 ? path.w[k] * values.slope[t] / weight_step : 0.0;
                // fp32 may see a quotient this far off, and take the other code
                const double unsure =
                    quotient * (std::expm1(path.h[k] - shift_bound[k] + h) + gamma(6)) + 0x1p-100;
                const auto [code, either] = rounded.next(tokens[k], quotient, unsure);
                codes.push_back(code);
                const float* off = &values.off_centre[tokens[k] * channels];
                const double affine = path.w[k] * values.centre[t];
                const double affine_error = std::fabs(affine) * (std::expm1(path.h[k]) + gamma(4)) +
                                            2 * unit_roundoff * path.w[k] * values.slope[t] * 255.0;
                for (std::size_t c = first_channel; c < end_channel; ++c) {
                    sum[c] += code * off[c];
                    numerator[c] += affine;
                    error[c] += affine_error;
                    other[c] += either ? std::fabs(off[c]) + values.half_level : 0.0;
                    magnitude[c] += std::fabs(affine);
                }
            }
            const double step = weight_step * rounded.factor();
            for (std::size_t k = first; k < last; ++k)
                for (std::size_t c = first_channel; c < end_channel; ++c)
                    coarse[c] += (weight_step * (1.0 + top_code * gamma(6)) +
                                  std::fabs(step - weight_step) * codes[k - first]) *
                                 std::fabs(values.off_centre[tokens[k] * channels + c]);
            for (std::size_t c = first_channel; c < end_channel; ++c) {
                numerator[c] += step * sum[c];
                error[c] +=
                    step * (std::fabs(sum[c]) * (std::expm1(h) + gamma(6) + rounded.doubt()) + other[c]);
                magnitude[c] += step * std::fabs(sum[c]);
            }
        }
        first = last;
    }
    for (std::size_t c = 0; c < channels; ++c) {
        r.path.out[c] = numerator[c] / path.sum;
        r.path.out_bound[c] =
            (error[c] + g * magnitude[c] + std::fabs(r.path.out[c]) * (denominator_error + g * path.high)) /
            path.low;
        // the truth may be off by the rounding of weights, and by all that fp32 does on this path
        double centre_roundings = 0.0;
        for (std::size_t k = 0; k < n; ++k)
            centre_roundings +=
                path.w[k] * unit_roundoff * std::fabs(values.values[tokens[k] * channels + c]);
        r.truth.out_bound[c] += r.path.out_bound[c] + (coarse[c] + centre_roundings) / path.low;
    }
    return r;
}

/// Half a unit in the last place of the output type at x.
template <class T>
double output_rounding(double x) {
    if constexpr (std::is_same_v<T, float>)
        return unit_roundoff * std::fabs(x) + 0x1p-149;
    else if constexpr (std::is_same_v<T, kv1::float16>)
        return 0x1p-11 * std::fabs(x) + 0x1p-25;
    else
        return 0x1p-8 * std::fabs(x) + 0x1p-134;
}

} // namespace kv1_test
