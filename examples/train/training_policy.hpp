// SPDX-License-Identifier: Apache-2.0
//
// The policy that keys and values pass through in training: formats and encodings that have a gradient.
#pragma once

#include <kv1/cache_policy.hpp>
#include <kv1/format.hpp>

#include <cstddef>
#include <string>
#include <string_view>

namespace kv1_train {

/// What keys, or values, of a layer go through.
struct trained_side {
    kv1::vector_policy policy{.format = kv1::kv_format::fp32};
    bool round_metadata = false; ///< scale and minimum through fp16, as a cache stores them
};

struct training_policy {
    kv1::cache_policy cache{.common = {{.format = kv1::kv_format::fp32}, {.format = kv1::kv_format::fp32}}};
    bool round_metadata = false;

    [[nodiscard]] trained_side key(std::size_t layer) const { return {cache.of(layer).key, round_metadata}; }
    [[nodiscard]] trained_side value(std::size_t layer) const {
        return {cache.of(layer).value, round_metadata};
    }
    friend bool operator==(const training_policy&, const training_policy&) = default;
};

/// The policy that leaves keys and values as they are, as a 16-bit cache nearly does.
inline const training_policy plain_kv{};

/// Whether the format leaves values as they are (the rounding of fp16 is negligible beside that of bf16).
[[nodiscard]] constexpr bool is_plain(kv1::kv_format f) noexcept {
    return f == kv1::kv_format::fp32 || f == kv1::kv_format::fp16;
}

/// A policy as `--kv` takes it (kv1/cache_policy.hpp). Throws input_error, which names `option`, for what is
/// none, and for what training does not know: bases, groups of channels, keys per channel, pages.
[[nodiscard]] training_policy parse_policy(std::string_view text, std::string_view option);

/// Throws input_error for a layer that a model of so many does not have.
void check_layers(const training_policy& p, std::size_t layers, std::string_view option);

/// "c3+ls+had,c2+ls+had round_metadata", for logs.
[[nodiscard]] std::string to_string(const training_policy& p);

} // namespace kv1_train
