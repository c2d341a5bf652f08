// SPDX-License-Identifier: Apache-2.0
//
// The format and encoding that keys and values pass through in training.
#pragma once

#include "kv_option.hpp"

#include <kv1/format.hpp>

#include <cstddef>
#include <map>
#include <string>
#include <string_view>

namespace kv1_train {

struct kv_policy {
    kv1_lm::kv_formats formats{kv1::kv_format::fp32, kv1::kv_format::fp32};
    std::map<std::size_t, kv1_lm::kv_formats> layers; ///< layers that differ, by number
    bool least_squares = false;                       ///< else minimum and maximum, as the reference
    bool hadamard = false;                            ///< quantized in a rotated basis
    bool centre = false;         ///< without the means of every layer and head, which are added again
    bool round_metadata = false; ///< scale and minimum through fp16, as a cache stores them

    [[nodiscard]] const kv1_lm::kv_formats& formats_of(std::size_t layer) const {
        const auto own = layers.find(layer);
        return own == layers.end() ? formats : own->second;
    }
    friend bool operator==(const kv_policy&, const kv_policy&) = default;
};

/// The policy that leaves keys and values as they are, as a 16-bit cache nearly does.
inline const kv_policy plain_kv{};

/// Whether the format leaves values as they are (the rounding of fp16 is negligible beside that of bf16).
[[nodiscard]] constexpr bool is_plain(kv1::kv_format f) noexcept {
    return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16;
}

/// Parses FORMATS[/LAYER:FORMATS]..., such as c3,c2/0:c2/3:c3, into the policy's `formats` and `layers`.
/// Throws input_error, which names `option`.
[[nodiscard]] kv_policy parse_formats(std::string_view text, std::string_view option);

/// Throws input_error for a layer that a model of so many does not have.
void check_layers(const kv_policy& p, std::size_t layers, std::string_view option);

/// "c3,c2/0:c2 least_squares hadamard", for logs.
[[nodiscard]] std::string to_string(const kv_policy& p);

} // namespace kv1_train
