// SPDX-License-Identifier: Apache-2.0
//
// The program README shows: one decode step of an engine whose K, V and queries are plain arrays.

#include <kv1/kv_cache.hpp>

#include <iostream>
#include <random>
#include <vector>

int main() {
    constexpr std::size_t layers = 4, kv_heads = 8, heads = 32, head_dim = 128, steps = 100;
    kv1::kv2_cache cache(kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, 4096));
    const kv1::sequence_id sequence = cache.create_sequence();

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> k(kv_heads * head_dim), v(k.size()), q(heads * head_dim), out(q.size());
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t layer = 0; layer < layers; ++layer) {
            for (auto* tensor : {&k, &v, &q}) // your projections, keys and queries after RoPE
                for (float& x : *tensor)
                    x = normal(random);
            cache.append(sequence, layer, {k.data(), 1, kv_heads, head_dim},
                         {v.data(), 1, kv_heads, head_dim});
            cache.attend(sequence, layer, {q.data(), 1, heads, head_dim}, {out.data(), 1, heads, head_dim});
        }
    std::cout << to_string(cache.statistics(sequence)) << '\n';
}
