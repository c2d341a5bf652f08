// SPDX-License-Identifier: Apache-2.0
//
// Reads config.json of a model folder: banana_kv1, which the project's own models are, or the Llama family as
// Transformers saves it (llama, which SmolLM2 is, too; qwen2; qwen3). They are one architecture. They differ in
// the names of their tensors, in which channels RoPE pairs, and in whether projections have biases and queries
// and keys are normalized.
#pragma once

#include <kv1/rotary_embedding.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_lm {

struct model_config {
    std::size_t vocab_size = 0;
    std::size_t hidden_size = 0;
    std::size_t intermediate_size = 0;
    std::size_t layers = 0;
    std::size_t heads = 0;
    std::size_t kv_heads = 0;
    std::size_t head_dim = 0;
    std::size_t max_positions = 0;
    float rms_norm_eps = 0.0f;
    float rope_theta = 0.0f;
    kv1::rotary_pairs rotary_pairs = kv1::rotary_pairs::interleaved;
    bool qkv_bias = false;       ///< projections of queries, keys and values have biases
    bool output_bias = false;    ///< the projection of attention's output has one
    bool normalized_qk = false;  ///< queries and keys of each head are normalized before RoPE
    std::string tensor_prefix{}; ///< of the names of all tensors but the head's: "model." in the Llama family
    bool tied_embeddings = true;
    std::vector<std::int32_t> end_tokens; ///< generation stops at any of them

    /// Throws input_error for a file that does not describe a model this program can run.
    [[nodiscard]] static model_config read(const std::filesystem::path& file);
};

} // namespace kv1_lm
