// SPDX-License-Identifier: Apache-2.0
//
// Small things that the distributed cache's files share: failures of this rank as statuses, what ranks tell
// each other of a call, and tensors of a type that is known at run time.
#pragma once

#include "agreement.hpp"
#include "distributed_cache.hpp"

#include <kv1/float16.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <span>

namespace context_parallel {

/// No index.
inline constexpr std::size_t none = static_cast<std::size_t>(-1);
/// MPI counts rows in an int.
inline constexpr std::size_t most_rows = static_cast<std::size_t>(std::numeric_limits<int>::max());

/// What a rank is about, in its digest.
enum class collective : std::uint64_t {
    making,
    creating,
    destroying,
    forking,
    cutting,
    committing,
    committed,
    appending,
    appended,
    undone,
    attending,
    attended
};

/// Runs what this rank does by itself, and gives its status. What it throws is one, too: a rank that left by
/// an exception would let the others wait.
template <class Work>
kv1::status guarded(Work&& work) noexcept {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return {kv1::errc::out_of_memory, "an allocation failed"};
    } catch (const std::exception&) { // of the standard library: sizes that no container has
        return {kv1::errc::invalid_argument, "more than a rank can hold"};
    }
}

[[nodiscard]] inline std::size_t bytes_of(kv1::scalar_type type) noexcept {
    return type == kv1::scalar_type::fp32 ? 4 : 2;
}

/// Contiguous [tokens][heads][channels] of this type.
[[nodiscard]] inline kv1::tensor_view view_of(const void* data, kv1::scalar_type type, std::size_t tokens,
                                              std::size_t heads, std::size_t channels) noexcept {
    switch (type) {
    case kv1::scalar_type::fp16:
        return {static_cast<const kv1::float16*>(data), tokens, heads, channels};
    case kv1::scalar_type::bf16:
        return {static_cast<const kv1::bfloat16*>(data), tokens, heads, channels};
    case kv1::scalar_type::fp32:
        break;
    }
    return {static_cast<const float*>(data), tokens, heads, channels};
}

inline digest told_of(collective what, std::span<const sequence> batch, std::size_t layer,
                      std::span<const std::size_t> indptr) {
    digest d;
    d.add(static_cast<std::uint64_t>(what)).add(std::uint64_t{layer}).add(std::uint64_t{batch.size()});
    for (const sequence s : batch)
        d.add(s.number);
    for (const std::size_t i : indptr)
        d.add(std::uint64_t{i});
    return d;
}

inline void add_shape(digest& d, const kv1::tensor_view& x) {
    d.add(std::uint64_t{x.tokens()}).add(std::uint64_t{x.heads()}).add(std::uint64_t{x.channels()});
    d.add(static_cast<std::uint64_t>(x.type()));
}

// A vector as it is, or rounded to fp16.
inline void copy_vector(const void* from, kv1::scalar_type type, std::size_t channels, bool to_fp16,
                        std::byte* to) {
    if (!to_fp16 || type == kv1::scalar_type::fp16) {
        std::memcpy(to, from, channels * bytes_of(type));
        return;
    }
    for (std::size_t c = 0; c < channels; ++c) {
        const float x = type == kv1::scalar_type::fp32
                            ? static_cast<const float*>(from)[c]
                            : static_cast<float>(static_cast<const kv1::bfloat16*>(from)[c]);
        const std::uint16_t half = kv1::float16(x).bits();
        std::memcpy(to + 2 * c, &half, 2);
    }
}

// Rows of a contiguous tensor, as one datatype, so that counts stay small.
class bytes_type {
public:
    explicit bytes_type(std::size_t bytes) {
        require_mpi(MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &type_));
        require_mpi(MPI_Type_commit(&type_));
    }
    bytes_type(const bytes_type&) = delete;
    bytes_type& operator=(const bytes_type&) = delete;
    ~bytes_type() { MPI_Type_free(&type_); }
    [[nodiscard]] MPI_Datatype get() const noexcept { return type_; }

private:
    MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

} // namespace context_parallel
