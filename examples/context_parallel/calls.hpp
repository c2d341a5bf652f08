// SPDX-License-Identifier: Apache-2.0
//
// What an append or an attend is while it is under way, and small things that the distributed cache's files
// share: failures of this rank as statuses, what ranks tell each other of a call, and tensors of a type that
// is known at run time.
#pragma once

#include "agreement.hpp"
#include "distributed_cache.hpp"

#include <kv1/float16.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <span>
#include <vector>

namespace context_parallel {

/// No position.
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

/// What an append and an attend have in common.
[[nodiscard]] inline digest told_of(collective what, std::span<const sequence> batch, std::size_t layer,
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

/// A row of a tensor, contiguous: [heads][channels].
inline void copy_row(const kv1::tensor_view& from, std::size_t row, std::byte* to) {
    const std::size_t bytes = from.channels() * bytes_of(from.type());
    for (std::size_t h = 0; h < from.heads(); ++h)
        std::memcpy(to + h * bytes, from.at(row, h), bytes);
}

/// This rank's share of the keys, or values, of an append.
struct dealt_rows {
    explicit dealt_rows(const kv1::tensor_view& tensor) : source(tensor) {}

    kv1::tensor_view source;                    // of all tokens
    bool to_fp16 = false;                       // as the layer asks for
    std::vector<std::byte> sent, bytes, halves; // the root's, by owner; this rank's; and in fp16

    [[nodiscard]] std::size_t row_bytes() const {
        return source.heads() * source.channels() * bytes_of(source.type());
    }
    /// This rank's rows, as they came.
    [[nodiscard]] kv1::tensor_view received(std::size_t count) const {
        return view_of(bytes.data(), source.type(), count, source.heads(), source.channels());
    }
    /// This rank's rows, ready to be appended.
    [[nodiscard]] kv1::tensor_view view(std::size_t count) const {
        return to_fp16 && source.type() != kv1::scalar_type::fp16
                   ? view_of(halves.data(), kv1::scalar_type::fp16, count, source.heads(), source.channels())
                   : received(count);
    }
};

struct distributed_cache::append_call {
    std::span<const sequence> batch;
    std::size_t layer;
    std::span<const std::size_t> indptr;
    dealt_rows keys, values;
    std::vector<std::size_t> lengths{};           // of the sequences, before
    std::vector<std::vector<std::size_t>> rows{}; // by rank: which tokens of the call
    std::vector<std::size_t> own_indptr{};        // of this rank's rows
};

struct distributed_cache::query_call {
    std::span<const sequence> batch;
    std::size_t layer;
    std::span<const std::size_t> indptr;
    kv1::tensor_view queries; // where all ranks have them
    kv1::mutable_tensor_view outputs;
    const kv1::attention_options& options;
    std::vector<std::size_t> lengths{}; // of the sequences, as the queries meet them
    std::vector<float> rows{};          // [query rows][channels + 1]
    rank_scratch scratch{};
    std::vector<std::byte> received{};

    [[nodiscard]] std::size_t width() const noexcept { return outputs.channels() + 1; }
    /// In a batch masks may be the sequences' own.
    [[nodiscard]] const kv1::attention_mask& mask(std::size_t i) const noexcept {
        return options.masks.empty() ? options.mask : options.masks[i];
    }
};

} // namespace context_parallel
