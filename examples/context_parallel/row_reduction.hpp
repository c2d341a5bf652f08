// SPDX-License-Identifier: Apache-2.0
//
// Rows (row_operation.hpp) of all ranks, joined:
//
//   in_rank_order    every rank's rows are gathered and joined from rank 0 on: the same bits on all ranks and
//                    in every run, for ranks times the bytes
//   reduced          MPI_Reduce or MPI_Allreduce with the operation: log2(ranks) steps of one size. The order
//                    is MPI's, so that bits may differ from run to run, and from rank to rank
#pragma once

#include "agreement.hpp"
#include "row_operation.hpp"

#include <kv1/merge_attention.hpp>

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace context_parallel {

enum class joining { in_rank_order, reduced };

/// Joins rows [rows][channels + 1] of all ranks into those of every rank, or of rank 0 alone.
class row_reduction {
public:
    /// Room for so many floats of rows, sought before others wait for this rank. Throws std::bad_alloc.
    void prepare(const agreement& ranks, std::size_t floats, joining how, bool to_root_alone) {
        const auto all = static_cast<std::size_t>(ranks.size());
        parts_.resize(all);
        if (how == joining::in_rank_order && (ranks.rank() == 0 || !to_root_alone))
            gathered_.resize(all * floats);
    }

    /// After prepare(). Collective. Throws rank_error where a rank does not come.
    void operator()(agreement& ranks, std::vector<float>& rows, std::size_t channels, joining how,
                    bool to_root_alone) {
        if (ranks.size() == 1)
            return;
        const row_type type(channels);
        const int count = static_cast<int>(rows.size() / (channels + 1));
        const std::size_t bytes = rows.size() * sizeof(float);
        if (how == joining::reduced) {
            ranks.run(
                bytes,
                [&](MPI_Request* pending) {
                    return to_root_alone ? reduce(ranks, rows.data(), count, type.get(), pending)
                                         : all_reduce(ranks, rows.data(), count, type.get(), pending);
                },
                rows);
            return;
        }
        const auto all = static_cast<std::size_t>(ranks.size());
        ranks.run(
            all * bytes,
            [&](MPI_Request* pending) {
                return to_root_alone ? gather(ranks, rows.data(), count, type.get(), pending)
                                     : all_gather(ranks, rows.data(), count, type.get(), pending);
            },
            rows, gathered_);
        if (ranks.rank() == 0 || !to_root_alone)
            join_in_order(rows, channels + 1, all);
    }

private:
    int reduce(const agreement& ranks, float* rows, int count, MPI_Datatype type, MPI_Request* pending) {
        const bool root = ranks.rank() == 0;
        const void* const from = root ? MPI_IN_PLACE : rows;
        float* const to = root ? rows : nullptr;
        return pending == nullptr
                   ? MPI_Reduce(from, to, count, type, operation_.get(), 0, ranks.comm())
                   : MPI_Ireduce(from, to, count, type, operation_.get(), 0, ranks.comm(), pending);
    }
    int all_reduce(const agreement& ranks, float* rows, int count, MPI_Datatype type, MPI_Request* pending) {
        return pending == nullptr
                   ? MPI_Allreduce(MPI_IN_PLACE, rows, count, type, operation_.get(), ranks.comm())
                   : MPI_Iallreduce(MPI_IN_PLACE, rows, count, type, operation_.get(), ranks.comm(), pending);
    }
    int gather(const agreement& ranks, const float* rows, int count, MPI_Datatype type,
               MPI_Request* pending) {
        return pending == nullptr
                   ? MPI_Gather(rows, count, type, gathered_.data(), count, type, 0, ranks.comm())
                   : MPI_Igather(rows, count, type, gathered_.data(), count, type, 0, ranks.comm(), pending);
    }
    int all_gather(const agreement& ranks, const float* rows, int count, MPI_Datatype type,
                   MPI_Request* pending) {
        return pending == nullptr
                   ? MPI_Allgather(rows, count, type, gathered_.data(), count, type, ranks.comm())
                   : MPI_Iallgather(rows, count, type, gathered_.data(), count, type, ranks.comm(), pending);
    }

    void join_in_order(std::span<float> rows, std::size_t width, std::size_t ranks) {
        for (std::size_t at = 0; at < rows.size(); at += width) {
            bool failed = false;
            for (std::size_t r = 0; r < ranks; ++r) {
                const std::span<const float> row(gathered_.data() + r * rows.size() + at, width);
                parts_[r] = {row.first(width - 1), row.last(1)};
                failed = failed || std::isnan(row.back());
            }
            const std::span<float> place = rows.subspan(at, width);
            kv1::merge_attention(parts_, width - 1, place.first(width - 1), place.last(1));
            if (failed)
                std::ranges::fill(place, std::numeric_limits<float>::quiet_NaN());
        }
    }

    row_operation operation_;
    std::vector<float> gathered_;
    std::vector<kv1::attention_part> parts_;
};

} // namespace context_parallel
