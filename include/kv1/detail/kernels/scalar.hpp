// SPDX-License-Identifier: Apache-2.0
//
// The scalar target: every kernel in plain C++, written from the definitions (quantizers, layout accessors)
// and not from the vectorized sources, so that it can serve as their oracle. Slow on purpose.
#pragma once

#include <kv1/detail/encode_reference.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/restore.hpp>
#include <kv1/detail/kernels/softmax.hpp>
#include <kv1/quantizers/all.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail::scalar {

inline void load_floats(scalar_type type, const void* source, std::size_t n, float* out) noexcept {
    for (std::size_t i = 0; i < n; ++i)
        switch (type) {
        case scalar_type::fp32:
            out[i] = static_cast<const float*>(source)[i];
            break;
        case scalar_type::fp16:
            out[i] = half_to_float(static_cast<const std::uint16_t*>(source)[i]);
            break;
        case scalar_type::bf16:
            out[i] = bfloat_to_float(static_cast<const std::uint16_t*>(source)[i]);
            break;
        }
}

inline void store_floats(scalar_type type, const float* source, std::size_t n, void* out) noexcept {
    for (std::size_t i = 0; i < n; ++i)
        switch (type) {
        case scalar_type::fp32:
            static_cast<float*>(out)[i] = source[i];
            break;
        case scalar_type::fp16:
            static_cast<std::uint16_t*>(out)[i] = float_to_half(source[i]);
            break;
        case scalar_type::bf16:
            static_cast<std::uint16_t*>(out)[i] = float_to_bfloat(source[i]);
            break;
        }
}

inline void store_outputs(scalar_type type, const float* source, std::size_t n, void* out) noexcept {
    for (std::size_t i = 0; i < n; ++i)
        switch (type) {
        case scalar_type::fp32:
            static_cast<float*>(out)[i] = source[i];
            break;
        case scalar_type::fp16:
            static_cast<std::uint16_t*>(out)[i] = float_to_half(saturated(source[i], largest_half));
            break;
        case scalar_type::bf16:
            static_cast<std::uint16_t*>(out)[i] = float_to_bfloat(saturated(source[i], largest_bfloat));
            break;
        }
}

template <quantizer Q>
encode_result encode(const float* x, std::size_t n, std::uint8_t* codes) noexcept {
    typename Q::metadata m{};
    const status s = Q::quantize({x, n}, {codes, n}, m);
    encode_result result{
        s.code(), s.rule(), static_cast<std::size_t>(s.where().channel), {}}; // -1: no_channel
    if (!s)
        return result;
    std::fill(codes + n, codes + round_up(n, 16), std::uint8_t{0});
    if constexpr (requires { m.scale; })
        result.metadata.scale = m.scale.bits();
    if constexpr (requires { m.minimum; })
        result.metadata.minimum = m.minimum.bits();
    return result;
}

inline encode_result encode_affine(const float* x, std::size_t n, int bits, std::uint8_t* codes) noexcept {
    switch (bits) {
    case 1:
        return encode<affine<1>>(x, n, codes);
    case 2:
        return encode<affine<2>>(x, n, codes);
    case 3:
        return encode<affine<3>>(x, n, codes);
    case 4:
        return encode<affine<4>>(x, n, codes);
    case 5:
        return encode<affine<5>>(x, n, codes);
    case 6:
        return encode<affine<6>>(x, n, codes);
    case 7:
        return encode<affine<7>>(x, n, codes);
    case 8:
        return encode<affine<8>>(x, n, codes);
    }
    return {errc::unsupported_format, "affine codes have 1 to 8 bits", no_channel, {}};
}

inline void pack(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* bytes) noexcept {
    const auto b = static_cast<std::size_t>(bits);
    std::memset(bytes, 0, (n * b + 7) / 8);
    for (std::size_t i = 0; i < n; ++i)
        bytes[i * b / 8] = static_cast<std::uint8_t>(bytes[i * b / 8] | codes[i] << (i * b % 8));
}

inline void unpack(int bits, const std::uint8_t* bytes, std::size_t n, std::uint8_t* codes) noexcept {
    const auto b = static_cast<std::size_t>(bits);
    for (std::size_t i = 0; i < n; ++i)
        codes[i] = static_cast<std::uint8_t>(bytes[i * b / 8] >> (i * b % 8) & ((1 << bits) - 1));
}

