// SPDX-License-Identifier: Apache-2.0
//
// The cache that a model runs with: the one that `--kv` names, or else the one that the model's folder names.
//
//   config.json              "kv1": {"policy": "c3+ls+had+mean+ew,c2+ls+had+mean+ew"}, as kv1/cache_policy.hpp
//                            has it
//   kv1_means.safetensors    with +mean: layers.I.key_means and layers.I.value_means, [kv_heads][head_dim]; with
//                            "key_means": "before rotary embedding" in its metadata, or else those of keys after it
//   kv1_calibration.bin      with +ew, +basis: error weights, bases; with +mean where there is no
//                            kv1_means.safetensors: means (kv1/calibration_file.hpp), named after model.safetensors
//
// `kv1-lm calibrate` makes the calibration; a model that kv1-train trains under error weights keeps it, and so does one
// that an adapter is merged into (adapter.hpp). Means that a model was trained with come
// before those of a calibration.
#pragma once

#include "cache_policy.hpp"
#include "kv_option.hpp"
#include "model_config.hpp"

#include <kv1/model_fingerprint.hpp>

#include <nlohmann/json_fwd.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <utility>

namespace kv1_lm {

class safetensors;

inline constexpr const char* means_file = "kv1_means.safetensors";
inline constexpr const char* calibration_file = "kv1_calibration.bin";

/// The metadata of a file of means, where those of keys turn with their position; and whether they do.
/// @{
inline const std::pair<std::string, std::string> means_that_turn{"key_means", "before rotary embedding"};
[[nodiscard]] bool means_turn(const safetensors& means);
/// @}

/// config.json's "kv_cache_bits", as the KV1 reference has it: a number where one width tells it all, 0 for plain keys
/// and values, else a text.
[[nodiscard]] nlohmann::json reference_bits(const cache_policy& policy);

/// The fingerprint of the weights in a model's folder. Throws input_error.
[[nodiscard]] kv1::model_fingerprint fingerprint_of_model(const std::filesystem::path& folder);

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
