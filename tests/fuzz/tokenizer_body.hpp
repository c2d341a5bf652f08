// SPDX-License-Identifier: Apache-2.0
//
// What holds for the tokenizer, whatever the file and the text. Throws std::logic_error where it does not.
#pragma once

#include "../example/tiny_tokenizer.hpp"
#include "safetensors_body.hpp"

#include "tokenizer.hpp"
#include "utf8.hpp"

namespace kv1_test {

/// Checks what `t` makes of a text and of ids; a tokenizer with all bytes gives a text back.
inline void check_tokenizer(const kv1_lm::tokenizer& t, std::string_view text, bool has_all_bytes) {
    std::vector<std::int32_t> ids;
    const std::size_t valid = kv1_lm::valid_prefix(text);
    try {
        ids = t.encode(text);
        require(valid == text.size(), "only UTF-8 is encoded");
        require(!has_all_bytes || t.decode(ids) == text, "a text comes back");
    } catch (const kv1_lm::input_error& e) {
        if (has_all_bytes)
            require(e.what() == "the text is not UTF-8 at byte " + std::to_string(valid),
                    "the byte is named");
        else // or PCRE2 gave up on the file's expression
            check_message(e.what(), valid == text.size() ? "t: " : "the text is not UTF-8 at byte ");
    }
    // Any ids, most of which no text has in this order.
    for (const char c : text)
        ids.push_back(static_cast<std::int32_t>(static_cast<std::uint8_t>(c) * 7u %
                                                std::max<std::size_t>(t.size(), 1)));
    kv1_lm::stream_decoder stream(t);
    std::string streamed;
    try {
        for (const std::int32_t id : ids) {
            const std::string part = stream.push(id);
            require(kv1_lm::valid_prefix(part) == part.size(), "a stream gives whole characters");
            streamed += part;
        }
        streamed += stream.finish();
        require(t.decode(ids) == streamed, "a stream gives what decoding gives");
    } catch (const kv1_lm::input_error& e) { // an id in a hole of the vocabulary
        require(!has_all_bytes, "every id has a token");
        check_message(e.what(), "t: ");
    }
}

/// The input as a tokenizer.json up to its first NUL and a text after it.
inline void tokenizer_body(std::span<const std::uint8_t> input) {
    const std::string_view all(reinterpret_cast<const char*>(input.data()), input.size());
    const std::string_view file = all.substr(0, all.find('\0'));
    const std::string_view text = all.substr(std::min(file.size() + 1, all.size()));

    static const auto good = kv1_lm::tokenizer::parse(tiny_tokenizer().dump(), "t");
    check_tokenizer(good, text, true);
    try {
        const auto hostile = kv1_lm::tokenizer::parse(file, "t");
        check_tokenizer(hostile, text.substr(0, 200), false);
    } catch (const kv1_lm::input_error& e) {
        check_message(e.what(), "t: ");
    }
}

} // namespace kv1_test
