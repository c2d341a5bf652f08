// SPDX-License-Identifier: Apache-2.0
#include "language_model.hpp"

#include "error.hpp"
#include "safetensors.hpp"

#include <torch/version.h>

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <utility>

// Fused kernels that came with LibTorch 2; 1.13 gets the same from elementary operations.
#define KV1_TRAIN_TORCH_2 (TORCH_VERSION_MAJOR >= 2)
#define KV1_TRAIN_RMS_NORM (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4))

namespace kv1_train {

namespace {

using torch::Tensor;

std::int64_t extent(std::size_t n) { return static_cast<std::int64_t>(n); }

Tensor normalize(const Tensor& x, const Tensor& weight, double epsilon) {
#if KV1_TRAIN_RMS_NORM
    return at::rms_norm(x, weight.sizes(), weight, epsilon);
#else
    return x * torch::rsqrt(x.square().mean(-1, true) + epsilon) * weight;
#endif
}

// Causal; q is [batch][length][heads][dim], k and v have fewer heads, each for heads / kv_heads queries.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v) {
    const std::int64_t group = q.size(2) / k.size(2);
    const auto by_head = [](const Tensor& x) { return x.transpose(1, 2); };
    const auto repeated = [&](const Tensor& x) {
        return group == 1 ? by_head(x) : by_head(x.repeat_interleave(group, 2));
    };
#if KV1_TRAIN_TORCH_2
    const Tensor out =
        at::scaled_dot_product_attention(by_head(q), repeated(k), repeated(v), std::nullopt, 0.0, true);
#else
    const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
    const Tensor scores = torch::matmul(by_head(q) * scale, repeated(k).transpose(-2, -1));
    const Tensor future = torch::ones({q.size(1), q.size(1)}, q.options().dtype(torch::kBool)).triu(1);
    const Tensor out = torch::matmul(
        torch::softmax(scores.masked_fill(future, -std::numeric_limits<double>::infinity()), -1),
        repeated(v));
#endif
    return out.transpose(1, 2).flatten(2);
}

} // namespace

language_model::language_model(kv1_lm::model_config config, torch::Device device)
    : config_(std::move(config)) {
    const kv1_lm::model_config& c = config_;
    struct entry {
        std::string name;
        std::vector<std::int64_t> shape;
        Tensor* place;
    };
    std::vector<entry> matrices, norms;
    kv1_lm::for_each_weight(c, !c.tied_embeddings, named_,
                            [&](std::string name, const std::vector<std::size_t>& shape, Tensor& place) {
                                (shape.size() == 1 ? norms : matrices)
                                    .push_back({std::move(name), {shape.begin(), shape.end()}, &place});
                            });

    const auto count = [](const std::vector<entry>& entries) {
        std::int64_t n = 0;
        for (const entry& e : entries)
            n += std::accumulate(e.shape.begin(), e.shape.end(), std::int64_t{1}, std::multiplies<>());
        return n;
    };
    matrix_weights_ = count(matrices);
    weights_ = torch::zeros({matrix_weights_ + count(norms)}, torch::dtype(torch::kFloat32).device(device));
    gradients_ = torch::zeros_like(weights_);

    std::int64_t at = 0;
    for (const auto* group : {&matrices, &norms})
        for (const entry& e : *group) {
            const std::int64_t n = count({e});
            Tensor leaf = weights_.narrow(0, at, n).view(e.shape).detach();
            leaf.requires_grad_(true);
            leaf.mutable_grad() = gradients_.narrow(0, at, n).view(e.shape);
            *e.place = leaf;
            parameters_.push_back({e.name, leaf});
            at += n;
        }
    if (c.tied_embeddings)
        named_.head = named_.embeddings;
    means_ = torch::zeros({extent(c.layers), 2, extent(c.kv_heads), extent(c.head_dim)}, weights_.options());
    rotary_ = rotary_table::make(extent(c.max_positions), extent(c.head_dim), c.rope_theta, device);
}

void language_model::initialize(std::uint64_t seed) {
    const torch::NoGradGuard no_gradient;
    const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    const double residual = 0.02 / std::sqrt(2.0 * static_cast<double>(config_.layers));
    for (const parameter& p : parameters_) {
        Tensor value = p.value;
        if (value.dim() == 1) {
            value.fill_(1.0);
            continue;
        }
        const bool into_residual = p.name.ends_with("o_proj.weight") || p.name.ends_with("down_proj.weight");
        // drawn on the CPU: the same on every device
        value.copy_(torch::empty(value.sizes(), torch::kFloat32)
                        .normal_(0.0, into_residual ? residual : 0.02, generator));
    }
}

void language_model::load(const kv1_lm::safetensors& file) {
    const torch::NoGradGuard no_gradient;
    std::size_t taken = 0;
    for (const parameter& p : parameters_) {
        const kv1_lm::tensor* found = file.find(p.name);
        if (found == nullptr)
            throw kv1_lm::input_error(file.origin() + ": tensor " + p.name + " is missing");
        if (!std::ranges::equal(found->shape, p.value.sizes(),
                                [](std::size_t a, std::int64_t b) { return extent(a) == b; }))
            throw kv1_lm::input_error(found->place, "has another shape than config.json says");
        Tensor value = p.value;
        value.copy_(torch::tensor(kv1_lm::to_floats(*found)).view(value.sizes()));
        ++taken;
    }
    if (taken != file.tensors().size())
        throw kv1_lm::input_error(file.origin(), "has tensors that are not this model's");
}

torch::Tensor language_model::logits(const torch::Tensor& tokens, const training_policy& kv,
                                     torch::ScalarType type, torch::Tensor* seen) const {
    const kv1_lm::model_config& c = config_;
    const std::int64_t batch = tokens.size(0), length = tokens.size(1);
    const double epsilon = static_cast<double>(c.rms_norm_eps);
    const auto apply = [&](const Tensor& x, const Tensor& weight) {
        return torch::linear(x, weight.to(type));
    };
    const auto heads = [&](const Tensor& x) { return x.view({batch, length, -1, extent(c.head_dim)}); };

    Tensor x = torch::embedding(named_.embeddings, tokens);
    std::vector<Tensor> observed;
    for (std::size_t i = 0; i < named_.layers.size(); ++i) {
        const auto& l = named_.layers[i];
        const Tensor centres = means_[extent(i)];
        const Tensor h = normalize(x, l.attention_norm, epsilon).to(type);
        const Tensor q = rotate(heads(apply(h, l.query)), rotary_);
        // what attention sees of a key or value is what the cache gives back of it
        const Tensor new_k = heads(apply(h, l.key)), new_v = heads(apply(h, l.value));
        const Tensor k = rotate_through_cache(new_k, rotary_, kv.key(i), centres[0]);
        const Tensor v = through_cache(new_v, kv.value(i), centres[1]);
        if (seen != nullptr) {
            const torch::NoGradGuard no_gradient;
            const auto mean = [](const Tensor& t) { return t.to(torch::kFloat32).flatten(0, 1).mean(0); };
            observed.push_back(torch::stack({mean(rotate(new_k, rotary_)), mean(new_v)}));
        }
        x = x + apply(attend(q, k, v), l.output);

        const Tensor m = normalize(x, l.mlp_norm, epsilon).to(type);
        x = x + apply(torch::silu(apply(m, l.gate)) * apply(m, l.up), l.down);
    }
    if (seen != nullptr)
        *seen = torch::stack(observed);
    return apply(normalize(x, named_.final_norm, epsilon).to(type), named_.head).flatten(0, 1);
}

} // namespace kv1_train
