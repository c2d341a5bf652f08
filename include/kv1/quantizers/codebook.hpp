// SPDX-License-Identifier: Apache-2.0
//
// Formats whose levels are uneven, with the metadata of compact formats.
//
// codebook2: four levels at the places of a normal distribution's best four.
//
//   value = scale * (level + 14 (w - 64) / 128), levels 0, 5, 9, 14 for codes 0 ... 3
//
// About their middle the levels are -7, -2, 2, 7. The ratio 7/2 lies between even levels' 3 and 4; the best
// for a normal distribution is 3.34 (Lloyd and Max), and among small numbers, which integer dot products of
// bytes want, this one loses nothing to it that shows in vectors of 32 or 128 channels. It takes 2 % off the
// squared error of even levels, fitted alike by least squares, where channels are normal and alike, as
// rotated ones nearly are.
//
// quantize() takes the range of the vector as compact<2> does, with L = 14, and then, with scale and base as
// stored,
//
//   code = clamp(round_half_even((x - base - scale / 4) / (9/2 scale)), 0, 3)
//
// whose boundaries lie half-way between levels.
//
// codebook4: sixteen levels. Twelve are evenly spaced, and the outer two on each side lie further apart.
//
//   value = scale * (level + 36 (w - 64) / 128)
//   code   0 1 2 3  4  5  6  7  8  9 10 11 12 13 14 15
//   level  0 4 7 9 11 13 15 17 19 21 23 25 27 29 32 36
//
// Rotated channels are nearly normal: few lie far out, and those may have larger errors. Evenly spaced levels have to
// reach as far with the step of the middle. Among whole numbers, sets of levels with a top of 32 or less are poor, and
// one of 59 gains little more than 36 (examples/evaluation/README.md has figures). Twelve levels are even, so that the
// nearest code takes few operations. quantize() takes the range as compact<4> does, with L = 36. With scale and base as
// stored, and u the code that level 2 u + 3 would have,
//
//   u = (x - base - 3 scale) / (2 scale)
//   code = clamp(round_half_even(min(max(u, 4/7 u + 11/14), 4/7 u + 79/14)), 0, 15)
//
// The boundaries between levels 0, 4 and 7 lie at u = -1/2 and 5/4. The first line, 4/7 u + 11/14, takes them to 1/2
// and 3/2, where rounding changes the code. The second does the same for levels 29, 32 and 36. Between u = 11/6 and
// 79/6 neither changes u. So a code's level is nearest, but for what fp32 rounds half-way.
//
// least_squares<> fits levels better. O(n), no allocation.
#pragma once

#include <kv1/quantizers/compact.hpp>

namespace kv1::inline KV1_ABI {

namespace detail {

#include <kv1/detail/precise_math_begin.inl>

// Boundaries between neighbours are evenly spaced: of codes, in scales, and what the first level lies before
// them.
inline constexpr float codebook_step = 4.5f, codebook_lead = 0.25f;

template <>
struct level_format<codebook2> : compact_levels<14> {
    static constexpr float top = 14.0f, max_code = 3.0f;
};

template <>
struct code_rule<codebook2> {
    float inverse, base;

    code_rule(float scale, float level_base) noexcept
        : inverse(1.0f / as_written(product_of(scale, codebook_step))),
          base(as_written(level_base + product_of(scale, codebook_lead))) {}
    [[nodiscard]] float code(float x) const noexcept {
        return std::nearbyint(std::clamp((x - base) * inverse, 0.0f, 3.0f));
    }
    static constexpr float level(float code) noexcept { return code * 5.0f - (code >= 2.0f ? 1.0f : 0.0f); }
};

// The same of codebook4's middle levels, and the lines that take its outer boundaries half-way between codes.
inline constexpr float codebook4_step = 2.0f, codebook4_lead = 3.0f, codebook4_slope = 4.0f / 7.0f,
                       codebook4_low = 11.0f / 14.0f, codebook4_high = 79.0f / 14.0f;

template <>
struct level_format<codebook4> : compact_levels<36> {
    static constexpr float top = 36.0f, max_code = 15.0f;
};

template <>
struct code_rule<codebook4> {
    float inverse, base;

    code_rule(float scale, float level_base) noexcept
        : inverse(1.0f / as_written(product_of(scale, codebook4_step))),
          base(as_written(level_base + product_of(scale, codebook4_lead))) {}
    [[nodiscard]] float code(float x) const noexcept {
        const float u = (x - base) * inverse, sloping = product_of(u, codebook4_slope);
        const float steps = (std::min)((std::max)(u, sloping + codebook4_low), sloping + codebook4_high);
        return std::nearbyint(std::clamp(steps, 0.0f, 15.0f));
    }
    // 2 code + 3, but 4 code below 2, and 4 code - 24 above 13; small integers
    static constexpr float level(float code) noexcept {
        return (std::max)((std::min)(2.0f * code + 3.0f, 4.0f * code), 4.0f * code - 24.0f);
    }
};

// Fits of codebook4 begin wider than those of even levels, whose outermost levels have more of the channels.
template <>
inline constexpr float fit_start<codebook4> = 0.9f;

#include <kv1/detail/precise_math_end.inl>

} // namespace detail

/// The quantizer of levels 0, 5, 9, 14.
struct codebook2 {
    static constexpr int bits = 2;     ///< of a code
    static constexpr int max_code = 3; ///< the largest code
    using metadata = compact_metadata; ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite, not_representable (a value beyond fp16); outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        return detail::quantize_range<codebook2>(x, codes, out);
    }

    /// The value that a code stands for; exact.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        return detail::decode_value(kv_format::codebook2, code, {m.scale.bits(), 0});
    }
};

/// The quantizer of levels 0, 4, 7, 9, 11 ... 29, 32, 36.
struct codebook4 {
    static constexpr int bits = 4;      ///< of a code
    static constexpr int max_code = 15; ///< the largest code
    using metadata = compact_metadata;  ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite, not_representable (a value beyond fp16); outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        return detail::quantize_range<codebook4>(x, codes, out);
    }

    /// The value that a code stands for; exact.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        return detail::decode_value(kv_format::codebook4, code, {m.scale.bits(), 0});
    }
};

static_assert(quantizer<codebook2> && quantizer<codebook4>);

} // namespace kv1::inline KV1_ABI
