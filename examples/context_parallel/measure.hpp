// SPDX-License-Identifier: Apache-2.0
//
// A cache of the shape of Qwen3-8B's, filled with random tokens over all ranks, and what a decoded token's
// attention then takes: time, this rank's bytes, and how much of the time is communication.
#pragma once

#include "distributed_cache.hpp"

#include <kv1/cache_description.hpp>

#include <mpi.h>

#include <cstddef>
#include <vector>

namespace context_parallel {

struct workload {
    kv1::cache_description shape; ///< capacity: `tokens` and `steps`
    cache_options how;
    std::size_t heads = 32;    ///< of a query
    std::size_t tokens = 4096; ///< in the cache before the first step
    std::size_t steps = 16;    ///< decoded tokens that are timed
};

struct measurement {
    double fill_seconds = 0.0;
    double token_seconds = 0.0; ///< of a decoded token, all layers
    double communication_seconds =
        0.0; ///< of it within MPI, waiting for slower ranks included: the mean of all ranks
    double communication_bytes = 0.0; ///< a token, of this rank
    double collectives = 0.0;         ///< of MPI's, a token
    std::vector<std::size_t> bytes;   ///< by rank
};

/// Collective; the same on all ranks.
[[nodiscard]] measurement measure(MPI_Comm ranks, const workload& work);

} // namespace context_parallel
