// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints: a model folder as Transformers and kv1-lm read it (fp16), with what a run needs to go on
// exactly where it was (fp32 weights, moments, step) beside it.
//
//   step-00001000/  config.json  model.safetensors  tokenizer.json ..  trainer_state.safetensors
//                   kv1_means.safetensors, where keys and values are centred: layers.N.key_means,
//                   .value_means, fp32 [kv_heads][head_dim]
//
// The data's order is a function of seed and step, and nothing else is random: there is no other state.
#pragma once

#include "kv_policy.hpp"
#include "language_model.hpp"
#include "optimizer.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

namespace kv1_train {

/// What is saved, and where the rest of a model folder comes from.
struct checkpoint_source {
    std::filesystem::path model_folder; ///< config.json and the tokenizer's files are taken over from here
    kv_policy kv;                       ///< named in config.json
    nlohmann::json options;             ///< of the run; a run goes on only under the same
};

/// Saves `root`/step-N, whole or not at all, and removes all but the last `keep`. Throws input_error.
std::filesystem::path save_checkpoint(const std::filesystem::path& root, std::int64_t step,
                                      const language_model& model, adamw& optimizer,
                                      const checkpoint_source& source, std::size_t keep);

/// A model folder, with its weights and the means beside them, or the shape alone. Throws input_error.
[[nodiscard]] std::unique_ptr<language_model> read_model(const std::filesystem::path& folder,
                                                         torch::Device device, bool weights);

/// The last step-N folder of a run, if it has one.
[[nodiscard]] std::optional<std::filesystem::path> last_checkpoint(const std::filesystem::path& root);

/// Restores a run; gives the number of steps done. Throws input_error where the run had other options, naming
/// the first that differs.
[[nodiscard]] std::int64_t load_checkpoint(const std::filesystem::path& folder, language_model& model,
                                           adamw& optimizer, const nlohmann::json& options);

} // namespace kv1_train
