// SPDX-License-Identifier: Apache-2.0
//
// Byte-pair merging of a word. Of all neighbouring tokens that have a merge, those whose merge has the lowest
// rank are joined; among equals the leftmost. This goes on until no neighbours have a merge.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kv1_lm {

struct merge {
    std::int32_t rank;
    std::int32_t token; ///< the token that the pair becomes
};

/// Finds the merge of two tokens. A hash table in one array, probed linearly, at most half full.
class merge_table {
public:
    explicit merge_table(std::size_t expected = 0);

    /// Adds the merge of a pair, or replaces it. Precondition: tokens are not negative.
    void set(std::int32_t left, std::int32_t right, merge m);
    /// The merge of a pair; null: none. Expected O(1).
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

/// Applies a table to words. It keeps its buffers between words, so each thread needs its own.
class pair_merger {
public:
    explicit pair_merger(const merge_table& table) noexcept : table_(&table) {}

    /// Merges the tokens of a word in place. O(n log n) for n < 2^32 of them.
    void apply(std::vector<std::int32_t>& word);

private:
    // A token of the word, in a doubly linked list; `none` ends it on both sides.
    struct symbol {
        std::int32_t token;
        std::uint32_t previous, next;
    };
    void propose(std::uint32_t left);

    const merge_table* table_;
    std::vector<symbol> symbols_;
    std::vector<std::uint64_t> queue_; // a heap of (rank, position of the left token), the least on top
};

} // namespace kv1_lm
