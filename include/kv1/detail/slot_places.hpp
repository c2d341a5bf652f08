// SPDX-License-Identifier: Apache-2.0
//
// The slots of a view as tokens of a block table. A place is a token's index in that table, as kernels count: with 64
// slots a page, the range 70-169 has the table {1, 2} and begins at place 6; the list {200, 5} has the table {3, 0} and
// the places 8 and 69.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/slot_views.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

class slot_places {
public:
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();

    // Takes a view of a store with so many blocks. Errors: out_of_range, invalid_argument (a slot or a block that comes
    // twice), out_of_memory.
    [[nodiscard]] status find(const slot_view& view, std::size_t page_tokens, std::size_t blocks) noexcept {
        page_ = page_tokens;
        view_ = view;
        const std::size_t n = view.size(), slots = blocks * page_tokens;
        if (n > slots || (view.kind() == slot_view_kind::range && view.first() > slots - n))
            return {errc::out_of_range, "a view has slots of the store"};
        if (n > static_cast<std::size_t>((std::numeric_limits<std::int32_t>::max)()))
            return {errc::out_of_range, "a view has at most 2^31 - 1 slots"};
        if (n == 0)
            return {};
        switch (view.kind()) {
        case slot_view_kind::range: {
            const std::size_t first = view.first() / page_;
            offset_ = view.first() % page_;
            if (!blocks_.resize((offset_ + n + page_ - 1) / page_))
                return no_memory();
            for (std::size_t i = 0; i < blocks_.size(); ++i)
                blocks_[i] = static_cast<std::uint32_t>(first + i);
            end_ = offset_ + n;
            return {};
        }
        case slot_view_kind::table: {
            const std::size_t used = (n + page_ - 1) / page_;
            if (used > view.items().size())
                return {errc::out_of_range, "a view's blocks hold its tokens"};
            end_ = n;
            if (!index_.resize(blocks, none) || !blocks_.assign(view.items().first(used)))
                return no_memory();
            for (std::size_t i = 0; i < used; ++i)
                if (const status s = add_block(blocks_[i], i); !s)
                    return s;
            return {};
        }
        case slot_view_kind::list:
            return find_list(blocks);
        }
        return {};
    }

    [[nodiscard]] bool is_list() const noexcept { return view_.kind() == slot_view_kind::list; }
    [[nodiscard]] std::size_t columns() const noexcept { return view_.size(); }
    // The block table, by number in the store.
    [[nodiscard]] std::span<const std::uint32_t> blocks() const noexcept { return blocks_.view(); }
    // Places offset() ... end() - 1 are those of the view, in order of its columns; of a list, some of them.
    [[nodiscard]] std::size_t offset() const noexcept { return offset_; }
    [[nodiscard]] std::size_t end() const noexcept { return end_; }

    [[nodiscard]] std::size_t place_of_column(std::size_t column) const noexcept {
        return is_list() ? places_[column] : offset_ + column;
    }
    // The column of a slot; none: the view does not have it.
    [[nodiscard]] std::uint32_t column_of(std::uint32_t slot) const noexcept {
        if (view_.kind() == slot_view_kind::range)
            return slot >= view_.first() && slot - view_.first() < columns()
                       ? static_cast<std::uint32_t>(slot - view_.first())
                       : none;
        if (index_.empty() || index_[slot / page_] == none)
            return none;
        const std::size_t place = place_of(slot);
        if (is_list())
            return column_at_[place];
        return place < end_ ? static_cast<std::uint32_t>(place) : none;
    }

private:
    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }

    [[nodiscard]] std::size_t place_of(std::uint32_t slot) const noexcept {
        return index_[slot / page_] * page_ + slot % page_;
    }
    status add_block(std::uint32_t block, std::size_t i) noexcept {
        if (block >= index_.size())
            return {errc::out_of_range,
                    "a view has blocks of the store",
                    {.token = static_cast<std::int64_t>(i * page_)}};
        if (index_[block] != none)
            return {errc::invalid_argument,
                    "a block comes once in a table",
                    {.token = static_cast<std::int64_t>(i * page_)}};
        index_[block] = static_cast<std::uint32_t>(i);
        return {};
    }
    status find_list(std::size_t blocks) noexcept {
        if (!index_.resize(blocks, none) || !places_.resize(columns()))
            return no_memory();
        const auto page = static_cast<std::uint32_t>(page_); // 32 bits divide in half the time
        for (std::size_t c = 0; c < columns(); ++c) {
            const std::uint32_t slot = view_.items()[c], block = slot / page;
            const error_location where{.token = static_cast<std::int64_t>(c)};
            if (block >= blocks)
                return {errc::out_of_range, "a view has slots of the store", where};
            if (index_[block] == none) {
                index_[block] = static_cast<std::uint32_t>(blocks_.size());
                if (!blocks_.try_push_back(block) || !column_at_.resize(blocks_.size() * page_, none))
                    return no_memory();
            }
            const std::uint32_t place = index_[block] * page + (slot - block * page);
            if (column_at_[place] != none)
                return {errc::invalid_argument, "a slot comes once in a list", where};
            column_at_[place] = static_cast<std::uint32_t>(c);
            places_[c] = place;
        }
        end_ = blocks_.size() * page_;
        return {};
    }

    slot_view view_;
    std::size_t page_ = 1, offset_ = 0, end_ = 0;
    buffer<std::uint32_t> blocks_;
    buffer<std::uint32_t> index_;     // [blocks of the store]: of a table or list, the index in it
    buffer<std::uint32_t> column_at_; // [places]: of a list
    buffer<std::uint32_t> places_;    // [columns]: of a list
};

} // namespace kv1::inline KV1_ABI::detail
