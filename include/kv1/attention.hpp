// SPDX-License-Identifier: Apache-2.0
//
// The options of basic_kv_cache::attend(): scale, mask, precision, and optional arguments of particular
// models. attention_mask.hpp has masks; merge_attention.hpp joins results over disjoint sets of tokens.
//
// A query token i stands at a position p: n - m + i, or first_position + i where the mask gives one (n tokens
// cached, m queries). With all options, and natural logarithms:
//
//   s[t]  = scale * q . k[t]                                      for the tokens t that i sees
//   s[t]  = soft_cap * tanh(s[t] / soft_cap)                      where soft_cap > 0
//   s[t] += alibi_slopes[h] * (t - p)                             where given
//   out   = sum_t exp(s[t]) v[t] / D,  log_sum_exp = log D,  D = sum_t exp(s[t]) [+ exp(sink_logits[h])]
#pragma once

#include <kv1/attention_mask.hpp>
#include <kv1/merge_attention.hpp>
#include <kv1/precision.hpp>

#include <cstddef>
#include <limits>
#include <optional>
#include <span>

namespace kv1::inline KV1_ABI {

/// The positions first ... last - 1 of a sequence, as far as they are cached.
struct token_range {
    std::size_t first = 0; ///< the first position
    /// One past the last position.
    std::size_t last = (std::numeric_limits<std::size_t>::max)();
};

/// How one call attends; the default is causal attention on the fast path.
struct attention_options {
    /// Factor of q . k before the softmax; 1 / sqrt(key head_dim) where absent.
    std::optional<float> scale = std::nullopt;
    /// Which tokens each query sees. In a batch it holds for each sequence by itself.
    attention_mask mask = attention_mask::causal();
    /// In a batch: one mask for each sequence, in place of `mask` (speculative trees, images, parts of
    /// prompts at positions of their own). Explicit masks may cover different numbers of keys. Empty: `mask`
    /// holds for all.
    std::span<const attention_mask> masks = {};
    /// Arithmetic; plain formats use fp32 in any case.
    precision mode = precision::fast;
    /// Receives the natural logarithm of each softmax denominator, [tokens][query heads]; empty: not wanted.
    std::span<float> log_sum_exp = {};
    /// Queries see only tokens of this range, of those that the mask shows. merge_attention() joins results
    /// over disjoint ranges.
    token_range range = {};
    /// Sliding window: a query at position p sees no token before p + 1 - window; 0: no window.
    std::size_t window = 0;
    /// Logit soft cap (Gemma 2); 0: none.
    float soft_cap = 0.0f;
    /// ALiBi's slopes, [query heads]; empty: none.
    std::span<const float> alibi_slopes = {};
    /// Sink logits, [query heads]: logits that join the softmax without a value (gpt-oss); empty: none. If
    /// results over several ranges are joined, give them to one of the calls only.
    std::span<const float> sink_logits = {};
};

} // namespace kv1::inline KV1_ABI
