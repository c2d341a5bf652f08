// SPDX-License-Identifier: Apache-2.0
//
// The handle of a sequence: a slot, and which of the slot's sequences it is.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstdint>
#include <limits>

namespace kv1::inline KV1_ABI {

/// Names a living sequence of one cache. A handle of a destroyed sequence is recognized as stale.
struct sequence_id {
    std::uint32_t slot = (std::numeric_limits<std::uint32_t>::max)(); ///< the cache's own
    std::uint32_t generation = 0;                                     ///< the cache's own
    /// Whether they name the same sequence.
    friend bool operator==(sequence_id, sequence_id) = default;
};

} // namespace kv1::inline KV1_ABI
