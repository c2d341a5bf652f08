// SPDX-License-Identifier: Apache-2.0
//
// A naive model of a cache: vectors of floats, one a token, with no sharing and no pages. It is written from
// the documentation of kv_cache.hpp alone. A token's keys and values depend on all tokens before it, as in a
// real model, so that sequences with equal prefixes have equal contents.
#pragma once

#include "attention_oracle.hpp"
#include "formats.hpp"
#include "random.hpp"

#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/quantizers/least_squares.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace kv1_test {

/// A vector after it went through a format, by the plain definitions.
inline std::vector<float> through_format(kv1::kv_format f, const std::vector<float>& x,
                                         kv1::level_choice levels = kv1::level_choice::min_max) {
    std::vector<float> y(x.size());
    const auto quantized = [&]<class Q>(Q) {
        std::vector<std::uint8_t> codes(x.size());
        typename Q::metadata m{};
        if (!Q::quantize(x, codes, m))
            throw std::logic_error("the model's values can be quantized");
        for (std::size_t i = 0; i < x.size(); ++i)
            y[i] = Q::dequantize(codes[i], m);
        return y;
    };
    return with_type_of(f, [&]<class F>() {
        constexpr kv1::format_info format = kv1::info_of(kv1::kv_format_of<F>);
        if constexpr (format.code_bits == 0)
            std::transform(x.begin(), x.end(), y.begin(),
                           [](float v) { return static_cast<float>(typename F::value_type(v)); });
        else if constexpr (format.fits_levels)
            return levels == kv1::level_choice::min_max ? quantized(F{}) : quantized(kv1::least_squares<F>{});
        else
            return quantized(F{});
        return y;
    });
}

/// A vector of this head with its mean taken off and rotated, as it is stored.
inline void prepare(const kv1::vector_encoding& e, std::size_t head, std::span<float> x) {
    for (std::size_t c = 0; c < x.size() && !e.means.empty(); ++c)
        x[c] -= e.means[head * x.size() + c];
    if (e.hadamard != 0)
        kv1::hadamard_transform(x, e.hadamard);
}
/// Rotates a vector back and adds its mean, as reading does.
inline void restore(const kv1::vector_encoding& e, std::size_t head, std::span<float> x) {
    if (e.hadamard != 0)
        kv1::hadamard_transform(x, e.hadamard);
    for (std::size_t c = 0; c < x.size() && !e.means.empty(); ++c)
        x[c] += e.means[head * x.size() + c];
}

/// through_format() by groups of channels, of a vector that is prepared and restored. Error weights are not
/// modelled.
inline std::vector<float> through_encoding(kv1::kv_format f, const kv1::vector_encoding& e, std::size_t head,
                                           std::vector<float> x, std::size_t group = 0) {
    const std::size_t part = group == 0 ? x.size() : group;
    prepare(e, head, x);
    for (auto at = x.begin(); at != x.end(); at += static_cast<std::ptrdiff_t>(part)) {
        const std::vector<float> y =
            through_format(f, {at, at + static_cast<std::ptrdiff_t>(part)}, e.levels);
        std::copy(y.begin(), y.end(), at);
    }
    restore(e, head, x);
    return x;
}

inline double norm_of(std::span<const float> x) {
    double sum = 0.0;
    for (const float v : x)
        sum += static_cast<double>(v) * static_cast<double>(v);
    return std::sqrt(sum);
}

inline std::uint64_t next_history(std::uint64_t history, std::int32_t token) {
    return generator(history * 31 + static_cast<std::uint32_t>(token) + 1).bits();
}

/// K or V of a token as an engine computes it, [kv_heads][dim].
inline std::vector<float> token_values(std::uint64_t history, std::size_t layer, kv1::kv_side side,
                                       std::size_t n) {
    generator g(history ^ (layer * 2 + (side == kv1::kv_side::key ? 0u : 1u) + 1) * 0x9e3779b97f4a7c15u);
    std::vector<float> x(n);
    for (float& v : x) // coarse and cheap; some spread over the heads
        v = static_cast<float>(static_cast<std::int64_t>(g.bits() >> 48) - 32768) * 0x1p-14f;
    return x;
}

