// SPDX-License-Identifier: Apache-2.0
//
// The columns of a mask between the first and the last that some query sees. Those outside need not be looked at: a
// window in an additive mask is found once for all KV heads.
#pragma once

#include <kv1/slot_views.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kv1::inline KV1_ABI::detail {

struct column_range {
    std::size_t first, last; // one past the last
};

// Elements of a mask's row as bits; those with one of two patterns hide their column.
template <class Bits>
struct hiding_bits {
    Bits one, other;

    // Whether all of `count` elements hide.
    [[nodiscard]] bool all(const std::byte* from, std::size_t count) const noexcept {
        constexpr std::size_t most = 64; // that compilers make registers of
        for (std::size_t i = 0; i < count; i += most) {
            Bits bits[most];
            const std::size_t n = (std::min)(most, count - i);
            std::memcpy(bits, from + i * sizeof(Bits), n * sizeof(Bits));
            std::fill(bits + n, bits + most, one);
            Bits shown = 0;
            for (std::size_t k = 0; k < most; ++k)
                shown |= static_cast<Bits>(bits[k] != one && bits[k] != other);
            if (shown != 0)
                return false;
        }
        return true;
    }
    // Leaves out of `columns` what a row hides at both ends.
    void widen(const std::byte* row, std::size_t count, column_range& seen) const noexcept {
        constexpr std::size_t step = 64;
        std::size_t first = 0;
        while (first < seen.first && all(row + first * sizeof(Bits), (std::min)(step, seen.first - first)))
            first += step;
        seen.first = (std::min)(seen.first, first);
        std::size_t last = count;
        while (last > seen.last) {
            const std::size_t n = (std::min)(step, last - seen.last);
            if (!all(row + (last - n) * sizeof(Bits), n))
                break;
            last -= n;
        }
        seen.last = (std::max)(seen.last, last);
    }
};

// The columns that some query of a stream may see, to 64 at either end; all of them if a mask says nothing or hides all.
// heads: query heads. Preconditions: those of an attention with this mask over so many columns.
inline column_range visible_columns(const slot_mask& mask, std::size_t columns, std::size_t queries,
                                    std::size_t heads, std::size_t window) noexcept {
    const column_range all{0, columns};
    column_range seen{columns, 0};
    switch (mask.kind()) {
    case slot_mask_kind::none:
    case slot_mask_kind::causal:
        return all;
    case slot_mask_kind::by_position: {
        if (queries == 0)
            return all;
        const auto [lowest, highest] =
            std::minmax_element(mask.query_positions().begin(), mask.query_positions().end());
        const auto reach = static_cast<std::int64_t>((std::min)(window, std::size_t{1} << 31));
        const std::int64_t from =
            window == 0 ? 0 : (std::max)(std::int64_t{*lowest} + 1 - reach, std::int64_t{0});
        const auto is_seen = [from, to = *highest](std::int32_t p) { return p >= from && p <= to; };
        const auto at = mask.column_positions();
        seen.first = static_cast<std::size_t>(std::find_if(at.begin(), at.end(), is_seen) - at.begin());
        seen.last = static_cast<std::size_t>(at.rend() - std::find_if(at.rbegin(), at.rend(), is_seen));
        break;
    }
    case slot_mask_kind::bytes: {
        const hiding_bits<std::uint8_t> hides{0, 0};
        for (std::size_t q = queries; q-- > 0;)
            hides.widen(reinterpret_cast<const std::byte*>(mask.visible().data()) +
                            q * static_cast<std::size_t>(mask.query_stride()),
                        columns, seen);
        break;
    }
    case slot_mask_kind::additive: {
        const auto* const added = static_cast<const std::byte*>(mask.added());
        const auto element = std::ptrdiff_t{mask.type() == scalar_type::fp32 ? 4 : 2};
        const std::size_t rows = mask.head_stride() != 0 ? heads : 1;
        for (std::size_t q = queries; q-- > 0;)
            for (std::size_t h = 0; h < rows; ++h) {
                const std::byte* const row =
                    added + element * (static_cast<std::ptrdiff_t>(q) * mask.query_stride() +
                                       static_cast<std::ptrdiff_t>(h) * mask.head_stride());
                if (mask.type() == scalar_type::fp32) // -infinity and the lowest number
                    hiding_bits<std::uint32_t>{0xff800000u, 0xff7fffffu}.widen(row, columns, seen);
                else if (mask.type() == scalar_type::fp16)
                    hiding_bits<std::uint16_t>{0xfc00u, 0xfc00u}.widen(row, columns, seen);
                else
                    hiding_bits<std::uint16_t>{0xff80u, 0xff80u}.widen(row, columns, seen);
            }
        break;
    }
    }
    return seen.first < seen.last ? seen : all;
}

} // namespace kv1::inline KV1_ABI::detail
