// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm calibrate: adds error weights to the cache that a model's folder names. The cache then chooses
// levels by what errors cost the model (kv1/calibration.hpp).
#pragma once

#include "cache_policy.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <span>

namespace kv1_lm {

class model;
class thread_pool;

/// Takes what the policy names (means, error weights of the tokens that it quantizes) from a run of the model over
/// these tokens in chunks of `chunk`. `name` is kept with it. Error weights take several times as long as the run.
/// Throws input_error, kv1::error.
[[nodiscard]] kv1::calibration calibrate(const model& m, std::span<const std::int32_t> tokens,
                                         std::size_t chunk, const cache_policy& policy,
                                         const kv1::model_fingerprint& name, thread_pool& pool);

struct calibrate_options {
    std::filesystem::path model = {};
    std::filesystem::path text = {}; ///< another text than the one that quality is measured on
    std::size_t tokens = 16384;      ///< number of its tokens to use
    std::size_t threads = 1;         ///< to compute with
};

/// Runs the model over the text with a plain cache, and writes a calibration to the model's folder (model_cache.hpp):
/// error weights, and the means that config.json names. Then names the weights in config.json. Files appear whole or
/// not at all, config.json last. Throws input_error for a folder that names no cache, or one whose levels are not
/// fitted.
void calibrate_folder(const calibrate_options& options, std::ostream& out);

} // namespace kv1_lm
