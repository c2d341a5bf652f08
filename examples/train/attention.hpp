// SPDX-License-Identifier: Apache-2.0
//
// Causal attention for training, over keys and values as a cache gives them back. Where the cache keeps its newest
// tokens in fp16, a query sees those as they are and the rest through the cache, in one softmax.
#pragma once

#include <torch/types.h>

#include <cstdint>

namespace kv1_train {

/// q is [batch][length][heads][dim]; k and v, [batch][length][kv_heads][dim], each serve heads / kv_heads query
/// heads. Gives [batch][length][heads * dim].
[[nodiscard]] torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v);

/// The same, with keys and values both as they are and through the cache: a query sees the last `window` tokens up
/// to its own as they are, and those before through the cache. Query 9 with window 3 sees tokens 7, 8 and 9 as they
/// are. Sinks, which all queries see as they are, are so in k and v. On CUDA in bf16 with LibTorch 2.4 it is
/// FlashAttention, and takes O(length) memory; elsewhere O(length^2).
[[nodiscard]] torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& plain_k,
                                   const torch::Tensor& plain_v, const torch::Tensor& k,
                                   const torch::Tensor& v, std::int64_t window);

/// The second attend() by elementary operations alone: what the fast path is tested against.
[[nodiscard]] torch::Tensor attend_by_operations(const torch::Tensor& q, const torch::Tensor& plain_k,
                                                 const torch::Tensor& plain_v, const torch::Tensor& k,
                                                 const torch::Tensor& v, std::int64_t window);

} // namespace kv1_train