inline void insert_codes(const section_layout& s, std::byte* page, std::size_t token,
                         const std::uint8_t* codes) noexcept {
    for (std::size_t c = 0; c < s.channels; ++c)
        store_code(s, page, token, c, codes[c]);
}

inline encode_result append_affine2(const vector_to_append* rows, std::size_t count,
                                    std::size_t& failed) noexcept {
    std::uint8_t codes[max_vector_length];
    for (const bool store : {false, true}) // nothing is stored before all are known to be good
        for (std::size_t i = 0; i < count; ++i) {
            const encode_result r = encode<affine<2>>(rows[i].x, rows[i].section->channels, codes);
            failed = i;
            if (r.code != errc::ok)
                return r;
            if (store) {
                insert_codes(*rows[i].section, rows[i].page, rows[i].token, codes);
                store_metadata(*rows[i].section, rows[i].page, rows[i].token, r.metadata);
            }
        }
    return {};
}

inline encode_result encode_vectors(const encoding_params& params, const vector_to_encode* rows,
                                    std::size_t count, std::uint8_t* codes, std::size_t stride,
                                    row_metadata* metadata, std::size_t& failed,
                                    const encode_scratch&) noexcept {
    for (failed = 0; failed < count; ++failed) {
        const encode_result r = encode_reference(params, rows[failed], codes + failed * stride,
                                                 metadata + failed * params.groups());
        if (r.code != errc::ok)
            return r;
    }
    return {};
}

#include <kv1/detail/precise_math_begin.inl>

inline void add_multiples(float* y, std::size_t stride, const float* factors, std::size_t rows,
                          const float* x, std::size_t n) noexcept {
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t i = 0; i < n; ++i)
            y[r * stride + i] = as_written(y[r * stride + i] + product_of(factors[r], x[i]));
}

#include <kv1/detail/precise_math_end.inl>

inline void rotate(float* x, std::size_t n, std::size_t width) noexcept { hadamard_transform({x, n}, width); }

inline void enter_basis(const basis_view& b, const float* x, std::size_t rows, float* y) noexcept {
    for (std::size_t r = 0; r < rows; ++r)
        to_basis(b, x + r * b.n, y + r * b.n);
}

// Slot i of a chunk.
struct slot_place {
    const std::byte* page;
    std::size_t token;
};
inline slot_place place_of(const chunk_view& view, std::size_t slot) noexcept {
    const tile_ref& tile = view.tiles[slot / tile_tokens];
    return {tile.page, tile.token + slot % tile_tokens};
}

// Where keys are quantized per channel the query has taken over scale and minimum: codes are the values.
template <storage_format Format>
affine_map affine_of(const chunk_view& view, std::size_t slot) noexcept {
    if (view.layout->axis == quantization_axis::per_channel)
        return {1.0f, 0.0f};
    const slot_place at = place_of(view, slot);
    return decode_metadata(kv_format_of<Format>, load_metadata(*view.layout, at.page, at.token));
}

template <storage_format Format>
float decoded(const chunk_view& view, std::size_t slot, std::size_t channel) noexcept {
    const slot_place at = place_of(view, slot);
    const std::uint32_t code = load_code(*view.layout, at.page, at.token, channel);
    if (view.layout->axis == quantization_axis::per_channel)
        return static_cast<float>(traits_of(kv_format_of<Format>).level(code));
    return decode_value(kv_format_of<Format>, code, load_metadata(*view.layout, at.page, at.token));
}

// level - top_level / 2, doubled to stay integral
template <storage_format Format>
std::int64_t centred_twice(const chunk_view& view, std::size_t slot, std::size_t channel) noexcept {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    const slot_place at = place_of(view, slot);
    return 2 * static_cast<std::int64_t>(t.level(load_code(*view.layout, at.page, at.token, channel))) -
           t.top_level();
}

template <storage_format Format>
float centre_of(const affine_map& p) noexcept {
    constexpr auto top = static_cast<float>(traits_of(kv_format_of<Format>).top_level());
    return p.base + p.slope * (0.5f * top);
}

template <storage_format Format>
void key_scores_exact(const chunk_view& view, const query_rows& q, float* scores, float*) noexcept {
    for (std::size_t r = 0; r < q.rows; ++r)
        for (std::size_t t = 0; t < view.count * tile_tokens; ++t) {
            float sum = 0.0f;
            for (std::size_t c = 0; c < view.layout->channels; ++c)
                sum += q.values[r * q.stride + c] * decoded<Format>(view, t, c);
            scores[r * score_stride + t] = sum;
        }
}

