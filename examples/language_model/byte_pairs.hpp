// SPDX-License-Identifier: Apache-2.0
//
// Byte-pair merging: of all neighbours in a word that a merge is known for, those of the lowest rank are
// joined first, the leftmost of equals before the others, until none is left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kv1_lm {

struct merge {
    std::int32_t rank;
    std::int32_t token; ///< what the pair becomes
};

/// Merges by pair of tokens: a hash table in one array, probed linearly, never more than half full.
class merge_table {
public:
    explicit merge_table(std::size_t expected = 0);

    /// Adds a merge or replaces that of the same pair. No token is negative.
    void set(std::int32_t left, std::int32_t right, merge m);
    /// The merge of a pair, or null. Expected O(1).
    [[nodiscard]] const merge* find(std::int32_t left, std::int32_t right) const noexcept;
    [[nodiscard]] std::size_t size() const noexcept { return size_; }

private:
    struct slot {
        std::uint64_t pair;
        merge value;
    };
    [[nodiscard]] std::size_t place_of(std::uint64_t pair) const noexcept;

    std::vector<slot> slots_; // a power of two
    std::size_t size_ = 0;
};

/// Applies a table to words. Keeps its buffers between words: one for each thread.
class pair_merger {
public:
    explicit pair_merger(const merge_table& table) noexcept : table_(&table) {}

    /// Merges the tokens of a word in place. O(n log n) for n < 2^32 of them.
    void apply(std::vector<std::int32_t>& word);

private:
    // A token in the list of those that are left; `none` ends it on both sides.
    struct symbol {
        std::int32_t token;
        std::uint32_t previous, next;
    };
    void propose(std::uint32_t left);

    const merge_table* table_;
    std::vector<symbol> symbols_;
    std::vector<std::uint64_t> queue_; // rank, then position of the left one: a heap with the least on top
};

} // namespace kv1_lm