struct model_token {
    std::vector<float> keys, values;     // as stored, [kv_heads][dim]
    std::vector<float> keys16, values16; // rounded to fp16
    std::vector<float> prepared16;       // of keys per channel: mean off, rotated, rounded to fp16
};

struct model_sequence {
    std::uint64_t salt = 0;
    std::vector<std::int32_t> ids;                // of the longest layer
    std::vector<std::uint64_t> histories;         // after each of them
    std::vector<std::vector<model_token>> layers; // [layer][token]
    std::set<std::size_t> dropped;                // pages
    std::vector<std::size_t> given_up;            // [layer]: commits have freed tokens before this one
    std::optional<std::size_t> committed;
    std::size_t fp16_from = 0;

    [[nodiscard]] std::size_t shortest() const {
        std::size_t n = layers[0].size();
        for (const auto& l : layers)
            n = std::min(n, l.size());
        return n;
    }
    [[nodiscard]] bool agreed() const {
        return std::all_of(layers.begin(), layers.end(),
                           [&](const auto& l) { return l.size() == layers[0].size(); });
    }
};

/// What options ask of one query row, beside the cache's own rules: only tokens first ... end - 1, and of
/// them those that a mask shows. Windows count back from `own`, one past the query's own token.
struct row_request {
    std::size_t first = 0, end = std::numeric_limits<std::size_t>::max();
    row_options options = {};
    std::optional<std::size_t> own;              // where absent: one past the last token that is seen
    std::function<bool(std::size_t)> shows = {}; // where empty: all
    std::function<bool(std::size_t)> only =
        {}; // of what is seen, the part that is asked for; where empty: all
};

/// What calls of a cache do to model sequences.
class cache_model {
public:
    explicit cache_model(kv1::cache_description d) : description_(std::move(d)) {}

    [[nodiscard]] const kv1::cache_description& description() const { return description_; }
    [[nodiscard]] bool has_copies(std::size_t layer) const {
        const kv1::layer_description& l = description_.layers[layer];
        const auto plain = [](kv1::kv_format f) {
            return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16;
        };
        return (description_.fp16_sinks != 0 || description_.fp16_window != 0) && l.sliding_window == 0 &&
               !(plain(l.key_format) && plain(l.value_format));
    }

    [[nodiscard]] model_sequence empty(std::uint64_t salt) const {
        model_sequence s;
        s.salt = salt;
        s.layers.resize(description_.layers.size());
        s.given_up.assign(description_.layers.size(), 0);
        return s;
    }
    /// Gives token `position` an id if it has none, and returns the hash of the tokens up to it.
    static std::uint64_t history(model_sequence& s, std::size_t position, std::int32_t id) {
        if (position == s.ids.size()) {
            s.ids.push_back(id);
            s.histories.push_back(next_history(position == 0 ? s.salt : s.histories.back(), id));
        }
        return s.histories[position];
    }
    [[nodiscard]] model_token token(std::uint64_t history, std::size_t layer) const {
        const kv1::layer_description& l = description_.layers[layer];
        model_token t;
        if (per_channel(layer)) {
            t.prepared16 = token_values(history, layer, kv1::kv_side::key, l.kv_heads * l.key_dim);
            if (has_copies(layer))
                t.prepared16 = through_format(kv1::kv_format::fp16, t.prepared16);
            for (std::size_t h = 0; h < l.kv_heads; ++h)
                prepare(l.key_encoding, h, std::span(t.prepared16).subspan(h * l.key_dim, l.key_dim));
            t.prepared16 = through_format(kv1::kv_format::fp16, t.prepared16);
        }
        const auto side = [&](kv1::kv_side which, std::size_t dim, kv1::kv_format f, std::size_t group,
                              const kv1::vector_encoding& e, std::vector<float>& stored,
                              std::vector<float>& halves) {
            const std::vector<float> all = token_values(history, layer, which, l.kv_heads * dim);
            for (std::size_t h = 0; h < l.kv_heads; ++h) {
                std::vector<float> x(all.begin() + static_cast<std::ptrdiff_t>(h * dim),
                                     all.begin() + static_cast<std::ptrdiff_t>((h + 1) * dim));
                const std::vector<float> rounded = through_format(kv1::kv_format::fp16, x);
                const std::vector<float> y =
                    through_encoding(f, e, h, has_copies(layer) ? rounded : x, group);
                stored.insert(stored.end(), y.begin(), y.end());
                halves.insert(halves.end(), rounded.begin(), rounded.end());
            }
        };
        side(kv1::kv_side::key, l.key_dim, l.key_format, l.key_group, l.key_encoding, t.keys, t.keys16);
        if (l.values_in_keys)
            for (std::size_t h = 0; h < l.kv_heads; ++h)
                for (const auto& [to, from] :
                     {std::pair(&t.values, &t.keys), std::pair(&t.values16, &t.keys16)}) {
                    const auto first = from->begin() + static_cast<std::ptrdiff_t>(h * l.key_dim);
                    to->insert(to->end(), first, first + static_cast<std::ptrdiff_t>(l.value_dim));
                }
        else
            side(kv1::kv_side::value, l.value_dim, l.value_format, l.value_group, l.value_encoding, t.values,
                 t.values16);
        return t;
    }

