// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm calibrate: adds error weights to the cache that a model's folder names. From then on the cache
// chooses levels by what errors cost the model's attention.
#pragma once

#include "cache_policy.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <vector>

namespace kv1_lm {

class model;

/// Means and error weights of a model, from a run over these tokens in chunks of `chunk`. Weights
/// (error_weights.hpp) take several times as long as the run; without `error_weights` they are left out.
/// Throws input_error.
[[nodiscard]] calibration calibrate(const model& m, std::vector<std::int32_t> tokens, std::size_t chunk,
                                    bool error_weights);

struct calibrate_options {
    std::filesystem::path model = {};
    std::filesystem::path text = {}; ///< not one to measure on
    std::size_t tokens = 16384;      ///< of it to use
};

/// Runs the model over the text with a plain cache and writes what errors would cost beside it
/// (error_weights.hpp, model_cache.hpp), and means where config.json names them and there are none; then
/// names the weights in config.json. Files appear whole or not at all, config.json last. Throws input_error:
/// for a folder that names no cache, or one whose levels are not fitted.
void calibrate_folder(const calibrate_options& options, std::ostream& out);

} // namespace kv1_lm
