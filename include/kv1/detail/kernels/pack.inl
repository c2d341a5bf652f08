// SPDX-License-Identifier: Apache-2.0
//
// Packs codes, one byte each, into fields of 1, 2, 4 or 8 bits, low bits first, and unpacks them. Parsed once per
// target. A 32-bit lane takes 4 codes at a time, which make 4b bits, so 32/b codes make a lane: 16 at 2 bits.

template <int Bits>
KV1_INLINE void pack_fields(const std::uint8_t* codes, std::size_t n, std::uint8_t* bytes) {
    constexpr std::size_t per_byte = 8 / Bits;
    constexpr std::size_t per_step = 4 * lanes; // codes in one register of bytes
    std::size_t i = 0;
    for (; i + per_step <= n; i += per_step) {
        const u32 four = u32::load_unaligned(reinterpret_cast<const std::uint32_t*>(codes + i));
        if constexpr (Bits == 4) {
            alignas(64) std::uint32_t words[lanes];
            const u32 pairs = (four | (four >> 4)) & u32(0x00ff00ffu);
            (pairs | (pairs >> 8)).store_aligned(words);
            for (std::size_t k = 0; k < lanes; ++k) {
                bytes[i / 2 + 2 * k] = static_cast<std::uint8_t>(words[k]);
                bytes[i / 2 + 2 * k + 1] = static_cast<std::uint8_t>(words[k] >> 8);
            }
            continue;
        }
        // gathers the four codes of a lane in its low 4 * Bits bits, and masks the rest
        const u32 joined =
            four | (four >> (8 - Bits)) | (four >> (2 * (8 - Bits))) | (four >> (3 * (8 - Bits)));
        if constexpr (Bits == 2) {
            store_u8(joined & u32(0xffu), bytes + i / per_byte);
        } else {
            alignas(64) std::uint8_t nibbles[lanes];
            store_u8(joined & u32(0x0fu), nibbles);
            for (std::size_t k = 0; k < lanes; k += 2)
                bytes[i / 8 + k / 2] = static_cast<std::uint8_t>(nibbles[k] | nibbles[k + 1] << 4);
        }
    }
    for (; i + 8 <= n; i += 8) { // short vectors, and ends: eight codes in a general-purpose register
        std::uint64_t x;
        std::memcpy(&x, codes + i, 8);
        x = (x | (x >> (8 - Bits))) & (0x0001000100010001u * ((1u << 2 * Bits) - 1u));
        x = (x | (x >> (16 - 2 * Bits))) & (0x0000000100000001u * ((std::uint64_t{1} << 4 * Bits) - 1u));
        x |= x >> (32 - 4 * Bits);
        std::memcpy(bytes + i / per_byte, &x, Bits);
    }
    for (; i < n; i += per_byte) {
        unsigned byte = 0;
        for (std::size_t k = 0; k < per_byte && i + k < n; ++k)
            byte |= static_cast<unsigned>(codes[i + k]) << (static_cast<unsigned>(Bits) * k);
        bytes[i / per_byte] = static_cast<std::uint8_t>(byte);
    }
}

template <int Bits>
KV1_INLINE void unpack_fields(const std::uint8_t* bytes, std::size_t n, std::uint8_t* codes) {
    constexpr std::size_t per_byte = 8 / Bits;
    constexpr std::size_t per_step = 4 * lanes;
    constexpr std::uint32_t mask = ((1u << Bits) - 1u) * 0x01010101u;
    std::size_t i = 0;
    if constexpr (Bits == 2) {
        for (; i + per_step <= n; i += per_step) {
            const u32 byte = load_u8(bytes + i / per_byte);
            const u32 spread = byte | (byte << 6) | (byte << 12) | (byte << 18);
            (spread & u32(mask)).store_unaligned(reinterpret_cast<std::uint32_t*>(codes + i));
        }
    }
    for (; i < n; ++i)
        codes[i] = static_cast<std::uint8_t>(
            bytes[i / per_byte] >> (static_cast<unsigned>(Bits) * (i % per_byte)) & ((1u << Bits) - 1u));
}

KV1_LAZY inline void pack(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* bytes) noexcept {
    switch (bits) {
    case 1:
        return pack_fields<1>(codes, n, bytes);
    case 2:
        return pack_fields<2>(codes, n, bytes);
    case 4:
        return pack_fields<4>(codes, n, bytes);
    case 8:
        std::memcpy(bytes, codes, n);
        return;
    }
}

KV1_LAZY inline void unpack(int bits, const std::uint8_t* bytes, std::size_t n,
                            std::uint8_t* codes) noexcept {
    switch (bits) {
    case 1:
        return unpack_fields<1>(bytes, n, codes);
    case 2:
        return unpack_fields<2>(bytes, n, codes);
    case 4:
        return unpack_fields<4>(bytes, n, codes);
    case 8:
        std::memcpy(codes, bytes, n);
        return;
    }
}

