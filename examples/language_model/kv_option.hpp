// SPDX-License-Identifier: Apache-2.0
//
// What 2, 1.5, 4,2 or c3,c2 means: the storage formats of keys and values.
#pragma once

#include <kv1/format.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

namespace kv1_lm {

struct kv_formats {
    kv1::kv_format key = kv1::kv_format::affine2;
    kv1::kv_format value = kv1::kv_format::affine2;
    friend bool operator==(const kv_formats&, const kv_formats&) = default;
};

/// Every format, the smallest first; after them those whose short names begin with a letter.
inline constexpr auto kv_formats_by_size = [] {
    auto all = kv1::all_kv_formats;
    std::ranges::sort(all, [](kv1::kv_format a, kv1::kv_format b) {
        const bool a_letter = kv1::info_of(a).short_name[0] > '9',
                   b_letter = kv1::info_of(b).short_name[0] > '9';
        const std::size_t a_bytes = kv1::row_bytes(a, 128), b_bytes = kv1::row_bytes(b, 128);
        return a_letter != b_letter ? b_letter : a_bytes != b_bytes ? a_bytes < b_bytes : a < b;
    });
    return all;
}();

/// Their short names, for messages: "1, 1.5, 2".
[[nodiscard]] std::string kv_format_names();

/// One width for both, or a pair "K,V". `option` is named in the input_error for anything else.
[[nodiscard]] kv_formats parse_kv(std::string_view text, std::string_view option);

/// The shortest text that parse_kv() takes for these formats.
[[nodiscard]] std::string to_string(const kv_formats& formats);

} // namespace kv1_lm
