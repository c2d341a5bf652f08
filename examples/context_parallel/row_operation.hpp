// SPDX-License-Identifier: Apache-2.0
//
// Attention over tokens that lie on several ranks, as data of MPI's. A row is the output of one query and head
// over a rank's own tokens, with its log-sum-exp behind it: channels + 1 floats, one element of row_type. Two
// rows are joined by row_operation, which is kv1::merge_attention:
//
//   row_type type(channels);
//   row_operation join;
//   MPI_Allreduce(MPI_IN_PLACE, rows, count, type.get(), join.get(), comm);
//
// Joining is associative and commutative but for rounding, and MPI may choose the order: bits may differ from
// run to run, and from rank to rank. A row of zeros with -infinity saw nothing, and changes no other. A NaN as
// log-sum-exp stays one whatever it is joined with, so that a rank can say by its rows that it failed.
#pragma once

#include "mpi_error.hpp"

#include <kv1/merge_attention.hpp>

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace context_parallel {

/// Joins a row to one that lies in place. Both have channels + 1 floats.
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

/// So many elements of a type of MPI's, one behind the other, as one: counts, which are ints, stay small.
class contiguous_type {
public:
    contiguous_type(std::size_t count, MPI_Datatype element) {
        require_mpi(MPI_Type_contiguous(static_cast<int>(count), element, &type_));
        require_mpi(MPI_Type_commit(&type_));
    }
    contiguous_type(const contiguous_type&) = delete;
    contiguous_type& operator=(const contiguous_type&) = delete;
    ~contiguous_type() { MPI_Type_free(&type_); }
    [[nodiscard]] MPI_Datatype get() const noexcept { return type_; }

private:
    MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

/// The MPI datatype of a row.
class row_type : public contiguous_type {
public:
    explicit row_type(std::size_t channels) : contiguous_type(channels + 1, MPI_FLOAT) {}
};

} // namespace context_parallel
