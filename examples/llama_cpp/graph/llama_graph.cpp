// SPDX-License-Identifier: Apache-2.0
#include "llama_graph.hpp"

#include <ggml-cpu.h>

#include <cstring>
#include <stdexcept>

namespace kv1_ggml {

template <>
void llama_graph::deleter<gguf_context>::operator()(gguf_context* p) const noexcept {
    gguf_free(p);
}
template <>
void llama_graph::deleter<ggml_context>::operator()(ggml_context* p) const noexcept {
    ggml_free(p);
}
template <>
void llama_graph::deleter<ggml_backend>::operator()(ggml_backend* p) const noexcept {
    ggml_backend_free(p);
}
template <>
void llama_graph::deleter<ggml_gallocr>::operator()(ggml_gallocr* p) const noexcept {
    ggml_gallocr_free(p);
}

llama_graph::llama_graph(const std::string& file, int threads) {
    ggml_context* weights = nullptr;
    file_.reset(gguf_init_from_file(file.c_str(), {.no_alloc = false, .ctx = &weights}));
    weights_.reset(weights);
    if (file_ == nullptr)
        throw std::runtime_error(file + " cannot be read as GGUF");
    shape_.architecture = gguf_get_val_str(file_.get(), key("general.architecture"));
    const std::string name = shape_.architecture + ".";
    if (name != "llama." && name != "qwen2." && name != "qwen3.")
        throw std::runtime_error("the architecture " + shape_.architecture + " is not llama, qwen2 or qwen3");
    if (gguf_find_key(file_.get(), (name + "expert_count").c_str()) >= 0 ||
        gguf_find_key(file_.get(), (name + "rope.scaling.type").c_str()) >= 0)
        throw std::runtime_error("models with experts or scaled rotary positions are not run");

    llama_shape& s = shape_;
    s.layers = count(name + "block_count");
    s.hidden = count(name + "embedding_length");
    s.heads = count(name + "attention.head_count");
    s.kv_heads = count(name + "attention.head_count_kv");
    s.head_dim = gguf_find_key(file_.get(), (name + "attention.key_length").c_str()) >= 0
                     ? count(name + "attention.key_length")
                     : s.hidden / s.heads;
    s.rotary_channels =
        static_cast<int>(gguf_find_key(file_.get(), (name + "rope.dimension_count").c_str()) >= 0
                             ? count(name + "rope.dimension_count")
                             : s.head_dim);
    s.rotary_base = real(name + "rope.freq_base", 10000.0f);
    s.epsilon = real(name + "attention.layer_norm_rms_epsilon", 1e-5f);
    s.interleaved = s.architecture == "llama"; // as llama.cpp orders the rows of its projections

    embedding_ = tensor("token_embd.weight");
    output_norm_ = tensor("output_norm.weight");
    output_ = maybe("output.weight");
    if (output_ == nullptr)
        output_ = embedding_; // tied
    rotary_factors_ = maybe("rope_freqs.weight");
    s.words = static_cast<std::size_t>(output_->ne[1]);
    for (std::size_t i = 0; i < s.layers; ++i) {
        const std::string b = "blk." + std::to_string(i) + ".";
        layers_.push_back(
            {tensor(b + "attn_norm.weight"), tensor(b + "attn_q.weight"), tensor(b + "attn_k.weight"),
             tensor(b + "attn_v.weight"), tensor(b + "attn_output.weight"), maybe(b + "attn_q.bias"),
             maybe(b + "attn_k.bias"), maybe(b + "attn_v.bias"), maybe(b + "attn_q_norm.weight"),
             maybe(b + "attn_k_norm.weight"), tensor(b + "ffn_norm.weight"), tensor(b + "ffn_gate.weight"),
             tensor(b + "ffn_up.weight"), tensor(b + "ffn_down.weight")});
    }

    backend_.reset(ggml_backend_cpu_init());
    if (backend_ == nullptr)
        throw std::runtime_error("ggml has no CPU backend");
    ggml_backend_cpu_set_n_threads(backend_.get(), threads);
    memory_.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
}

std::int64_t llama_graph::key(const std::string& name) const {
    const std::int64_t id = gguf_find_key(file_.get(), name.c_str());
    if (id < 0)
        throw std::runtime_error("the file has no " + name);
    return id;
}

std::size_t llama_graph::count(const std::string& name) const {
    const std::int64_t id = key(name);
    if (gguf_get_kv_type(file_.get(), id) != GGUF_TYPE_UINT32)
        throw std::runtime_error(name + " is no unsigned integer");
    return gguf_get_val_u32(file_.get(), id);
}

float llama_graph::real(const std::string& name, float otherwise) const {
    const std::int64_t id = gguf_find_key(file_.get(), name.c_str());
    if (id < 0)
        return otherwise;
    if (gguf_get_kv_type(file_.get(), id) != GGUF_TYPE_FLOAT32)
        throw std::runtime_error(name + " is no float");
    return gguf_get_val_f32(file_.get(), id);
}

ggml_tensor* llama_graph::maybe(const std::string& name) const {
    return ggml_get_tensor(weights_.get(), name.c_str());
}

ggml_tensor* llama_graph::tensor(const std::string& name) const {
    ggml_tensor* t = maybe(name);
    if (t == nullptr)
        throw std::runtime_error("the file has no tensor " + name);
    return t;
}

ggml_tensor* llama_graph::normalized(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight) const {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, shape_.epsilon), weight);
}

