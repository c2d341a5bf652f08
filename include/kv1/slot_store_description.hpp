// SPDX-License-Identifier: Apache-2.0
//
// The shape of a slot store, and the memory that it lies in. Plain data, which is checked when a store is made from it.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/layout.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Layers whose slots have the same numbers.
struct slot_store_description {
    /// In the model's order. Sliding windows are left at 0 (slot_attention_options::window), and keys are quantized per
    /// token (slot_store.hpp says why). Where means turn with positions, positions come with the keys that are written.
    std::vector<layer_description> layers;
    std::size_t slots = 0;        ///< of each layer, rounded up to whole pages; at most 2^31 - 1
    std::size_t page_tokens = 64; ///< slots of a page; a multiple of tile_tokens
    /// Slots that may have an fp16 copy at a time, rounded up to whole pages; 0: none has. It must do for what settle()
    /// leaves and for what is written until the next settle().
    std::size_t fp16_slots = 0;
    /// settle() leaves the fp16 copies of positions below this.
    std::size_t fp16_sinks = 0;
    /// settle() leaves the fp16 copies of the newest fp16_window - 1 positions of a sequence. So a token that is decoded
    /// next sees the last fp16_window tokens in fp16, its own included.
    std::size_t fp16_window = 0;
    /// Asks the system to back the slots with large pages (Linux only).
    bool huge_pages = false;
    /// Whether all fields are the same.
    friend bool operator==(const slot_store_description&, const slot_store_description&) = default;
};

/// Memory for the slots of one layer, which the caller owns and keeps for as long as the store lives.
struct slot_memory {
    /// At least slot_memory_bytes(), aligned to line_bytes. What it holds does not matter, and it is not touched until
    /// slots are written to, its last page aside.
    std::span<std::byte> bytes = {};
    /// It holds the slots of a store of the same description, in this process or, of the same version, another. The new
    /// store has them, too, but no fp16 copies.
    bool holds_slots = false;
};

/// Whether a store keeps the positions of a layer's keys: where their means turn with them.
[[nodiscard]] inline bool keeps_positions(const layer_description& l) noexcept {
    return !l.rotary.empty() && !l.key_encoding.means.empty();
}

/// Bytes that the slots of one layer take: their pages, and one page more; with 4 bytes a slot for positions, where the
/// store keeps them. Preconditions: such a layer exists, and its page_tokens are positive.
[[nodiscard]] inline std::size_t slot_memory_bytes(const slot_store_description& d, std::size_t layer) {
    const layer_description& l = d.layers[layer];
    const std::size_t pages = d.slots / d.page_tokens + (d.slots % d.page_tokens != 0 ? 1 : 0);
    return (pages + 1) * (l.kv_heads * layout_of(l, d.page_tokens).bytes() +
                          (keeps_positions(l) ? d.page_tokens * sizeof(std::int32_t) : 0));
}

} // namespace kv1::inline KV1_ABI
