// SPDX-License-Identifier: Apache-2.0
//
// What a cache knows of one sequence. Lengths and counts of pages are atomic only so that statistics may read
// them while another thread appends; everything else belongs to the thread that works on the sequence.
#pragma once

#include <kv1/block_table.hpp>
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

struct replaced_block {
    std::size_t place;
    std::uint32_t before;
};

// A sequence's share in one page group.
struct sequence_pages {
    block_table table;
    std::atomic<std::size_t> dropped{0};  // pages in holes
    std::atomic<std::size_t> retained{0}; // pages that are kept behind the sliding window
    std::size_t window_from = 0;          // tokens before it were given up by the sliding window
    // an append that is under way
    std::size_t pages_before = 0;
    buffer<replaced_block> replaced; // by their copies
    buffer<std::uint32_t> fresh;     // scratch
    // of open keys: the page that was filled in amid others, and a block that the append alone needs
    std::size_t filled = no_page;
    std::uint32_t spare = no_block;
};

struct sequence_state {
    std::unique_ptr<sequence_pages[]> pages;             // by group
    std::unique_ptr<std::atomic<std::size_t>[]> lengths; // tokens, by layer
    std::optional<std::size_t> committed;                // tokens that rollback() returns to
    std::size_t fp16_from = 0; // of the tokens past the sinks, those from here on have their fp16 copies

    // Room for a first use of the slot. False: no memory.
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
