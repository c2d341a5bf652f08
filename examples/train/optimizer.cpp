// SPDX-License-Identifier: Apache-2.0
#include "optimizer.hpp"

#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kv1_train {

double schedule::rate(std::int64_t step) const {
    if (step < warmup)
        return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
    const auto left = static_cast<double>(std::max<std::int64_t>(steps - warmup, 1));
    const double done = std::min(static_cast<double>(step - warmup) / left, 1.0);
    return last + 0.5 * (peak - last) * (1.0 + std::cos(std::numbers::pi * done));
}

adamw::adamw(const torch::Tensor& weights, std::int64_t decayed, adamw_options options)
    : options_(options), decayed_(decayed), first_(torch::zeros_like(weights)),
      second_(torch::zeros_like(weights)) {}

void adamw::update(torch::Tensor& weights, const torch::Tensor& gradients, double rate, std::int64_t step) {
    const torch::NoGradGuard no_gradient;
    const auto [beta1, beta2, epsilon, decay] = options_;
    const auto n = static_cast<double>(step + 1);
    first_.lerp_(gradients, 1.0 - beta1);
    second_.mul_(beta2).addcmul_(gradients, gradients, 1.0 - beta2);
    const torch::Tensor denominator = second_.sqrt().div_(std::sqrt(1.0 - std::pow(beta2, n))).add_(epsilon);
    weights.narrow(0, 0, decayed_).mul_(1.0 - rate * decay);
    weights.addcdiv_(first_, denominator, -rate / (1.0 - std::pow(beta1, n)));
}

torch::Tensor clip(torch::Tensor& gradients, double limit) {
    const torch::NoGradGuard no_gradient;
    const torch::Tensor norm = gradients.norm();
    if (limit > 0.0)
        gradients.mul_((limit / (norm + 1e-6)).clamp_max(1.0));
    return norm;
}

} // namespace kv1_train
