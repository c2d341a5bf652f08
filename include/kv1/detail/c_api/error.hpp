// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/error.h.
#pragma once

#include <kv1/detail/c_api/support.hpp>

#include <kv1/target.hpp>
#include <kv1/version.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kv1::inline KV1_ABI::detail {

static_assert(static_cast<int>(errc::ok) == KV1_OK &&
              static_cast<int>(errc::invalid_argument) == KV1_INVALID_ARGUMENT &&
              static_cast<int>(errc::shape_mismatch) == KV1_SHAPE_MISMATCH &&
              static_cast<int>(errc::out_of_range) == KV1_OUT_OF_RANGE &&
              static_cast<int>(errc::non_finite) == KV1_NON_FINITE &&
              static_cast<int>(errc::not_representable) == KV1_NOT_REPRESENTABLE &&
              static_cast<int>(errc::out_of_memory) == KV1_OUT_OF_MEMORY &&
              static_cast<int>(errc::capacity_exceeded) == KV1_CAPACITY_EXCEEDED &&
              static_cast<int>(errc::invalid_sequence) == KV1_INVALID_SEQUENCE &&
              static_cast<int>(errc::unsupported_format) == KV1_UNSUPPORTED_FORMAT &&
              static_cast<int>(errc::unsupported_target) == KV1_UNSUPPORTED_TARGET &&
              static_cast<int>(errc::layers_disagree) == KV1_LAYERS_DISAGREE &&
              static_cast<int>(errc::dropped_tokens) == KV1_DROPPED_TOKENS &&
              static_cast<int>(errc::nothing_committed) == KV1_NOTHING_COMMITTED &&
              static_cast<int>(errc::bad_format) == KV1_BAD_FORMAT &&
              static_cast<int>(errc::unsupported_version) == KV1_UNSUPPORTED_VERSION &&
              static_cast<int>(errc::checksum_mismatch) == KV1_CHECKSUM_MISMATCH &&
              static_cast<int>(errc::truncated) == KV1_TRUNCATED &&
              static_cast<int>(errc::different_cache) == KV1_DIFFERENT_CACHE &&
              static_cast<int>(errc::different_model) == KV1_DIFFERENT_MODEL &&
              static_cast<int>(errc::io_error) == KV1_IO_ERROR &&
              static_cast<int>(errc::broken_invariant) == KV1_BROKEN_INVARIANT);

// A text of which as much is written as there is room for.
class c_text {
public:
    c_text(char* text, std::size_t size) noexcept : text_(text), size_(text != nullptr ? size : 0) {
        if (size_ != 0)
            *text_ = '\0';
    }
    void add(std::string_view more) noexcept {
        if (length_ + 1 < size_) {
            const std::size_t n = (std::min)(more.size(), size_ - 1 - length_);
            std::copy_n(more.data(), n, text_ + length_);
            text_[length_ + n] = '\0';
        }
        length_ += more.size();
    }
    void add(std::int64_t number) noexcept { // not negative
        char digits[20];
        std::size_t first = sizeof digits;
        do
            digits[--first] = static_cast<char>('0' + number % 10);
        while ((number /= 10) != 0);
        add(std::string_view(digits + first, sizeof digits - first));
    }
    // As if there were room for all.
    [[nodiscard]] std::size_t length() const noexcept { return length_; }

private:
    char* text_;
    std::size_t size_, length_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

int32_t kv1_version(void) { return KV1_VERSION; }

const char* kv1_code_name(kv1_code code) {
    return kv1::detail::c_within(code, KV1_BROKEN_INVARIANT)
               ? to_string(static_cast<kv1::errc>(code)).data() // of literals, which end with a zero
               : "unknown error";
}

// The text of status::message(), which allocates.
size_t kv1_describe(const kv1_error* error, char* text, size_t size) {
    kv1::detail::c_text out(text, size);
    if (error == nullptr)
        return 0;
    out.add(kv1_code_name(error->code));
    if (error->rule != nullptr && *error->rule != '\0') {
        out.add(": ");
        out.add(error->rule);
    }
    const char* separator = " (";
    const auto place = [&](const char* name, std::int64_t index) {
        if (index < 0)
            return;
        out.add(separator);
        out.add(name);
        out.add(" ");
        out.add(index);
        separator = ", ";
    };
    place("layer", error->layer);
    place("KV head", error->kv_head);
    place("token", error->token);
    place("channel", error->channel);
    if (*separator == ',')
        out.add(")");
    return out.length();
}

const char* kv1_target(void) { return to_string(kv1::current_target()).data(); }

kv1_code kv1_set_target(const char* name) {
    if (name == nullptr)
        return KV1_INVALID_ARGUMENT;
    const auto target = kv1::target_from_string(name);
    return target ? static_cast<kv1_code>(kv1::try_set_target(*target).code()) : KV1_UNSUPPORTED_TARGET;
}

} // extern "C"
