// SPDX-License-Identifier: Apache-2.0
//
// scaled_binary ("1.5-bit" in the KV1 reference): the sign of every channel and the mean magnitude of the
// vector. code = (x >= 0), stored scale = fp16(max(mean |x|, 1e-6)), value = +-scale.
//
// The sum is taken in 16 interleaved fp32 partial sums (channel i goes to sum i mod 16) that are added
// pairwise, on every target: a cache written on one processor equals the one written on another.
// O(n), no allocation.
#pragma once

#include <kv1/quantizer.hpp>

#include <algorithm>
#include <array>

namespace kv1::inline KV1_ABI {

#include <kv1/detail/precise_math_begin.inl>

namespace detail {

// The fixed order in which 16 partial sums become one.
constexpr float add_pairwise(std::array<float, 16> sums) noexcept {
    for (std::size_t width = 8; width != 0; width /= 2)
        for (std::size_t i = 0; i < width; ++i)
            sums[i] = as_written(sums[i] + sums[i + width]);
    return sums[0];
}

} // namespace detail

/// The quantizer of signs with a mean magnitude.
struct scaled_binary {
    static constexpr int bits = 1;   ///< of a code
    using metadata = scale_metadata; ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite, not_representable (metadata overflows fp16); outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        if (const status s = detail::check_vector(x, codes); !s)
            return s;
        std::array<float, 16> sums{};
        for (std::size_t i = 0; i < x.size(); ++i)
            sums[i % 16] = detail::as_written(sums[i % 16] + std::fabs(x[i]));
        const float mean = detail::add_pairwise(sums) / static_cast<float>(x.size());
        const metadata stored{float16((std::max)(mean, 1e-6f))};
        if (!detail::is_finite(stored.scale))
            return {errc::not_representable, detail::rule_fp16_metadata};
        for (std::size_t i = 0; i < x.size(); ++i)
            codes[i] = detail::is_non_negative(x[i]) ? 1 : 0;
        out = stored;
        return {};
    }

    /// The value that a code stands for.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        const auto scale = static_cast<float>(m.scale);
        return code != 0 ? scale : -scale;
    }
};

#include <kv1/detail/precise_math_end.inl>

static_assert(quantizer<scaled_binary>);

} // namespace kv1::inline KV1_ABI
