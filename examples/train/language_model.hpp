// SPDX-License-Identifier: Apache-2.0
//
// The transformer that examples/transformer runs, for training: the same tensors by the same names, keys and
// values through a differentiable image of the cache.
//
// All that is trained lies in one fp32 tensor, all gradients in another, matrices first: what is done to every
// parameter (optimizer, clipping, summing over ranks, saving) is done to one tensor. That is all weights, or, once
// a model has an adapter (lora.hpp), the adapter's alone.
#pragma once

#include "cache_path.hpp"
#include "error_weights.hpp"
#include "lora.hpp"
#include "model_config.hpp"
#include "training_policy.hpp"
#include "weights.hpp"

#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kv1_lm {
class safetensors;
}

namespace kv1_train {

struct parameter {
    std::string name;    ///< in safetensors files
    torch::Tensor value; ///< a leaf; lies in flat_parameters::values, its gradient in ::gradients
};

/// Parameters that lie in one tensor.
struct flat_parameters {
    std::vector<parameter> parts;
    torch::Tensor values, gradients; ///< fp32, one dimension
    std::int64_t matrix_weights =
        0; ///< the first so many values are matrices', the rest are norms' and biases'
};

/// Means of keys, before rotation, and of values, taken on the way through a model.
struct observed_means {
    std::int64_t sequences = 1; ///< the first so many of a batch are looked at
    torch::Tensor means;        ///< shaped as language_model::means()
};

class language_model {
public:
    /// Weights are zero; load() or initialize() them.
    language_model(kv1_lm::model_config config, torch::Device device);
    language_model(const language_model&) = delete;
    language_model& operator=(const language_model&) = delete;

    /// Normal with deviation 0.02, projections into the residual stream smaller by sqrt(2 layers), norms 1,
    /// biases 0.
    void initialize(std::uint64_t seed);
    /// Throws input_error for a tensor that is missing or of another shape, or left over.
    void load(const kv1_lm::safetensors& file);

    /// Freezes the weights and adds an adapter, which trained() is from now on. It changes nothing at first: A is
    /// uniform up to 1 / sqrt(inputs), as PEFT draws it, B is zero. `type`: what logits will be computed in.
    /// Throws input_error for targets that the model does not have. Precondition: the model has no adapter.
    void adapt(const lora_options& options, std::uint64_t seed, torch::ScalarType type);
    /// Adds the adapter to the weights, and drops it.
    void merge();
    [[nodiscard]] const std::optional<lora_options>& adapter() const noexcept { return adapter_; }

    /// Logits [batch * length][words] of tokens [batch][length], int64, in `type`, which matrix products and
    /// attention are computed in; the residual stream and norms are fp32. Precondition: a policy with +ew is the one
    /// that error_weights() are for.
    /// `seen`, where given, gets the means of what the policy quantizes.
    [[nodiscard]] torch::Tensor logits(const torch::Tensor& tokens, const training_policy& kv,
                                       torch::ScalarType type, observed_means* seen = nullptr) const;
    /// Logits with plain keys and values and without the adapter: of the model as it was loaded.
    [[nodiscard]] torch::Tensor original_logits(const torch::Tensor& tokens, torch::ScalarType type) const;

    /// What a policy with +mean takes off keys and values, fp32 [layers][2][kv_heads][head_dim]; zero at
    /// first. No parameter: no gradient moves it.
    [[nodiscard]] torch::Tensor& means() noexcept { return means_; }
    [[nodiscard]] const torch::Tensor& means() const noexcept { return means_; }
    /// Whether means of keys are those before rotation, and turn with the position. They do, but for models of old.
    [[nodiscard]] bool means_turn() const noexcept { return means_turn_; }
    void set_means_turn(bool turn) noexcept { means_turn_ = turn; }

    /// What a policy with +ew chooses codes by; none at first.
    [[nodiscard]] const std::optional<calibrated_weights>& error_weights() const noexcept {
        return error_weights_;
    }
    void set_error_weights(calibrated_weights found) noexcept { error_weights_ = std::move(found); }

    [[nodiscard]] const kv1_lm::model_config& config() const noexcept { return config_; }
    [[nodiscard]] torch::Device device() const { return base_.values.device(); }
    /// The weights of the model itself.
    [[nodiscard]] const flat_parameters& base() const noexcept { return base_; }
    /// What is trained: the adapter, if there is one, or else the weights.
    [[nodiscard]] flat_parameters& trained() noexcept { return adapter_ ? added_ : base_; }
    [[nodiscard]] const flat_parameters& trained() const noexcept { return adapter_ ? added_ : base_; }

private:
    struct projection {
        torch::Tensor weight;   // a view of base_.values
        torch::Tensor cast;     // frozen weights in the type of matrix products
        torch::Tensor down, up; // of an adapter: A and B
    };
    struct channel_weights {
        torch::Tensor weight;  // a view of base_.values
        torch::Tensor trained; // of an adapter that has norms
    };
    using weights = kv1_lm::model_weights<projection, channel_weights>;

    [[nodiscard]] torch::Tensor run(const torch::Tensor& tokens, const training_policy& kv,
                                    torch::ScalarType type, bool adapted, observed_means* seen) const;

    kv1_lm::model_config config_;
    flat_parameters base_, added_;
    std::optional<lora_options> adapter_;
    torch::Tensor means_;
    bool means_turn_ = true;
    std::optional<calibrated_weights> error_weights_;
    weights named_; // the head is the embeddings where the two are tied
    std::vector<std::pair<std::string, projection*>> projections_;
    std::vector<std::pair<std::string, channel_weights*>> channels_;
    rotary_table rotary_;
};

} // namespace kv1_train
