// SPDX-License-Identifier: Apache-2.0
//
// What a query sees, in positions of the whole sequence, and how a rank asks its own cache for its share.
// Positions between two bounds are places between two bounds in every rank's cache (distribution.hpp). From
// query to query a bound stands still or moves by one place, depending on whose page it lies in: queries
// whose bounds move alike are one call.
#pragma once

#include "distribution.hpp"

#include <kv1/attention.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>

namespace context_parallel {

/// Positions, or places, first ... last - 1.
struct token_span {
    std::size_t first = 0, last = 0;
    [[nodiscard]] constexpr bool empty() const noexcept { return first >= last; }
    friend constexpr bool operator==(const token_span&, const token_span&) = default;
};

/// What a layer does to what its queries see.
struct layer_rules {
    std::size_t sliding_window = 0;              ///< 0: none
    std::size_t fp16_sinks = 0, fp16_window = 0; ///< 0 where the layer has no copies
    std::size_t fp16_from = 0;                   ///< tokens before it, past the sinks, have lost their copies
};

/// The positions that each of some queries sees; the rules are kv_cache.hpp's and attention.hpp's.
class query_sight {
public:
    query_sight(std::size_t length, std::size_t queries, const kv1::attention_options& options,
                const layer_rules& rules) noexcept
        : length_(length), causal_(options.mask.is_causal()),
          first_(options.mask.first_position().value_or(length - std::min(length, queries))),
          range_(options.range), asked_(options.window), rules_(rules) {}

    /// Positions that are attended to as they were quantized, those of fp16 sinks included.
    [[nodiscard]] token_span quantized(std::size_t i) const noexcept {
        return tidy(lower(i), window_from(i));
    }
    /// Those that are attended to in fp16 since they are within the window.
    [[nodiscard]] token_span recent(std::size_t i) const noexcept {
        return tidy(std::max(lower(i), window_from(i)), upper(i));
    }

    /// Positions from lower(i) to upper(i) - 1 are seen.
    /// @{
    [[nodiscard]] std::size_t upper(std::size_t i) const noexcept {
        return std::min(causal_ ? own(i) : length_, range_.last);
    }
    [[nodiscard]] std::size_t lower(std::size_t i) const noexcept {
        return std::max(
            {range_.first, behind(own(i), rules_.sliding_window), behind(first_ + i + 1, asked_)});
    }
    /// @}

private:
    static token_span tidy(std::size_t first, std::size_t last) noexcept {
        return first < last ? token_span{first, last} : token_span{};
    }
    static std::size_t behind(std::size_t end, std::size_t window) noexcept {
        return window != 0 && end > window ? end - window : 0;
    }
    // One past the query's own token, from which windows count back.
    [[nodiscard]] std::size_t own(std::size_t i) const noexcept { return std::min(first_ + i + 1, length_); }
    [[nodiscard]] std::size_t window_from(std::size_t i) const noexcept {
        const std::size_t r = rules_.fp16_window;
        return r == 0
                   ? upper(i)
                   : std::min(upper(i), std::max({rules_.fp16_sinks, behind(own(i), r), rules_.fp16_from}));
    }

    std::size_t length_;
    bool causal_;
    std::size_t first_; // position of the first query
    kv1::token_range range_;
    std::size_t asked_;
    layer_rules rules_;
};

/// Queries first ... first + count - 1 of a call, and what makes a rank's cache show them their places.
struct local_call {
    std::size_t first = 0, count = 0;
    kv1::attention_mask mask;
    kv1::token_range range;
    std::size_t window = 0;
};

/// Makes call(local_call) for the queries that see any place. places(i) is a token_span, whose ends never
/// move back. No call has more than `longest` queries.
template <class Places, class Call>
void for_each_local_call(std::size_t queries, std::size_t longest, Places&& places, Call&& call) {
    for (std::size_t i = 0; i < queries;) {
        const token_span from = places(i);
        if (from.empty()) {
            ++i;
            continue;
        }
        std::size_t first_step = 0, last_step = 0, count = 1;
        for (token_span before = from; i + count < queries && count < longest; ++count) {
            const token_span now = places(i + count);
            const std::size_t up = now.first - before.first, end = now.last - before.last;
            if (now.empty() || up > 1 || end > 1 || (count > 1 && (up != first_step || end != last_step)))
                break;
            first_step = up;
            last_step = end;
            before = now;
        }
        // Query i sees up to place p + i of its own; an end that stands still is the range's. A beginning
        // that moves is a window behind p + i.
        const std::size_t p = last_step != 0 ? from.last - 1 : from.last;
        local_call c{i, count, kv1::attention_mask::causal_from(p), {}, 0};
        if (last_step == 0)
            c.range.last = from.last;
        if (first_step != 0)
            c.window = p + 1 - from.first;
        else
            c.range.first = from.first;
        call(c);
        i += count;
    }
}

} // namespace context_parallel