// The 8-bit code of a quotient by the step; NaN, which a query may hold, becomes 0.
inline std::int8_t rounded_code(float quotient) noexcept {
    return quotient > -128.0f && quotient < 128.0f ? static_cast<std::int8_t>(std::nearbyint(quotient))
                                                   : std::int8_t{0};
}

inline std::int64_t rounded_weight(float quotient) noexcept {
    return quotient >= -0.5f && quotient < 256.0f ? static_cast<std::int64_t>(std::nearbyint(quotient)) : 0;
}

// The integer path by its definition.
template <storage_format Format>
void key_scores_fast(const chunk_view& view, const query_rows& q, float* scores, float*) noexcept {
    for (std::size_t r = 0; r < q.rows; ++r)
        for (std::size_t t = 0; t < view.count * tile_tokens; ++t) {
            std::int64_t twice = 0; // 2 * sum i (level - top / 2)
            for (std::size_t c = 0; c < view.layout->channels; ++c)
                twice += q.codes[r * q.stride + c] * centred_twice<Format>(view, t, c);
            const affine_map p = affine_of<Format>(view, t);
            scores[r * score_stride + t] = p.slope * (static_cast<float>(twice) * (0.5f * q.code_scales[r])) +
                                           centre_of<Format>(p) * q.sums[r];
        }
}

// Scores of row r to weights in place.
inline void exponentiate(const softmax_rows& w, std::size_t slots, std::size_t r) noexcept {
    float sum = 0.0f;
    for (std::size_t t = 0; t < slots; ++t) {
        float& score = w.scores[r * score_stride + t];
        score = score == lowest_score ? 0.0f : std::exp2(std::fma(score, log2_e, -w.maxima[r]));
        sum += score;
    }
    w.denominators[r] = w.denominators[r] * w.rescale[r] + sum;
}

template <storage_format Format>
void value_sums_exact(const chunk_view& view, const softmax_rows& w, float* sums,
                      std::size_t stride) noexcept {
    const std::size_t slots = view.count * tile_tokens;
    for (std::size_t r = 0; r < w.rows; ++r) {
        exponentiate(w, slots, r);
        for (std::size_t c = 0; c < view.layout->channels; ++c) {
            float sum = sums[r * stride + c] * w.rescale[r];
            for (std::size_t t = 0; t < slots; ++t)
                sum += w.scores[r * score_stride + t] * decoded<Format>(view, t, c);
            sums[r * stride + c] = sum;
        }
    }
}

template <storage_format Format>
void value_sums_fast(const chunk_view& view, const softmax_rows& w, float* sums,
                     std::size_t stride) noexcept {
    const std::size_t slots = view.count * tile_tokens;
    for (std::size_t r = 0; r < w.rows; ++r) {
        exponentiate(w, slots, r);
        float scaled[max_chunk_slots];
        float top = 0.0f, affine_sum = 0.0f;
        for (std::size_t t = 0; t < slots; ++t) {
            const affine_map p = affine_of<Format>(view, t);
            const float weight = w.scores[r * score_stride + t];
            scaled[t] = weight * p.slope;
            affine_sum += weight * centre_of<Format>(p);
            top = (std::max)(top, scaled[t]);
        }
        constexpr auto top_code =
            static_cast<float>(top_weight_code(traits_of(kv_format_of<Format>).code_bits));
        const float inverse = top > 0.0f ? top_code / top : 0.0f;
        float total = 0.0f;
        for (std::size_t t = 0; t < slots; ++t)
            total += scaled[t];
        const bool few = total * inverse < few_codes;
        first_carries carries = few ? weight_carries : first_carries{};
        std::uint8_t codes[max_chunk_slots];
        std::int64_t code_sum = 0;
        for (std::size_t t = 0; t < slots; ++t) {
            float& carry = carries.at[t % tile_tokens];
            const float wanted = scaled[t] * inverse + carry;
            codes[t] = static_cast<std::uint8_t>(rounded_weight(wanted));
            code_sum += codes[t];
            if (few)
                carry = 0.5f * (carry + (wanted - static_cast<float>(codes[t])));
        }
        const float step = code_sum > 0 ? total / static_cast<float>(code_sum) : 0.0f;
        for (std::size_t c = 0; c < view.layout->channels; ++c) {
            std::int64_t twice = 0;
            for (std::size_t t = 0; t < slots; ++t)
                twice += codes[t] * centred_twice<Format>(view, t, c);
            sums[r * stride + c] =
                sums[r * stride + c] * w.rescale[r] + affine_sum + static_cast<float>(twice) * (0.5f * step);
        }
    }
}

