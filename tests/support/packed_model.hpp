// SPDX-License-Identifier: Apache-2.0
//
// The packed format, written bit by bit: slow and simple.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1_test {

inline std::vector<std::byte> packed_model(std::span<const std::uint8_t> codes, int bits) {
    const auto width = static_cast<std::size_t>(bits);
    std::vector<std::byte> bytes((codes.size() * width + 7) / 8);
    for (std::size_t i = 0; i < codes.size(); ++i)
        for (std::size_t b = 0; b < width; ++b)
            if ((codes[i] >> b & 1) != 0)
                bytes[(i * width + b) / 8] |= std::byte{1} << (i * width + b) % 8;
    return bytes;
}

} // namespace kv1_test
