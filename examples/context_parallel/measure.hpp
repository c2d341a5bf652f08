// SPDX-License-Identifier: Apache-2.0
//
// A cache filled with random tokens over all ranks, and what a decoded token's attention then takes: time, this
// rank's bytes, and how much of the time is communication.
#pragma once

#include "distributed_cache.hpp"

#include <kv1/cache_description.hpp>

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace context_parallel {

struct workload {
    kv1::cache_description shape; ///< capacity: `tokens` and 1 + `steps`
    cache_options how;            ///< positions of a comparison are pages
    std::size_t heads = 32;       ///< of a query
    std::size_t tokens = 4096;    ///< in the cache before the first step
    std::size_t steps = 16;       ///< decoded tokens that are timed
};

struct measurement {
    std::size_t ranks = 0; ///< 0: one kv_cache, without MPI
    double fill_seconds = 0.0;
    std::vector<double> token_seconds; ///< by step, all layers; the slowest rank's
    /// Of them within MPI, waiting for slower ranks included: the mean of all ranks.
    std::vector<double> communication_seconds;
    std::uint64_t collectives = 0, communication_bytes = 0; ///< of MPI's, of the last step, on rank 0
    std::vector<std::size_t> bytes;                         ///< in use, by rank
};

/// Over all ranks. Collective; the same on all of them.
[[nodiscard]] measurement measure(MPI_Comm ranks, const workload& work);

/// The same sequence in one kv_cache and over 1, 2, 4, ... ranks, in turns, so that other work on the machine
/// meets all of them alike. Ranks that have no part in a turn sleep. Collective; rank 0 gets the result.
[[nodiscard]] std::vector<measurement> compare(MPI_Comm ranks, const workload& work);

/// Precondition: not empty.
[[nodiscard]] double median(std::vector<double> x);

} // namespace context_parallel
