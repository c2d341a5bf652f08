// SPDX-License-Identifier: Apache-2.0
//
// Byte-level vocabularies spell bytes as printable characters. A byte that is a visible character of Latin-1
// is spelled as that character. The other 68 bytes are spelled U+0100 to U+0143, in their order: a space is
// U+0120.
#pragma once

#include "utf8.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kv1_lm {

/// The table, in both directions.
struct byte_alphabet {
    std::array<char32_t, 256> letter{}; // by byte
    std::array<int, 0x144> byte{};      // by letter; -1 where it is none

    constexpr byte_alphabet() {
        byte.fill(-1);
        char32_t next = 0x100;
        for (std::size_t b = 0; b < 256; ++b) {
            const bool visible = (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad);
            letter[b] = visible ? static_cast<char32_t>(b) : next++;
            byte[letter[b]] = static_cast<int>(b);
        }
    }
};
inline constexpr byte_alphabet alphabet{};

/// Bytes as a vocabulary spells them.
[[nodiscard]] inline std::string spell(std::string_view bytes) {
    std::string text;
    for (const char c : bytes)
        append_utf8(text, alphabet.letter[static_cast<std::uint8_t>(c)]);
    return text;
}

/// The bytes that a spelling stands for; nothing if one of its characters is not in the alphabet.
[[nodiscard]] inline std::optional<std::string> unspell(std::string_view text) {
    std::string bytes;
    while (!text.empty()) {
        const utf8_step step = first_step(text);
        if (step.form != utf8_form::valid || step.code >= alphabet.byte.size() ||
            alphabet.byte[step.code] < 0)
            return std::nullopt;
        bytes += static_cast<char>(alphabet.byte[step.code]);
        text.remove_prefix(step.length);
    }
    return bytes;
}

} // namespace kv1_lm
