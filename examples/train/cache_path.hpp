// SPDX-License-Identifier: Apache-2.0
//
// What happens to a key or value between a layer and attention, as differentiable operations: rotary
// positions, then fake quantization with the straight-through gradient. The CPU uses kv1/fake_quantize.hpp,
// CUDA one kernel with the same arithmetic (device_path.cu).
#pragma once

#include "training_policy.hpp"

#include <kv1/rotary_embedding.hpp>

#include <torch/types.h>

namespace kv1_train {

/// Cosines and sines, [positions][head_dim / 2] each, fp32, and which channels make a pair.
struct rotary_table {
    torch::Tensor cosines, sines;
    kv1::rotary_pairs pairs = kv1::rotary_pairs::interleaved;
    [[nodiscard]] static rotary_table make(std::int64_t positions, std::int64_t head_dim, float theta,
                                           kv1::rotary_pairs pairs, torch::Device device);
};

/// Rotates each pair of channels by the angle of its position. x is [batch][positions][heads][head_dim].
[[nodiscard]] torch::Tensor rotate(const torch::Tensor& x, const rotary_table& table);

/// What a cache of this policy gives back of x, [batch][positions][heads][head_dim], in x's type; computed in
/// fp32. The gradient is straight-through. On the CPU it throws kv1::error for values that no cache can hold;
/// on CUDA NaN stays NaN. centre: means of x, [heads][head_dim], fp32, which a policy with `means` takes off;
/// a constant to the gradient.
[[nodiscard]] torch::Tensor through_cache(const torch::Tensor& x, const trained_side& side,
                                          const torch::Tensor& centre);

/// rotate(), then through_cache(), without rounding to x's type in between.
[[nodiscard]] torch::Tensor rotate_through_cache(const torch::Tensor& x, const rotary_table& table,
                                                 const trained_side& side, const torch::Tensor& centre);

} // namespace kv1_train
