// SPDX-License-Identifier: Apache-2.0
//
// What keys and values go through in training: the cache's format and how it is filled.
#pragma once

#include "kv_option.hpp"

#include <kv1/format.hpp>

#include <string>

namespace kv1_train {

struct kv_policy {
    kv1_lm::kv_formats formats{kv1::kv_format::fp32, kv1::kv_format::fp32};
    bool least_squares = false;  ///< else minimum and maximum, as the reference
    bool hadamard = false;       ///< quantized in a rotated basis
    bool centre = false;         ///< without the means of every layer and head, which are added again
    bool round_metadata = false; ///< scale and minimum through fp16, as a cache stores them
    friend bool operator==(const kv_policy&, const kv_policy&) = default;
};

/// Keys and values as they are: what a 16-bit cache is to a model in training.
inline constexpr kv_policy plain_kv{};

/// Whether the format leaves values as they are (fp16's rounding counts for nothing beside bf16's).
[[nodiscard]] constexpr bool is_plain(kv1::kv_format f) noexcept {
    return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16;
}

/// "2 least_squares hadamard", for logs.
[[nodiscard]] inline std::string to_string(const kv_policy& p) {
    std::string text = kv1_lm::to_string(p.formats);
    if (p.least_squares)
        text += " least_squares";
    if (p.hadamard)
        text += " hadamard";
    if (p.centre)
        text += " centre";
    if (p.round_metadata)
        text += " round_metadata";
    return text;
}

} // namespace kv1_train
