// SPDX-License-Identifier: Apache-2.0
//
// A calibration of a small model of random keys and values, for tests of what is done with calibrations.
#pragma once

#include "random.hpp"

#include <kv1/calibration.hpp>

#include <cstddef>
#include <string_view>
#include <utility>
#include <vector>

namespace kv1_test {

/// Two layers, one of which has a sliding window and keys that turn.
inline kv1::cache_description small_calibrated_shape() {
    kv1::cache_description d = kv1::uniform_cache(2, {2, 8, 4}, 64, 16);
    d.layers[1] = {1, 6, 6};
    d.layers[1].sliding_window = 20;
    d.layers[1].rotary = {kv1::rotary_frequencies(100.0, 4), kv1::rotary_pairs::interleaved, 1};
    return d;
}

/// Of 40 tokens.
inline kv1::calibration small_calibration(std::string_view policy, const kv1::model_fingerprint& model = {}) {
    const kv1::cache_description shape = small_calibrated_shape();
    kv1::calibrator c(kv1::parse_policy(policy), shape, {.model = model});
    generator g(5);
    constexpr std::size_t tokens = 40, group = 2, outputs = 6;
    for (std::size_t i = 0; i < shape.layers.size(); ++i) {
        const kv1::layer_description& l = shape.layers[i];
        const std::vector<float> w = normal_values(g, outputs * group * l.kv_heads * l.value_dim),
                                 q = normal_values(g, tokens * group * l.kv_heads * l.key_dim),
                                 k = normal_values(g, tokens * l.kv_heads * l.key_dim, 1.0f, 2.0f),
                                 v = normal_values(g, tokens * l.kv_heads * l.value_dim);
        c.set_output_projection(i, {w.data(), outputs, group * l.kv_heads, l.value_dim});
        c.add(i, {q.data(), tokens, group * l.kv_heads, l.key_dim}, {k.data(), tokens, l.kv_heads, l.key_dim},
              {v.data(), tokens, l.kv_heads, l.value_dim});
    }
    return c.finish();
}

} // namespace kv1_test
