// SPDX-License-Identifier: Apache-2.0
//
// UTF-8, one character at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kv1_lm {

enum class utf8_form : std::uint8_t {
    valid,     ///< a character
    invalid,   ///< bytes that begin no character, whatever follows
    truncated, ///< the beginning of a character whose other bytes the text lacks
};

struct utf8_step {
    utf8_form form;
    std::uint8_t length; ///< in bytes; of an invalid step what one U+FFFD stands for (the "maximal subpart")
    char32_t code;       ///< of a valid step
};

/// The first step of a text that is not empty.
[[nodiscard]] constexpr utf8_step first_step(std::string_view text) noexcept {
    const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
    const std::uint8_t lead = byte(0);
    if (lead < 0x80)
        return {utf8_form::valid, 1, lead};
    if (lead < 0xc2 || lead > 0xf4)
        return {utf8_form::invalid, 1, 0};
    const std::uint8_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    char32_t code = lead & (0x7fu >> length);
    for (std::uint8_t i = 1; i < length; ++i) {
        if (i == text.size())
            return {utf8_form::truncated, i, 0};
        std::uint8_t low = 0x80, high = 0xbf;
        if (i == 1) { // no overlong form, no surrogate, nothing past U+10FFFF
            low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : low;
            high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : high;
        }
        if (byte(i) < low || byte(i) > high)
            return {utf8_form::invalid, i, 0};
        code = code << 6 | (byte(i) & 0x3fu);
    }
    return {utf8_form::valid, length, code};
}

/// Offset of the first byte that is not UTF-8; the text's size where all of it is.
[[nodiscard]] constexpr std::size_t valid_prefix(std::string_view text) noexcept {
    std::size_t at = 0;
    while (at < text.size()) {
        const utf8_step step = first_step(text.substr(at));
        if (step.form != utf8_form::valid)
            break;
        at += step.length;
    }
    return at;
}

/// Moves complete characters from the front of `bytes` to `text`, invalid ones as U+FFFD. A truncated one is
/// left in `bytes`.
inline void take_text(std::string& text, std::string_view& bytes) {
    while (!bytes.empty()) {
        const utf8_step step = first_step(bytes);
        if (step.form == utf8_form::truncated)
            return;
        text.append(step.form == utf8_form::valid ? bytes.substr(0, step.length) : "\xef\xbf\xbd");
        bytes.remove_prefix(step.length);
    }
}

/// The same to the end: a truncated character is U+FFFD, too.
inline void take_last_text(std::string& text, std::string_view bytes) {
    take_text(text, bytes);
    if (!bytes.empty())
        text.append("\xef\xbf\xbd");
}

/// Appends a character, which has to be a Unicode scalar value.
inline void append_utf8(std::string& text, char32_t code) {
    if (code < 0x80) {
        text += static_cast<char>(code);
        return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    text += static_cast<char>((0xff00u >> (more + 1) & 0xffu) | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i)
        text += static_cast<char>(0x80u | (code >> 6 * i & 0x3fu));
}

} // namespace kv1_lm
