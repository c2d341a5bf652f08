// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm kld: measures what a cache format costs. It gives KL(P_reference || P_kv) at every position of a
// text, the divergence of the model's predictions from those with a better cache, and both perplexities.
//
// The text is cut into chunks, and each is run from an empty cache. A chunk of n tokens gives n - 1
// positions, since its last logits predict a token outside of it. With include_last_logit it gives n
// divergences. The reference may be another model, such as the one that this one was adapted from.
#pragma once

#include "cache_policy.hpp"
#include "kv_option.hpp"

#include <kv1/attention.hpp>

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

namespace kv1_lm {

struct kld_options {
    std::filesystem::path model = {};
    std::filesystem::path original = {}; ///< folder of the model to compare with; empty: the same model
    std::filesystem::path text = {};
    std::optional<cache_policy> kv = {}; ///< none: the cache that the model's folder names
    kv_formats reference{kv1::kv_format::fp32, kv1::kv_format::fp32};
    kv1::precision precision = kv1::precision::exact;
    std::size_t seq_len = 1024;
    std::size_t stride = 1024;
    std::size_t skip = 0;       ///< positions at each chunk's start that are not counted
    std::size_t max_tokens = 0; ///< 0: the whole text
    bool include_last_logit = false;
    std::size_t threads = 1;
    std::filesystem::path json = {}; ///< file to write; empty: none
    bool show_progress = false;
};

struct kld_result {
    std::size_t loaded_tokens = 0, positions = 0;
    double nats_per_token = 0.0, max_position_nats = 0.0, max_chunk_mean_nats = 0.0;
    double reference_perplexity = 0.0, kv_perplexity = 0.0;
    double shrink_vs_fp16 = 0.0; ///< bytes of fp16 over the row-format bytes of the cache
    kv_formats kv;               ///< most layers'
    std::string kv_policy;       ///< the cache in full
    std::vector<double> chunk_means;
};

/// Measures. Chunks are shared among the threads, and the result does not depend on their number. Throws
/// input_error.
[[nodiscard]] kld_result measure_kld(const kld_options& options, std::ostream& log);

/// Measures, prints a summary and writes the JSON file. Throws input_error.
void kld(const kld_options& options, std::ostream& out, std::ostream& log);

} // namespace kv1_lm
