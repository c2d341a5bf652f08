// SPDX-License-Identifier: Apache-2.0
//
// The scalar target: every kernel in plain C++, written from the definitions (quantizers, layout accessors)
// and not from the vectorized sources, so that it can serve as their oracle. Slow on purpose.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/scaled_binary.hpp>

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

template <quantizer Q>
encode_result encode(const float* x, std::size_t n, std::uint8_t* codes) noexcept {
    typename Q::metadata m{};
    const status s = Q::quantize({x, n}, {codes, n}, m);
    encode_result result{
        s.code(), s.rule(), static_cast<std::size_t>(std::max<std::int64_t>(s.where().channel, 0)), {}};
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
    default:
        return encode<affine<8>>(x, n, codes);
    }
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

template <storage_format Format>
float decoded(const section_view& view, std::size_t token, std::size_t channel) noexcept {
    const std::size_t t = view.first_token + token;
    return decode_value(kv_format_of<Format>, load_code(*view.layout, view.page, t, channel),
                        load_metadata(*view.layout, view.page, t));
}

template <storage_format Format>
void key_scores_exact(const section_view& view, const query_rows& q, float* scores,
                      std::size_t stride) noexcept {
    for (std::size_t r = 0; r < q.rows; ++r)
        for (std::size_t t = 0; t < view.tokens; ++t) {
            float sum = 0.0f;
            for (std::size_t c = 0; c < view.layout->channels; ++c)
                sum += q.values[r * q.stride + c] * decoded<Format>(view, t, c);
            scores[r * stride + t] = sum;
        }
}

// The 8-bit code of a quotient by the step; NaN, which a query may hold, becomes 0.
inline std::int8_t rounded_code(float quotient) noexcept {
    return quotient > -128.0f && quotient < 128.0f ? static_cast<std::int8_t>(std::nearbyint(quotient))
                                                   : std::int8_t{0};
}

// The integer path by its definition; codes[1] of the query rows holds them in channel order on this target.
template <storage_format Format>
void key_scores_fast(const section_view& view, const query_rows& q, float* scores,
                     std::size_t stride) noexcept {
    const std::int64_t max_code = (1 << traits_of(kv_format_of<Format>).code_bits) - 1;
    for (std::size_t r = 0; r < q.rows; ++r)
        for (std::size_t t = 0; t < view.tokens; ++t) {
            const std::size_t at = view.first_token + t;
            std::int64_t twice = 0; // 2 * sum i (c - max_code / 2)
            for (std::size_t c = 0; c < view.layout->channels; ++c)
                twice +=
                    q.codes[1][r * q.stride + c] *
                    (2 * static_cast<std::int64_t>(load_code(*view.layout, view.page, at, c)) - max_code);
            const affine_pair p =
                decode_metadata(kv_format_of<Format>, load_metadata(*view.layout, view.page, at));
            scores[r * stride + t] = p.slope * (static_cast<float>(twice) * (0.5f * q.code_scales[r])) +
                                     (p.base + p.slope * (0.5f * static_cast<float>(max_code))) * q.sums[r];
        }
}

template <storage_format Format>
void value_sums_exact(const section_view& view, const weight_rows& w, float* sums,
                      std::size_t stride) noexcept {
    for (std::size_t r = 0; r < w.rows; ++r)
        for (std::size_t c = 0; c < view.layout->channels; ++c) {
            float sum = sums[r * stride + c] * w.rescale[r];
            for (std::size_t t = 0; t < view.tokens; ++t)
                sum += w.weights[r * w.stride + t] * decoded<Format>(view, t, c);
            sums[r * stride + c] = sum;
        }
}

template <storage_format Format>
void value_sums_fast(const section_view& view, const weight_rows& w, float* sums,
                     std::size_t stride) noexcept {
    const std::int64_t max_code = (1 << traits_of(kv_format_of<Format>).code_bits) - 1;
    for (std::size_t r = 0; r < w.rows; ++r) {
        float scaled[max_block_tokens];
        float top = 0.0f, affine_sum = 0.0f;
        for (std::size_t t = 0; t < view.tokens; ++t) {
            const affine_pair p = decode_metadata(
                kv_format_of<Format>, load_metadata(*view.layout, view.page, view.first_token + t));
            const float weight = w.weights[r * w.stride + t];
            scaled[t] = weight * p.slope;
            affine_sum += weight * (p.base + p.slope * (0.5f * static_cast<float>(max_code)));
            top = std::max(top, scaled[t]);
        }
        const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        for (std::size_t c = 0; c < view.layout->channels; ++c) {
            std::int64_t twice = 0;
            for (std::size_t t = 0; t < view.tokens; ++t)
                twice += rounded_code(scaled[t] * inverse) *
                         (2 * static_cast<std::int64_t>(
                                  load_code(*view.layout, view.page, view.first_token + t, c)) -
                          max_code);
            sums[r * stride + c] = sums[r * stride + c] * w.rescale[r] + affine_sum +
                                   static_cast<float>(twice) * (0.5f * (top / 127.0f));
        }
    }
}