    [[nodiscard]] bool per_channel(std::size_t layer) const {
        return description_.layers[layer].key_axis == kv1::quantization_axis::per_channel;
    }
    /// Appends tokens to a layer.
    void push(model_sequence& s, std::size_t layer, std::span<const model_token> tokens) const {
        auto& to = s.layers[layer];
        const std::size_t first = to.size() / description_.page_tokens;
        to.insert(to.end(), tokens.begin(), tokens.end());
        settle(s, layer, first);
    }
    /// Computes keys per channel again, from a page on: codes in full pages, fp16 in the open one.
    void settle(model_sequence& s, std::size_t layer, std::size_t first_page) const {
        if (!per_channel(layer))
            return;
        const kv1::layer_description& l = description_.layers[layer];
        auto& tokens = s.layers[layer];
        const std::size_t page = description_.page_tokens, channels = l.kv_heads * l.key_dim;
        for (std::size_t first = first_page * page; first < tokens.size(); first += page) {
            const std::size_t count = std::min(page, tokens.size() - first);
            std::vector<std::vector<float>> stored;
            for (std::size_t t = 0; t < count; ++t)
                stored.push_back(tokens[first + t].prepared16);
            for (std::size_t c = 0; c < channels && count == page; ++c) {
                std::vector<float> x;
                for (const auto& row : stored)
                    x.push_back(row[c]);
                x = through_format(l.key_format, x, l.key_encoding.levels);
                for (std::size_t t = 0; t < count; ++t)
                    stored[t][c] = x[t];
            }
            for (std::size_t t = 0; t < count; ++t) {
                for (std::size_t h = 0; h < l.kv_heads; ++h)
                    restore(l.key_encoding, h, std::span(stored[t]).subspan(h * l.key_dim, l.key_dim));
                tokens[first + t].keys = stored[t];
            }
        }
    }

    /// Whether a truncation is allowed.
    [[nodiscard]] kv1::errc can_truncate(const model_sequence& s, std::size_t n) const {
        if (n > s.shortest())
            return kv1::errc::out_of_range;
        const std::size_t page = description_.page_tokens;
        for (std::size_t l = 0; l < s.layers.size(); ++l) {
            if (n % page != 0 && (s.dropped.contains(n / page) || n < s.given_up[l]))
                return kv1::errc::dropped_tokens;
            const auto open = [&](std::size_t tokens) {
                return tokens % page != 0 && tokens / page == n / page;
            };
            if (n % page != 0 && per_channel(l) && !open(s.layers[l].size()) &&
                !open(s.committed.value_or(0)))
                return kv1::errc::dropped_tokens;
            if (const std::size_t w = description_.layers[l].sliding_window; w != 0) {
                const std::size_t first = n + 1 > w ? n + 1 - w : 0;
                if (std::min(n, s.given_up[l]) > first)
                    return kv1::errc::dropped_tokens;
            }
        }
        return kv1::errc::ok;
    }
    void truncate(model_sequence& s, std::size_t n) const {
        for (std::size_t l = 0; l < s.layers.size(); ++l) {
            s.layers[l].resize(n);
            settle(s, l, n / description_.page_tokens);
        }
        s.ids.resize(n);
        s.histories.resize(n);
        if (s.committed)
            s.committed = std::min(*s.committed, n);
        s.fp16_from = std::min(s.fp16_from, n);
        const std::size_t page = description_.page_tokens, pages = (n + page - 1) / page;
        s.dropped.erase(s.dropped.lower_bound(pages), s.dropped.end());
        for (std::size_t& g : s.given_up)
            g = std::min(g, pages * page);
    }
    void commit(model_sequence& s) const {
        const std::size_t n = s.layers[0].size(), page = description_.page_tokens;
        s.committed = n;
        for (std::size_t l = 0; l < s.layers.size(); ++l)
            if (const std::size_t w = description_.layers[l].sliding_window,
                kept = w + description_.layers[l].window_retention;
                w != 0 && n + 1 > kept)
                s.given_up[l] = std::max(s.given_up[l], (n + 1 - kept) / page * page);
        const std::size_t r = description_.fp16_window;
        s.fp16_from = std::max(s.fp16_from, r == 0 ? n : n + 1 > r ? n + 1 - r : 0);
    }

