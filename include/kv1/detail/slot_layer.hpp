// SPDX-License-Identifier: Apache-2.0
//
// One layer of a slot store: its bytes, which of its pages were begun, which of its slots have an fp16 copy. Slot s is
// token s % page_tokens of block s / page_tokens. One block more than slots need stays zero for good: it stands for
// pages that nobody has written to, whose memory may hold anything. Behind the blocks lie the positions of keys, if
// their means turn: an int32 for each slot of each block, -1 where no key was written.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/detail/slot_copies.hpp>
#include <kv1/layout.hpp>
#include <kv1/slot_store_description.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// Memory of the caller's, for one arena.
class lent_memory final : public memory_source {
public:
    explicit lent_memory(std::span<std::byte> bytes) noexcept : bytes_(bytes) {}
    std::byte* allocate(std::size_t bytes) noexcept override {
        return bytes <= bytes_.size() ? bytes_.data() : nullptr;
    }
    void deallocate(std::byte*, std::size_t) noexcept override {}
    [[nodiscard]] std::span<std::byte> bytes() const noexcept { return bytes_; }

private:
    std::span<std::byte> bytes_;
};

struct slot_layer {
    slot_layer(const layer_description& l, std::span<std::byte> lent_bytes) noexcept
        : encodings{l}, lent(lent_bytes),
          body{{}, 0, 0,
               0,  0, detail::arena(lent_bytes.data() != nullptr ? static_cast<memory_source&>(lent) : own)},
          copies{{}, 0, 0, 0, 0, detail::arena(own)} {}
    slot_layer(const slot_layer&) = delete;
    slot_layer& operator=(const slot_layer&) = delete;

    [[nodiscard]] static page_layout copy_layout(const layer_description& l,
                                                 std::size_t page_tokens) noexcept {
        return l.values_in_keys
                   ? page_layout::with_values_in_keys(kv_format::fp16, l.key_dim, l.value_dim, page_tokens)
                   : page_layout(kv_format::fp16, l.key_dim, kv_format::fp16, l.value_dim, page_tokens);
    }
    // Whether a layer can have fp16 copies: not if it stores everything plain.
    [[nodiscard]] static bool is_coded(const layer_description& l) noexcept {
        return traits_of(l.key_format).code_bits != 0 || traits_of(l.value_format).code_bits != 0;
    }

    [[nodiscard]] const layer_description& shape() const noexcept { return encodings.shape; }
    [[nodiscard]] std::size_t blocks() const noexcept { return begun.size(); }
    [[nodiscard]] std::uint32_t blank() const noexcept { return static_cast<std::uint32_t>(begun.size()); }
    [[nodiscard]] const section_layout& section(kv_side side) const noexcept {
        return side == kv_side::key ? body.layout.keys() : body.layout.values();
    }
    [[nodiscard]] const section_layout& copy_section(kv_side side) const noexcept {
        return side == kv_side::key ? copies.layout.keys() : copies.layout.values();
    }

    // Checks the layer and makes room. copied_slots: that may have an fp16 copy at a time, in whole pages.
    // holds_slots: the lent memory has a store's bytes. Errors: as layer_encodings::make(), shape_mismatch for lent
    // memory, out_of_memory.
    [[nodiscard]] status make(std::size_t page, std::size_t block_count, std::size_t copied_slots,
                              const kernel_set& kernels, bool holds_slots, bool huge_pages) noexcept {
        const layer_description& l = shape();
        if (const status s = encodings.make(page, kernels); !s)
            return s;
        has_copies = copied_slots != 0 && is_coded(l);
        if (has_copies && !kernels.contains(kv_format::fp16))
            return {errc::unsupported_format, "fp16 copies need a store type with fp16"};
        set(body, layout_of(l, page));
        if (has_copies)
            set(copies, copy_layout(l, page));
        constexpr std::size_t most_bytes = (std::numeric_limits<std::ptrdiff_t>::max)();
        has_positions = keeps_positions(l);
        const std::size_t position_bytes = has_positions ? page * sizeof(std::int32_t) : 0;
        if (!plane::addressable(body.layout, l.kv_heads, block_count + 1) ||
            block_count + 1 > most_bytes / (body.block_bytes + position_bytes))
            return {errc::out_of_memory, "the memory's size overflows"};
        const std::span<std::byte> given = lent.bytes();
        const std::size_t bytes = (block_count + 1) * (body.block_bytes + position_bytes);
        if (given.data() != nullptr && given.size() < bytes)
            return {errc::shape_mismatch, "lent memory has slot_memory_bytes() of its layer"};
        if (reinterpret_cast<std::uintptr_t>(given.data()) % line_bytes != 0)
            return {errc::invalid_argument, "lent memory is aligned to line_bytes"};
        const std::size_t copy_blocks = has_copies ? copied_slots / page : 0;
        if (!body.arena.allocate(bytes) || !begun.resize(block_count, holds_slots ? 1 : 0) ||
            !copied.reserve(block_count * page, copy_blocks * page, page) ||
            !copies_begun.resize(copy_blocks) ||
            (has_copies && !copies.allocate(copies.arena, copy_blocks, huge_pages)))
            return {errc::out_of_memory, "no memory for the slots"};
        if (huge_pages)
            advise_huge_pages(body.arena.data(), bytes);
        clear(blank());
        return {};
    }

