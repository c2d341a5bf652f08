// SPDX-License-Identifier: Apache-2.0
//
// codebook2: four levels at the places of a normal distribution's best four, with the metadata of compact<2>.
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
// whose boundaries lie half-way between levels. least_squares<codebook2> fits them better. O(n), no
// allocation.
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

static_assert(quantizer<codebook2>);

} // namespace kv1::inline KV1_ABI
