// SPDX-License-Identifier: Apache-2.0
//
// Which rank holds which position of a sequence. Positions are dealt in blocks of whole pages, round robin:
//
//   pages     a page each: all ranks work however long a sequence is, and share what is appended
//   ranges    as long a block as a rank takes of a full context: one contiguous range a rank
//
// A rank keeps its positions in ascending order. The place among them is the position in its own cache, so
// that whatever is true of all positions before some p is true of the first owned_before(rank, p) places.
#pragma once

#include <algorithm>
#include <cstddef>

namespace context_parallel {

class distribution {
public:
    /// Blocks of block_tokens positions. Preconditions: both positive.
    [[nodiscard]] static constexpr distribution pages(std::size_t ranks, std::size_t block_tokens) noexcept {
        return {ranks, block_tokens};
    }
    /// One range a rank, of whole pages, for contexts of so many tokens. Preconditions: all positive.
    [[nodiscard]] static constexpr distribution ranges(std::size_t ranks, std::size_t tokens,
                                                       std::size_t page_tokens) noexcept {
        const std::size_t page_count = (tokens + page_tokens - 1) / page_tokens;
        return {ranks, (page_count + ranks - 1) / ranks * page_tokens};
    }

    [[nodiscard]] constexpr std::size_t ranks() const noexcept { return ranks_; }
    [[nodiscard]] constexpr std::size_t block_tokens() const noexcept { return block_; }

    /// The rank that holds a position.
    [[nodiscard]] constexpr std::size_t owner(std::size_t position) const noexcept {
        return position / block_ % ranks_;
    }
    /// How many positions before this one a rank holds.
    [[nodiscard]] constexpr std::size_t owned_before(std::size_t rank, std::size_t position) const noexcept {
        const std::size_t rest = position % round(), before = rank * block_;
        return position / round() * block_ + (rest > before ? std::min(rest - before, block_) : 0);
    }
    /// The position at a place of a rank's.
    [[nodiscard]] constexpr std::size_t position(std::size_t rank, std::size_t place) const noexcept {
        return place / block_ * round() + rank * block_ + place % block_;
    }
    /// The most of so many consecutive positions that one rank may hold.
    [[nodiscard]] constexpr std::size_t most_owned(std::size_t consecutive) const noexcept {
        return consecutive / round() * block_ + std::min(consecutive % round(), block_);
    }

    friend constexpr bool operator==(const distribution&, const distribution&) = default;

private:
    constexpr distribution(std::size_t ranks, std::size_t block) noexcept : ranks_(ranks), block_(block) {}
    [[nodiscard]] constexpr std::size_t round() const noexcept { return ranks_ * block_; }

    std::size_t ranks_, block_;
};

} // namespace context_parallel
