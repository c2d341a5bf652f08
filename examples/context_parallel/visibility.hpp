// SPDX-License-Identifier: Apache-2.0
//
// What a query sees, in positions of the whole sequence, and how a rank asks its own cache for its share.
// Positions between two bounds are places between two bounds in every rank's cache (distribution.hpp). From
// query to query a bound stands still or moves by one place, depending on whose page it lies in: queries
// whose bounds move alike are one call. Under an explicit mask each call has the part of the mask that
// concerns the rank's places.
#pragma once

#include "distribution.hpp"

#include <kv1/attention.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

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
    /// `length`: of the layer. `mask` is the sequence's own, whatever the options say.
    query_sight(std::size_t length, std::size_t queries, const kv1::attention_mask& mask,
                const kv1::attention_options& options, const layer_rules& rules) noexcept
        : length_(length), causal_(mask.is_causal()),
          first_(mask.first_position()
                     ? static_cast<std::ptrdiff_t>(*mask.first_position())
                     : static_cast<std::ptrdiff_t>(length) - static_cast<std::ptrdiff_t>(queries)),
          keys_(mask.explicit_keys()), visible_(mask.visible()), range_(options.range),
          asked_(bounded(options.window)), rules_(rules) {
        rules_.sliding_window = bounded(rules_.sliding_window);
    }

    /// Positions that are attended to as they were quantized, those of fp16 sinks included.
    [[nodiscard]] token_span quantized(std::size_t i) const noexcept {
        return tidy(lower(i), window_from(i));
    }
    /// Those that are attended to in fp16 since they are within the window.
    [[nodiscard]] token_span recent(std::size_t i) const noexcept {
        return tidy(std::max(lower(i), window_from(i)), upper(i));
    }

    /// Positions from lower(i) to upper(i) - 1 are seen, as far as the mask shows them.
    /// @{
    [[nodiscard]] std::size_t upper(std::size_t i) const noexcept {
        return std::min(causal_ ? own(i) : length_, range_.last);
    }
    [[nodiscard]] std::size_t lower(std::size_t i) const noexcept {
        const std::ptrdiff_t asked = asked_ == 0 ? 0 : end_position(i) - static_cast<std::ptrdiff_t>(asked_);
        return std::max({range_.first, rules_.sliding_window == 0 ? 0 : back(i, rules_.sliding_window),
                         asked > 0 ? static_cast<std::size_t>(asked) : 0});
    }
    /// @}

    /// Whether there is an explicit mask; the position from which on it decides; whether it shows position t
    /// to a query.
    /// @{
    [[nodiscard]] bool by_mask() const noexcept { return !visible_.empty(); }
    [[nodiscard]] std::size_t masked_from() const noexcept { return by_mask() ? length_ - keys_ : length_; }
    [[nodiscard]] bool shows(std::size_t i, std::size_t t) const noexcept {
        return t < masked_from() || visible_[i * keys_ + (t - masked_from())] != 0;
    }
    /// @}
    /// Whether ends of what queries see do not move as those of kv1's own masks do: under an explicit mask, and
    /// where a query sees beyond its own token and only so far back.
    [[nodiscard]] bool needs_mask() const noexcept {
        return by_mask() || (!causal_ && rules_.sliding_window != 0);
    }
    [[nodiscard]] const layer_rules& rules() const noexcept { return rules_; }

private:
    static token_span tidy(std::size_t first, std::size_t last) noexcept {
        return first < last ? token_span{first, last} : token_span{};
    }
    // A window that no position reaches is none.
    static std::size_t bounded(std::size_t window) noexcept {
        return window < std::numeric_limits<std::size_t>::max() / 4 ? window : 0;
    }
    // One past the query's position.
    [[nodiscard]] std::ptrdiff_t end_position(std::size_t i) const noexcept {
        return first_ + static_cast<std::ptrdiff_t>(i) + 1;
    }
    // The number of tokens up to the query's own.
    [[nodiscard]] std::size_t own(std::size_t i) const noexcept {
        return static_cast<std::size_t>(
            std::clamp(end_position(i), std::ptrdiff_t{0}, static_cast<std::ptrdiff_t>(length_)));
    }
    // The first of the last `window` tokens, up to the query's own, that the mask shows it.
    [[nodiscard]] std::size_t back(std::size_t i, std::size_t window) const noexcept {
        std::size_t end = own(i), left = window;
        for (; end > masked_from() && left != 0; --end)
            left -= shows(i, end - 1) ? 1u : 0u;
        return end > left ? end - left : 0;
    }
    [[nodiscard]] std::size_t window_from(std::size_t i) const noexcept {
        const std::size_t r = rules_.fp16_window;
        return r == 0 ? upper(i)
                      : std::min(upper(i), std::max({rules_.fp16_sinks, back(i, r), rules_.fp16_from}));
    }

    std::size_t length_;
    bool causal_;
    std::ptrdiff_t first_; // position of the first query
    std::size_t keys_;
    std::span<const std::uint8_t> visible_;
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

/// As above where a mask is needed, and the ends of places(i) may be any: shows(i, place) says whether the query
/// sees a place of them, and shows it everywhere before `masked`. The rank has `length` places. A call shows a
/// query at most `most` of them: where that divides what it sees, results of several calls are to be joined.
/// `visible` is room for the calls' masks.
template <class Places, class Shows, class Call>
void for_each_masked_call(std::size_t queries, std::size_t length, std::size_t masked, std::size_t most,
                          Places&& places, Shows&& shows, std::vector<std::uint8_t>& visible, Call&& call) {
    constexpr std::size_t longest = 64; // bounds the mask
    for (std::size_t first = 0; first < queries; first += longest) {
        const std::size_t count = std::min(longest, queries - first);
        std::size_t low = length, high = 0;
        for (std::size_t i = first; i < first + count; ++i)
            if (const token_span p = places(i); !p.empty()) {
                low = std::min(low, p.first);
                high = std::max(high, p.last);
            }
        for (std::size_t begin = low, end; begin < high; begin = end) {
            end = high - begin > most ? begin + most : high;
            // All of these queries see the places begin ... alike - 1, and the mask says what of the others.
            std::size_t alike = end;
            for (std::size_t i = first; i < first + count && alike > begin; ++i) {
                const token_span p = places(i);
                alike = p.first > begin || p.last <= begin
                            ? begin
                            : std::min({alike, p.last, std::max(begin, masked)});
            }
            const std::size_t keys = length - alike;
            visible.assign(count * keys, 0);
            for (std::size_t i = 0; i < count; ++i) {
                const token_span p = places(first + i);
                for (std::size_t t = std::max(p.first, alike); t < std::min(p.last, end); ++t)
                    visible[i * keys + (t - alike)] = shows(first + i, t) ? 1 : 0;
            }
            call(local_call{
                first, count, kv1::attention_mask::explicit_for_last(keys, visible), {begin, end}, 0});
        }
    }
}

} // namespace context_parallel
