// SPDX-License-Identifier: Apache-2.0
//
// What a graph says of the model beside its cache: a parameter by which a layer is known, and the output projection that
// follows its attention. Both are read where the model has them, so no second file is wanted, and no list of
// architectures.
#pragma once

#include "ggml.hpp"

#include <kv1/model_fingerprint.hpp>

#include <cstddef>
#include <deque>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace kv1_ggml {

inline bool is_weight(const ggml_tensor* t) noexcept {
    return t != nullptr && t->op == GGML_OP_NONE && t->view_src == nullptr && t->buffer != nullptr &&
           t->buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && t->data != nullptr;
}

// The nearest vector of fp32 parameters on the way back from a key: its norm's, its bias, or the norm's before the
// projection. Quantized models keep these as they were, so all quantizations of a model have the same. Null: none.
inline const ggml_tensor* nearest_parameters(const ggml_tensor* key) {
    constexpr std::size_t far = 64;
    std::deque<const ggml_tensor*> next{key};
    std::unordered_set<const ggml_tensor*> seen;
    for (; !next.empty() && seen.size() < far; next.pop_front()) {
        const ggml_tensor* const t = next.front();
        if (t == nullptr || !seen.insert(t).second)
            continue;
        if (is_weight(t)) {
            if (t->type == GGML_TYPE_F32 && t->ne[0] > 1 && t->ne[1] == 1 && t->ne[2] == 1)
                return t;
            continue;
        }
        if (t->op == GGML_OP_NONE) {
            next.push_back(t->view_src);
        } else if (t->op == GGML_OP_ROPE) { // positions and frequencies are not the model's alone
            next.push_back(t->src[0]);
        } else {
            for (const ggml_tensor* source : t->src)
                next.push_back(source);
        }
    }
    return nullptr;
}

// A layer's parameters, joined to the fingerprint of the layers before it.
inline kv1::model_fingerprint joined(const kv1::model_fingerprint& before, std::size_t layer,
                                     const ggml_tensor* parameters) {
    if (parameters == nullptr)
        return before;
    const std::uint64_t number = layer;
    const std::span<const std::byte> numbers(static_cast<const std::byte*>(parameters->data),
                                             size_of(parameters->ne[0]) * sizeof(float));
    return kv1::fingerprint_of(numbers, kv1::fingerprint_of(std::as_bytes(std::span(&number, 1)), before));
}

// The attention whose result a tensor is, heads side by side. Null: it is something else.
inline const ggml_tensor* attention_behind(const ggml_tensor* t) noexcept {
    for (int depth = 0; t != nullptr && depth < 8; ++depth) {
        if (t->op == GGML_OP_FLASH_ATTN_EXT)
            return t;
        if (!is_view(t->op) && t->op != GGML_OP_CONT)
            return nullptr;
        t = t->op == GGML_OP_NONE ? t->view_src : t->src[0];
    }
    return nullptr;
}

// The attention that a product projects, where the weights are an output projection's: [outputs][heads][value_dim].
inline const ggml_tensor* attention_projected_by(const ggml_tensor* product) noexcept {
    const ggml_tensor* const w = product->src[0];
    if (product->op != GGML_OP_MUL_MAT || !is_weight(w) || w->ne[2] != 1 || w->ne[3] != 1)
        return nullptr;
    const ggml_tensor* const attention = attention_behind(product->src[1]);
    return attention != nullptr && w->ne[0] == attention->ne[0] * attention->ne[1] ? attention : nullptr;
}

// Rows of weights as fp32, whatever their type. Nothing: the program's ggml does not say how.
inline std::optional<std::vector<float>> as_fp32(const ggml_tensor* weights) {
    const std::size_t columns = size_of(weights->ne[0]), rows = size_of(weights->ne[1]);
    std::vector<float> all(columns * rows);
    const ggml_to_float_t convert = weights->type == GGML_TYPE_F32 ? nullptr
                                    : ggml_get_type_traits != nullptr
                                        ? ggml_get_type_traits(weights->type)->to_float
                                        : nullptr;
    if (weights->type != GGML_TYPE_F32 && convert == nullptr)
        return std::nullopt;
    for (std::size_t r = 0; r < rows; ++r) {
        const auto* const row = static_cast<const std::byte*>(weights->data) + r * weights->nb[1];
        if (convert != nullptr)
            convert(row, all.data() + r * columns, weights->ne[0]);
        else
            std::memcpy(all.data() + r * columns, row, columns * sizeof(float));
    }
    return all;
}

} // namespace kv1_ggml
