// SPDX-License-Identifier: Apache-2.0
//
// A run of pages that were dropped from the middle of a sequence (block_table.hpp). Kernels that need the
// position of a token read it from here, too.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

/// Pages first ... last - 1 are dropped.
struct page_hole {
    std::uint32_t first = 0; ///< page
    std::uint32_t last = 0;  ///< one past the last page
    /// Whether both ends are the same.
    friend bool operator==(page_hole, page_hole) = default;
};

} // namespace kv1::inline KV1_ABI::detail
