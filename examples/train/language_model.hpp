// SPDX-License-Identifier: Apache-2.0
//
// The transformer that examples/transformer runs, for training: the same tensors by the same names, keys and
// values through a differentiable image of the cache.
//
// All weights lie in one fp32 tensor, all gradients in another, matrices first: what is done to every
// parameter (optimizer, clipping, summing over ranks, saving) is done to one tensor.
#pragma once

#include "cache_path.hpp"
#include "training_policy.hpp"
#include "model_config.hpp"
#include "weights.hpp"

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kv1_lm {
class safetensors;
}

namespace kv1_train {

struct parameter {
    std::string name;    ///< in safetensors files
    torch::Tensor value; ///< a leaf; lies in weights(), its gradient in gradients()
};

class language_model {
public:
    /// Weights are zero; load() or initialize() them.
    language_model(kv1_lm::model_config config, torch::Device device);

    /// Normal with deviation 0.02, projections into the residual stream smaller by sqrt(2 layers), norms 1.
    void initialize(std::uint64_t seed);
    /// Throws input_error for a tensor that is missing or of another shape, or left over.
    void load(const kv1_lm::safetensors& file);

    /// Logits [batch * length][words] of tokens [batch][length], int64, in `type`, which matrix products and
    /// attention are computed in; the residual stream and norms are fp32.
    /// `seen`, where given, gets the means of the batch's keys (after rotation) and values, shaped as
    /// means().
    [[nodiscard]] torch::Tensor logits(const torch::Tensor& tokens, const training_policy& kv,
                                       torch::ScalarType type, torch::Tensor* seen = nullptr) const;

    /// What a policy with +mean takes off keys and values, fp32 [layers][2][kv_heads][head_dim]; zero at
    /// first. No parameter: no gradient moves it.
    [[nodiscard]] torch::Tensor& means() noexcept { return means_; }
    [[nodiscard]] const torch::Tensor& means() const noexcept { return means_; }

    [[nodiscard]] const kv1_lm::model_config& config() const noexcept { return config_; }
    [[nodiscard]] torch::Device device() const { return weights_.device(); }
    [[nodiscard]] const std::vector<parameter>& parameters() const noexcept { return parameters_; }
    [[nodiscard]] torch::Tensor& weights() noexcept { return weights_; }
    [[nodiscard]] const torch::Tensor& weights() const noexcept { return weights_; }
    [[nodiscard]] torch::Tensor& gradients() noexcept { return gradients_; }
    /// The first so many weights are matrices', the rest are norms'.
    [[nodiscard]] std::int64_t matrix_weights() const noexcept { return matrix_weights_; }

private:
    kv1_lm::model_config config_;
    std::vector<parameter> parameters_;
    torch::Tensor weights_, gradients_, means_;
    std::int64_t matrix_weights_ = 0;
    // views of weights_; the head is the embeddings where the two are tied
    kv1_lm::model_weights<torch::Tensor, torch::Tensor> named_;
    rotary_table rotary_;
};

} // namespace kv1_train
