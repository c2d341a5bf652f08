// SPDX-License-Identifier: Apache-2.0
//
// ggml's ROPE as kv1 has it: from a key that is written to the cache back to the node that turned it, and what that
// node does.
#pragma once

#include "ggml.hpp"

#include <kv1/rotary_embedding.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>

namespace kv1_ggml {

// The ROPE node that a tensor comes from, through what may follow it: views, copies, concatenation with channels that do
// not turn (MLA), a Hadamard transform. Null: none.
inline const ggml_tensor* find_rope(const ggml_tensor* t, int depth = 12) noexcept {
    if (t == nullptr || depth == 0)
        return nullptr;
    switch (t->op) {
    case GGML_OP_ROPE:
        return t;
    case GGML_OP_CONCAT: {
        const ggml_tensor* const first = find_rope(t->src[0], depth - 1);
        return first != nullptr ? first : find_rope(t->src[1], depth - 1);
    }
    case GGML_OP_MUL_MAT: // of a Hadamard matrix and a key
        return find_rope(t->src[1], depth - 1);
    case GGML_OP_NONE:
        return t->view_src != nullptr ? find_rope(t->view_src, depth - 1) : nullptr;
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
    case GGML_OP_CONT:
    case GGML_OP_CPY:
    case GGML_OP_DUP:
    case GGML_OP_SCALE:
    case GGML_OP_RMS_NORM:
    case GGML_OP_MUL:
    case GGML_OP_PAD:
        return find_rope(t->src[0], depth - 1);
    default:
        return nullptr;
    }
}

// Positions of so many tokens, one each, or null. M-RoPE has four a token, the first of all tokens first.
inline const std::int32_t* positions_of(const ggml_tensor* rope, std::size_t tokens) noexcept {
    const ggml_tensor* const p = rope != nullptr ? rope->src[1] : nullptr;
    if (p == nullptr || p->type != GGML_TYPE_I32 || p->data == nullptr || size_of(p->ne[0]) % tokens != 0)
        return nullptr;
    return static_cast<const std::int32_t*>(p->data);
}

// How a ROPE node turns a vector by one position, and by what it multiplies turned channels.
struct turn {
    kv1::rotary_embedding rotary;
    float magnitude = 1;
};

// YaRN (Peng et al. 2023) blends frequencies: pairs that turn often keep theirs, others are scaled.
inline turn turn_of(const ggml_tensor* rope) {
    const std::int32_t* const whole = rope->op_params;
    const auto channels = static_cast<std::size_t>(whole[1]);
    const int mode = whole[2];
    const auto original_context = static_cast<double>(whole[4]);
    const double base = float_param(rope, 5), scale = float_param(rope, 6), blend = float_param(rope, 7);
    const double fast = float_param(rope, 9), slow = float_param(rope, 10);
    const auto dims = static_cast<double>(channels);
    // the pair that turns so many times within the context that the model was trained with
    const auto pair_of = [&](double turns) {
        return dims * std::log(original_context / (turns * 2 * std::numbers::pi)) / (2 * std::log(base));
    };
    double low = 0, high = 1;
    if (blend != 0) {
        low = std::max(0.0, std::floor(pair_of(fast)));
        high = std::min(dims - 1, std::ceil(pair_of(slow)));
    }
    const float* const factors =
        rope->src[2] != nullptr ? static_cast<const float*>(rope->src[2]->data) : nullptr;
    turn t;
    t.rotary.pairs = mode == 0 ? kv1::rotary_pairs::interleaved : kv1::rotary_pairs::half_split;
    for (std::size_t j = 0; j < channels / 2; ++j) {
        double plain = std::pow(base, -2.0 * static_cast<double>(j) / dims);
        if (factors != nullptr)
            plain /= factors[j];
        double frequency = scale * plain;
        if (blend != 0) {
            const double ramp = (static_cast<double>(j) - low) / std::max(0.001, high - low);
            const double kept = (1 - std::clamp(ramp, 0.0, 1.0)) * blend;
            frequency = scale * plain * (1 - kept) + plain * kept;
        }
        t.rotary.frequencies.push_back(static_cast<float>(frequency));
    }
    t.magnitude = float_param(rope, 8);
    if (blend != 0)
        t.magnitude *= static_cast<float>(1 + 0.1 * std::log(1 / scale));
    return t;
}

} // namespace kv1_ggml
