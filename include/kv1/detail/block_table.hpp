// SPDX-License-Identifier: Apache-2.0
//
// block_table: says which block holds which page of a sequence. Page p always means the positions p *
// page_tokens and on: pages that are dropped from the middle leave a hole, and later pages keep their
// numbers. The blocks of the pages that are left lie together, in order of position, so that kernels walk
// them as one run. kept_before() turns a position into a place in that run.
//
// Example: 64 tokens a page, four pages in blocks 7, 3, 9, 4. After page 1 is dropped, blocks() is {7, 9, 4},
// holes() is {[1, 2)}, find(2) is 1, and position 130 has the place kept_before(130, 64) = 66.
//
// Plain data: owns no blocks, counts no references. Not synchronized.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/detail/page_hole.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace kv1::inline KV1_ABI::detail {

/// Blocks by page, with holes. Not synchronized.
class block_table {
public:
    /// Blocks of the pages that are left, in order of position.
    [[nodiscard]] std::span<const std::uint32_t> blocks() const noexcept { return blocks_.view(); }
    /// Ascending; two holes never touch.
    [[nodiscard]] std::span<const page_hole> holes() const noexcept { return holes_.view(); }
    /// Pages, dropped ones included.
    [[nodiscard]] std::size_t pages() const noexcept { return blocks_.size() + dropped_; }
    /// Pages in holes.
    [[nodiscard]] std::size_t dropped() const noexcept { return dropped_; }

    /// Where in blocks() a page lies; nothing for a dropped one and past the end. O(holes).
    [[nodiscard]] std::optional<std::size_t> find(std::size_t page) const noexcept {
        std::size_t before = 0;
        for (const page_hole& h : holes_) {
            if (page < h.first)
                break;
            if (page < h.last)
                return std::nullopt;
            before += h.last - h.first;
        }
        if (page >= pages())
            return std::nullopt;
        return page - before;
    }

    /// The first page at or after `page` that is not dropped; pages() where none is. O(holes).
    [[nodiscard]] std::size_t next_kept(std::size_t page) const noexcept {
        for (const page_hole& h : holes_)
            if (page >= h.first && page < h.last)
                page = h.last;
        return (std::min)(page, pages());
    }

    /// The hole that a page lies in. O(holes).
    [[nodiscard]] std::optional<page_hole> hole_at(std::size_t page) const noexcept {
        for (const page_hole& h : holes_)
            if (page >= h.first && page < h.last)
                return h;
        return std::nullopt;
    }

    /// Tokens before position `token` that are not dropped. O(holes).
    [[nodiscard]] std::size_t kept_before(std::size_t token, std::size_t page_tokens) const noexcept {
        std::size_t kept = token;
        for (const page_hole& h : holes_) {
            const std::size_t first = static_cast<std::size_t>(h.first) * page_tokens;
            const std::size_t last = static_cast<std::size_t>(h.last) * page_tokens;
            if (token <= first)
                break;
            kept -= (std::min)(token, last) - first;
        }
        return kept;
    }

    /// Room for more blocks, or holes. False: no memory, nothing changed.
    /// @{
    [[nodiscard]] bool reserve(std::size_t more_blocks) noexcept {
        return blocks_.reserve(blocks_.size() + more_blocks);
    }
    [[nodiscard]] bool reserve_hole() noexcept { return reserve_holes(1); }
    [[nodiscard]] bool reserve_holes(std::size_t more) noexcept {
        return holes_.reserve(holes_.size() + more);
    }
    /// @}

    /// The block of the next page. Precondition: room is reserved.
    void push_back(std::uint32_t block) noexcept { blocks_.push_back(block); }
    /// Dropped pages at the end. Preconditions: room for a hole, pages_dropped > 0.
    void append_hole(std::uint32_t pages_dropped) noexcept {
        const auto first = static_cast<std::uint32_t>(pages());
        if (!holes_.empty() && holes_.back().last == first)
            holes_.back().last += pages_dropped;
        else
            holes_.push_back({first, first + pages_dropped});
        dropped_ += pages_dropped;
    }
    /// Gives a dropped page a block. Preconditions: the page lies in a hole; room for a block and a hole.
    void fill(std::uint32_t page, std::uint32_t block) noexcept {
        std::size_t at = 0;
        while (holes_[at].last <= page)
            ++at;
        blocks_.insert(live_before(page), block);
        const page_hole hole = holes_[at];
        holes_.erase(at, at + 1);
        if (page + 1 < hole.last)
            holes_.insert(at, {page + 1, hole.last});
        if (hole.first < page)
            holes_.insert(at, {hole.first, page});
        --dropped_;
    }
    /// Puts another block in a place of blocks().
    void replace(std::size_t place, std::uint32_t block) noexcept { blocks_[place] = block; }

    /// Cuts the table to its first pages, giving release(block) what is left over. A hole is cut like pages.
    template <class Release>
    void truncate(std::size_t new_pages, Release&& release) noexcept {
        while (!holes_.empty() && holes_.back().last > new_pages) {
            page_hole& hole = holes_.back();
            while (pages() > hole.last)
                release(pop());
            const auto last = static_cast<std::uint32_t>(std::max<std::size_t>(hole.first, new_pages));
            dropped_ -= hole.last - last;
            hole.last = last;
            if (hole.first == hole.last)
                holes_.pop_back();
        }
        while (pages() > new_pages)
            release(pop());
    }

    /// Drops pages first ... last - 1, holes among them included. Preconditions: first < last <= pages(),
    /// room for a hole is reserved.
    template <class Release>
    void drop(std::uint32_t first, std::uint32_t last, Release&& release) noexcept {
        const std::size_t from = live_before(first), to = live_before(last);
        for (std::size_t i = from; i < to; ++i)
            release(blocks_[i]);
        blocks_.erase(from, to);
        dropped_ += to - from;
        page_hole merged{first, last};
        std::size_t at = 0;
        while (at < holes_.size() && holes_[at].last < first)
            ++at;
        std::size_t end = at;
        for (; end < holes_.size() && holes_[end].first <= last; ++end) {
            merged.first = (std::min)(merged.first, holes_[end].first);
            merged.last = (std::max)(merged.last, holes_[end].last);
        }
        holes_.erase(at, end);
        holes_.insert(at, merged);
    }

    /// Takes over another table's pages. False: no memory, nothing changed.
    [[nodiscard]] bool assign(const block_table& other) noexcept {
        if (!blocks_.reserve(other.blocks_.size()) || !holes_.reserve(other.holes_.size()))
            return false;
        static_cast<void>(blocks_.assign(other.blocks()));
        static_cast<void>(holes_.assign(other.holes()));
        dropped_ = other.dropped_;
        return true;
    }

    /// Forgets all pages.
    void clear() noexcept {
        blocks_.clear();
        holes_.clear();
        dropped_ = 0;
    }

    /// Whether holes are in order and the counts agree.
    [[nodiscard]] bool valid() const noexcept {
        std::size_t total = 0, end = 0;
        for (const page_hole& h : holes_) {
            if (h.first >= h.last || (end != 0 && h.first <= end) || h.last > pages())
                return false;
            total += h.last - h.first;
            end = h.last;
        }
        return total == dropped_;
    }

private:
    std::uint32_t pop() noexcept {
        const std::uint32_t block = blocks_.back();
        blocks_.pop_back();
        return block;
    }
    [[nodiscard]] std::size_t live_before(std::size_t page) const noexcept { return kept_before(page, 1); }

    buffer<std::uint32_t> blocks_;
    buffer<page_hole> holes_;
    std::size_t dropped_ = 0; // pages in holes
};

} // namespace kv1::inline KV1_ABI::detail