    /// The first of the last `window` tokens before `end` that the mask shows.
    [[nodiscard]] static std::size_t window_start(std::size_t window, std::size_t end,
                                                  const row_request& asked) {
        std::size_t t = end;
        for (std::size_t seen = 0; t != 0 && seen != window;)
            seen += shown(asked, --t) ? 1u : 0u;
        return t;
    }
    [[nodiscard]] static bool shown(const row_request& asked, std::size_t t) {
        return !asked.shows || asked.shows(t);
    }
    /// Tokens of a layer that a query which sees tokens before `last` would attend to if none were gone.
    [[nodiscard]] std::vector<std::size_t> wanted(std::size_t layer, std::size_t last,
                                                  const row_request& asked) const {
        const std::size_t w = description_.layers[layer].sliding_window;
        std::vector<std::size_t> out;
        for (std::size_t t = w != 0 ? window_start(w, asked.own.value_or(last), asked) : 0; t < last; ++t)
            if (t >= asked.first && t < asked.end && shown(asked, t))
                out.push_back(t);
        return out;
    }
    /// Whether a commit has freed any of them.
    [[nodiscard]] bool lacks(const model_sequence& s, std::size_t layer, std::size_t last,
                             const row_request& asked = {}) const {
        const std::vector<std::size_t> all = wanted(layer, last, asked);
        return !all.empty() && all.front() < s.given_up[layer];
    }

    /// Tokens that such a query attends to, by the form it sees them in: sinks, quantized, window.
    struct seen {
        std::vector<std::size_t> sinks, quantized, window;
    };
    [[nodiscard]] seen visible(const model_sequence& s, std::size_t layer, std::size_t last,
                               const row_request& asked = {}) const {
        const std::size_t page = description_.page_tokens,
                          newest = window_start(description_.fp16_window, asked.own.value_or(last), asked);
        seen out;
        for (const std::size_t t : wanted(layer, last, asked)) {
            if (s.dropped.contains(t / page) || t < s.given_up[layer] || (asked.only && !asked.only(t)))
                continue;
            const bool recent = t >= newest && t >= s.fp16_from;
            if (has_copies(layer) && t < description_.fp16_sinks)
                out.sinks.push_back(t);
            else if (has_copies(layer) && description_.fp16_window != 0 && recent)
                out.window.push_back(t);
            else
                out.quantized.push_back(t);
        }
        return out;
    }

