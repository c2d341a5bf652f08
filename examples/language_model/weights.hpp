// SPDX-License-Identifier: Apache-2.0
//
// The weights of a model, and what each is called in model.safetensors. The model that runs and the model
// that is trained both walk this table, each with its own type of matrix and of vector.
#pragma once

#include "model_config.hpp"

#include <cstddef>
#include <deque>
#include <string>
#include <vector>

namespace kv1_lm {

/// Of one layer.
template <class Matrix, class Vector>
struct layer_weights {
    Vector attention_norm, mlp_norm;  ///< [hidden_size]
    Matrix query, key, value, output; ///< projections of attention
    Vector query_bias, key_bias, value_bias,
        output_bias;             ///< [outputs]; as they were made where there are none
    Vector query_norm, key_norm; ///< [head_dim]; alike
    Matrix gate, up, down;       ///< of the SwiGLU
};

template <class Matrix, class Vector>
struct model_weights {
    Matrix embeddings; ///< [vocab_size][hidden_size]
    Matrix head;       ///< the same shape; as it was made where the embeddings serve as head
    Vector final_norm; ///< [hidden_size]
    std::deque<layer_weights<Matrix, Vector>> layers; ///< each stays where it is as more are added
};

/// Adds config.layers layers to `weights` and calls visit(name, shape, place) for every tensor: a matrix has
/// the shape {outputs, inputs}, a vector {channels}, and `place` is its member of `weights`. `own_head`:
/// whether there is a tensor lm_head.weight.
template <class Matrix, class Vector, class Visit>
void for_each_weight(const model_config& config, bool own_head, model_weights<Matrix, Vector>& weights,
                     Visit visit) {
    using shape = std::vector<std::size_t>;
    const std::size_t hidden = config.hidden_size, wide = config.intermediate_size;
    const std::size_t queries = config.heads * config.head_dim, keys = config.kv_heads * config.head_dim;

    visit(config.tensor_prefix + "embed_tokens.weight", shape{config.vocab_size, hidden}, weights.embeddings);
    for (std::size_t i = 0; i < config.layers; ++i) {
        const std::string at = config.tensor_prefix + "layers." + std::to_string(i) + ".";
        layer_weights<Matrix, Vector>& layer = weights.layers.emplace_back();
        visit(at + "input_layernorm.weight", shape{hidden}, layer.attention_norm);
        visit(at + "self_attn.q_proj.weight", shape{queries, hidden}, layer.query);
        visit(at + "self_attn.k_proj.weight", shape{keys, hidden}, layer.key);
        visit(at + "self_attn.v_proj.weight", shape{keys, hidden}, layer.value);
        visit(at + "self_attn.o_proj.weight", shape{hidden, queries}, layer.output);
        if (config.qkv_bias) {
            visit(at + "self_attn.q_proj.bias", shape{queries}, layer.query_bias);
            visit(at + "self_attn.k_proj.bias", shape{keys}, layer.key_bias);
            visit(at + "self_attn.v_proj.bias", shape{keys}, layer.value_bias);
        }
        if (config.output_bias)
            visit(at + "self_attn.o_proj.bias", shape{hidden}, layer.output_bias);
        if (config.normalized_qk) {
            visit(at + "self_attn.q_norm.weight", shape{config.head_dim}, layer.query_norm);
            visit(at + "self_attn.k_norm.weight", shape{config.head_dim}, layer.key_norm);
        }
        visit(at + "post_attention_layernorm.weight", shape{hidden}, layer.mlp_norm);
        visit(at + "mlp.gate_proj.weight", shape{wide, hidden}, layer.gate);
        visit(at + "mlp.up_proj.weight", shape{wide, hidden}, layer.up);
        visit(at + "mlp.down_proj.weight", shape{hidden, wide}, layer.down);
    }
    visit(config.tensor_prefix + "norm.weight", shape{hidden}, weights.final_norm);
    if (own_head)
        visit("lm_head.weight", shape{config.vocab_size, hidden}, weights.head);
}

} // namespace kv1_lm
