// SPDX-License-Identifier: Apache-2.0
#include "language_model.hpp"

#include "adapter.hpp"
#include "attention.hpp"
#include "error.hpp"
#include "safetensors.hpp"

#include <torch/version.h>

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>

// A fused kernel that came with LibTorch 2.4; earlier ones get the same from elementary operations.
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

struct entry {
    std::string name;
    std::vector<std::int64_t> shape;
    Tensor* place;
};

std::int64_t count(const std::vector<entry>& entries) {
    std::int64_t n = 0;
    for (const entry& e : entries)
        n += std::accumulate(e.shape.begin(), e.shape.end(), std::int64_t{1}, std::multiplies<>());
    return n;
}

// One tensor of zeros for all entries, and one for their gradients; each entry's place becomes a view.
flat_parameters lay_out(const std::vector<entry>& matrices, const std::vector<entry>& vectors,
                        torch::Device device) {
    flat_parameters flat;
    flat.matrix_weights = count(matrices);
    flat.values =
        torch::zeros({flat.matrix_weights + count(vectors)}, torch::dtype(torch::kFloat32).device(device));
    flat.gradients = torch::zeros_like(flat.values);
    std::int64_t at = 0;
    for (const auto* group : {&matrices, &vectors})
        for (const entry& e : *group) {
            const std::int64_t n = count({e});
            Tensor leaf = flat.values.narrow(0, at, n).view(e.shape).detach();
            leaf.requires_grad_(true);
            leaf.mutable_grad() = flat.gradients.narrow(0, at, n).view(e.shape);
            *e.place = leaf;
            flat.parts.push_back({e.name, leaf});
            at += n;
        }
    return flat;
}

// "model.layers.0.self_attn.q_proj" of "model.layers.0.self_attn.q_proj.weight"
std::string module_of(const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); }
std::string last_of(const std::string& module) { return module.substr(module.rfind('.') + 1); }

} // namespace

language_model::language_model(kv1_lm::model_config config, torch::Device device)
    : config_(std::move(config)) {
    const kv1_lm::model_config& c = config_;
    std::vector<entry> matrices, vectors;
    const auto visit = [&](std::string name, const std::vector<std::size_t>& shape, auto& place) {
        entry e{name, {shape.begin(), shape.end()}, &place.weight};
        if constexpr (std::is_same_v<decltype(place), projection&>) {
            projections_.emplace_back(std::move(name), &place);
            matrices.push_back(std::move(e));
        } else {
            channels_.emplace_back(std::move(name), &place);
            vectors.push_back(std::move(e));
        }
    };
    kv1_lm::for_each_weight(c, !c.tied_embeddings, named_, visit);
    base_ = lay_out(matrices, vectors, device);
    if (c.tied_embeddings)
        named_.head = named_.embeddings;
    means_ =
        torch::zeros({extent(c.layers), 2, extent(c.kv_heads), extent(c.head_dim)}, base_.values.options());
    rotary_ =
        rotary_table::make(extent(c.max_positions), extent(c.head_dim), c.rope_theta, c.rotary_pairs, device);
}

