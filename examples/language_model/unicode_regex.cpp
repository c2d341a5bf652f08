// SPDX-License-Identifier: Apache-2.0
#include "unicode_regex.hpp"

#include "error.hpp"
#include "utf8.hpp"

#include <array>
#include <new>

namespace kv1_lm {

namespace {

std::string message_of(int code) {
    std::array<PCRE2_UCHAR, 256> text{};
    pcre2_get_error_message(code, text.data(), text.size());
    return reinterpret_cast<const char*>(text.data());
}

PCRE2_SPTR units(std::string_view text) noexcept { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

} // namespace

unicode_regex::unicode_regex(std::string_view pattern, std::string_view place) : place_(place) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    // \C could end a match inside a character.
    code_.reset(pcre2_compile(units(pattern), pattern.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C,
                              &error, &offset, nullptr),
                [](pcre2_code* code) { pcre2_code_free(code); });
    if (!code_)
        throw input_error(place_, "is not an expression that PCRE2 takes: " + message_of(error) +
                                      ", at byte " + std::to_string(offset));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE); // where it fails, matching interprets
}

regex_splitter::regex_splitter(const unicode_regex& regex, std::string_view text)
    : regex_(&regex), text_(text), data_(pcre2_match_data_create(1, nullptr)) {
    if (!data_)
        throw std::bad_alloc();
    search(0);
}

void regex_splitter::search(std::size_t from) {
    const auto match = [&](std::uint32_t options) {
        return pcre2_match(regex_->code_.get(), units(text_), text_.size(), from,
                           options | PCRE2_NO_UTF_CHECK, data_.get(), nullptr);
    };
    int found = match(0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) // the interpreter's is the heap
        found = match(PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) {
        begin_ = end_ = text_.size();
        return;
    }
    if (found < 0)
        throw input_error(regex_->place_, "matching failed: " + message_of(found));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data_.get());
    begin_ = bounds[0];
    end_ = bounds[1];
    if (begin_ < from || end_ < begin_) // \K inside a look-around does that
        throw input_error(regex_->place_, "matches out of order");
}

std::string_view regex_splitter::next() {
    while (at_ < text_.size()) {
        if (at_ < begin_) {
            const std::string_view piece = text_.substr(at_, begin_ - at_);
            at_ = begin_;
            return piece;
        }
        if (at_ < end_) {
            const std::string_view piece = text_.substr(at_, end_ - at_);
            at_ = end_;
            search(at_);
            return piece;
        }
        // An empty match parts what is on its sides; the next one lies at least a character on.
        search(at_ + first_step(text_.substr(at_)).length);
    }
    return {};
}

} // namespace kv1_lm
