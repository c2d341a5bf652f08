// SPDX-License-Identifier: Apache-2.0
#include "byte_pairs.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

namespace kv1_lm {

namespace {

constexpr std::uint64_t free_slot = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint32_t none = std::numeric_limits<std::uint32_t>::max();

std::uint64_t pair_of(std::int32_t left, std::int32_t right) noexcept {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
           static_cast<std::uint32_t>(right);
}

} // namespace

merge_table::merge_table(std::size_t expected)
    : slots_(std::bit_ceil(std::max<std::size_t>(2 * expected, 2)), slot{free_slot, {}}) {}

// The slot that holds the pair, or the free slot that it would go to.
std::size_t merge_table::place_of(std::uint64_t pair) const noexcept {
    const std::size_t mask = slots_.size() - 1;
    std::uint64_t hash = pair * 0x9e3779b97f4a7c15u; // Fibonacci hashing: upper bits are mixed best
    hash ^= hash >> 32;
    std::size_t i = static_cast<std::size_t>(hash) & mask;
    while (slots_[i].pair != pair && slots_[i].pair != free_slot)
        i = (i + 1) & mask;
    return i;
}

void merge_table::set(std::int32_t left, std::int32_t right, merge m) {
    if (2 * (size_ + 1) > slots_.size()) {
        const std::vector<slot> old =
            std::exchange(slots_, std::vector<slot>(2 * slots_.size(), slot{free_slot, {}}));
        for (const slot& s : old)
            if (s.pair != free_slot)
                slots_[place_of(s.pair)] = s;
    }
    const std::uint64_t pair = pair_of(left, right);
    slot& s = slots_[place_of(pair)];
    size_ += s.pair == free_slot ? 1u : 0u;
    s = {pair, m};
}

const merge* merge_table::find(std::int32_t left, std::int32_t right) const noexcept {
    const slot& s = slots_[place_of(pair_of(left, right))];
    return s.pair == free_slot ? nullptr : &s.value;
}

// Queues the merge of a symbol with the next one, if the table has such a merge.
void pair_merger::propose(std::uint32_t left) {
    const symbol& s = symbols_[left];
    if (s.next == none)
        return;
    if (const merge* m = table_->find(s.token, symbols_[s.next].token))
        queue_.push_back(static_cast<std::uint64_t>(m->rank) << 32 | left);
}

void pair_merger::apply(std::vector<std::int32_t>& word) {
    const auto size = static_cast<std::uint32_t>(word.size());
    symbols_.resize(size);
    for (std::uint32_t i = 0; i < size; ++i)
        symbols_[i] = {word[i], i == 0 ? none : i - 1, i + 1 == size ? none : i + 1};
    queue_.clear();
    for (std::uint32_t i = 0; i < size; ++i)
        propose(i);
    std::make_heap(queue_.begin(), queue_.end(), std::greater<>());

    constexpr std::int32_t gone = -1;
    while (!queue_.empty()) {
        std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
        const auto rank = static_cast<std::int32_t>(queue_.back() >> 32);
        const auto left = static_cast<std::uint32_t>(queue_.back());
        queue_.pop_back();
        symbol& s = symbols_[left];
        if (s.token == gone || s.next == none)
            continue;
        symbol& right = symbols_[s.next];
        // Symbols only grow, so a pair that has changed since it was queued has another merge or none.
        const merge* m = table_->find(s.token, right.token);
        if (m == nullptr || m->rank != rank)
            continue;
        s.token = m->token;
        s.next = right.next;
        right.token = gone;
        if (s.next != none)
            symbols_[s.next].previous = left;
        for (const std::uint32_t i : {s.previous, left}) {
            const std::size_t before = queue_.size();
            if (i != none)
                propose(i);
            if (queue_.size() != before)
                std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
        }
    }

    std::size_t kept = 0;
    for (std::uint32_t i = size == 0 ? none : 0; i != none; i = symbols_[i].next)
        word[kept++] = symbols_[i].token;
    word.resize(kept);
}

} // namespace kv1_lm
