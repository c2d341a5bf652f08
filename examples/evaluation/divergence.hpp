// SPDX-License-Identifier: Apache-2.0
//
// How far predictions differ: rows of logits against each other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

namespace kv1_lm {

/// log(sum(exp(x))). Precondition: x is not empty.
inline double log_sum_exp(std::span<const float> x) {
    const float largest = *std::max_element(x.begin(), x.end());
    double sum = 0.0;
    for (const float v : x)
        sum += static_cast<double>(std::exp(v - largest));
    return static_cast<double>(largest) + std::log(sum);
}

/// KL(P || Q) of two rows of logits with their log_sum_exp, in nats.
inline double divergence(std::span<const float> p, double p_norm, std::span<const float> q, double q_norm) {
    double sum = 0.0;
    const auto p_offset = static_cast<float>(p_norm);
    const double norms = q_norm - p_norm;
    for (std::size_t i = 0; i < p.size(); ++i)
        sum += static_cast<double>(std::exp(p[i] - p_offset)) * (static_cast<double>(p[i] - q[i]) + norms);
    return std::max(sum, 0.0); // rounding may leave it a hair below
}

} // namespace kv1_lm
