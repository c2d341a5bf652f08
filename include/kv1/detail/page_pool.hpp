// SPDX-License-Identifier: Apache-2.0
//
// page_pool: hands out block numbers 0 ... capacity - 1 and counts their references. The block that was freed
// last is handed out first. All blocks are alike, so there is no fragmentation. The pool does not know where
// bytes lie.
//
// allocate(), retain() and release() are O(1) a block and never allocate memory. They and the const members
// may be called from any threads at once. Moving a pool, try_grow() and limit() need it for themselves. If
// references() of a block is 1, the holder of that reference may write to the block: nobody else can gain a
// reference to it.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/status.hpp>

#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

/// Block numbers, free or in use.
class page_pool {
public:
    /// No block at all.
    page_pool() = default;
    /// An empty pool that grows to `capacity` blocks: 8 bytes each. Errors: out_of_memory.
    [[nodiscard]] static result<page_pool> create(std::uint32_t capacity) noexcept {
        page_pool pool;
        if (const status s = pool.try_grow(capacity); !s)
            return s;
        return pool;
    }
    /// The same; throws kv1::error (without exceptions: aborts).
    explicit page_pool(std::uint32_t capacity) { throw_if_error(try_grow(capacity)); }

    /// Moving needs both pools for itself; the source is left without blocks.
    /// @{
    page_pool(page_pool&& other) noexcept { take(other); }
    page_pool& operator=(page_pool&& other) noexcept {
        take(other);
        return *this;
    }
    /// @}

    /// Raises the capacity; a smaller one changes nothing. O(capacity). Errors: out_of_memory, which leaves
    /// the pool as it was.
    status try_grow(std::uint32_t capacity) noexcept {
        if (capacity <= capacity_)
            return {};
        std::unique_ptr<counter[]> grown(new (std::nothrow) counter[capacity]);
        if (grown == nullptr || !free_.reserve(capacity))
            return {errc::out_of_memory, "no memory for the page list"};
        for (std::uint32_t i = 0; i < capacity; ++i)
            grown[i].store(i < unused_ ? counts_[i].load(std::memory_order_relaxed) : 0,
                           std::memory_order_relaxed);
        counts_ = std::move(grown);
        capacity_ = capacity;
        return {};
    }

    /// Takes try_grow() back. Precondition: touched() <= capacity.
    void limit(std::uint32_t capacity) noexcept { capacity_ = capacity < capacity_ ? capacity : capacity_; }

    /// Takes a block, with one reference. Nothing: no block is free.
    [[nodiscard]] std::optional<std::uint32_t> allocate() noexcept {
        std::uint32_t block = 0;
        if (!allocate({&block, 1}))
            return std::nullopt;
        return block;
    }
    /// Takes as many blocks as the span has elements, each with one reference. Takes none if there are too
    /// few: false.
    [[nodiscard]] bool allocate(std::span<std::uint32_t> blocks) noexcept {
        const std::lock_guard lock(mutex_);
        if (blocks.size() > capacity_ - in_use_.load(std::memory_order_relaxed))
            return false;
        for (std::uint32_t& block : blocks) {
            if (free_.empty()) {
                block = unused_++;
            } else {
                block = free_.back();
                free_.pop_back();
            }
            counts_[block].store(1, std::memory_order_relaxed);
        }
        in_use_.fetch_add(blocks.size(), std::memory_order_relaxed);
        return true;
    }

    /// Adds a reference. Precondition: the caller holds one, or prevents one from being released.
    void retain(std::uint32_t block) noexcept {
        assert(references(block) != 0);
        counts_[block].fetch_add(1, std::memory_order_relaxed);
    }

    /// Removes a reference, and frees the block if it was the last one: true. Precondition: the caller holds
    /// one.
    bool release(std::uint32_t block) noexcept {
        assert(references(block) != 0);
        // others' reads of the block come before its next owner's writes
        if (counts_[block].fetch_sub(1, std::memory_order_acq_rel) != 1)
            return false;
        const std::lock_guard lock(mutex_);
        free_.push_back(block); // within the reserved capacity
        in_use_.fetch_sub(1, std::memory_order_relaxed);
        return true;
    }

    /// The number of references to a block; 0: it is free. Precondition: block < capacity().
    [[nodiscard]] std::uint32_t references(std::uint32_t block) const noexcept {
        return counts_[block].load(std::memory_order_acquire);
    }

    /// Blocks in all, free, and in use. O(1).
    /// @{
    [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] std::size_t in_use() const noexcept { return in_use_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::size_t available() const noexcept { return capacity() - in_use(); }
    /// One past the highest block that was ever handed out: memory beyond it was never touched.
    [[nodiscard]] std::size_t touched() const noexcept {
        const std::lock_guard lock(mutex_);
        return unused_;
    }

    /// The number of blocks that sharing saves: the sum of references() - 1 over the blocks in use.
    /// O(touched()).
    [[nodiscard]] std::size_t shared() const noexcept {
        const std::lock_guard lock(mutex_);
        std::size_t total = 0;
        for (std::uint32_t i = 0; i < unused_; ++i) {
            const std::uint32_t count = counts_[i].load(std::memory_order_relaxed);
            total += count > 1 ? count - 1 : 0;
        }
        return total;
    }

    /// Whether free list, counts and totals agree. O(capacity). The pool must not change meanwhile.
    [[nodiscard]] bool valid() const noexcept {
        const std::lock_guard lock(mutex_);
        std::size_t held = 0;
        for (std::uint32_t i = 0; i < capacity_; ++i) {
            const bool used = counts_[i].load(std::memory_order_relaxed) != 0;
            held += used ? 1u : 0u;
            if (used && i >= unused_)
                return false;
        }
        for (const std::uint32_t block : free_)
            if (block >= unused_ || counts_[block].load(std::memory_order_relaxed) != 0)
                return false;
        return held == in_use() && held + free_.size() == unused_;
    }
    /// @}

private:
    using counter = std::atomic<std::uint32_t>;

    void take(page_pool& other) noexcept {
        counts_ = std::move(other.counts_);
        free_ = std::move(other.free_);
        capacity_ = std::exchange(other.capacity_, 0);
        unused_ = std::exchange(other.unused_, 0);
        in_use_.store(other.in_use_.exchange(0));
    }

    mutable std::mutex mutex_; // of free_ and unused_
    std::unique_ptr<counter[]> counts_;
    buffer<std::uint32_t> free_;
    std::uint32_t capacity_ = 0;
    std::uint32_t unused_ = 0; // blocks from here on were never handed out
    std::atomic<std::size_t> in_use_{0};
};

} // namespace kv1::inline KV1_ABI::detail