ggml_tensor* llama_graph::attend(ggml_context* ctx, const attention_nodes& attention, std::size_t i,
                                 ggml_tensor* x, ggml_tensor* positions) const {
    const layer& l = layers_[i];
    const std::int64_t tokens = x->ne[1];
    const auto project = [&](ggml_tensor* weight, ggml_tensor* bias, std::size_t heads) {
        ggml_tensor* y = ggml_mul_mat(ctx, weight, x);
        if (bias != nullptr)
            y = ggml_add(ctx, y, bias);
        return ggml_reshape_3d(ctx, y, static_cast<std::int64_t>(shape_.head_dim),
                               static_cast<std::int64_t>(heads), tokens);
    };
    const auto turn = [&](ggml_tensor* y, ggml_tensor* norm) {
        if (norm != nullptr)
            y = normalized(ctx, y, norm);
        return ggml_rope_ext(ctx, y, positions, rotary_factors_, shape_.rotary_channels,
                             shape_.interleaved ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX, 0,
                             shape_.rotary_base, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
    };
    ggml_tensor* q = turn(project(l.q, l.q_bias, shape_.heads), l.q_norm);
    ggml_tensor* k = turn(project(l.k, l.k_bias, shape_.kv_heads), l.k_norm);
    ggml_tensor* v = project(l.v, l.v_bias, shape_.kv_heads);

    ggml_tensor* out = attention(ctx, i, q, k, v);
    return ggml_mul_mat(ctx, l.o, ggml_reshape_2d(ctx, out, out->ne[0] * out->ne[1], tokens));
}

std::vector<float> llama_graph::run(const attention_nodes& attention, std::span<const std::int32_t> ids,
                                    std::size_t first) {
    const std::size_t nodes = 64 + 48 * shape_.layers;
    const owned<ggml_context> owner(
        ggml_init({.mem_size = nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false),
                   .mem_buffer = nullptr,
                   .no_alloc = true}));
    ggml_context* ctx = owner.get();
    const auto tokens = static_cast<std::int64_t>(ids.size());
    ggml_tensor* words = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, tokens);
    ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, tokens);
    ggml_set_input(words);
    ggml_set_input(positions);

    ggml_tensor* x = ggml_get_rows(ctx, embedding_, words);
    for (std::size_t i = 0; i < shape_.layers; ++i) {
        const layer& l = layers_[i];
        x = ggml_add(ctx, x, attend(ctx, attention, i, normalized(ctx, x, l.attention_norm), positions));
        ggml_tensor* h = normalized(ctx, x, l.ffn_norm);
        h = ggml_mul(ctx, ggml_silu(ctx, ggml_mul_mat(ctx, l.gate, h)), ggml_mul_mat(ctx, l.up, h));
        x = ggml_add(ctx, x, ggml_mul_mat(ctx, l.down, h));
    }
    ggml_tensor* last = ggml_view_1d(ctx, x, x->ne[0], static_cast<std::size_t>(tokens - 1) * x->nb[1]);
    ggml_tensor* logits = ggml_mul_mat(ctx, output_, normalized(ctx, last, output_norm_));
    ggml_set_output(logits);

    ggml_cgraph* graph = ggml_new_graph_custom(ctx, nodes, false);
    ggml_build_forward_expand(graph, logits);
    if (!ggml_gallocr_alloc_graph(memory_.get(), graph))
        throw std::runtime_error("no memory for the graph");
    std::memcpy(words->data, ids.data(), ids.size_bytes());
    for (std::size_t t = 0; t < ids.size(); ++t)
        static_cast<std::int32_t*>(positions->data)[t] = static_cast<std::int32_t>(first + t);
    if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS)
        throw std::runtime_error("ggml could not compute the graph");
    const auto* numbers = static_cast<const float*>(logits->data);
    return {numbers, numbers + shape_.words};
}

} // namespace kv1_ggml
