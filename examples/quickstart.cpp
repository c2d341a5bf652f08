// SPDX-License-Identifier: Apache-2.0
//
// The program README shows; a test compares the two.

#include <kv1/cache_policy.hpp>
#include <kv1/kv_cache.hpp>

#include <iostream>
#include <vector>

int main() {
    constexpr std::size_t layers = 4, kv_heads = 8, heads = 32, head_dim = 128;

    // Keys in three bits, values in two. The first 4 tokens and the newest 32 stay in fp16, too.
    const kv1::cache_policy policy = kv1::parse_policy("c3+ls+had,c2+ls+had@4:32");
    const kv1::cache_description shape = kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, 4096);
    kv1::kv_cache cache(kv1::describe_cache(policy, shape)); // room for 4,096 tokens
    const kv1::sequence_id sequence = cache.create_sequence();

    std::vector<float> k(kv_heads * head_dim), v(k.size()), q(heads * head_dim), out(q.size());
    for (std::size_t token = 0; token < 100; ++token) {
        for (std::size_t l = 0; l < layers; ++l) {
            for (std::size_t i = 0; i < k.size(); ++i) // your projections; keys and queries after RoPE
                k[i] = v[i] = q[i] = static_cast<float>((i * 7 + token + l) % 13) - 6.0f;
            cache.append(sequence, l, {k.data(), 1, kv_heads, head_dim}, {v.data(), 1, kv_heads, head_dim});
            cache.attend(sequence, l, {q.data(), 1, heads, head_dim}, {out.data(), 1, heads, head_dim});
        }
        cache.commit(sequence); // the step is whole: tokens that left the window give their fp16 back
    }
    std::cout << to_string(cache.statistics(sequence)) << '\n';
}
