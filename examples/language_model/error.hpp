// SPDX-License-Identifier: Apache-2.0
//
// The exception that kv1-lm throws if its input is at fault: files, texts, arguments.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kv1_lm {

/// Malformed input or bad arguments. what() is one line that says where (file, key, tensor, byte) and what.
class input_error : public std::runtime_error {
public:
    explicit input_error(std::string message) : std::runtime_error(one_line(std::move(message))) {}
    input_error(std::string_view place, std::string_view problem)
        : input_error(std::string(place).append(": ").append(problem)) {}

private:
    static std::string one_line(std::string text) {
        std::replace_if(
            text.begin(), text.end(),
            [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == '\x7f'; }, ' ');
        return text;
    }
};

/// Quotes text of a file for a message: in double quotes, control characters as \xNN, cut to 60 bytes.
[[nodiscard]] inline std::string quote(std::string_view text) {
    constexpr std::size_t longest = 60;
    std::size_t size = std::min(text.size(), longest);
    while (size > 0 && size < text.size() && (static_cast<unsigned char>(text[size]) & 0xc0u) == 0x80u)
        --size; // do not cut inside a character
    constexpr std::string_view hex = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : text.substr(0, size)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f)
            out.append("\\x") += {hex[byte >> 4], hex[byte & 15u]};
        else
            out += c;
    }
    return out.append(text.size() > size ? "\"..." : "\"");
}

} // namespace kv1_lm
