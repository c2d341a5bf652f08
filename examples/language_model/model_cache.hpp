// SPDX-License-Identifier: Apache-2.0
//
// The cache that a model runs with: what `--kv` names, or else what its folder says it was trained for.
//
//   config.json              "kv1": {"key_format": "compact3", "value_format": "compact2",
//                                    "encoder": "least_squares", "hadamard": true, "centre": true,
//                                    "error_weights": true, "key_axis": "per_channel",
//                                    "layers": {"0": {"key_format": "compact2"}}}    those that differ
//   kv1_means.safetensors    with "centre": layers.I.key_means and layers.I.value_means, [kv_heads][head_dim]
//   kv1_error_weights.safetensors    with "error_weights": layers.I.key_weights and layers.I.value_weights,
//                            [kv_heads][head_dim][head_dim] (error_weights.hpp)
//
// kv1-train writes all but error weights, which `kv1-lm calibrate` adds.
#pragma once

#include "cache_policy.hpp"
#include "kv_option.hpp"
#include "model_config.hpp"

#include <filesystem>
#include <optional>

namespace kv1_lm {

inline constexpr const char* means_file = "kv1_means.safetensors";
inline constexpr const char* error_weights_file = "kv1_error_weights.safetensors";

struct model_cache {
    cache_policy policy;
    calibration calibrated; ///< the model's own; empty where the policy takes none
    /// The formats of most layers.
    [[nodiscard]] kv_formats formats() const noexcept {
        return {policy.common.key.format, policy.common.value.format};
    }
};

/// `kv`: this cache, with the folder's means and error weights where it takes any; none: what the model's
/// folder names, or two bits where it names nothing. Throws input_error for a folder that names what no cache
/// of this model can be, or whose means and error weights are not this model's.
[[nodiscard]] model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                                       const std::optional<cache_policy>& kv);

} // namespace kv1_lm
