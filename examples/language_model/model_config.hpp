// SPDX-License-Identifier: Apache-2.0
//
// Reads config.json of a banana_kv1 model folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
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
    bool tied_embeddings = true;
    std::vector<std::int32_t> end_tokens; ///< generation stops at any of them

    /// Throws input_error for a file that does not describe a model this program can run.
    [[nodiscard]] static model_config read(const std::filesystem::path& file);
};

} // namespace kv1_lm