    /// The exact result of a query row over those tokens, and how far off it may be.
    [[nodiscard]] bounded_row attend(const model_sequence& s, std::size_t layer, std::size_t kv_head,
                                     std::span<const float> query, std::size_t last,
                                     const row_request& asked = {}) const {
        const kv1::layer_description& l = description_.layers[layer];
        const seen tokens = visible(s, layer, last, asked);
        std::vector<bounded_row> parts;
        for (const auto& [all, copy] : {std::pair(&tokens.sinks, true), std::pair(&tokens.quantized, false),
                                        std::pair(&tokens.window, true)})
            for (const std::vector<std::size_t>& list : side_by_side(s, *all, asked)) {
                cached_side k, v;
                k.dim = l.key_dim;
                v.dim = l.value_dim;
                std::vector<std::size_t> places;
                const bool in_place = asked.options.alibi_slope != 0.0f; // what is not shown leaves a gap
                for (const std::size_t t : list) {
                    const model_token& x = s.layers[layer][t];
                    const std::size_t at = in_place ? t - list.front() : places.size();
                    k.values.resize(at * l.key_dim);
                    v.values.resize(at * l.value_dim);
                    append(k.values, copy ? x.keys16 : x.keys, kv_head, l.key_dim);
                    append(v.values, copy ? x.values16 : x.values, kv_head, l.value_dim);
                    places.push_back(at);
                }
                std::vector<std::size_t>
                    starts; // chunks of a page or more: more of them bound more roundings
                for (std::size_t t = 0; t <= places.back(); t += description_.page_tokens)
                    starts.push_back(t);
                row_options own = asked.options; // places count from the first token of the part
                own.position -= static_cast<double>(list.front());
                own.sink_logit.reset();
                parts.push_back(expect_row(query, 1.0f / std::sqrt(static_cast<float>(l.key_dim)), k, v,
                                           places, starts, kv1::precision::exact, own)
                                    .truth);
                if (!copy)
                    allow_for_encodings(l, kv_head, query, k, v, starts.size(), parts.back());
                if (!copy && per_channel(layer))
                    allow_for_channels(s, layer, kv_head, query, v, parts.back());
            }
        if (asked.options.sink_logit) { // a token of its own, whose value is zero
            bounded_row& sink = parts.emplace_back();
            sink.out.assign(l.value_dim, 0.0);
            sink.out_bound.assign(l.value_dim, 0.0);
            sink.lse = *asked.options.sink_logit;
        }
        return merged(parts, l.value_dim);
    }

    /// Parts joined by their log-sum-exp. A part's weight exp(lse - total) is as wrong as its lse: by its own
    /// bound, the roundings of the differences and of exp and log; each join adds a few.
    static bounded_row merged(const std::vector<bounded_row>& parts, std::size_t channels) {
        bounded_row r;
        r.out.assign(channels, 0.0);
        r.out_bound.assign(channels, 0.0);
        if (parts.empty())
            return r;
        double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
        for (const bounded_row& p : parts)
            top = std::max(top, p.lse);
        for (const bounded_row& p : parts)
            sum += std::exp(p.lse - top);
        r.lse = top + std::log(sum);
        const auto joins = static_cast<double>(std::max<std::size_t>(parts.size(), 4));
        std::vector<double> weight, wrong;
        for (const bounded_row& p : parts) {
            weight.push_back(std::exp(p.lse - r.lse));
            const double step =
                2 * unit_roundoff * (std::fabs(p.lse) + std::fabs(r.lse) + 2.0) + 2 * exp_error;
            wrong.push_back(std::expm1(2 * p.lse_bound + joins * step));
            r.lse_bound = std::max(r.lse_bound, p.lse_bound + joins * step);
        }
        for (std::size_t c = 0; c < channels; ++c) {
            for (std::size_t i = 0; i < parts.size(); ++i)
                r.out[c] += weight[i] * parts[i].out[c];
            for (std::size_t i = 0; i < parts.size(); ++i)
                r.out_bound[c] += weight[i] * (parts[i].out_bound[c] +
                                               wrong[i] * (std::fabs(parts[i].out[c]) + std::fabs(r.out[c])) +
                                               gamma(8 * joins) * std::fabs(parts[i].out[c]));
            /// weights and products that are less than a normal fp32 number may be lost
            for (const bounded_row& p : parts)
                r.out_bound[c] += std::numeric_limits<float>::min() * joins * (1.0 + std::fabs(p.out[c]));
        }
        return r;
    }

private:
    // Tokens of a part that are attended to as one: with ALiBi's slopes those between two dropped pages.
    [[nodiscard]] std::vector<std::vector<std::size_t>> side_by_side(const model_sequence& s,
                                                                     const std::vector<std::size_t>& all,
                                                                     const row_request& asked) const {
        std::vector<std::vector<std::size_t>> lists;
        for (const std::size_t t : all) {
            bool apart = lists.empty();
            if (!apart && asked.options.alibi_slope != 0.0f)
                for (std::size_t p = lists.back().back() / description_.page_tokens;
                     p < t / description_.page_tokens; ++p)
                    apart = apart || s.dropped.contains(p);
            if (apart)
                lists.emplace_back();
            lists.back().push_back(t);
        }
        return lists;
    }

