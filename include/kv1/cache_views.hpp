// SPDX-License-Identifier: Apache-2.0
//
// What goes into a cache and comes out of it beside tensors: rows as they are stored, block tables, matched
// prefixes.
#pragma once

#include <kv1/float16.hpp>
#include <kv1/sequence_id.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI {

/// Which of the two tensors of a layer.
enum class kv_side : std::uint8_t { key, value };

/// Destination of exported rows: packed values, and metadata where the format has it (else the spans stay
/// empty). Row i takes bytes [i * packed_bytes, (i + 1) * packed_bytes); plain formats export their values,
/// little-endian.
struct row_buffers {
    std::span<std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<float16> scales = {}; ///< [row][group of channels], where the format has scales
    std::span<float16> minima = {}; ///< [row][group of channels], where the format has minima
};

/// The same to read from.
struct const_row_buffers {
    std::span<const std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<const float16> scales = {}; ///< [row][group of channels], where the format has scales
    std::span<const float16> minima = {}; ///< [row][group of channels], where the format has minima
};

/// Block tables as FlashInfer and vLLM have them. Sequence i owns indices indptr[i] ... indptr[i + 1] - 1;
/// its last page holds last_page_tokens[i] tokens (0 where there is none).
struct block_tables {
    std::span<std::int32_t> indptr;           ///< sequences + 1
    std::span<std::int32_t> indices;          ///< as many as needed, or more
    std::span<std::int32_t> last_page_tokens; ///< sequences
};

/// A sequence that begins with known tokens.
struct prefix_match {
    sequence_id sequence;   ///< the new one
    std::size_t tokens = 0; ///< that it already holds
};

} // namespace kv1::inline KV1_ABI
