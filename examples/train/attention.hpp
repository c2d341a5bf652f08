// SPDX-License-Identifier: Apache-2.0
//
// Causal attention for training, over keys and values as a cache gives them back. Where the cache keeps its first
// tokens and its newest ones in fp16, a query sees those as they are and the rest through the cache, in one softmax.
#pragma once

#include <torch/types.h>

#include <cstdint>

namespace kv1_train {

/// Which tokens a query sees as they are: the first `sinks`, and the last `window` up to its own. Query 9 with
/// sinks 2 and window 3 sees tokens 0, 1, 7, 8, 9 as they are, and 2 to 6 through the cache.
struct fp16_tokens {
    std::int64_t sinks = 0, window = 0;
};

/// q is [batch][length][heads][dim]; k and v, [batch][length][kv_heads][dim], each serve heads / kv_heads query
/// heads. Gives [batch][length][heads * dim].
[[nodiscard]] torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v);

/// The same, with keys and values both as they are and through the cache. On CUDA in bf16 with LibTorch 2.4 it is
/// FlashAttention, and takes O(length) memory; elsewhere O(length^2).
[[nodiscard]] torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& plain_k,
                                   const torch::Tensor& plain_v, const torch::Tensor& k,
                                   const torch::Tensor& v, fp16_tokens as_they_are);

/// The second attend() by elementary operations alone: what the fast path is tested against.
[[nodiscard]] torch::Tensor attend_by_operations(const torch::Tensor& q, const torch::Tensor& plain_k,
                                                 const torch::Tensor& plain_v, const torch::Tensor& k,
                                                 const torch::Tensor& v, fp16_tokens as_they_are);

} // namespace kv1_train
