// SPDX-License-Identifier: Apache-2.0
//
// The transformer: a decoder of the Llama family (RMSNorm, rotary positions, grouped-query attention, SwiGLU;
// biases and normalized queries and keys where a model has them), whose keys and values live in a kv1 cache. model.cpp's forward() is the place to see what an
// engine does with kv1: append the new keys and values of a layer, attend.
#pragma once

#include "kv_option.hpp"
#include "linear.hpp"
#include "model_config.hpp"
#include "rotary.hpp"
#include "thread_pool.hpp"
#include "weights.hpp"

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

namespace kv1_lm {

class safetensors;

class model {
public:
    /// Reads config.json and model.safetensors. Throws input_error.
    [[nodiscard]] static model read(const std::filesystem::path& folder);
    model(model_config config, const safetensors& weights);

    [[nodiscard]] const model_config& config() const noexcept { return config_; }
    [[nodiscard]] std::size_t parameters() const noexcept { return parameters_; }
    /// The shape of a cache for this model with room for `tokens`.
    [[nodiscard]] kv1::cache_description cache_shape(const kv_formats& formats, std::size_t tokens) const;

    /// Runs the tokens that follow what the sequence holds, adds them to it and commits. Gives the final hidden
    /// states, [tokens][hidden_size]. Throws input_error for an unknown token and for a position past the
    /// model's last, kv1::error where the cache is full. Const calls may run at once on caches of their own.
    [[nodiscard]] std::vector<float> forward(std::span<const std::int32_t> tokens, kv1::kv_cache& cache,
                                             kv1::sequence_id sequence, kv1::precision precision,
                                             thread_pool& pool) const;
    /// Sees queries, keys (both after RoPE) and values of each layer before they go to the cache.
    using observer = std::function<void(std::size_t layer, kv1::tensor_view queries, kv1::tensor_view keys,
                                        kv1::tensor_view values)>;
    /// As above, watched. What `watch` throws ends the run.
    [[nodiscard]] std::vector<float> forward(std::span<const std::int32_t> tokens, kv1::kv_cache& cache,
                                             kv1::sequence_id sequence, kv1::precision precision,
                                             thread_pool& pool, const observer& watch) const;
    /// A layer's attention, wherever its cache is: keeps the new tokens' keys and values, and lets their
    /// queries attend to all tokens so far. Views are [tokens][heads][head_dim], after RoPE.
    using attention = std::function<void(std::size_t layer, kv1::tensor_view queries, kv1::tensor_view keys,
                                         kv1::tensor_view values, kv1::mutable_tensor_view outputs)>;
    /// As above, for tokens at positions `first` and on; `attend`'s cache is its caller's to commit. What
    /// `attend` throws ends the run.
    [[nodiscard]] std::vector<float> forward(std::span<const std::int32_t> tokens, std::size_t first,
                                             const attention& attend, thread_pool& pool) const;
    /// The output projection of a layer, [hidden_size][heads][head_dim]. Precondition: a layer of the model.
    [[nodiscard]] kv1::tensor_view output_projection(std::size_t index) const noexcept;
    /// Logits [rows][vocab_size] of hidden states [rows][hidden_size].
    void logits(std::span<const float> hidden, std::span<float> out, thread_pool& pool) const;

private:
    void normalize(std::span<const float> x, std::span<const float> weight, std::span<float> out) const;
    void rotate(std::span<float> vectors, std::size_t heads, std::size_t first_position) const;

    model_config config_;
    model_weights<linear, std::vector<float>> weights_;
    rotary_angles angles_;
    std::size_t parameters_ = 0;
};

} // namespace kv1_lm
