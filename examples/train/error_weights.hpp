// SPDX-License-Identifier: Apache-2.0
//
// What errors of keys and values cost (kv1/calibration.hpp), for a policy with +ew. They are taken from a folder's
// kv1_calibration.bin, which `kv1-lm calibrate` makes before training, and stay as they are.
#pragma once

#include "training_policy.hpp"

#include <kv1/model_fingerprint.hpp>

#include <torch/types.h>

#include <array>
#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

namespace kv1_lm {
struct model_config;
}

namespace kv1_train {

struct calibrated_weights {
    std::vector<std::byte> file;  ///< the calibration, as it was read
    kv1::model_fingerprint model; ///< whose it is
    /// side_constants::error_factors for the policy, [layers][keys, values]; undefined without +ew.
    std::vector<std::array<torch::Tensor, 2>> factors;
};

/// Reads the calibration of the first of the folders that has one, for the model in the folder `base`. Throws
/// input_error where none has one, and for one of another model or shape, or without error weights.
[[nodiscard]] calibrated_weights read_error_weights(std::span<const std::filesystem::path> folders,
                                                    const std::filesystem::path& base,
                                                    const kv1_lm::model_config& config,
                                                    const training_policy& kv, torch::Device device);

/// The calibration's file for a model with these weights, which was trained from the one that it was made with: the
/// same parts, for this policy. Throws kv1::error, input_error.
[[nodiscard]] std::vector<std::byte> calibration_of(const calibrated_weights& weights,
                                                    std::span<const std::byte> model,
                                                    const training_policy& kv);

} // namespace kv1_train
