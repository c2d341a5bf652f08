// SPDX-License-Identifier: Apache-2.0
//
// The 8M model over a distributed cache: every rank runs the model, each keeps its share of the tokens.
#pragma once

#include "distributed_cache.hpp"

#include "model.hpp"
#include "thread_pool.hpp"

#include <kv1/attention.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace context_parallel {

/// Continues a prompt by the likeliest tokens: the prompt and `wanted` tokens, or fewer where the model ends
/// the text. Collective; the same on all ranks, of which each has to have the same outputs to the bit
/// (joining::in_rank_order). Precondition: the prompt is not empty.
[[nodiscard]] std::vector<std::int32_t>
continue_greedily(const kv1_lm::model& model, distributed_cache& cache, std::span<const std::int32_t> prompt,
                  std::size_t wanted, kv1::precision precision, kv1_lm::thread_pool& pool);

} // namespace context_parallel
