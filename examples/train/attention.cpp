// SPDX-License-Identifier: Apache-2.0
#include "attention.hpp"

#include <torch/autograd.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

// Fused kernels came with LibTorch 2, windows of FlashAttention with 2.4; earlier ones get the same from elementary
// operations.
#define KV1_TRAIN_TORCH_2 (TORCH_VERSION_MAJOR >= 2)
#define KV1_TRAIN_FLASH (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4))

namespace kv1_train {

namespace {

using torch::Tensor;

constexpr double infinity = std::numeric_limits<double>::infinity();

// [batch][heads][length][dim], keys and values repeated for the query heads that share them
Tensor by_head(const Tensor& x, std::int64_t heads) {
    const std::int64_t group = heads / x.size(2);
    return (group == 1 ? x : x.repeat_interleave(group, 2)).transpose(1, 2);
}

double scale_of(const Tensor& q) { return 1.0 / std::sqrt(static_cast<double>(q.size(3))); }

#if KV1_TRAIN_FLASH
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

bool is_for_flash(const Tensor& q) { return q.is_cuda() && q.scalar_type() == torch::kBFloat16; }

// FlashAttention, which knows layouts [batch][length][heads][dim] and heads that share keys and values. `window`: a
// query sees the last so many tokens up to its own; all before it, where there is none.
std::tuple<Tensor, Tensor, Tensor, Tensor> flash(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 std::optional<std::int64_t> window) {
    const std::optional<std::int64_t> before = window ? std::optional(*window - 1) : std::nullopt,
                                      after = window ? std::optional<std::int64_t>(0) : std::nullopt;
    auto [out, sum, seed, offset, unused] =
        at::_flash_attention_forward(q, k, v, std::nullopt, std::nullopt, q.size(1), k.size(1), 0.0, true,
                                     false, scale_of(q), before, after);
    return {out, sum, seed, offset};
}

std::tuple<Tensor, Tensor, Tensor> flash_gradient(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                  const Tensor& v, const Tensor& out, const Tensor& sum,
                                                  const Tensor& seed, const Tensor& offset,
                                                  std::optional<std::int64_t> window) {
    const std::optional<std::int64_t> before = window ? std::optional(*window - 1) : std::nullopt,
                                      after = window ? std::optional<std::int64_t>(0) : std::nullopt;
    return at::_flash_attention_backward(dout, q, k, v, out, sum, Tensor(), Tensor(), q.size(1), k.size(1),
                                         0.0, true, seed, offset, scale_of(q), before, after);
}

// Two parts: tokens before the window, through the cache, and the window, as it is. Query i sees the codes of tokens 0
// to i - window: causal attention of the queries from `window` on with the tokens before length - window. Parts are
// joined by their log-sum-exp. In the backward pass each part gets the joined output and log-sum-exp: with those, its
// probabilities and gradients are those of the whole (as Ring Attention has it).
struct windowed_attention : torch::autograd::Function<windowed_attention> {
    static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& plain_k,
                          const Tensor& plain_v, const Tensor& k, const Tensor& v, std::int64_t window) {
        const std::int64_t older = q.size(1) - window;
        const auto [old_out, old_sum, old_seed, old_offset] =
            flash(q.narrow(1, window, older), k.narrow(1, 0, older), v.narrow(1, 0, older), std::nullopt);
        auto [out, sum, seed, offset] = flash(q, plain_k, plain_v, window);

        const Tensor late_sum = sum.narrow(2, window, older);
        const Tensor ahead =
            old_sum - late_sum; // by so much the older part's weight is larger, as a logarithm
        const Tensor share = torch::sigmoid(ahead).transpose(1, 2).unsqueeze(-1).to(out.scalar_type());
        late_sum.add_(at::softplus(ahead));
        out.narrow(1, window, older).lerp_(old_out, share);
        context->save_for_backward({q, plain_k, plain_v, k, v, out, sum, old_seed, old_offset, seed, offset});
        context->saved_data["window"] = window;
        return out;
    }

    static tensor_list backward(AutogradContext* context, tensor_list gradients) {
        const auto saved = context->get_saved_variables();
        const Tensor &q = saved[0], &plain_k = saved[1], &plain_v = saved[2], &k = saved[3], &v = saved[4],
                     &out = saved[5], &sum = saved[6];
        const Tensor dout = gradients[0].contiguous();
        const std::int64_t window = context->saved_data["window"].toInt(), older = q.size(1) - window;
        const auto late = [&](const Tensor& x) { return x.narrow(1, window, older); };
        const auto [old_dq, dk, dv] =
            flash_gradient(late(dout), late(q), k.narrow(1, 0, older), v.narrow(1, 0, older), late(out),
                           sum.narrow(2, window, older).contiguous(), saved[7], saved[8], std::nullopt);
        const auto [dq, plain_dk, plain_dv] =
            flash_gradient(dout, q, plain_k, plain_v, out, sum, saved[9], saved[10], window);
        late(dq).add_(old_dq);
        const auto all = [&](const Tensor& part) {
            return at::constant_pad_nd(part, {0, 0, 0, 0, 0, window});
        };
        return {dq, plain_dk, plain_dv, all(dk), all(dv), Tensor()};
    }
};
#endif

} // namespace

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v) {
#if KV1_TRAIN_FLASH
    if (is_for_flash(q))
        return std::get<0>(flash(q, k, v, std::nullopt)).flatten(2);
#endif
#if KV1_TRAIN_TORCH_2
    const std::int64_t heads = q.size(2);
    const Tensor out = at::scaled_dot_product_attention(by_head(q, heads), by_head(k, heads),
                                                        by_head(v, heads), std::nullopt, 0.0, true);
    return out.transpose(1, 2).flatten(2);
#else
    return attend_by_operations(q, k, v, k, v, 0);
#endif
}

Tensor attend(const Tensor& q, const Tensor& plain_k, const Tensor& plain_v, const Tensor& k, const Tensor& v,
              std::int64_t window) {
    if (window >= q.size(1))
        return attend(q, plain_k, plain_v);
    if (window == 0)
        return attend(q, k, v);
#if KV1_TRAIN_FLASH
    if (is_for_flash(q))
        return windowed_attention::apply(q, plain_k, plain_v, k, v, window).flatten(2);
#endif
    return attend_by_operations(q, plain_k, plain_v, k, v, window);
}

Tensor attend_by_operations(const Tensor& q, const Tensor& plain_k, const Tensor& plain_v, const Tensor& k,
                            const Tensor& v, std::int64_t window) {
    const std::int64_t heads = q.size(2), length = q.size(1);
    const Tensor queries = by_head(q, heads) * scale_of(q);
    const auto scores_with = [&](const Tensor& keys) {
        return torch::matmul(queries, by_head(keys, heads).transpose(-2, -1));
    };
    Tensor scores = scores_with(k);
    const Tensor ones = torch::ones({length, length}, q.options().dtype(torch::kBool));
    Tensor in_window;
    if (window > 0) {
        in_window = ones.triu(1 - window); // tokens after query - window
        scores = torch::where(in_window, scores_with(plain_k), scores);
    }
    const Tensor p = torch::softmax(scores.masked_fill(ones.triu(1), -infinity), -1);
    const Tensor out = in_window.defined() ? torch::matmul(p * in_window, by_head(plain_v, heads)) +
                                                 torch::matmul(p * in_window.logical_not(), by_head(v, heads))
                                           : torch::matmul(p, by_head(v, heads));
    return out.transpose(1, 2).flatten(2);
}

} // namespace kv1_train
