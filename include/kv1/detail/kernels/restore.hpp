// SPDX-License-Identifier: Apache-2.0
//
// Undoes means, rotation and basis of stored keys and values in attention. It runs once a query row, so it is plain
// C++ outside the targets' regions. With the mean mu of keys or values:
//
//   q . (k + mu) = q . k + q . mu         all scores of a row shift by q . mu: weights do not change, but a soft cap,
//                                         sink logits and the log-sum-exp see it
//   sum p (v + mu) = sum p v + mu sum p   the output gets mu, times the sum of the weights
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/softmax.hpp>

#include <algorithm>
#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

// The shift of a row's scores: scale * q . mu, of the query before it is rotated. 0 without means.
inline float key_shift(const attention_job& job, const float* query) noexcept {
    if (job.key_means == nullptr)
        return 0.0f;
    float sums[4]{};
    const std::size_t n = job.layout->keys().channels;
    std::size_t c = 0;
    for (; c + 4 <= n; c += 4)
        for (std::size_t k = 0; k < 4; ++k)
            sums[k] += query[c + k] * job.key_means[c + k];
    for (; c < n; ++c)
        sums[c % 4] += query[c] * job.key_means[c];
    return job.scale * ((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

// Adds the shift to the maximum of a row. With a soft cap the scores contain it already.
inline void shift_maximum(const attention_job& job, float shift, softmax_state& state) noexcept {
    if (job.key_means != nullptr && !(job.soft_cap > 0.0f) && state.maximum != lowest_score)
        state.maximum += shift * log2_e;
}

// Rotates an output back, leaves the basis of the values, and adds weight times the mean of the values. weight: the sum of the row's weights,
// 1 unless a sink logit has a share.
inline void restore_output(const attention_job& job, float weight, float* output) noexcept {
    const std::size_t n = job.layout->values().channels;
    if (job.value_hadamard != 0)
        job.target->rotate(output, n, job.value_hadamard);
    if (job.value_basis) {
        float inside[max_vector_length];
        std::copy_n(output, n, inside);
        job.target->leave_basis(job.value_basis, inside, output);
    }
    if (job.value_means != nullptr)
        for (std::size_t c = 0; c < n; ++c)
            output[c] += weight * job.value_means[c];
}

} // namespace kv1::inline KV1_ABI::detail
