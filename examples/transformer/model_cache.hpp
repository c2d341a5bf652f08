// SPDX-License-Identifier: Apache-2.0
//
// The cache that a model runs with: what `--kv` names, or else what its folder says it was trained for.
//
//   config.json              "kv1": {"key_format": "compact3", "value_format": "compact2",
//                                    "encoder": "least_squares", "hadamard": true, "centre": true,
//                                    "error_weights": true,
//                                    "layers": {"0": {"key_format": "compact2"}}}    those that differ
//   kv1_means.safetensors    with "centre": layers.I.key_means and layers.I.value_means, [kv_heads][head_dim]
//   kv1_moments.safetensors  with "error_weights": layers.I.query_moments, [kv_heads][head_dim][head_dim], of
//                            queries after RoPE; what errors in values cost is in the model's weights
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
inline constexpr const char* moments_file = "kv1_moments.safetensors";

struct model_cache {
    cache_policy policy;
    calibration calibrated; ///< the model's own; empty where the policy takes none
    /// The formats of most layers.
    [[nodiscard]] kv_formats formats() const noexcept {
        return {policy.common.key.format, policy.common.value.format};
    }
};

/// `kv`: these formats in the reference's encoding; none: what the model's folder names, or two bits where it
/// names nothing. Throws input_error for a folder that names what no cache of this model can be, or whose
/// means and moments are not this model's.
[[nodiscard]] model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                                       const std::optional<kv_formats>& kv);

} // namespace kv1_lm