// Writes a key's codes of 3 bits into one lane of consecutive lines, which layout.hpp describes. Four codes c make a byte
// of their own line, and bits of the shared one.
KV1_LAZY inline void insert_key_of_3_bits(const section_layout& s, std::byte* section, std::size_t token,
                                          const std::uint8_t* codes) noexcept {
    alignas(64) std::uint8_t own[max_vector_length / 4], shared[max_vector_length / 4];
    const std::size_t words = round_up(s.channels, 32) / 4; // of four codes, four for a line
    std::size_t i = 0;
    for (; i + lanes <= words; i += lanes) {
        const u32 c = u32::load_unaligned(reinterpret_cast<const std::uint32_t*>(codes + 4 * i));
        const u32 high = (c >> 12) & u32(0x40u), last = c >> 24; // high bit of the third code, the fourth
        store_u8((c & u32(0x07u)) | ((c >> 5) & u32(0x38u)) | ((c >> 10) & u32(0xc0u)), own + i);
        store_u8(high | last, shared + i);
    }
    for (; i < words; ++i) {
        std::uint32_t c;
        std::memcpy(&c, codes + 4 * i, sizeof c);
        own[i] = static_cast<std::uint8_t>((c & 0x07u) | (c >> 5 & 0x38u) | (c >> 10 & 0xc0u));
        shared[i] = static_cast<std::uint8_t>((c >> 12 & 0x40u) | c >> 24);
    }
    std::byte* const lane = section + 4 * s.place(0, token, 0).lane;
    for (std::size_t line = 0; line < s.own_lines(); ++line)
        std::memcpy(lane + line * line_bytes, own + 4 * line, 4);
    for (std::size_t line = 0; line < s.shared_lines(); ++line) {
        std::uint32_t first, second;
        std::memcpy(&first, shared + 8 * line, 4);
        std::memcpy(&second, shared + 8 * line + 4, 4);
        // what two lines share lies apart: bits 0-2 and 6, 3-5 and 7
        const std::uint32_t low = second & 0x07070707u, high = second & 0x40404040u;
        const std::uint32_t both = first | low << 3 | high << 1;
        std::memcpy(lane + (s.first_shared() + line) * line_bytes, &both, 4);
    }
}

// Writes a vector's codes into the lanes of one token of a section. K: the packed words of the vector go to one lane
// of consecutive lines. V: one field of each of 16 lanes is replaced, for each run of 16 channels. `codes` holds
// round_up(channels, 32) bytes, zero past the channels.
KV1_LAZY inline void insert_codes(const section_layout& s, std::byte* page, std::size_t token,
                                  const std::uint8_t* codes) noexcept {
    const format_traits t = s.traits();
    std::byte* const section = page + s.offset;
    alignas(64) std::uint8_t fields[max_vector_length];
    alignas(64) std::uint8_t words[max_vector_length];
    if (s.keys && t.slice_count() == 2)
        return insert_key_of_3_bits(s, section, token, codes);
    for (int p = 0; p < t.slice_count(); ++p) {
        const bit_slice part = t.slices[static_cast<std::size_t>(p)];
        const std::size_t padded = round_up(s.channels, 32);
        const std::uint8_t* source = codes;
        if (t.slice_count() > 1) {
            const u32 mask(static_cast<std::uint32_t>((1 << part.bits) - 1) * 0x01010101u);
            for (std::size_t i = 0; i < padded; i += 4 * lanes < padded - i ? 4 * lanes : padded - i) {
                if (i + 4 * lanes <= padded) {
                    const u32 c = u32::load_unaligned(reinterpret_cast<const std::uint32_t*>(codes + i));
                    ((c >> part.shift) & mask).store_unaligned(reinterpret_cast<std::uint32_t*>(fields + i));
                } else {
                    for (std::size_t k = i; k < padded; ++k)
                        fields[k] =
                            static_cast<std::uint8_t>(codes[k] >> part.shift & ((1 << part.bits) - 1));
                }
            }
            source = fields;
        }
        const field_place at = s.place(p, token, 0);
        if (s.keys) {
            pack(part.bits, source, padded, words);
            for (std::size_t line = 0; line < s.own_lines(); ++line)
                std::memcpy(section + (at.lane + line * line_lanes) * 4, words + line * 4, 4);
        } else {
            const u32 keep(~(field_mask(part.bits) << at.shift));
            auto* lane = reinterpret_cast<std::uint32_t*>(section) + at.lane;
            for (std::size_t c = 0; c < s.channels; c += line_lanes, lane += s.unit_lines() * line_lanes)
                for (std::size_t k = 0; k < registers_per_line; ++k) {
                    const u32 old = u32::load_aligned(lane + k * lanes);
                    ((old & keep) | (load_u8(source + c + k * lanes) << at.shift))
                        .store_aligned(lane + k * lanes);
                }
        }
    }
}
