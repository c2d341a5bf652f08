// SPDX-License-Identifier: Apache-2.0
//
// The program README shows; a test compares the two.

#include <kv1/kv_cache.hpp>

#include <iostream>
#include <vector>

int main() {
    constexpr std::size_t layers = 4, kv_heads = 8, heads = 32, head_dim = 128;
    kv1::kv2_cache cache(kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, 4096));
    const kv1::sequence_id sequence = cache.create_sequence();

    std::vector<float> k(kv_heads * head_dim), v(k.size()), q(heads * head_dim), out(q.size());
    for (std::size_t token = 0; token < 100; ++token)
        for (std::size_t layer = 0; layer < layers; ++layer) {
            for (std::size_t i = 0; i < k.size(); ++i) // your projections; keys and queries after RoPE
                k[i] = v[i] = q[i] = static_cast<float>((i * 7 + token + layer) % 13) - 6.0f;
            cache.append(sequence, layer, {k.data(), 1, kv_heads, head_dim},
                         {v.data(), 1, kv_heads, head_dim});
            cache.attend(sequence, layer, {q.data(), 1, heads, head_dim}, {out.data(), 1, heads, head_dim});
        }
    std::cout << to_string(cache.statistics(sequence)) << '\n';
}
