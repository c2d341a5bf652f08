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
    torch::Tensor cosines, sines;           ///< of keys and queries, as the reference computes them
    torch::Tensor mean_cosines, mean_sines; ///< of means, as the cache computes them (kv1::turn_mean)
    kv1::rotary_pairs pairs = kv1::rotary_pairs::interleaved;
    [[nodiscard]] static rotary_table make(std::int64_t positions, std::int64_t head_dim, float theta,
                                           kv1::rotary_pairs pairs, torch::Device device);
};

/// What a side's policy takes from elsewhere, fp32; constants to the gradient.
struct side_constants {
    torch::Tensor means; ///< [heads][head_dim]; taken off where the policy has means
    bool turn = false;   ///< means of keys before rotation, which turn with their positions
    /// [heads][head_dim][head_dim], as kv1::try_factor_error_weights() makes them, where the policy has error weights.
    torch::Tensor error_factors = {};
};

/// Keys as attention sees them.
struct keys_seen {
    torch::Tensor cached; ///< as a cache gives them back
    torch::Tensor plain;  ///< as they are; undefined where nobody asked
};

/// Rotates each pair of channels by the angle of its position. x is [batch][positions][heads][head_dim].
[[nodiscard]] torch::Tensor rotate(const torch::Tensor& x, const rotary_table& table);

/// What a cache of this policy gives back of x, [batch][positions][heads][head_dim], in x's type; computed in
/// fp32. The first `sinks` positions stay as they are. The gradient is straight-through. On the CPU it throws
/// kv1::error for values that no cache can hold; on CUDA NaN stays NaN.
[[nodiscard]] torch::Tensor through_cache(const torch::Tensor& x, const trained_side& side,
                                          const side_constants& constants, std::int64_t sinks = 0);

/// rotate(), then through_cache(), without rounding to x's type in between; and with `also_plain` rotate() alone,
/// from the same pass over x.
[[nodiscard]] keys_seen rotate_through_cache(const torch::Tensor& x, const rotary_table& table,
                                             const trained_side& side, const side_constants& constants,
                                             std::int64_t sinks = 0, bool also_plain = false);

} // namespace kv1_train
