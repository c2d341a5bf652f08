// SPDX-License-Identifier: Apache-2.0
//
// What a cache knows of one sequence. Lengths and counts of pages are atomic so that statistics may read them
// while another thread appends. All else belongs to the thread that works on the sequence.
#pragma once

#include <kv1/detail/block_table.hpp>
#include <kv1/detail/buffer.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::size_t no_page = static_cast<std::size_t>(-1);
inline constexpr std::uint32_t no_block = static_cast<std::uint32_t>(-1);

// During an append, entry `place` of a block table has a copy of block `before`, which others share.
struct replaced_block {
    std::size_t place;
    std::uint32_t before;
};

// A sequence's pages in one block group.
struct sequence_pages {
    block_table table;
    std::atomic<std::size_t> dropped{0};  // pages in holes
    std::atomic<std::size_t> retained{0}; // pages that lie behind the sliding window and are kept
    std::size_t window_from = 0;          // commits have freed tokens before this position
    // of an append that is under way, to undo it
    std::size_t pages_before = 0;
    buffer<replaced_block> replaced;
    buffer<std::uint32_t> fresh; // blocks that it took
    // of open keys, during an append: a page that lay in a hole and got a block, and a block that is given
    // back at the end
    std::size_t filled = no_page;
    std::uint32_t spare = no_block;
};

// A sequence: its pages in every block group, and how many tokens each layer holds.
struct sequence_state {
    std::unique_ptr<sequence_pages[]> pages;             // [block group]
    std::unique_ptr<std::atomic<std::size_t>[]> lengths; // [layer]: tokens
    std::optional<std::size_t> committed;                // tokens that rollback() returns to
    std::size_t fp16_from = 0; // tokens past the sinks have fp16 copies from this position on

    // Makes an empty sequence of this object; the first call allocates. False: no memory.
    [[nodiscard]] bool prepare(std::size_t groups, std::size_t layers) noexcept {
        if (pages == nullptr)
            pages.reset(new (std::nothrow) sequence_pages[groups]);
        if (pages != nullptr && lengths == nullptr)
            lengths.reset(new (std::nothrow) std::atomic<std::size_t>[layers]);
        if (pages == nullptr || lengths == nullptr)
            return false;
        for (std::size_t i = 0; i < layers; ++i)
            set_length(i, 0);
        for (std::size_t g = 0; g < groups; ++g)
            pages[g].retained.store(0, std::memory_order_relaxed);
        committed.reset();
        fp16_from = 0;
        return true;
    }

    [[nodiscard]] std::size_t length(std::size_t layer) const noexcept {
        return lengths[layer].load(std::memory_order_relaxed);
    }
    void set_length(std::size_t layer, std::size_t tokens) noexcept {
        lengths[layer].store(tokens, std::memory_order_relaxed);
    }
    [[nodiscard]] std::size_t shortest(std::size_t layers) const noexcept {
        std::size_t n = length(0);
        for (std::size_t i = 1; i < layers; ++i)
            n = (std::min)(n, length(i));
        return n;
    }
    [[nodiscard]] std::size_t longest(std::size_t layers) const noexcept {
        std::size_t n = length(0);
        for (std::size_t i = 1; i < layers; ++i)
            n = (std::max)(n, length(i));
        return n;
    }
};

} // namespace kv1::inline KV1_ABI::detail
