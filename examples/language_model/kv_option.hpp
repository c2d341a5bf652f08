// SPDX-License-Identifier: Apache-2.0
//
// What 2, 1.5, 4,2 or c3,c2 means: the storage formats of keys and values.
#pragma once

#include <kv1/format.hpp>

#include <array>
#include <optional>
#include <string>
#include <string_view>

namespace kv1_lm {

struct kv_formats {
    kv1::kv_format key = kv1::kv_format::affine2;
    kv1::kv_format value = kv1::kv_format::affine2;
    friend bool operator==(const kv_formats&, const kv_formats&) = default;
};

/// Every width, narrowest first; then the compact formats.
inline constexpr std::array<std::string_view, 12> kv_widths{"1",  "1.5", "2",  "3",  "4",  "8",
                                                            "16", "32",  "c2", "c3", "c4", "cb2"};

/// The format of one of kv_widths, or none.
[[nodiscard]] std::optional<kv1::kv_format> format_of(std::string_view width) noexcept;

/// One width for both, or a pair "K,V". `option` is named in the input_error for anything else.
[[nodiscard]] kv_formats parse_kv(std::string_view text, std::string_view option);

/// Cuts what comes before the first `mark` off the front of `text`, and the mark: all of it where there is
/// none.
std::string_view take_until(std::string_view& text, char mark);

/// The shortest text that parse_kv() takes for these formats.
[[nodiscard]] std::string to_string(const kv_formats& formats);

} // namespace kv1_lm
