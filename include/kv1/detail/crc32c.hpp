// SPDX-License-Identifier: Apache-2.0
//
// CRC-32C (Castagnoli, reflected), eight bytes a step. Finds every single flipped bit and every burst of up
// to 32 bits; not a defence against people.
#pragma once

#include <kv1/detail/config.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

using crc32c_table = std::array<std::array<std::uint32_t, 256>, 8>;

inline crc32c_table make_crc32c_table() noexcept {
    crc32c_table t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        std::uint32_t c = i;
        for (int bit = 0; bit < 8; ++bit)
            c = (c >> 1) ^ ((c & 1u) != 0 ? 0x82f63b78u : 0u);
        t[0][i] = c;
    }
    for (std::size_t k = 1; k < 8; ++k)
        for (std::size_t i = 0; i < 256; ++i)
            t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xffu];
    return t;
}

// Continues a checksum; begin with 0.
inline std::uint32_t crc32c(std::uint32_t crc, std::span<const std::byte> bytes) noexcept {
    // made at the first use: at compile time it would be a sixteenth of what including the library costs
    static const crc32c_table t = make_crc32c_table();
    const auto at = [&](std::size_t i) { return std::to_integer<std::uint32_t>(bytes[i]); };
    std::uint32_t c = ~crc;
    std::size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
        const std::uint32_t low = c ^ (at(i) | at(i + 1) << 8 | at(i + 2) << 16 | at(i + 3) << 24);
        c = t[7][low & 0xffu] ^ t[6][low >> 8 & 0xffu] ^ t[5][low >> 16 & 0xffu] ^ t[4][low >> 24] ^
            t[3][at(i + 4)] ^ t[2][at(i + 5)] ^ t[1][at(i + 6)] ^ t[0][at(i + 7)];
    }
    for (; i < bytes.size(); ++i)
        c = (c >> 8) ^ t[0][(c ^ at(i)) & 0xffu];
    return ~c;
}

} // namespace kv1::inline KV1_ABI::detail
