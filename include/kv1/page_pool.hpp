// SPDX-License-Identifier: Apache-2.0
//
// page_pool: hands out block numbers 0 ... capacity - 1, last freed first. A block is the same range of
// tokens in every layer; where its bytes lie is the cache's affair. allocate() and release() are O(1) and
// never allocate memory. Not synchronized.
#pragma once

#include <kv1/detail/config.hpp>

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Block numbers, free or in use.
class page_pool {
public:
    /// No block at all.
    page_pool() = default;
    /// Throws std::bad_alloc where the free list (4 bytes a block) does not fit in memory.
    explicit page_pool(std::uint32_t capacity) : capacity_(capacity) { free_.reserve(capacity); }

    /// A block that is not in use; nothing where there is none. O(1).
    [[nodiscard]] std::optional<std::uint32_t> allocate() noexcept {
        if (!free_.empty()) {
            const std::uint32_t block = free_.back();
            free_.pop_back();
            return block;
        }
        if (unused_ == capacity_)
            return std::nullopt;
        return unused_++;
    }

    /// Precondition: the block is allocated.
    void release(std::uint32_t block) noexcept {
        assert(block < unused_);
        free_.push_back(block); // within the reserved capacity
    }

    /// Blocks in all, free, and in use. O(1).
    /// @{
    [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] std::size_t available() const noexcept { return capacity_ - unused_ + free_.size(); }
    [[nodiscard]] std::size_t in_use() const noexcept { return capacity() - available(); }
    /// @}

private:
    std::uint32_t capacity_ = 0;
    std::uint32_t unused_ = 0; // blocks from here on were never handed out
    std::vector<std::uint32_t> free_;
};

} // namespace kv1::inline KV1_ABI
