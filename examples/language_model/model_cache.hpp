// SPDX-License-Identifier: Apache-2.0
//
// The cache that a model runs with: the one that `--kv` names, or else the one that the model's folder names.
//
//   config.json              "kv1": {"policy": "c3+ls+had+mean+ew,c2+ls+had+mean+ew"}, as kv1/cache_policy.hpp
//                            has it
//   kv1_means.safetensors    with +mean: layers.I.key_means and layers.I.value_means, [kv_heads][head_dim]
//   kv1_error_weights.safetensors    with +ew: layers.I.key_weights and layers.I.value_weights,
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

/// The cache of a model. With `kv` it is that policy, with means and error weights of the folder if it takes
/// any. Else it is the policy that the folder names, or two bits if it names none. Throws input_error if the
/// folder names a cache that this model cannot have, or if its means and error weights are not this model's.
[[nodiscard]] model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                                       const std::optional<cache_policy>& kv);

} // namespace kv1_lm
