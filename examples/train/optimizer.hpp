// SPDX-License-Identifier: Apache-2.0
//
// AdamW over one flat tensor, and the learning rate of a step.
#pragma once

#include <torch/types.h>

#include <cstdint>

namespace kv1_train {

/// Linear warm-up, then a cosine from `peak` to `last` at `steps`.
struct schedule {
    double peak = 1e-3, last = 1e-5;
    std::int64_t warmup = 0, steps = 1;
    [[nodiscard]] double rate(std::int64_t step) const; ///< of step 0, 1, ..
};

struct adamw_options {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};

/// Decoupled weight decay on the first `decayed` weights; the rest, norms, have none.
class adamw {
public:
    adamw(const torch::Tensor& weights, std::int64_t decayed, adamw_options options);

    /// One step with this rate; `step` counts from 0 and corrects the moments' bias. No host synchronization.
    void update(torch::Tensor& weights, const torch::Tensor& gradients, double rate, std::int64_t step);

    /// Moments, for checkpoints.
    [[nodiscard]] torch::Tensor& first() noexcept { return first_; }
    [[nodiscard]] torch::Tensor& second() noexcept { return second_; }

private:
    adamw_options options_;
    std::int64_t decayed_;
    torch::Tensor first_, second_;
};

/// Scales gradients to a norm of `limit` at the most (0: leaves them); gives the norm before, on the device.
torch::Tensor clip(torch::Tensor& gradients, double limit);

} // namespace kv1_train