inline void attend_rows(const attention_job& job) noexcept {
    constexpr float lowest = std::numeric_limits<float>::lowest();
    const section_layout& keys = job.layout->keys();
    const section_layout& values = job.layout->values();
    const auto mode = static_cast<std::size_t>(job.mode);
    float query[max_head_dim], sums[max_head_dim], scores[max_block_tokens];
    std::int8_t codes[max_head_dim];
    for (std::size_t r = 0; r < job.rows; ++r) {
        const std::size_t token = (job.first_row + r) / job.group, head = (job.first_row + r) % job.group;
        const std::ptrdiff_t query_size = job.query_type == scalar_type::fp32 ? 4 : 2;
        load_floats(job.query_type,
                    static_cast<const std::byte*>(job.queries) +
                        (static_cast<std::ptrdiff_t>(token) * job.query_token_stride +
                         static_cast<std::ptrdiff_t>(head) * job.query_head_stride) *
                            query_size,
                    keys.channels, query);
        float query_sum = 0.0f, top = 0.0f;
        for (std::size_t c = 0; c < keys.channels; ++c) {
            query[c] *= job.scale;
            query_sum += query[c];
            top = std::max(top, std::fabs(query[c]));
        }
        const float step = top / 127.0f, inverse = top > 0.0f ? 127.0f / top : 0.0f;
        std::int32_t code_sum = 0;
        for (std::size_t c = 0; c < keys.channels; ++c) {
            codes[c] = rounded_code(query[c] * inverse);
            code_sum += codes[c];
        }
        std::fill_n(sums, values.channels, 0.0f);
        const query_rows q{1, keys.channels, query, &query_sum, {nullptr, codes}, &step, &code_sum};

        const std::size_t limit = std::min(job.visible_base + token * job.visible_step, job.last_token);
        float maximum = lowest, denominator = 0.0f;
        for (std::size_t first = job.first_token; first < limit;) {
            const std::size_t in_page = first % keys.tokens;
            const std::size_t n = std::min({keys.tokens - in_page, max_block_tokens, limit - first});
            const std::byte* page =
                job.pages + static_cast<std::size_t>(job.block_table[first / keys.tokens]) * job.block_stride;
            job.key_kernels->key_scores[mode]({&keys, page, in_page, n}, q, scores, max_block_tokens);
            for (std::size_t t = 0; t < n; ++t)
                if (job.mask != nullptr && first + t >= job.mask_first &&
                    job.mask[token * job.mask_stride + first + t - job.mask_first] == 0)
                    scores[t] = lowest;
            const float m = std::max(maximum, *std::max_element(scores, scores + n));
            const float rescale = maximum == lowest ? 0.0f : std::exp(maximum - m);
            denominator *= rescale;
            for (std::size_t t = 0; t < n; ++t) {
                scores[t] = m == lowest ? 0.0f : std::exp(scores[t] - m);
                denominator += scores[t];
            }
            maximum = m;
            job.value_kernels->value_sums[mode]({&values, page, in_page, n},
                                                {1, max_block_tokens, scores, &rescale}, sums, max_head_dim);
            first += n;
        }
        if (job.partials != nullptr) {
            float* partial = job.partials + r * job.partial_stride;
            partial[0] = maximum;
            partial[1] = denominator;
            std::copy_n(sums, values.channels, partial + 2);
            continue;
        }
        for (std::size_t c = 0; c < values.channels; ++c)
            sums[c] = denominator > 0.0f ? sums[c] / denominator : 0.0f;
        const std::ptrdiff_t output_size = job.output_type == scalar_type::fp32 ? 4 : 2;
        store_floats(job.output_type, sums, values.channels,
                     static_cast<std::byte*>(job.outputs) +
                         (static_cast<std::ptrdiff_t>(token) * job.output_token_stride +
                          static_cast<std::ptrdiff_t>(head) * job.output_head_stride) *
                             output_size);
        if (job.log_sum_exp != nullptr)
            job.log_sum_exp[r] = denominator > 0.0f ? maximum + std::log(denominator)
                                                    : -std::numeric_limits<float>::infinity();
    }
}

inline const target_kernels& kernels() noexcept {
    static constexpr target_kernels table{load_floats,    store_floats, encode_affine, encode<scaled_binary>,
                                          encode<binary>, pack,         unpack,        insert_codes,
                                          attend_rows};
    return table;
}

template <storage_format Format>
const format_kernels& kernels_for() noexcept {
    if constexpr (traits_of(kv_format_of<Format>).code_bits == 0) {
        static constexpr format_kernels table{{key_scores_exact<Format>, key_scores_exact<Format>},
                                              {value_sums_exact<Format>, value_sums_exact<Format>}};
        return table;
    } else {
        static constexpr format_kernels table{{key_scores_fast<Format>, key_scores_exact<Format>},
                                              {value_sums_fast<Format>, value_sums_exact<Format>}};
        return table;
    }
}

} // namespace kv1::inline KV1_ABI::detail::scalar