void language_model::initialize(std::uint64_t seed) {
    const torch::NoGradGuard no_gradient;
    const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    const double residual = 0.02 / std::sqrt(2.0 * static_cast<double>(config_.layers));
    for (const parameter& p : base_.parts) {
        Tensor value = p.value;
        if (value.dim() == 1) {
            value.fill_(p.name.ends_with(".bias") ? 0.0 : 1.0);
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
    for (const parameter& p : base_.parts) {
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

void language_model::adapt(const lora_options& options, std::uint64_t seed, torch::ScalarType type) {
    const torch::NoGradGuard no_gradient;
    for (const std::string& target : options.targets)
        if (std::ranges::none_of(projections_, [&](const auto& p) {
                const std::string module = module_of(p.first);
                return last_of(module) == target && module.find("layers.") != std::string::npos;
            }))
            throw kv1_lm::input_error("--lora-targets",
                                      "the model has no projection " + kv1_lm::quote(target));

    std::vector<entry> matrices, vectors;
    for (auto& [name, p] : projections_) {
        const std::string module = module_of(name);
        if (std::ranges::find(options.targets, last_of(module)) == options.targets.end())
            continue;
        const std::string at = std::string(kv1_lm::adapter_prefix) + module;
        matrices.push_back({at + ".lora_A.weight", {options.rank, p->weight.size(1)}, &p->down});
        matrices.push_back({at + ".lora_B.weight", {p->weight.size(0), options.rank}, &p->up});
    }
    std::vector<channel_weights*> norms;
    if (options.norms)
        for (auto& [name, c] : channels_)
            if (!name.ends_with(".bias")) {
                vectors.push_back(
                    {std::string(kv1_lm::adapter_prefix) + name, c->weight.sizes().vec(), &c->trained});
                norms.push_back(c);
            }
    added_ = lay_out(matrices, vectors, device());
    adapter_ = options;
    const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    for (const parameter& p : added_.parts)
        if (p.name.ends_with(".lora_A.weight")) {
            const double most = 1.0 / std::sqrt(static_cast<double>(p.value.size(1)));
            Tensor value = p.value;
            value.copy_(torch::empty(value.sizes(), torch::kFloat32).uniform_(-most, most, generator));
        }
    for (channel_weights* c : norms)
        c->trained.copy_(c->weight);

    for (parameter& p : base_.parts) {
        p.value.requires_grad_(false);
        p.value.mutable_grad() = Tensor();
    }
    base_.gradients = Tensor();
    if (type != torch::kFloat32)
        for (auto& [name, p] : projections_)
            p->cast = p->weight.to(type);
    named_.head.cast = config_.tied_embeddings ? named_.embeddings.cast : named_.head.cast;
}

void language_model::merge() {
    const torch::NoGradGuard no_gradient;
    for (auto& [name, p] : projections_) {
        if (p->down.defined())
            p->weight.add_(torch::matmul(p->up, p->down), adapter_->scale());
        p->down = p->up = p->cast = Tensor();
    }
    named_.head.cast = Tensor();
    for (auto& [name, c] : channels_) {
        if (c->trained.defined())
            c->weight.copy_(c->trained);
        c->trained = Tensor();
    }
    adapter_.reset();
    added_ = {};
}

Tensor language_model::logits(const Tensor& tokens, const training_policy& kv, torch::ScalarType type,
                              observed_means* seen) const {
    return run(tokens, kv, type, true, seen);
}

Tensor language_model::original_logits(const Tensor& tokens, torch::ScalarType type) const {
    return run(tokens, plain_kv, type, false, nullptr);
}

Tensor language_model::run(const Tensor& tokens, const training_policy& kv, torch::ScalarType type,
                           bool adapted, observed_means* seen) const {
    const kv1_lm::model_config& c = config_;
    const std::int64_t batch = tokens.size(0), length = tokens.size(1);
    const double epsilon = static_cast<double>(c.rms_norm_eps);
    const auto of = [&](const channel_weights& w) {
        return adapted && w.trained.defined() ? w.trained : w.weight;
    };
    const auto apply = [&](const Tensor& x, const projection& p, const channel_weights& bias = {}) {
        const Tensor weight = p.cast.defined() && p.cast.scalar_type() == type ? p.cast : p.weight.to(type);
        const Tensor y =
            bias.weight.defined() ? torch::linear(x, weight, bias.weight.to(type)) : torch::linear(x, weight);
        if (!adapted || !p.down.defined())
            return y;
        // the addition within the product: one pass over y less
        const Tensor low = torch::linear(x, p.down.to(type)), up = (p.up * adapter_->scale()).to(type);
        return torch::addmm(y.flatten(0, -2), low.flatten(0, -2), up.t()).view(y.sizes());
    };
    const auto heads = [&](const Tensor& x) { return x.view({batch, length, -1, extent(c.head_dim)}); };
    // of each head, in fp32
    const auto normalized = [&](const Tensor& x, const channel_weights& norm) {
        return norm.weight.defined() ? normalize(x.to(torch::kFloat32), of(norm), epsilon).to(type) : x;
    };
    const auto sinks = std::min(static_cast<std::int64_t>(kv.cache.fp16_sinks), length),
               window = static_cast<std::int64_t>(kv.cache.fp16_window);
    const auto mean_of = [&](const Tensor& t) {
        return t.narrow(0, 0, std::min(batch, seen->sequences))
            .narrow(1, sinks, length - sinks)
            .to(torch::kFloat32)
            .mean(at::IntArrayRef{0, 1});
    };

    Tensor x = torch::embedding(named_.embeddings.weight, tokens);
    std::vector<Tensor> observed;
    for (std::size_t i = 0; i < named_.layers.size(); ++i) {
        const auto& l = named_.layers[i];
        const Tensor means = means_[extent(i)];
        const Tensor h = normalize(x, of(l.attention_norm), epsilon).to(type);
        const Tensor q = rotate(normalized(heads(apply(h, l.query, l.query_bias)), l.query_norm), rotary_);
        // what attention sees of a key or value is what the cache gives back of it
        const Tensor new_k = normalized(heads(apply(h, l.key, l.key_bias)), l.key_norm);
        const Tensor new_v = heads(apply(h, l.value, l.value_bias));
        const auto factors = error_weights_ && kv.cache.needs_error_weights() ? error_weights_->factors[i]
                                                                              : std::array<Tensor, 2>();
        const keys_seen k = rotate_through_cache(new_k, rotary_, kv.key(i),
                                                 {means[0], means_turn_, factors[0]}, sinks, window > 0);
        const Tensor v = through_cache(new_v, kv.value(i), {means[1], false, factors[1]}, sinks);
        if (seen != nullptr && sinks < length) {
            const torch::NoGradGuard no_gradient;
            observed.push_back(torch::stack({mean_of(new_k), mean_of(new_v)}));
        }
        const Tensor attended =
            window > 0 ? attend(q, k.plain, new_v, k.cached, v, window) : attend(q, k.cached, v);
        x = x + apply(attended, l.output, l.output_bias);

        const Tensor m = normalize(x, of(l.mlp_norm), epsilon).to(type);
        x = x + apply(torch::silu(apply(m, l.gate)) * apply(m, l.up), l.down);
    }
    if (seen != nullptr)
        seen->means = observed.empty() ? means_.clone() : torch::stack(observed);
    return apply(normalize(x, of(named_.final_norm), epsilon).to(type), named_.head).flatten(0, 1);
}

} // namespace kv1_train
