// SPDX-License-Identifier: Apache-2.0
//
// binary: one bit per channel, code = (x >= 0), value 0 or 1, no metadata (the KV1 reference's 1-bit mode).
// -0 counts as >= 0. O(n), no allocation.
#pragma once

#include <kv1/quantizer.hpp>

namespace kv1::inline KV1_ABI {

/// The quantizer of signs.
struct binary {
    static constexpr int bits = 1; ///< of a code
    using metadata = no_metadata;  ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel),
    /// non_finite; outputs are then untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata&) noexcept {
        if (const status s = detail::check_vector(x, codes); !s)
            return s;
        for (std::size_t i = 0; i < x.size(); ++i)
            codes[i] = detail::is_non_negative(x[i]) ? 1 : 0;
        return {};
    }

    /// The value that a code stands for.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata) noexcept {
        return static_cast<float>(code);
    }
};

static_assert(quantizer<binary>);

} // namespace kv1::inline KV1_ABI
