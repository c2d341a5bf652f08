// SPDX-License-Identifier: Apache-2.0
//
// The types of what goes into a cache and comes out of it besides tensors: rows as they are stored, block
// tables, matched prefixes.
#pragma once

#include <kv1/float16.hpp>
#include <kv1/sequence_id.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI {

/// Keys or values.
enum class kv_side : std::uint8_t { key, value };

/// Destination of exported rows (row.hpp). Row i takes bytes [i * packed_bytes, (i + 1) * packed_bytes) of
/// `packed`: at affine2 and 128 channels, row 2 takes bytes 64 ... 95. Plain formats export their values,
/// little-endian. Spans for metadata that the format does not have are empty.
struct row_buffers {
    std::span<std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<float16> scales = {}; ///< [row][group of channels], where the format has scales
    std::span<float16> minima = {}; ///< [row][group of channels], where the format has minima
};

/// Source of rows, laid out as row_buffers.
struct const_row_buffers {
    std::span<const std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<const float16> scales = {}; ///< [row][group of channels], where the format has scales
    std::span<const float16> minima = {}; ///< [row][group of channels], where the format has minima
};

/// Block tables as FlashInfer and vLLM have them. Sequence i has indices[indptr[i]] ... indices[indptr[i + 1]
/// - 1], the block numbers of its pages in order. Its last page holds last_page_tokens[i] tokens, 0 if it has
/// no page. Example: sequences of 150 and 20 tokens in pages of 64 give indptr {0, 3, 4}, indices {7, 3, 9,
/// 12} and last_page_tokens {22, 20}.
struct block_tables {
    std::span<std::int32_t> indptr;           ///< sequences + 1
    std::span<std::int32_t> indices;          ///< as many as needed, or more
    std::span<std::int32_t> last_page_tokens; ///< sequences
};

/// A sequence that was made from a known prefix.
struct prefix_match {
    sequence_id sequence;   ///< the new sequence
    std::size_t tokens = 0; ///< the number of tokens that it holds
};

} // namespace kv1::inline KV1_ABI