    // Makes the pages of a slot and of its copy ready to be written to.
    void begin(std::uint32_t slot) noexcept {
        const auto block = static_cast<std::uint32_t>(slot / body.layout.page_tokens());
        if (begun[block] == 0)
            clear(block);
        begun[block] = 1;
    }
    void begin_copy(std::uint32_t copy) noexcept {
        const auto block = static_cast<std::uint32_t>(copy / copies.layout.page_tokens());
        if (copies_begun[block] == 0)
            copies.clear(block);
        copies_begun[block] = 1;
    }

    // Where a slot is read: blocks that were not begun are blank.
    [[nodiscard]] std::uint32_t block_of(std::size_t block) const noexcept {
        return begun[block] != 0 ? static_cast<std::uint32_t>(block) : blank();
    }
    [[nodiscard]] slot_place place_of(std::uint32_t slot) const noexcept {
        const std::size_t page = body.layout.page_tokens();
        return {block_of(slot / page), slot % page};
    }
    // Positions of keys, [blocks() + 1][page_tokens]. Precondition: has_positions.
    [[nodiscard]] std::int32_t* positions() noexcept {
        return reinterpret_cast<std::int32_t*>(body.block(blank() + 1));
    }
    [[nodiscard]] const std::int32_t* positions() const noexcept {
        return reinterpret_cast<const std::int32_t*>(body.block(blank() + 1));
    }
    // Of a slot's key; -1: none was written, or the layer has no positions.
    [[nodiscard]] std::int32_t position_of(std::uint32_t slot) const noexcept {
        const slot_place at = place_of(slot);
        return has_positions ? positions()[at.block * body.layout.page_tokens() + at.token] : -1;
    }
    // Precondition: the slot's page was begun.
    void set_position(std::uint32_t slot, std::int32_t position) noexcept {
        if (has_positions)
            positions()[slot] = position;
    }
    [[nodiscard]] slot_place copy_place(std::uint32_t copy) const noexcept {
        const std::size_t page = copies.layout.page_tokens();
        return {static_cast<std::uint32_t>(copy / page), copy % page};
    }

    // Vectors with smaller numbers than this are never refused: no metadata that encoders make of them overflow fp16.
    // Levels that fit 2-bit codes best reach three ranges of the vector beyond its ends, 7 * 8192 in all.
    [[nodiscard]] float always_fits(kv_side side) const noexcept {
        const kv_format format = side == kv_side::key ? shape().key_format : shape().value_format;
        const prepared_encoding& e = side == kv_side::key ? encodings.keys : encodings.values;
        if (format == kv_format::fp32 && !has_copies)
            return std::numeric_limits<float>::infinity();
        if (traits_of(format).code_bits == 0)
            return largest_half;
        float mean = 0.0f;
        for (const float m : e.means)
            mean = (std::max)(mean, std::fabs(m));
        mean = (std::max)(mean, e.turning.largest());
        // channels that are mixed: none of them becomes larger than all together are
        const std::size_t width = e.basis.empty() ? e.params.hadamard : e.params.channels;
        return 8192.0f / std::sqrt(static_cast<float>(width != 0 ? width : 1)) - mean;
    }

private:
    void clear(std::uint32_t block) noexcept {
        body.clear(block);
        const std::size_t page = body.layout.page_tokens();
        if (has_positions)
            std::fill_n(positions() + block * page, page, -1);
    }
    void set(plane& p, const page_layout& layout) noexcept {
        p.layout = layout;
        p.kv_heads = shape().kv_heads;
        p.block_bytes = p.kv_heads * layout.bytes();
    }

public:
    layer_encodings encodings;
    lent_memory lent;
    allocator_memory<std::allocator<std::byte>> own{std::allocator<std::byte>{}};
    plane body, copies;
    buffer<std::uint8_t> begun, copies_begun; // [blocks]: not 0: cleared, and perhaps written to
    slot_copies copied;
    bool has_copies = false, has_positions = false;
};

} // namespace kv1::inline KV1_ABI::detail
