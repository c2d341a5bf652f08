// SPDX-License-Identifier: Apache-2.0
//
// The caches that random operations run on. They are small, and together they have every option of a layer.
#pragma once

#include "random.hpp"

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>

namespace kv1_test {

/// Gives layers means, rotations and fitted levels, differently for each K and V.
inline void add_encodings(kv1::cache_description& d) {
    using kv1::level_choice;
    generator g(5);
    d.layers[0].key_format = kv1::kv_format::compact3;
    d.layers[0].key_encoding = {level_choice::least_squares, 8, normal_values(g, 2 * 8)};
    d.layers[0].value_format = kv1::kv_format::codebook2;
    d.layers[0].value_encoding = {level_choice::least_squares, 2};
    d.layers[1].value_encoding = {.means = normal_values(g, 7)};
    if (d.layers.size() > 2 && d.layers[2].values_in_keys) {
        d.layers[2].key_format = d.layers[2].value_format = kv1::kv_format::affine2;
        d.layers[2].key_group = d.layers[2].value_group = 32;
        d.layers[2].key_encoding = {level_choice::least_squares, 32, normal_values(g, 2 * 96)};
    } else if (d.layers.size() > 2) { // metadata by groups, with levels that are fitted and that are not
        d.layers[2].key_dim = d.layers[2].value_dim = 64;
        d.layers[2].key_group = d.layers[2].value_group = 32;
        d.layers[2].key_encoding = {level_choice::least_squares, 0, normal_values(g, 64)};
        d.layers[2].value_encoding = {.hadamard = 64};
    }
}

/// A byte chooses.
inline kv1::cache_description random_cache(std::uint8_t choice) {
    using enum kv1::kv_format;
    kv1::cache_description d;
    d.layers = {{2, 8, 6, affine2, affine4}, {1, 5, 7, fp16, scaled_binary}};
    if ((choice & 1) != 0)
        d.layers.push_back(
            {1, 8, 8, affine3, affine8, (choice & 2) != 0 ? 20u : 37u, (choice & 4) != 0 ? 25u : 0u});
    if ((choice & 3) == 2) { // values in keys
        kv1::layer_description& l = d.layers.emplace_back(kv1::latent_layer(96, 64, affine3));
        l.kv_heads = 2;
        l.sliding_window = (choice & 64) != 0 ? 20 : 0;
        l.window_retention = (choice & 4) != 0 ? 25 : 0;
    }
    if ((choice & 128) != 0)
        add_encodings(d);
    if ((choice & 4) != 0)
        d.fp16_sinks = (choice & 8) != 0 ? 3 : 18;
    if ((choice & 16) != 0)
        d.fp16_window = (choice & 32) != 0 ? 1 : 21;
    if ((choice & 0x30) == 0x20 || (choice & 0x0c) == 0x08) // what windows, or sinks, leave free
        for (const std::size_t layer : {std::size_t{0}, d.layers.size() - 1})
            if (d.layers[layer].key_format != fp16 && !d.layers[layer].values_in_keys) {
                d.layers[layer].key_axis = kv1::quantization_axis::per_channel;
                d.layers[layer].key_group = 0;
            }
    d.page_tokens = (choice & 64) != 0 ? 32 : 16;
    d.capacity_tokens = 24 * d.page_tokens;
    return d;
}

} // namespace kv1_test
