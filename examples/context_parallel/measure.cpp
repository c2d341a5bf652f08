// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>

namespace context_parallel {

namespace {

// The same on all ranks: any seed does, for nothing here depends on the values.
std::vector<float> random_values(std::size_t n, std::uint32_t seed) {
    std::minstd_rand random(seed);
    std::uniform_real_distribution<float> uniform(-1.7f, 1.7f); // of variance one, about
    std::vector<float> x(n);
    for (float& v : x)
        v = uniform(random);
    return x;
}

} // namespace

measurement measure(MPI_Comm ranks, const workload& work) {
    distributed_cache cache(ranks, work.shape, work.how);
    const sequence s = cache.create_sequence();
    const kv1::layer_description& l = work.shape.layers.front();
    const std::size_t layers = work.shape.layers.size(), chunk = std::min<std::size_t>(work.tokens, 4096);
    const std::vector<float> k = random_values(std::max<std::size_t>(1, chunk) * l.kv_heads * l.key_dim, 1),
                             v = random_values(std::max<std::size_t>(1, chunk) * l.kv_heads * l.value_dim, 2),
                             q = random_values(work.heads * l.key_dim, 3);
    std::vector<float> out(work.heads * l.value_dim);
    const auto append = [&](std::size_t layer, std::size_t tokens) {
        cache.append(s, layer, {k.data(), tokens, l.kv_heads, l.key_dim},
                     {v.data(), tokens, l.kv_heads, l.value_dim});
    };

    measurement m;
    const double start = MPI_Wtime();
    for (std::size_t done = 0; done < work.tokens; done += chunk) {
        for (std::size_t layer = 0; layer < layers; ++layer)
            append(layer, std::min(chunk, work.tokens - done));
        cache.commit(s);
    }
    m.fill_seconds = MPI_Wtime() - start;

    std::vector<double> steps;
    const auto step = [&] {
        const double begin = MPI_Wtime();
        for (std::size_t layer = 0; layer < layers; ++layer) {
            append(layer, 1);
            cache.attend(s, layer, {q.data(), 1, work.heads, l.key_dim},
                         {out.data(), 1, work.heads, l.value_dim});
        }
        cache.commit(s);
        steps.push_back(MPI_Wtime() - begin);
    };
    step(); // buffers find their size
    steps.clear();
    cache.forget_spent();
    for (std::size_t i = 0; i < work.steps; ++i)
        step();

    const auto count = static_cast<double>(work.steps);
    m.communication_seconds = cache.spent().seconds / count;
    m.communication_bytes = static_cast<double>(cache.spent().bytes) / count;
    m.collectives = static_cast<double>(cache.spent().calls) / count;
    m.token_seconds = std::accumulate(steps.begin(), steps.end(), 0.0) / count;
    require_mpi(MPI_Allreduce(MPI_IN_PLACE, &m.token_seconds, 1, MPI_DOUBLE, MPI_MAX, ranks));
    require_mpi(MPI_Allreduce(MPI_IN_PLACE, &m.communication_seconds, 1, MPI_DOUBLE, MPI_SUM, ranks));
    m.communication_seconds /= cache.ranks();
    m.bytes.resize(static_cast<std::size_t>(cache.ranks()));
    const std::uint64_t mine = cache.bytes_in_use();
    std::vector<std::uint64_t> all(m.bytes.size());
    require_mpi(MPI_Allgather(&mine, 1, MPI_UINT64_T, all.data(), 1, MPI_UINT64_T, ranks));
    std::ranges::copy(all, m.bytes.begin());
    return m;
}

} // namespace context_parallel
