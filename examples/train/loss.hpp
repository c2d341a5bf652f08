// SPDX-License-Identifier: Apache-2.0
//
// The loss of a language model and its gradient at the logits, computed together. With a vocabulary of
// thousands the logits are the largest tensors of training, and a graph would keep several tensors of their
// size.
#pragma once

#include <torch/types.h>

namespace kv1_train {

struct token_loss {
    torch::Tensor cross_entropy; ///< mean over the rows, nats; a scalar
    torch::Tensor divergence;    ///< mean KL(teacher || model), nats; 0 without a teacher
    torch::Tensor gradient;      ///< of `scale` times the loss, shaped as the logits
};

/// Loss (1 - weight) cross entropy + weight KL(teacher || model), mean over the rows of logits
/// [rows][words] with targets [rows], int64. `teacher`: logits alike, or undefined (weight 0 then).
/// The logits' memory may be reused for the gradient: do not read them afterwards.
///
///     const token_loss loss = loss_of(logits.detach(), targets, teacher, 0.5, 1.0);
///     logits.backward(loss.gradient);
[[nodiscard]] token_loss loss_of(const torch::Tensor& logits, const torch::Tensor& targets,
                                 const torch::Tensor& teacher, double weight, double scale);

/// Mean cross entropies of two sets of logits and KL(P_reference || P_kv), nats, for evaluation.
struct comparison {
    double reference_loss = 0.0, kv_loss = 0.0, divergence = 0.0;
};
[[nodiscard]] comparison compare(const torch::Tensor& reference, const torch::Tensor& kv,
                                 const torch::Tensor& targets);

} // namespace kv1_train
