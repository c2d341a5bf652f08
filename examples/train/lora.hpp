// SPDX-License-Identifier: Apache-2.0
//
// Low-rank adapters (LoRA; Hu et al. 2021) in the form that PEFT reads and writes: a folder with
//
//   adapter_config.json        rank r, alpha, the names of the adapted projections
//   adapter_model.safetensors  base_model.model.MODULE.lora_A.weight [r][inputs], .lora_B.weight [outputs][r],
//                              fp16; base_model.model.MODULE.weight for norms that were trained, too
//   kv1.json                   the cache that it was trained for, as in config.json of a model folder
//
// An adapted projection gives W x + (alpha / r) B A x.
#pragma once

#include "training_policy.hpp"

#include <nlohmann/json.hpp>

#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_train {

class language_model;
class durable_folder;

struct lora_options {
    std::int64_t rank = 0; ///< 0: no adapter
    double alpha = 0.0;    ///< 0: twice the rank
    /// Projections to adapt in every layer: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
    std::vector<std::string> targets{"q_proj", "k_proj", "v_proj", "o_proj"};
    bool norms = false; ///< trains the norms' weights, too

    [[nodiscard]] double scale() const noexcept {
        return (alpha > 0.0 ? alpha : 2.0 * static_cast<double>(rank)) / static_cast<double>(rank);
    }
};

/// What decides an adapter's meaning, for logs and for resuming.
[[nodiscard]] nlohmann::json describe(const lora_options& options);

/// Writes the adapter of a model that has one. `base`: the folder of the model that it adapts.
void write_adapter(const durable_folder& folder, const language_model& model,
                   const std::filesystem::path& base);

/// Gives a model the adapter in a PEFT folder. Throws input_error for one that is not this model's, and for what is
/// not plain LoRA: DoRA, rank-stabilized scales, biases, ranks of single layers. `type`: what logits will be computed
/// in.
void read_adapter(const std::filesystem::path& folder, language_model& model,
                  torch::ScalarType type = torch::kFloat32);

/// The cache that an adapter was trained for: plain keys and values where its folder names none.
[[nodiscard]] training_policy read_adapter_policy(const std::filesystem::path& folder);

} // namespace kv1_train
