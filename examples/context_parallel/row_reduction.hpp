// SPDX-License-Identifier: Apache-2.0
//
// Joining what ranks computed over their own tokens. A row is the output of one query and head with its
// log-sum-exp behind it, channels + 1 floats, and an MPI datatype. Joining two rows is kv1::merge_attention,
// as an operation of MPI's: associative and commutative but for rounding. A NaN as log-sum-exp stays one
// whatever it is joined with; a rank that failed says so by it.
//
//   in_rank_order    every rank's rows are gathered and joined from rank 0 on: the same bits on all ranks and
//                    in every run, for ranks times the bytes
//   reduced          MPI_Reduce or MPI_Allreduce with the operation: log2(ranks) steps of one size. The order
//                    is MPI's, so that bits may differ from run to run, and from rank to rank
#pragma once

#include "agreement.hpp"

#include <kv1/attention.hpp>

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace context_parallel {

enum class joining { in_rank_order, reduced };

/// Joins a row to one that lies in place. No part that saw nothing changes the other.
inline void join_row(std::span<const float> row, std::span<float> place) noexcept {
    const std::size_t channels = place.size() - 1;
    if (std::isnan(row[channels]) || std::isnan(place[channels])) {
        std::fill(place.begin(), place.end(), std::numeric_limits<float>::quiet_NaN());
        return;
    }
    const kv1::attention_part parts[] = {{row.first(channels), row.last(1)},
                                         {place.first(channels), place.last(1)}};
    static_cast<void>( // the shapes are right, and nothing is allocated
        kv1::try_merge_attention(parts, channels, place.first(channels), place.last(1)));
}

/// The MPI operation: inout[i] = in[i] joined to inout[i].
class row_operation {
public:
    row_operation() { require_mpi(MPI_Op_create(&join, 1, &op_)); }
    row_operation(const row_operation&) = delete;
    row_operation& operator=(const row_operation&) = delete;
    ~row_operation() { MPI_Op_free(&op_); }
    [[nodiscard]] MPI_Op get() const noexcept { return op_; }

private:
    static void join(void* in, void* inout, int* count, MPI_Datatype* type) {
        MPI_Aint low = 0, extent = 0;
        MPI_Type_get_extent(*type, &low, &extent);
        const std::size_t width = static_cast<std::size_t>(extent) / sizeof(float);
        for (std::size_t i = 0; i < static_cast<std::size_t>(*count); ++i)
            join_row({static_cast<const float*>(in) + i * width, width},
                     {static_cast<float*>(inout) + i * width, width});
    }

    MPI_Op op_ = MPI_OP_NULL;
};

/// The MPI datatype of a row.
class row_type {
public:
    explicit row_type(std::size_t channels) {
        require_mpi(MPI_Type_contiguous(static_cast<int>(channels + 1), MPI_FLOAT, &type_));
        require_mpi(MPI_Type_commit(&type_));
    }
    row_type(const row_type&) = delete;
    row_type& operator=(const row_type&) = delete;
    ~row_type() { MPI_Type_free(&type_); }
    [[nodiscard]] MPI_Datatype get() const noexcept { return type_; }

private:
    MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

/// Rows [rows][channels + 1] of all ranks, joined into those of every rank, or of rank 0 alone.
class row_reduction {
public:
    /// Room for so many floats of rows, sought before others wait for this rank. Throws std::bad_alloc.
    void prepare(const agreement& ranks, std::size_t floats, joining how, bool to_root_alone) {
        const auto all = static_cast<std::size_t>(ranks.size());
        parts_.resize(all);
        if (how == joining::in_rank_order && (ranks.rank() == 0 || !to_root_alone))
            gathered_.resize(all * floats);
    }

    /// After prepare().
    void operator()(agreement& ranks, std::span<float> rows, std::size_t channels, joining how,
                    bool to_root_alone) {
        const std::size_t width = channels + 1;
        const int count = static_cast<int>(rows.size() / width);
        const row_type type(channels);
        const bool root = ranks.rank() == 0;
        if (ranks.size() == 1)
            return;
        if (how == joining::reduced) {
            ranks.timed(rows.size_bytes(), [&] {
                void* const own = rows.data();
                require_mpi(to_root_alone ? MPI_Reduce(root ? MPI_IN_PLACE : own, root ? own : nullptr, count,
                                                       type.get(), operation_.get(), 0, ranks.comm())
                                          : MPI_Allreduce(MPI_IN_PLACE, own, count, type.get(),
                                                          operation_.get(), ranks.comm()));
            });
            return;
        }
        const std::size_t all = static_cast<std::size_t>(ranks.size());
        ranks.timed(all * rows.size_bytes(), [&] {
            require_mpi(to_root_alone ? MPI_Gather(rows.data(), count, type.get(), gathered_.data(), count,
                                                   type.get(), 0, ranks.comm())
                                      : MPI_Allgather(rows.data(), count, type.get(), gathered_.data(), count,
                                                      type.get(), ranks.comm()));
        });
        if (root || !to_root_alone)
            join_in_order(rows, width, all);
    }

private:
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
