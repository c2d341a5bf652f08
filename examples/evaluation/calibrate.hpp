// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm calibrate: takes what a cache wants to know of a model from a text (kv1/calibration.hpp), and keeps it in the
// model's folder. The cache is the one that is asked for, or the one that the folder names, with error weights added.
#pragma once

#include "cache_policy.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <optional>
#include <span>
#include <vector>

namespace kv1_lm {

class model;
class thread_pool;

/// Takes what the policy names (means, bases, error weights of the tokens that it quantizes) from a run of the model
/// over these tokens. They are divided equally among the lengths of chunks: {1024, 8192} reads the first half in chunks
/// of 1,024, the second in chunks of 8,192. Every query_stride-th query counts for error weights and bases. `name` is
/// kept with it. Error weights take several times as long as the run. Throws input_error, kv1::error.
[[nodiscard]] kv1::calibration calibrate(const model& m, std::span<const std::int32_t> tokens,
                                         const std::vector<std::size_t>& lengths, const cache_policy& policy,
                                         const kv1::model_fingerprint& name, thread_pool& pool,
                                         std::size_t query_stride = 1);

struct calibrate_options {
    std::filesystem::path model = {};
    std::filesystem::path text = {};            ///< another text than the one that quality is measured on
    std::optional<cache_policy> policy = {};    ///< none: the folder's, with error weights added
    std::size_t tokens = 16384;                 ///< number of its tokens to use
    std::vector<std::size_t> chunk_tokens = {}; ///< lengths of chunks; none: as long as the model can read
    std::size_t query_stride = 1;               ///< 4: every fourth query counts
    std::size_t threads = 1;                    ///< to compute with
};

/// Runs the model over the text with a plain cache, writes a calibration to the model's folder (model_cache.hpp), and
/// names the policy in config.json. Files appear whole or not at all, config.json last. Throws input_error for a policy
/// that takes nothing from a text, for a folder that names none where none is given, or one whose levels are not
/// fitted.
void calibrate_folder(const calibrate_options& options, std::ostream& out);

} // namespace kv1_lm
