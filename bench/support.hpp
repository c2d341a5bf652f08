// SPDX-License-Identifier: Apache-2.0
//
// Shared by the benchmarks: random data, targets by name, caches filled with separate pages.
#pragma once

#include <kv1/kv_cache.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline std::vector<float> normal_values(std::size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    std::generate(values.begin(), values.end(), [&] { return normal(generator); });
    return values;
}

inline std::vector<kv1::target> supported_targets() {
    std::vector<kv1::target> found;
    std::copy_if(kv1::all_targets.begin(), kv1::all_targets.end(), std::back_inserter(found),
                 [](kv1::target t) { return kv1::is_supported(t); });
    return found;
}

inline std::string name_of(auto named) { return std::string(kv1::to_string(named)); }

// Registers a benchmark that calls body(state) on this target. The body may measure times itself.
template <class Body>
void register_on(kv1::target t, const std::string& name, Body body, bool takes_times = false) {
    benchmark::internal::Benchmark* registered =
        benchmark::RegisterBenchmark(name.c_str(), [t, body](benchmark::State& state) {
            const kv1::target before = kv1::current_target();
            kv1::set_target(t);
            body(state);
            kv1::set_target(before);
        });
    if (takes_times)
        registered->UseManualTime();
}

struct attention_shape {
    std::size_t heads, kv_heads, head_dim;
};

// Appends `tokens` tokens to every layer. They repeat a few thousand random vectors, in separate pages.
inline kv1::sequence_id fill(kv1::kv_cache& cache, std::size_t tokens) {
    const kv1::sequence_id sequence = cache.create_sequence();
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const kv1::layer_description& shape = cache.description().layers[layer];
        const std::size_t chunk = std::min<std::size_t>(tokens, 2048);
        const std::vector<float> k = normal_values(chunk * shape.kv_heads * shape.key_dim, 1);
        const std::vector<float> v = normal_values(chunk * shape.kv_heads * shape.value_dim, 2);
        for (std::size_t done = 0; done < tokens; done += chunk) {
            const std::size_t n = std::min(chunk, tokens - done);
            if (shape.values_in_keys)
                cache.append(sequence, layer, {k.data(), n, shape.kv_heads, shape.key_dim});
            else
                cache.append(sequence, layer, {k.data(), n, shape.kv_heads, shape.key_dim},
                             {v.data(), n, shape.kv_heads, shape.value_dim});
        }
    }
    cache.commit(sequence);
    return sequence;
}

} // namespace bench
