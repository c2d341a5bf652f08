// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints. A checkpoint is a model folder that Transformers and kv1-lm read (fp16). Beside the model it
// holds what a run needs to go on with the same bits: fp32 weights, the optimizer's moments, and the step.
//
//   step-00001000/  config.json  model.safetensors  tokenizer.json ..  trainer_state.safetensors
//                   kv1_means.safetensors, where keys and values are centred: layers.N.key_means,
//                   .value_means, fp32 [kv_heads][head_dim]
//                   kv1_calibration.bin, where the policy has error weights
//
// A run that trains an adapter saves a PEFT folder (lora.hpp) in the place of the model; its weights are no part of the
// state then.
//
// The order of the data is a function of seed and step, and nothing else is random, so there is no other
// state.
#pragma once

#include "language_model.hpp"
#include "training_policy.hpp"
#include "optimizer.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

namespace kv1_train {

/// What a checkpoint contains besides weights and optimizer.
struct checkpoint_source {
    std::filesystem::path model_folder; ///< config.json and the tokenizer's files are copied from here
    training_policy kv;                 ///< written to config.json
    nlohmann::json options;             ///< of the run; it is resumed only with equal options
};

class durable_folder;

/// Writes a model folder: weights in fp16, means and error weights where the policy has any, config.json and the
/// tokenizer of `model_folder`, and in config.json the policy. Throws input_error.
void write_model(const durable_folder& folder, const language_model& model,
                 const std::filesystem::path& model_folder, const training_policy& kv);

/// Loads the means that a folder holds, if it holds any. Throws input_error.
void read_means(const std::filesystem::path& folder, language_model& model);

/// Saves `root`/step-N, whole or not at all, and removes all checkpoints but the last `keep`. Throws
/// input_error.
std::filesystem::path save_checkpoint(const std::filesystem::path& root, std::int64_t step,
                                      const language_model& model, adamw& optimizer,
                                      const checkpoint_source& source, std::size_t keep);

/// Loads a model folder: its shape, or with weights and means too. Throws input_error.
[[nodiscard]] std::unique_ptr<language_model> read_model(const std::filesystem::path& folder,
                                                         torch::Device device, bool weights);

/// The last step-N folder of a run, if it has one.
[[nodiscard]] std::optional<std::filesystem::path> last_checkpoint(const std::filesystem::path& root);

/// Restores a run, and gives the number of steps done. Throws input_error if the run had other options,
/// naming the first that differs.
[[nodiscard]] std::int64_t load_checkpoint(const std::filesystem::path& folder, language_model& model,
                                           adamw& optimizer, const nlohmann::json& options);

} // namespace kv1_train
