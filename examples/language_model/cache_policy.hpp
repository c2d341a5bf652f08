// SPDX-License-Identifier: Apache-2.0
//
// A cache policy: formats, encodings and fp16 tokens, written as text.
//
//   policy   SIDES[/LAYER:SIDES]...[@SINKS:WINDOW][#PAGE]
//   SIDES    KEYS,VALUES, or one for both
//   KEYS     FORMAT[+ls|+cs][+had][+mean][+ew][+gCHANNELS|+channel]
//   FORMAT   a short name of kv1/format.hpp: 1, 1.5, 2, c2 (compact), cb2 (codebook)
//
//   ls, cs      levels by least squares, by a clip search
//   had         Hadamard rotation
//   mean        calibrated means are taken off
//   ew          codes under calibrated error weights
//   g32         groups: one scale and minimum for every 32 channels
//   channel     keys per channel: one scale and minimum for each channel of a page
//   /3:c4,c3    layer 3 has other formats
//   @4:32       the first 4 and the last 32 tokens stay in fp16
//   #256        256 tokens a page
//
// Example: c3,c2+ls+had@4:32 has compact 3-bit keys, compact 2-bit values that are fitted and rotated, and
// fp16 sinks and window. ARCHITECTURE.md explains the words.
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
    std::map<std::size_t, layer_policy> layers; ///< layers that differ, by number
    std::size_t fp16_sinks = 0, fp16_window = 0;
    std::size_t page_tokens = 0; ///< 0: the cache's default

    /// Whether any layer takes means; whether any takes error weights.
    /// @{
    [[nodiscard]] bool centred() const noexcept;
    [[nodiscard]] bool weighted() const noexcept;
    /// @}
};

/// The text KEYS,VALUES that parse_policy() takes for these formats and encodings.
[[nodiscard]] std::string to_string(const layer_policy& policy);

/// Parses a policy. Throws input_error for any other text; `what` names the text in its message.
[[nodiscard]] cache_policy parse_policy(std::string_view text, std::string_view what = "policy");

/// Means and error weights of a model, [layer], as vector_encoding takes them.
struct calibration {
    std::vector<std::vector<float>> key_means, value_means;     ///< [kv_heads][head_dim]
    std::vector<std::vector<float>> key_weights, value_weights; ///< [kv_heads][head_dim][head_dim]
};

/// The description of the cache that a policy names. Throws input_error for a layer that the model does not
/// have, and for a cache that cannot be made.
[[nodiscard]] kv1::cache_description describe(const model_config& config, const cache_policy& policy,
                                              const calibration& c, std::size_t tokens);

/// The bytes of a vector, averaged over K and V, layers, and the tokens of a sequence of `tokens`. It counts
/// pages with their metadata, fp16 copies, fp16 keys of the open page, and the means in fp16 as if each
/// sequence had its own.
[[nodiscard]] double bytes_per_vector(const kv1::cache_description& d, std::size_t tokens);

} // namespace kv1_lm
