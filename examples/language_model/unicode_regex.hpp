// SPDX-License-Identifier: Apache-2.0
//
// Splitting of UTF-8 text by a regular expression with Unicode classes, by PCRE2.
#pragma once

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace kv1_lm {

/// A compiled expression: immutable, cheap to copy, usable from several threads at once. \p{..}, \w, \s and
/// (?i) go by Unicode, in the version that PCRE2 was built with.
class unicode_regex {
public:
    /// Throws input_error, naming `place`, for what PCRE2 does not understand.
    unicode_regex(std::string_view pattern, std::string_view place);

private:
    friend class regex_splitter;
    std::shared_ptr<pcre2_code> code_;
    std::string place_;
};

/// Walks the pieces that the matches of an expression cut a text into: each match is one, and so is each
/// stretch between matches. They are not empty and make up the text.
class regex_splitter {
public:
    /// The text has to be valid UTF-8; both have to outlive the splitter.
    regex_splitter(const unicode_regex& regex, std::string_view text);

    /// The next piece; empty when there is none left. Throws input_error where PCRE2 gives up.
    [[nodiscard]] std::string_view next();

private:
    struct deleter {
        void operator()(pcre2_match_data* data) const noexcept { pcre2_match_data_free(data); }
    };
    void search(std::size_t from);

    const unicode_regex* regex_;
    std::string_view text_;
    std::unique_ptr<pcre2_match_data, deleter> data_;
    std::size_t at_ = 0;              // the pieces before have been handed out
    std::size_t begin_ = 0, end_ = 0; // the next match; at the text's end where there is none
};

} // namespace kv1_lm
