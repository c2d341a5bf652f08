// SPDX-License-Identifier: Apache-2.0
//
// The orthonormal Walsh-Hadamard transform of runs of `width` channels. It spreads an outlier of one channel
// over all channels of its run: {4, 0, 0, 0} becomes {2, 2, 2, 2} with width = 4. Channels become alike,
// which suits evenly spaced levels. The transform is its own inverse and keeps dot products.
#pragma once

#include <kv1/detail/config.hpp>

#include <bit>
#include <cstddef>
#include <span>

namespace kv1::inline KV1_ABI {

/// The widest width for vectors of n channels: the largest power of two that divides n (96: 32). 0 for n = 0.
[[nodiscard]] constexpr std::size_t rotation_width(std::size_t n) noexcept { return n & (~n + 1); }

/// 1 / sqrt(width), the factor that makes the transform orthonormal. Precondition: a power of two.
[[nodiscard]] constexpr float hadamard_norm(std::size_t width) noexcept {
    float norm = 1.0f;
    for (; width >= 4; width /= 4)
        norm *= 0.5f;
    return width == 2 ? norm * 0.70710678f : norm;
}

/// Transforms each run of `width` channels in place. O(n log width). Preconditions: width is a power of two
/// and divides the vector's length.
constexpr void hadamard_transform(std::span<float> x, std::size_t width) noexcept {
    for (std::size_t half = 1; half < width; half *= 2)
        for (std::size_t at = 0; at < x.size(); at += 2 * half)
            for (std::size_t i = at; i < at + half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    const float norm = hadamard_norm(width);
    for (float& v : x)
        v *= norm;
}

} // namespace kv1::inline KV1_ABI
