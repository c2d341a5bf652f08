// SPDX-License-Identifier: Apache-2.0
//
// Which slots of a layer have an fp16 copy, and where. Copies have slots of their own, in pages of a plane of their own.
// A new copy lies behind that of the slot before, if there is room in its page, so copies of one sequence share pages.
#pragma once

#include <kv1/detail/buffer.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail {

class slot_copies {
public:
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();

    // For so many slots and copies, in pages. No copies: nothing is allocated. False: no memory.
    [[nodiscard]] bool reserve(std::size_t slots, std::size_t copies, std::size_t page_tokens) noexcept {
        page_ = page_tokens;
        return copies == 0 || (copy_of_.resize(slots, none) && slot_of_.resize(copies, none) &&
                               used_in_.resize(copies / page_tokens));
    }

    [[nodiscard]] std::size_t size() const noexcept { return used_; }
    [[nodiscard]] std::size_t free() const noexcept { return slot_of_.size() - used_; }
    // The copy of a slot, or none.
    [[nodiscard]] std::uint32_t of(std::uint32_t slot) const noexcept {
        return copy_of_.empty() ? none : copy_of_[slot];
    }
    // The slot of each copy, or none.
    [[nodiscard]] std::span<const std::uint32_t> slots() const noexcept { return slot_of_.view(); }

    // Gives a slot a copy. Preconditions: it has none, free() is not 0.
    std::uint32_t add(std::uint32_t slot) noexcept {
        const std::uint32_t copy = place_for(slot);
        copy_of_[slot] = copy;
        slot_of_[copy] = slot;
        ++used_in_[copy / page_];
        ++used_;
        return copy;
    }
    // Takes a slot's copy, if it has one.
    void remove(std::uint32_t slot) noexcept {
        const std::uint32_t copy = of(slot);
        if (copy == none)
            return;
        copy_of_[slot] = slot_of_[copy] = none;
        --used_in_[copy / page_];
        --used_;
    }
    void clear() noexcept {
        for (std::uint32_t copy = 0; copy < slot_of_.size() && used_ != 0; ++copy)
            if (slot_of_[copy] != none)
                remove(slot_of_[copy]);
    }

private:
    [[nodiscard]] std::uint32_t place_for(std::uint32_t slot) const noexcept {
        if (slot != 0 && copy_of_[slot - 1] != none) {
            const std::uint32_t next = copy_of_[slot - 1] + 1;
            if (next % page_ != 0 && slot_of_[next] == none)
                return next;
        }
        for (std::size_t p = 0; p < used_in_.size(); ++p)
            if (used_in_[p] == 0)
                return static_cast<std::uint32_t>(p * page_);
        std::uint32_t copy = 0;
        while (slot_of_[copy] != none)
            ++copy;
        return copy;
    }

    std::size_t page_ = 1, used_ = 0;
    buffer<std::uint32_t> copy_of_; // [slots]
    buffer<std::uint32_t> slot_of_; // [copies]
    buffer<std::uint32_t> used_in_; // [pages of copies]
};

} // namespace kv1::inline KV1_ABI::detail
