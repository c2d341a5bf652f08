// SPDX-License-Identifier: Apache-2.0
//
// Layers of one kind each: plain formats, two bits, groups of channels, an encoding, one bit and a half.
#pragma once

#include <kv1/cache_description.hpp>

#include <cstddef>
#include <vector>

namespace kv1_test {

[[nodiscard]] inline std::vector<kv1::layer_description> layers_of_each_kind(std::size_t kv_heads) {
    kv1::layer_description plain{kv_heads, 64, 32};
    plain.key_format = kv1::kv_format::fp16;
    plain.value_format = kv1::kv_format::fp32;
    const kv1::layer_description two_bits{kv_heads, 64, 96};
    kv1::layer_description groups{kv_heads, 96, 64};
    groups.key_format = kv1::kv_format::affine4;
    groups.key_group = 32;
    groups.value_format = kv1::kv_format::affine8;
    kv1::layer_description encoded{kv_heads, 64, 64};
    encoded.key_format = kv1::kv_format::compact3;
    encoded.key_encoding.levels = kv1::level_choice::least_squares;
    encoded.key_encoding.hadamard = 64;
    encoded.key_encoding.means.assign(kv_heads * 64, 0.25f);
    encoded.value_format = kv1::kv_format::codebook2;
    kv1::layer_description bits{kv_heads, 40, 72};
    bits.key_format = kv1::kv_format::scaled_binary;
    bits.value_format = kv1::kv_format::affine3;
    return {plain, two_bits, groups, encoded, bits};
}

} // namespace kv1_test