// Whether query token `token` of a job sees cached token t, from the definition of the job.
inline bool sees(const attention_job& job, std::size_t token, std::size_t t) noexcept {
    if (t < job.first_visible || t >= job.last_token || t >= job.visible_base + token * job.visible_step)
        return false;
    if (job.window != 0 && static_cast<std::ptrdiff_t>(t + job.window) <=
                               job.first_position + static_cast<std::ptrdiff_t>(token))
        return false;
    return job.mask == nullptr || t < job.mask_first ||
           job.mask[token * job.mask_stride + t - job.mask_first] != 0;
}

// A score with an additive mask or the distance of positions; lowest_score if the query does not see the token.
inline float with_slot_rules(const slot_rules& rules, std::size_t query, std::size_t head, std::size_t t,
                             float score) noexcept {
    const float slope = rules.slopes != nullptr ? rules.slopes[head] : 1.0f;
    if (rules.bias != nullptr) {
        float added = 0.0f;
        load_floats(rules.bias_type,
                    rules.bias_row(query, head) +
                        static_cast<std::ptrdiff_t>(t - rules.bias_first) * rules.element(),
                    1, &added);
        if (added <= lowest_score)
            return lowest_score;
        score += slope * added;
    }
    if (rules.positions == nullptr)
        return score;
    const std::int32_t at = rules.positions[t];
    if (rules.bias == nullptr && rules.slopes != nullptr)
        score += slope * static_cast<float>(at - rules.query_positions[query]);
    const slot_rules::span seen = rules.seen_by(query);
    return at < seen.first || at > seen.last ? lowest_score : score;
}

// One row's 8-bit query: its step.
inline float round_query(std::span<const float> query, std::int8_t* codes) noexcept {
    float top = 0.0f;
    for (const float x : query)
        top = (std::max)(top, std::fabs(x));
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (std::size_t c = 0; c < query.size(); ++c)
        codes[c] = rounded_code(query[c] * inverse);
    return top / 127.0f;
}

// Scores of one row, scaled, against keys quantized per channel: sum_c q_c (scale_c level + minimum_c), a
// page after the other. first: the token of the first tile.
inline void channel_scores(const attention_job& job, std::span<const float> query, const tile_ref* tiles,
                           std::size_t count, std::size_t first, std::size_t mode, float* scores) noexcept {
    const section_layout& keys = job.layout->keys();
    auto& scaled = job.scratch->scaled;
    auto& codes = job.scratch->codes;
    for (std::size_t k = 0; k < count; ++k) { // tile by tile, for simplicity's sake
        const bool is_open = job.open_keys != nullptr && first + k * tile_tokens >= job.open_from;
        const tile_ref tile{is_open ? job.open_keys : tiles[k].page, tiles[k].token};
        float shift = 0.0f;
        for (std::size_t c = 0; c < query.size(); ++c) {
            const affine_map p =
                is_open ? affine_map{1.0f, 0.0f}
                        : decode_metadata(keys.format, load_channel_metadata(keys, tile.page, c));
            scaled[c] = query[c] * p.slope;
            shift += query[c] * p.base;
        }
        float sum = 0.0f;
        for (std::size_t c = 0; c < query.size(); ++c)
            sum += scaled[c];
        const float step = round_query({scaled, query.size()}, codes);
        const section_layout& layout = is_open ? job.open_layout->keys() : keys;
        (is_open ? job.open_kernels : job.key_kernels)
            ->key_scores[mode]({&layout, &tile, 1, nullptr, nullptr, 0, 0, 0},
                               {1, query.size(), scaled, &sum, codes, nullptr, &step, nullptr},
                               scores + k * tile_tokens, nullptr);
        for (std::size_t i = 0; i < tile_tokens; ++i)
            scores[k * tile_tokens + i] += shift;
    }
}

