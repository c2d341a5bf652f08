// SPDX-License-Identifier: Apache-2.0
//
// affine<Bits>: 2^Bits evenly spaced levels between the minimum and the maximum of a vector.
//
//   lo = min x, scale = max((max x - lo) / (2^Bits - 1), 1e-6)        in fp32
//   code = clamp(round_half_even((x - lo) / scale), 0, 2^Bits - 1)    from the unrounded lo and scale
//   stored: fp16(scale), fp16(lo);  value = code * scale + lo
//
// This is the KV1 reference format; at 2 bits a vector of 32 channels takes 12 bytes. -0 counts as less than
// +0, so that the stored minimum does not depend on the order of evaluation. O(n), no allocation.
#pragma once

#include <kv1/quantizer.hpp>

#include <algorithm>

namespace kv1::inline KV1_ABI {

namespace detail {

inline constexpr float smallest_scale = 1e-6f;

constexpr bool less_with_signed_zero(float a, float b) noexcept { return ordered_bits(a) < ordered_bits(b); }

} // namespace detail

#include <kv1/detail/precise_math_begin.inl>

/// The quantizer of 2^Bits evenly spaced levels. Bits is 1 to 8.
template <int Bits>
struct affine {
    static_assert(Bits >= 1 && Bits <= 8);
    static constexpr int bits = Bits;                ///< of a code
    static constexpr int max_code = (1 << Bits) - 1; ///< the largest code
    using metadata = affine_metadata;                ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite, not_representable (metadata overflows fp16); outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        if (const status s = detail::check_vector(x, codes); !s)
            return s;
        const auto [lo_at, hi_at] = std::minmax_element(x.begin(), x.end(), detail::less_with_signed_zero);
        const float lo = *lo_at;
        const float scale = (std::max)((*hi_at - lo) / detail::as_written(static_cast<float>(max_code)),
                                       detail::smallest_scale);
        const metadata stored{float16(scale), float16(lo)};
        if (!detail::is_finite(stored.scale) || !detail::is_finite(stored.minimum))
            return {errc::not_representable, detail::rule_fp16_metadata};
        for (std::size_t i = 0; i < x.size(); ++i) {
            const float level = std::nearbyint((x[i] - lo) / detail::as_written(scale));
            codes[i] = static_cast<std::uint8_t>(std::clamp(level, 0.0f, static_cast<float>(max_code)));
        }
        out = stored;
        return {};
    }

    /// The value that a code stands for.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        return static_cast<float>(code) * static_cast<float>(m.scale) + static_cast<float>(m.minimum);
    }
};

#include <kv1/detail/precise_math_end.inl>

static_assert(quantizer<affine<2>>);

} // namespace kv1::inline KV1_ABI
