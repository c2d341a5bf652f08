// SPDX-License-Identifier: Apache-2.0
//
// What queries see of slots whose order says nothing (slot_store.hpp): positions that a caller gave, and additive
// masks. A job of a cache has none of this.
#pragma once

#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

// "Token" counts the tokens of the job's block table, "query" those of the job.
struct slot_rules {
    // Where tokens stand, in whole pages; negative: no query sees the token. Null: all do.
    const std::int32_t* positions = nullptr;
    const std::int32_t* query_positions = nullptr; // [queries], where tokens have positions
    bool causal = false;                           // a query sees no position after its own
    std::size_t window = 0; // a query at p sees no position before p + 1 - window; 0: no window

    // The additive mask: column t - bias_first is that of token t. -infinity, and
    // fp32's lowest number, hide a token. Null: none.
    const void* bias = nullptr;
    scalar_type bias_type = scalar_type::fp32;
    std::size_t bias_first = 0;
    std::ptrdiff_t bias_query_stride = 0, bias_head_stride = 0; // in elements

    // [query heads]: what the mask is multiplied by; without a mask, the distance of positions. Null: 1; nothing.
    const float* slopes = nullptr;

    // The positions first ... last, of tokens, that a query sees.
    struct span {
        std::int32_t first, last;
    };
    [[nodiscard]] span seen_by(std::size_t query) const noexcept {
        const std::int32_t own = query_positions[query];
        const bool bounded = window != 0 && own >= 0 && window <= static_cast<std::size_t>(own);
        return {bounded ? own + 1 - static_cast<std::int32_t>(window) : 0,
                causal ? own : (std::numeric_limits<std::int32_t>::max)()};
    }
    // The first byte of a query's mask in a head.
    [[nodiscard]] const std::byte* bias_row(std::size_t query, std::size_t head) const noexcept {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(query) * bias_query_stride +
                                  static_cast<std::ptrdiff_t>(head) * bias_head_stride;
        return static_cast<const std::byte*>(bias) + at * element();
    }
    [[nodiscard]] std::ptrdiff_t element() const noexcept { return bias_type == scalar_type::fp32 ? 4 : 2; }
};

} // namespace kv1::inline KV1_ABI::detail
