// SPDX-License-Identifier: Apache-2.0
//
// A model of the Llama family in a GGUF file, run as a ggml graph on ggml's public interface. Matrix products, norms and
// rotary embedding are ggml's; attention is what the caller puts there, kv1's for one (graph_cache.hpp).
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>
#include <gguf.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kv1_ggml {

/// What the file says of the model.
struct llama_shape {
    std::string architecture; ///< llama, qwen2 or qwen3
    std::size_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, words = 0;
    int rotary_channels = 0;
    float rotary_base = 0.0f, epsilon = 0.0f;
    /// Whether channels 2 i and 2 i + 1 turn together; else i and i + rotary_channels / 2.
    bool interleaved = false;
};

/// A layer's attention in a graph: of q [channels][heads][tokens] to k, v [channels][kv heads][tokens] and what was before
/// them. Keys and queries are rotated. Gives [channels][heads][tokens].
using attention_nodes = std::function<ggml_tensor*(ggml_context* ctx, std::size_t layer, ggml_tensor* q,
                                                   ggml_tensor* k, ggml_tensor* v)>;

class llama_graph {
public:
    /// Reads the file. Throws std::runtime_error for one that cannot be read, or holds another model.
    llama_graph(const std::string& file, int threads);

    [[nodiscard]] const llama_shape& shape() const noexcept { return shape_; }

    /// Runs tokens at positions `first` and on. Gives the logits after the last of them. Throws std::runtime_error where
    /// ggml fails.
    [[nodiscard]] std::vector<float> run(const attention_nodes& attention, std::span<const std::int32_t> ids,
                                         std::size_t first);

private:
    template <class T>
    struct deleter {
        void operator()(T* p) const noexcept;
    };
    template <class T>
    using owned = std::unique_ptr<T, deleter<T>>;

    struct layer {
        ggml_tensor *attention_norm, *q, *k, *v, *o;
        ggml_tensor *q_bias, *k_bias, *v_bias; // qwen2; else null
        ggml_tensor *q_norm, *k_norm;          // qwen3; else null
        ggml_tensor *ffn_norm, *gate, *up, *down;
    };

    [[nodiscard]] std::int64_t key(const std::string& name) const;
    [[nodiscard]] std::size_t count(const std::string& name) const;
    [[nodiscard]] float real(const std::string& name, float otherwise) const;
    [[nodiscard]] ggml_tensor* tensor(const std::string& name) const; // throws where there is none
    [[nodiscard]] ggml_tensor* maybe(const std::string& name) const;  // null where there is none
    [[nodiscard]] ggml_tensor* normalized(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight) const;
    [[nodiscard]] ggml_tensor* attend(ggml_context* ctx, const attention_nodes& attention, std::size_t i,
                                      ggml_tensor* x, ggml_tensor* positions) const;

    owned<gguf_context> file_;
    owned<ggml_context> weights_;
    owned<ggml_backend> backend_;
    owned<ggml_gallocr> memory_; // of a graph's tensors, kept for the next
    llama_shape shape_;
    std::vector<layer> layers_;
    ggml_tensor *embedding_ = nullptr, *output_norm_ = nullptr, *output_ = nullptr,
                *rotary_factors_ = nullptr;
};

} // namespace kv1_ggml