inline void attend_rows(const attention_job& job) noexcept {
    const section_layout& keys = job.layout->keys();
    const section_layout& values = job.layout->values();
    const auto mode = static_cast<std::size_t>(job.mode);
    auto &query = job.scratch->query, &sums = job.scratch->sums;
    auto &scores = job.scratch->scores, &group_scores = job.scratch->group_scores;
    auto& codes = job.scratch->codes;
    float query_sums[max_groups], steps[max_groups];
    const std::size_t key_groups = keys.groups(), key_group = keys.group_channels;
    const bool integer_keys = job.mode == precision::fast && keys.traits().code_bits != 0;
    const bool per_channel = keys.axis == quantization_axis::per_channel;
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.head_group,
                          head = (job.first_row + r) % job.head_group;
        const std::ptrdiff_t query_size = job.query_type == scalar_type::fp32 ? 4 : 2;
        load_floats(job.query_type,
                    static_cast<const std::byte*>(job.queries) +
                        (static_cast<std::ptrdiff_t>(token) * job.query_token_stride +
                         static_cast<std::ptrdiff_t>(head) * job.query_head_stride) *
                            query_size,
                    keys.channels, query);
        const float shift = key_shift(job, query);
        // the mean that turns, for its share of each score
        const turning_mean* const turning = job.key_turning;
        float* const waves = job.scratch->waves; // [pair][2]
        for (std::size_t j = 0; turning != nullptr && j < turning->count; ++j) {
            const float a = job.scale * query[turning->first_channel[j]],
                        b = job.scale * query[turning->second_channel[j]];
            waves[2 * j] = a * turning->first[j] + b * turning->second[j];
            waves[2 * j + 1] = b * turning->first[j] - a * turning->second[j];
        }
        if (job.key_basis)
            std::copy_n(job.queries_in_basis + (job.first_row + r) * keys.channels, keys.channels, query);
        if (job.key_hadamard != 0)
            rotate(query, keys.channels, job.key_hadamard);
        for (std::size_t g = 0; g < key_groups; ++g) {
            const std::span<float> part(query + g * key_group, key_group);
            query_sums[g] = 0.0f;
            for (float& x : part) {
                x *= job.scale;
                query_sums[g] += x;
            }
            steps[g] = round_query(part, codes + g * key_group);
            if (integer_keys && !per_channel) { // codes and bases meet the same query
                std::int32_t code_sum = 0;
                for (std::size_t c = 0; c < key_group; ++c)
                    code_sum += codes[g * key_group + c];
                query_sums[g] = steps[g] * static_cast<float>(code_sum);
            }
        }
        std::fill_n(sums, values.channels, 0.0f);

        // scores of some tiles, the first of which begins at token `first`
        const auto score_tiles = [&](const tile_ref* tiles, std::size_t count, std::size_t first,
                                     std::size_t how, float* out) {
            if (per_channel)
                channel_scores(job, {query, keys.channels}, tiles, count, first, how, out);
            for (std::size_t g = 0; !per_channel && g < key_groups; ++g) {
                const section_layout own = keys.group(g);
                std::int8_t* const own_codes = codes + g * key_group;
                job.key_kernels->key_scores[how]({&own, tiles, count, nullptr, nullptr, 0, 0, 0},
                                                 {1, key_group, query + g * key_group, query_sums + g,
                                                  own_codes, nullptr, steps + g, nullptr},
                                                 g == 0 ? out : group_scores, nullptr);
                for (std::size_t i = 0; g != 0 && i < count * tile_tokens; ++i)
                    out[i] += group_scores[i];
            }
            for (std::size_t i = 0; i < count * tile_tokens; ++i) {
                const std::size_t t = first + i;
                float& s = out[i];
                if (!sees(job, token, t)) {
                    s = lowest_score;
                    continue;
                }
                for (std::size_t j = 0; turning != nullptr && j < turning->count; ++j) {
                    const unit_vector u = unit_at(
                        static_cast<std::uint32_t>(turning->half_turns[j] * (2 * position_of(job, t)) >> 32));
                    s += waves[2 * j] * u.cosine + waves[2 * j + 1] * u.sine;
                }
                if (job.soft_cap > 0.0f)
                    s = job.soft_cap * std::tanh((s + shift) / job.soft_cap);
                if (job.alibi_slopes != nullptr)
                    s += job.alibi_slopes[head] *
                         static_cast<float>(static_cast<std::ptrdiff_t>(t) - job.first_position -
                                            static_cast<std::ptrdiff_t>(token));
                if (job.slots != nullptr)
                    s = with_slot_rules(*job.slots, token, job.first_head + head, t, s);
            }
        };

        softmax_state state;
        float exact_sum = 0.0f; // of weights by exact scores: of what other targets find out in some tiles
        const std::size_t last = (std::min)(job.visible_base + token * job.visible_step, job.last_token);
        for (std::size_t first = job.first_token; first < last;) {
            const std::size_t end = chunk_end(*job.layout, first, last);
            tile_ref tiles[max_chunk_tiles];
            std::size_t count = 0;
            for (std::size_t t = first; t < end; t += tile_tokens)
                tiles[count++] = {job.pages + static_cast<std::size_t>(job.block_table[t / keys.tokens]) *
                                                  job.block_stride,
                                  t % keys.tokens};
            score_tiles(tiles, count, first, mode, scores);
            const float maximum = *std::max_element(scores, scores + count * tile_tokens);
            const float m =
                (std::max)(maximum == lowest_score ? lowest_score : maximum * log2_e, state.maximum);
            const float rescale = softmax_rescale(state.maximum, m);
            state.maximum = m;
            if (integer_keys) {
                float exact[max_chunk_slots];
                score_tiles(tiles, count, first, static_cast<std::size_t>(precision::exact), exact);
                exact_sum *= rescale;
                for (std::size_t i = 0; i < count * tile_tokens && m != lowest_score; ++i)
                    exact_sum += std::exp2(exact[i] * log2_e - m);
            }
            const float denominator = state.denominator;
            for (std::size_t g = 0; g < values.groups(); ++g) { // all see the same scores
                const section_layout own = values.group(g);
                std::copy_n(scores, score_stride, group_scores);
                state.denominator = denominator;
                job.value_kernels->value_sums[mode]({&own, tiles, count, nullptr, nullptr, 0, 0, 0},
                                                    {1, group_scores, &m, &rescale, &state.denominator},
                                                    sums + g * values.group_channels, max_vector_length);
            }
            first = end;
        }
        const bool corrected = integer_keys && exact_sum > 0.0f && is_finite(exact_sum);
        const float wrong = corrected ? exact_sum / state.denominator : 1.0f;
        state.denominator *= wrong;
        for (std::size_t c = 0; c < values.channels; ++c)
            sums[c] *= wrong;
        if (job.partials != nullptr) {
            float* partial = job.partials + r * job.partial_stride;
            partial[0] = state.maximum;
            partial[1] = state.denominator;
            std::copy_n(sums, values.channels, partial + 2);
            continue;
        }
        shift_maximum(job, shift, state);
        const float seen_weights = state.denominator;
        const float factor = job.sink_logits != nullptr ? add_sink_logit(state, job.sink_logits[head]) : 1.0f;
        for (std::size_t c = 0; c < values.channels; ++c)
            sums[c] = state.denominator > 0.0f ? sums[c] * factor / state.denominator : 0.0f;
        restore_output(job, state.denominator > 0.0f ? factor * seen_weights / state.denominator : 0.0f,
                       sums);
        const std::ptrdiff_t output_size = job.output_type == scalar_type::fp32 ? 4 : 2;
        store_outputs(job.output_type, sums, values.channels,
                      static_cast<std::byte*>(job.outputs) +
                          (static_cast<std::ptrdiff_t>(token) * job.output_token_stride +
                           static_cast<std::ptrdiff_t>(head) * job.output_head_stride) *
                              output_size);
        if (job.log_sum_exp != nullptr)
            job.log_sum_exp[r] = log_sum_exp_of(state);
    }
}

