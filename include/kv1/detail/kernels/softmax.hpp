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

// A tile's scores, twice.
struct sampled_scores {
    const float *fast, *exact;        // lowest_score where a token is not seen
    const float *weights, *corrected; // by the former, by the latter
};

// What scores on the integer path are off by, on the whole: a query's rounding error meets what all keys
// share and shifts their scores alike. Weights do not see it, but the log-sum-exp does, and with it whatever
// is joined to these keys. It is found in a tile of tokens: their weights are corrected one by one, all
// others by the tile's mean. In it a token counts the less the more its weight is above the average (a sink
// says nothing of the rest), and the mean counts as far as it stands out from its own error, three times.
// seen: tokens behind the state, those that an explicit mask hides included. Returns what to add to the
// maximum.
inline float sum_correction(const sampled_scores& sample, std::size_t tokens, std::size_t seen,
                            const softmax_state& s) noexcept {
    const float average = s.denominator / static_cast<float>(seen);
    float inside = 0.0f, corrected = 0.0f, count = 0.0f, sum = 0.0f, squares = 0.0f, shares = 0.0f;
    for (std::size_t i = 0; i < tokens; ++i) {
        if (sample.fast[i] == lowest_score)
            continue;
        const float error = sample.exact[i] - sample.fast[i];
        const float share = average / (average + sample.weights[i]);
        inside += sample.weights[i];
        corrected += sample.corrected[i];
        count += share;
        shares += share * share;
        sum += share * error;
        squares += share * error * error;
    }
    float mean = 0.0f;
    const float others = count * count / shares - 1.0f; // as many as equal shares would be, less one
    if (others > 0.01f) {
        mean = sum / count;
        const float spread = squares / count - mean * mean;
        const float square = spread > 0.0f ? spread / others : 0.0f; // of the mean's error
        mean = mean * mean > 9.0f * square ? mean - 9.0f * square / mean : 0.0f;
    } else if (count > 0.25f) { // one token alone, of ordinary weight
        mean = sum / count;
    }
    const float outside = s.denominator > inside ? s.denominator - inside : 0.0f;
    const float whole = (corrected + outside * std::exp(mean)) / s.denominator;
    return whole > 0.0f && whole < std::numeric_limits<float>::infinity() ? std::log2(whole) : 0.0f;
}

inline float log_sum_exp_of(const softmax_state& s) noexcept {
    return s.denominator > 0.0f ? s.maximum * ln_2 + std::log(s.denominator)
                                : -std::numeric_limits<float>::infinity();
}

} // namespace kv1::inline KV1_ABI::detail
