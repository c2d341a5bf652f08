// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm calibrate: adds error weights to the cache that a model's folder names. The cache then chooses
// levels by what errors cost the model.
#pragma once

#include "cache_policy.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <vector>

namespace kv1_lm {

class model;

/// Computes means and error weights of a model, from a run over these tokens in chunks of `chunk`. Error
/// weights (error_weights.hpp) take several times as long as the run; `error_weights` = false leaves them
/// out. Throws input_error.
[[nodiscard]] calibration calibrate(const model& m, std::vector<std::int32_t> tokens, std::size_t chunk,
                                    bool error_weights);

struct calibrate_options {
    std::filesystem::path model = {};
    std::filesystem::path text = {}; ///< another text than the one that quality is measured on
    std::size_t tokens = 16384;      ///< number of its tokens to use
};

/// Runs the model over the text with a plain cache, and writes error weights to the model's folder
/// (error_weights.hpp, model_cache.hpp). Writes means too, if config.json names them and the file is missing.
/// Then names the weights in config.json. Files appear whole or not at all, config.json last. Throws
/// input_error for a folder that names no cache, or one whose levels are not fitted.
void calibrate_folder(const calibrate_options& options, std::ostream& out);

} // namespace kv1_lm
