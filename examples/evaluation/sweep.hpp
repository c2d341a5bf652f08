// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm sweep: compares many cache policies with an fp32 cache, on several models. A chunk's reference
// logits are computed once and serve every policy. Every policy runs through a real cache.
//
// The JSON file holds the sums of every chunk and is rewritten as chunks are done. A run that was
// interrupted, or is asked for more chunks or policies, goes on from it. A file of other settings is refused.
#pragma once

#include "cache_policy.hpp"

#include <kv1/attention.hpp>

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

namespace kv1_lm {

struct sweep_options {
    std::vector<std::filesystem::path> models = {};
    std::filesystem::path text = {};
    std::filesystem::path calibration_text = {}; ///< empty: policies that need one are refused
    std::size_t calibration_tokens = 16384;
    std::vector<std::string> policies = {}; ///< empty: default_policies()
    std::size_t chunks = 0;                 ///< number of chunks from the first on; 0: all
    std::size_t seq_len = 1024;
    kv1::precision precision = kv1::precision::exact;
    std::size_t threads = 1;
    std::filesystem::path json = {}, csv = {}; ///< empty: not written
    bool show_progress = false;
};

/// What a policy costs a model.
struct sweep_row {
    std::string model, policy;
    double bytes_per_vector = 0.0;
    double key_mse = 0.0, value_mse = 0.0; ///< over the first chunk's K (after RoPE) and V, per channel
    double encode_ns = 0.0;                ///< per value, on one thread, K and V
    std::size_t positions = 0;
    double kld = 0.0; ///< nats a position
    double reference_perplexity = 0.0, perplexity = 0.0;
    double top1 = 0.0; ///< share of positions whose likeliest token is the reference's
};

[[nodiscard]] std::vector<std::string> default_policies();

/// Measures, and gives a row for each model and policy, in the order asked for. Throws input_error.
[[nodiscard]] std::vector<sweep_row> measure_sweep(const sweep_options& options, std::ostream& log);

/// Measures, prints a table and writes the files. Throws input_error.
void sweep(const sweep_options& options, std::ostream& out, std::ostream& log);

} // namespace kv1_lm
