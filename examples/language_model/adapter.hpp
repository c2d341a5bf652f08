// SPDX-License-Identifier: Apache-2.0
//
// A LoRA in PEFT's form: adapter_config.json and adapter_model.safetensors, and beside them what an adapter for a packed
// cache has (model_cache.hpp): kv1.json, which names the cache, kv1_means.safetensors and kv1_calibration.bin.
#pragma once

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

namespace kv1_lm {

inline constexpr const char* adapter_weights_file = "adapter_model.safetensors";
inline constexpr const char* adapter_cache_file = "kv1.json";

/// What stands before a module's name in an adapter's tensors.
inline constexpr const char* adapter_prefix = "base_model.model.";

/// What adapter_config.json says.
struct adapter_config {
    std::size_t rank = 0;
    double alpha = 0.0;               ///< the adapter counts alpha / rank
    std::vector<std::string> targets; ///< the last names of the projections that it adapts
    bool norms = false;               ///< whether it has norms' weights, too
};

/// Reads a PEFT folder's configuration. Throws input_error for what is not plain LoRA: DoRA, rank-stabilized scales,
/// biases, ranks of single layers.
[[nodiscard]] adapter_config read_adapter_config(const std::filesystem::path& folder);

struct merge_options {
    std::filesystem::path model;   ///< folder of the model that is adapted
    std::filesystem::path adapter; ///< PEFT folder
    std::filesystem::path out;     ///< folder to make; it may exist, but hold none of the files
};

/// `kv1-lm merge`: makes a model folder of a model and an adapter for it. Weights are W + (alpha / rank) B A, computed in
/// fp32 and kept in fp16. The folder names the adapter's cache, and has its means and error weights. Throws input_error
/// for an adapter that is not this model's.
void merge(const merge_options& options, std::ostream& out);

} // namespace kv1_lm
