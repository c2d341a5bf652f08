// SPDX-License-Identifier: Apache-2.0
#include "loss.hpp"

#ifdef KV1_TRAIN_CUDA
#include "device_path.hpp"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace kv1_train {

namespace {

using torch::Tensor;

// -log p of the targets, from log probabilities
Tensor at_targets(const Tensor& log_probabilities, const Tensor& targets) {
    return -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1);
}

token_loss by_operations(const Tensor& logits, const Tensor& targets, const Tensor& teacher, double weight,
                         double scale) {
    const Tensor log_p = torch::log_softmax(logits.to(torch::kFloat32), 1);
    token_loss out;
    out.cross_entropy = at_targets(log_p, targets).mean();
    Tensor gradient = log_p.exp();
    gradient.scatter_add_(1, targets.unsqueeze(1),
                          torch::full({targets.size(0), 1}, weight - 1.0, gradient.options()));
    if (teacher.defined()) {
        const Tensor log_t = torch::log_softmax(teacher.to(torch::kFloat32), 1);
        const Tensor t = log_t.exp();
        out.divergence = (t * (log_t - log_p)).sum(1).mean();
        gradient.sub_(t, weight);
    } else {
        out.divergence = torch::zeros({}, gradient.options());
    }
    out.gradient = gradient.mul_(scale / static_cast<double>(logits.size(0))).to(logits.scalar_type());
    return out;
}

#ifdef KV1_TRAIN_CUDA
token_loss by_kernel(const Tensor& logits, const Tensor& targets, const Tensor& teacher, double weight,
                     double scale) {
    const std::int64_t rows = logits.size(0);
    const auto numbers = torch::dtype(torch::kFloat32).device(logits.device());
    Tensor losses = torch::zeros({2, rows}, numbers);
    cuda::token_loss_job job;
    job.logits = logits.data_ptr();
    job.teacher = teacher.defined() ? teacher.data_ptr() : nullptr;
    job.targets = targets.data_ptr<std::int64_t>();
    job.cross_entropy = losses.data_ptr<float>();
    job.divergence = teacher.defined() ? losses.data_ptr<float>() + rows : nullptr;
    job.rows = rows;
    job.words = static_cast<std::int32_t>(logits.size(1));
    job.bf16 = logits.scalar_type() == torch::kBFloat16;
    job.label_weight = static_cast<float>((1.0 - weight) * scale / static_cast<double>(rows));
    job.teacher_weight = static_cast<float>(weight * scale / static_cast<double>(rows));
    const c10::cuda::CUDAGuard on_its_device(logits.device());
    cuda::run(job, c10::cuda::getCurrentCUDAStream().stream());
    const Tensor means = losses.mean(1);
    return {means[0], means[1], logits};
}
#endif

} // namespace

token_loss loss_of(const Tensor& logits, const Tensor& targets, const Tensor& teacher, double weight,
                   double scale) {
    const torch::NoGradGuard no_gradient;
#ifdef KV1_TRAIN_CUDA
    if (logits.is_cuda() && logits.size(1) % 8 == 0)
        return by_kernel(logits.contiguous(), targets.contiguous(),
                         teacher.defined() ? teacher.to(logits.scalar_type()).contiguous() : teacher, weight,
                         scale);
#endif
    return by_operations(logits, targets, teacher, weight, scale);
}

comparison compare(const Tensor& reference, const Tensor& kv, const Tensor& targets) {
    const torch::NoGradGuard no_gradient;
    const Tensor log_r = torch::log_softmax(reference.to(torch::kFloat32), 1);
    const Tensor log_k = torch::log_softmax(kv.to(torch::kFloat32), 1);
    const auto mean = [](const Tensor& x) { return x.mean(torch::kFloat64).item<double>(); };
    return {mean(at_targets(log_r, targets)), mean(at_targets(log_k, targets)),
            mean((log_r.exp() * (log_r - log_k)).sum(1))};
}

} // namespace kv1_train
