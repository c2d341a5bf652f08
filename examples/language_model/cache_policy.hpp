// SPDX-License-Identifier: Apache-2.0
//
// A cache policy: formats, encodings and fp16 tokens, written as text.
//
//   policy   SIDES[/LAYER:SIDES]...[@SINKS:WINDOW][#PAGE]
//   SIDES    KEYS,VALUES, or one for both
//   KEYS     FORMAT[+ls|+cs][+had][+mean][+ew][+gCHANNELS|+channel]
//   FORMAT   1, 1.5, 2, 3, 4, 8, 16, 32, c2, c3, c4 (compact), cb2 (codebook)
//
// ls: least squares, cs: clip search, had: Hadamard rotation, mean: less calibrated means, ew: error weights,
// g32: a scale and minimum for every 32 channels, channel: one for every channel over a page (keys alone). A
// slash gives one layer something else, @ the fp16 sinks and window, # the tokens of a page.
#pragma once

#include <kv1/cache_description.hpp>

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace kv1_lm {

struct model_config;

struct side_policy {
    kv1::kv_format format = kv1::kv_format::fp32;
    bool least_squares = false, clip_search = false, hadamard = false, means = false, error_weights = false,
         per_channel = false;
    std::size_t group = 0; ///< channels that share metadata; 0: all
    friend bool operator==(const side_policy&, const side_policy&) = default;
};

struct layer_policy {
    side_policy key, value;
    friend bool operator==(const layer_policy&, const layer_policy&) = default;
};

struct cache_policy {
    std::string text;
    layer_policy common;
    std::map<std::size_t, layer_policy> layers; ///< those that differ
    std::size_t fp16_sinks = 0, fp16_window = 0;
    std::size_t page_tokens = 0; ///< 0: the cache's default

    /// Whether any layer takes means, or error weights.
    /// @{
    [[nodiscard]] bool centred() const noexcept;
    [[nodiscard]] bool weighted() const noexcept;
    /// @}
};

/// KEYS,VALUES as parse_policy() takes it.
[[nodiscard]] std::string to_string(const layer_policy& policy);

/// `what` is put before the text in the input_error for anything else.
[[nodiscard]] cache_policy parse_policy(std::string_view text, std::string_view what = "policy");

/// Means and error weights of a model, by layer, as encodings want them.
struct calibration {
    std::vector<std::vector<float>> key_means, value_means;     ///< [kv_heads][head_dim]
    std::vector<std::vector<float>> key_weights, value_weights; ///< [kv_heads][head_dim][head_dim]
};

/// The cache of a policy. Throws input_error for a layer the model does not have, and for what no cache
/// takes.
[[nodiscard]] kv1::cache_description describe(const model_config& config, const cache_policy& policy,
                                              const calibration& c, std::size_t tokens);

/// Bytes that a vector takes, averaged over K and V, layers and the tokens of a sequence of `tokens`: pages
/// with their metadata, fp16 copies and keys of the open page, and the means in fp16 as if they were each
/// sequence's own.
[[nodiscard]] double bytes_per_vector(const kv1::cache_description& d, std::size_t tokens);

} // namespace kv1_lm
