// SPDX-License-Identifier: Apache-2.0
//
// What the backend knows of llama.cpp's cells: where the token of each slot stands, and which slots belong together.
// llama.cpp tells a backend neither. Positions come from the ROPE node that turned a slot's key. Which slots a sequence
// has is read off the mask: a token sees the tokens of its sequence up to its own. So the last token of each sequence in
// a batch sees all of it.
//
// Where no position is known (models without RoPE, a state that was restored), the order in which slots were written
// stands for it.
#pragma once

#include <kv1/slot_views.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace kv1_ggml {

class step_book {
public:
    explicit step_book(std::size_t slots) : cells_(slots) {}

    static constexpr std::int32_t unknown = -1;

    [[nodiscard]] bool written(std::uint32_t slot) const noexcept { return cells_[slot].order != 0; }
    // Where a slot's token stands, or unknown; and which slot was written first.
    // @{
    [[nodiscard]] std::int32_t position(std::uint32_t slot) const noexcept { return cells_[slot].position; }
    [[nodiscard]] std::uint64_t order(std::uint32_t slot) const noexcept { return cells_[slot].order; }
    // @}
    // In which step a slot was written or seen by a batch that it belongs to.
    [[nodiscard]] std::uint64_t last_use(std::uint32_t slot) const noexcept { return cells_[slot].used; }
    [[nodiscard]] std::uint64_t step() const noexcept { return step_; }
    // The slots that were written in this step.
    [[nodiscard]] std::span<const std::uint32_t> batch() const noexcept { return batch_; }
    [[nodiscard]] bool observed() const noexcept { return observed_; }

    // A batch goes to these slots.
    void begin(std::span<const std::uint32_t> slots) {
        ++step_;
        observed_ = false;
        ends_.clear();
        batch_.assign(slots.begin(), slots.end());
        for (const std::uint32_t slot : slots)
            place(slot, unknown);
    }
    // Rows of a saved state follow.
    void begin_restoring() noexcept { ++step_; }
    void place(std::uint32_t slot, std::int32_t position) noexcept {
        cells_[slot] = {position, ++order_, step_};
    }
    void set_positions(const std::int32_t* positions) noexcept {
        for (std::size_t i = 0; i < batch_.size(); ++i)
            cells_[batch_[i]].position = positions[i];
    }
    void shift(std::uint32_t slot, std::int32_t by) noexcept {
        if (cells_[slot].position != unknown)
            cells_[slot].position = std::max(0, cells_[slot].position + by);
    }
    void copy(std::uint32_t from, std::uint32_t to) noexcept { cells_[to] = cells_[from]; }
    void clear(std::uint32_t slot) noexcept { cells_[slot] = {}; }
    void clear() noexcept {
        std::fill(cells_.begin(), cells_.end(), cell{});
        batch_.clear();
        ends_.clear();
    }

    // Tokens first ... first + count - 1 of the batch see(i, slot) slots begin ... end - 1.
    template <class Sees>
    void observe(std::size_t first, std::size_t count, std::uint32_t begin, std::uint32_t end, Sees&& sees) {
        observed_ = true;
        for (std::size_t i = 0; i < count && first + i < batch_.size(); ++i) {
            const std::uint32_t own = batch_[first + i];
            bool last = true;
            for (std::size_t j = i + 1; last && j < count; ++j)
                last = !sees(j, own);
            if (!last)
                continue;
            sequence& s = ends_.emplace_back();
            for (std::uint32_t slot = begin; slot < end; ++slot)
                if (written(slot) && sees(i, slot))
                    s.slots.push_back(slot);
        }
    }

    // The sequences of the batch, for slot_store::settle(), and the tokens of the batch that none of them sees any more
    // (sliding windows). Valid until the next step begins.
    [[nodiscard]] std::span<const kv1::slot_sequence> sequences() {
        views_.clear();
        for (sequence& s : ends_) {
            s.positions.resize(s.slots.size());
            bool known = true;
            for (std::size_t i = 0; i < s.slots.size(); ++i) {
                s.positions[i] = cells_[s.slots[i]].position;
                known = known && s.positions[i] != unknown;
                cells_[s.slots[i]].used = step_;
            }
            if (!known)
                rank(s);
            views_.push_back({kv1::slot_view::list(s.slots), s.positions});
        }
        return views_;
    }
    [[nodiscard]] std::vector<std::uint32_t> unseen() const {
        std::vector<std::uint32_t> seen, rest;
        for (const sequence& s : ends_)
            seen.insert(seen.end(), s.slots.begin(), s.slots.end());
        std::sort(seen.begin(), seen.end());
        for (const std::uint32_t slot : batch_)
            if (!std::binary_search(seen.begin(), seen.end(), slot))
                rest.push_back(slot);
        return rest;
    }
    void end() noexcept {
        batch_.clear();
        ends_.clear();
        observed_ = false;
    }

private:
    struct cell {
        std::int32_t position = unknown;
        std::uint64_t order = 0; // of writing; 0: nothing is there
        std::uint64_t used = 0;
    };
    struct sequence {
        std::vector<std::uint32_t> slots;
        std::vector<std::int32_t> positions;
    };

    void rank(sequence& s) const {
        std::vector<std::uint32_t> by_order(s.slots.size());
        std::iota(by_order.begin(), by_order.end(), 0u);
        std::sort(by_order.begin(), by_order.end(), [&](std::uint32_t a, std::uint32_t b) {
            return cells_[s.slots[a]].order < cells_[s.slots[b]].order;
        });
        for (std::size_t i = 0; i < by_order.size(); ++i)
            s.positions[by_order[i]] = static_cast<std::int32_t>(i);
    }

    std::vector<cell> cells_;
    std::vector<std::uint32_t> batch_;
    std::vector<sequence> ends_;
    std::vector<kv1::slot_sequence> views_;
    std::uint64_t step_ = 0, order_ = 0;
    bool observed_ = false;
};

} // namespace kv1_ggml
