// SPDX-License-Identifier: Apache-2.0
//
// The handle of a sequence: a slot of the cache, and which of the sequences that used the slot it names.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstdint>
#include <limits>

namespace kv1::inline KV1_ABI {

/// Names a sequence of one cache. A default handle names none. Calls recognize the handle of a destroyed
/// sequence as stale (errc::invalid_sequence), even if its slot is in use again.
struct sequence_id {
    std::uint32_t slot = (std::numeric_limits<std::uint32_t>::max)(); ///< the cache's own
    std::uint32_t generation = 0;                                     ///< the cache's own
    /// Whether they name the same sequence.
    friend bool operator==(sequence_id, sequence_id) = default;
};

} // namespace kv1::inline KV1_ABI
