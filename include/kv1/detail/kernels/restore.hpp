// SPDX-License-Identifier: Apache-2.0
//
// What attention adds for keys and values that were stored without their means, or rotated. Once a row, so
// plain C++ outside the targets' regions.
//
//   q . (k + mu) = q . k + q . mu      the same for all keys of a row: weights do not see it, but a soft cap,
//                                      sinks and the log-sum-exp do
//   sum p (v + mu) = sum p v + mu sum p
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/softmax.hpp>

namespace kv1::inline KV1_ABI::detail {

// Scaled score of a query, before it is rotated, with the mean of its keys.
inline float key_shift(const attention_job& job, const float* query) noexcept {
    if (job.key_means == nullptr)
        return 0.0f;
    float sums[4]{};
    const std::size_t n = job.layout->keys().channels;
    for (std::size_t c = 0; c < n; ++c)
        sums[c % 4] += query[c] * job.key_means[c];
    return job.scale * ((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

// A soft cap has taken the shift in already.
inline void shift_maximum(const attention_job& job, float shift, softmax_state& state) noexcept {
    if (job.key_means != nullptr && !(job.soft_cap > 0.0f) && state.maximum != lowest_score)
        state.maximum += shift * log2_e;
}

// `weight`: sum of the weights behind the output, less than one where a sink has a share.
template <class Rotate>
void restore_output(const attention_job& job, float weight, float* output, const Rotate& rotate) noexcept {
    const std::size_t n = job.layout->values().channels;
    if (job.value_hadamard != 0)
        rotate(output, n, job.value_hadamard);
    if (job.value_means != nullptr)
        for (std::size_t c = 0; c < n; ++c)
            output[c] += weight * job.value_means[c];
}

} // namespace kv1::inline KV1_ABI::detail
