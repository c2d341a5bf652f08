// SPDX-License-Identifier: Apache-2.0
//
// compact<Bits>: 2^Bits evenly spaced levels whose scale and offset share 16 bits; 2 bytes less a vector than
// affine<Bits>. With L = 2^Bits - 1 and w = -63 ... 63,
//
//   value = scale * (code + L * (w - 64) / 128)            scale: fp16 with 4 bits of mantissa
//
// Zero always lies between the levels or next to them, so this format suits vectors about zero, such as
// centred ones (encoding.hpp). quantize() takes the range of the vector, widened to include zero:
//
//   lo = min(min x, 0), hi = max(max x, 0)
//   scale = (hi - lo) / L to fp16, half to even, then to 4 bits of mantissa, half up; at least 2^-18
//   w = clamp(round_half_even(128 lo / (scale L) + 64), -63, 63)
//   code = clamp(round_half_even((x - base) / scale), 0, L) with scale and base as stored
//
// least_squares<compact<Bits>> fits them better. O(n), no allocation.
#pragma once

#include <kv1/detail/page_fields.hpp>
#include <kv1/quantizer.hpp>

#include <algorithm>

namespace kv1::inline KV1_ABI {

/// Scale and offset in 16 bits.
struct compact_metadata {
    /// As stored (layout.hpp's compact_word): a finite fp16 number to those who only copy it.
    float16 scale;
};

namespace detail {

// Scale and base of evenly spaced levels as they are read back, and whether they could be stored.
struct stored_levels {
    row_metadata bits;
    float scale = 0.0f, base = 0.0f;
    bool fits = false;
    bool refined = false; // by least squares
};

// An fp16 number with -0 as +0: which of them a tiny number becomes depends on flush-to-zero.
constexpr std::uint16_t plain_zero(std::uint16_t half) noexcept {
    return half == 0x8000u ? std::uint16_t{0} : half;
}

// Levels that are fitted (least_squares.hpp) begin evenly over this share of the range.
template <class Q>
inline constexpr float fit_start = 0.8f;

// How a format keeps levels 0 ... top, of which codes 0 ... max_code stand for some. All of a target's
// kernels do the same, in this order.
template <class Q>
struct level_format;

// Evenly spaced levels are their codes.
template <int Top>
struct even_levels {
    static constexpr float top = static_cast<float>(Top), max_code = top;
};

#include <kv1/detail/precise_math_begin.inl>

template <int Top>
struct compact_levels {
    static constexpr float low(float lo) noexcept { return lo < 0.0f ? lo : 0.0f; }
    static constexpr float high(float hi) noexcept { return hi > 0.0f ? hi : 0.0f; }

    static std::uint16_t round_scale(float scale) noexcept {
        const int half = float_to_half(scale);
        const int rounded = (half + 0x20) & compact_word::scale_mask;
        return static_cast<std::uint16_t>(std::max<int>(rounded, compact_word::smallest_scale));
    }
    static float scale_of(std::uint16_t bits) noexcept { return half_to_float(bits); }
    static stored_levels store(std::uint16_t scale_bits, float base) noexcept {
        stored_levels s;
        s.scale = scale_of(scale_bits);
        s.fits = (scale_bits & 0x7c00u) != 0x7c00u;
        const float steps =
            base / as_written(s.scale * static_cast<float>(Top)) * 128.0f + 64.0f; // the product is exact
        const float nearest = std::nearbyint(std::clamp(steps, -63.0f, 63.0f));
        const int w = static_cast<int>(nearest);
        s.bits.scale = static_cast<std::uint16_t>(scale_bits | (w < 0 ? 0x8000 | -w : w));
        s.base = s.scale * compact_word::offset(s.bits.scale, Top);
        return s;
    }
};
template <int Bits>
struct level_format<compact<Bits>> : compact_levels<(1 << Bits) - 1>, even_levels<(1 << Bits) - 1> {};

// The nearest code of levels at scale * level + base, and the level of a code.
template <class Q>
struct code_rule {
    float inverse, base;

    code_rule(float scale, float level_base) noexcept : inverse(1.0f / as_written(scale)), base(level_base) {}
    [[nodiscard]] float code(float x) const noexcept {
        return std::nearbyint(std::clamp((x - base) * inverse, 0.0f, level_format<Q>::max_code));
    }
    static constexpr float level(float code) noexcept { return code; }
};

// Codes of the nearest levels; the sum of squared errors, channel by channel in order.
template <class Q>
float nearest_codes(std::span<const float> x, const stored_levels& levels, std::uint8_t* codes) noexcept {
    const code_rule<Q> rule(levels.scale, levels.base);
    float error = 0.0f;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const float code = rule.code(x[i]);
        const float value = rule.level(code) * levels.scale + levels.base; // an exact product
        const float e = x[i] - value;
        error = as_written(error + product_of(e, e));
        codes[i] = static_cast<std::uint8_t>(code);
    }
    return error;
}

// quantize() of compact formats and codebooks: the range of the vector, and zero.
template <class Q>
status quantize_range(std::span<const float> x, std::span<std::uint8_t> codes,
                      compact_metadata& out) noexcept {
    using format = level_format<Q>;
    if (const status s = check_vector(x, codes); !s)
        return s;
    if (const status s = check_fp16_range(x); !s)
        return s;
    const auto [lo, hi] = plain_range(x);
    const float low = format::low(lo), high = format::high(hi);
    const stored_levels levels =
        format::store(format::round_scale((high - low) / as_written(format::top)), low);
    if (!levels.fits)
        return {errc::not_representable, rule_fp16_metadata};
    nearest_codes<Q>(x, levels, codes.data());
    out.scale = float16::from_bits(levels.bits.scale);
    return {};
}

#include <kv1/detail/precise_math_end.inl>

} // namespace detail

/// The quantizer of 2^Bits evenly spaced levels about zero. Bits is 2 to 4.
template <int Bits>
struct compact {
    static_assert(Bits >= 2 && Bits <= 4);
    static constexpr int bits = Bits;                ///< of a code
    static constexpr int max_code = (1 << Bits) - 1; ///< the largest code
    using metadata = compact_metadata;               ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite, not_representable (a value beyond fp16); outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        return detail::quantize_range<compact>(x, codes, out);
    }

    /// The value that a code stands for; exact.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        const float scale = detail::compact_word::scale(m.scale.bits());
        return static_cast<float>(code) * scale +
               scale * detail::compact_word::offset(m.scale.bits(), max_code);
    }
};

static_assert(quantizer<compact<2>>);

} // namespace kv1::inline KV1_ABI
