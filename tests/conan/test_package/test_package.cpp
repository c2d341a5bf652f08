// SPDX-License-Identifier: Apache-2.0
#include <kv1/kv1.hpp>

#include <cmath>
#include <iostream>
#include <vector>

int main() {
    // One token: attention gives its value back. A vector of two values keeps them in two bits each, but for
    // the rounding of its metadata to fp16.
    constexpr std::size_t head_dim = 32;
    std::vector<float> k(head_dim, 1.0f), v(head_dim), out(head_dim);
    for (std::size_t c = 0; c < head_dim; ++c)
        v[c] = c % 2 == 0 ? -0.5f : 1.0f;
    kv1::kv2_cache cache(kv1::uniform_cache(1, {1, head_dim, head_dim}, 64));
    const kv1::sequence_id sequence = cache.create_sequence();
    cache.append(sequence, 0, {k.data(), 1, 1, head_dim}, {v.data(), 1, 1, head_dim});
    kv1::attention_options options;
    options.mode = kv1::precision::exact;
    cache.attend(sequence, 0, {k.data(), 1, 1, head_dim}, {out.data(), 1, 1, head_dim}, options);
    for (std::size_t c = 0; c < head_dim; ++c)
        if (!(std::fabs(out[c] - v[c]) < 1e-5f)) {
            std::cerr << "channel " << c << ": " << out[c] << " is not " << v[c] << '\n';
            return 1;
        }
    std::cout << "kv1 " << KV1_VERSION << " on " << to_string(kv1::current_target()) << ": "
              << to_string(cache.statistics(sequence)) << '\n';
}