    // Attention turns the query instead of the keys, and the output instead of the values; expect_row() took
    // them as they are read. Turning in blocks of 2^L moves a vector by gamma(L + 2) of its norm, whether it
    // is the query, the output or the vector that is read; sums of products in the turned basis err by
    // gamma(terms) of the norms' product (Cauchy and Schwarz), and means come in as terms of their own. No
    // vector in the turned basis is longer than what is read and twice the mean.
    static void allow_for_encodings(const kv1::layer_description& l, std::size_t head,
                                    std::span<const float> query, const cached_side& k, const cached_side& v,
                                    std::size_t chunks, bounded_row& row) {
        const auto longest = [&](const cached_side& side, const kv1::vector_encoding& e) {
            double most = 0.0;
            for (std::size_t at = 0; at < side.values.size(); at += side.dim)
                most = std::max(most, norm_of(std::span(side.values).subspan(at, side.dim)));
            return most + (e.means.empty()
                               ? 0.0
                               : 2.0 * norm_of(std::span(e.means).subspan(head * side.dim, side.dim)));
        };
        const auto turns = [](const kv1::vector_encoding& e) {
            return e.hadamard == 0 ? 0.0 : static_cast<double>(std::bit_width(e.hadamard) + 1);
        };
        const auto tokens = static_cast<double>(v.values.size() / v.dim);
        const kv1::vector_encoding of_values = value_encoding_of(l);
        if (l.key_encoding != kv1::vector_encoding{}) {
            const auto terms = static_cast<double>(l.key_dim) + 35;
            const double score = norm_of(query) / std::sqrt(static_cast<double>(l.key_dim)) *
                                 longest(k, l.key_encoding) *
                                 (2 * gamma(terms) + 2 * gamma(turns(l.key_encoding)));
            row.lse_bound += score;
            for (double& bound : row.out_bound) // weights that sum to one, each off by 2 score at most
                bound += std::expm1(2 * score) * 2 * longest(v, of_values);
        }
        if (of_values != kv1::vector_encoding{})
            for (double& bound : row.out_bound)
                bound += longest(v, of_values) * (gamma(tokens + 3 * static_cast<double>(chunks) + 12) +
                                                  2 * gamma(turns(of_values)) + gamma(2));
    }

    // Of values that lie in keys: the keys', of those channels.
    static kv1::vector_encoding value_encoding_of(const kv1::layer_description& l) {
        if (!l.values_in_keys)
            return l.value_encoding;
        kv1::vector_encoding e{.levels = l.key_encoding.levels, .hadamard = l.key_encoding.hadamard};
        for (std::size_t at = 0; at < l.key_encoding.means.size(); at += l.key_dim)
            for (std::size_t c = 0; c < l.value_dim; ++c)
                e.means.push_back(l.key_encoding.means[at + c]);
        return e;
    }

    // Attention multiplies the query by a page's scales instead of the codes, and takes its minima from sums
    // of their own: terms s level and m of a product q (s level + m). Fitted levels reach no further than 1.3
    // ranges beyond each other, so that neither is larger than 10 times a channel's largest key; sums err by
    // gamma(terms) of the norms' product.
    void allow_for_channels(const model_sequence& s, std::size_t layer, std::size_t head,
                            std::span<const float> query, const cached_side& v, bounded_row& row) const {
        const std::size_t dim = description_.layers[layer].key_dim;
        std::vector<float> reach(dim);
        for (const model_token& t : s.layers[layer])
            for (std::size_t c = 0; c < dim; ++c)
                reach[c] = std::max(reach[c], std::fabs(t.prepared16[head * dim + c]));
        const double score = norm_of(query) / std::sqrt(static_cast<double>(dim)) * 20 * norm_of(reach) *
                             gamma(static_cast<double>(dim) + 40);
        double longest = 0.0;
        for (std::size_t at = 0; at < v.values.size(); at += v.dim)
            longest = std::max(longest, norm_of(std::span(v.values).subspan(at, v.dim)));
        row.lse_bound += score;
        for (double& bound : row.out_bound)
            bound += std::expm1(2 * score) * 2 * longest;
    }

    static void append(std::vector<float>& to, const std::vector<float>& from, std::size_t head,
                       std::size_t dim) {
        to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(head * dim),
                  from.begin() + static_cast<std::ptrdiff_t>((head + 1) * dim));
    }

    kv1::cache_description description_;
};

} // namespace kv1_test
