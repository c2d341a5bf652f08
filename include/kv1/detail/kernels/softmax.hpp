// SPDX-License-Identifier: Apache-2.0
//
// The state of a row's online softmax between chunks, ranges and sink logits. Exponentials are taken to base
// 2: with L = log2(e) in fp32, the weight of a score s is 2^(s L - m), m = L * (largest score) in fp32.
// Whatever m is rounded to, all weights of a row share it, so only s L - m is rounded, once, relative to its
// own size.
#pragma once

#include <kv1/detail/config.hpp>

#include <cmath>
#include <cstddef>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

inline constexpr float log2_e = 1.44269504f;
inline constexpr float ln_2 = 0.693147181f;
inline constexpr float lowest_score = std::numeric_limits<float>::lowest(); // of a token that is not seen

// The largest score of a row so far, and the sum of its weights.
struct softmax_state {
    float maximum = lowest_score; // in units of log2; lowest_score: nothing seen
    float denominator = 0.0f;
};

// The factor from weights less `before` to weights less `after`, both maxima in units of log2.
inline float softmax_rescale(float before, float after) noexcept {
    return before == lowest_score ? 0.0f : std::exp2(before - after);
}

// Adds exp(sink) to the denominator; returns the factor for the weighted sums.
inline float add_sink_logit(softmax_state& s, float sink_logit) noexcept {
    const float logit = sink_logit * log2_e;
    const float maximum = logit > s.maximum ? logit : s.maximum;
    const float factor = softmax_rescale(s.maximum, maximum);
    s.denominator = s.denominator * factor + std::exp2(logit - maximum);
    s.maximum = maximum;
    return factor;
}

inline float log_sum_exp_of(const softmax_state& s) noexcept {
    return s.denominator > 0.0f ? s.maximum * ln_2 + std::log(s.denominator)
                                : -std::numeric_limits<float>::infinity();
}

} // namespace kv1::inline KV1_ABI::detail