inline const target_kernels& kernels() noexcept {
    static constexpr target_kernels table{
        load_floats,    store_floats,  store_outputs, encode_affine, encode<scaled_binary>,
        encode<binary>, pack,          unpack,        insert_codes,  append_affine2,
        encode_vectors, add_multiples, set_mean_at,   enter_basis,   from_basis,
        rotate,         attend_rows};
    return table;
}

template <storage_format Format>
const format_kernels& kernels_for() noexcept {
    if constexpr (traits_of(kv_format_of<Format>).code_bits == 0) {
        static constexpr format_kernels table{{key_scores_exact<Format>, key_scores_exact<Format>},
                                              nullptr,
                                              {value_sums_exact<Format>, value_sums_exact<Format>}};
        return table;
    } else {
        static constexpr format_kernels table{{key_scores_fast<Format>, key_scores_exact<Format>},
                                              nullptr,
                                              {value_sums_fast<Format>, value_sums_exact<Format>}};
        return table;
    }
}

// All that the registry asks of a target.
struct tables {
    template <class = void>
    static const target_kernels& common() noexcept {
        return kernels();
    }
    template <storage_format Format>
    static const format_kernels& of_format() noexcept {
        return kernels_for<Format>();
    }
};

} // namespace kv1::inline KV1_ABI::detail::scalar
