// SPDX-License-Identifier: Apache-2.0
//
// Where a cache's bytes lie. A plane is one layer's blocks in one layout. A layer has one to three planes:
// its body (the codes), its fp16 copies, and the fp16 keys of open pages if its keys are quantized per
// channel.
//
// Planes whose pages come and go together form a block group (block_group): one pool of block numbers, and one
// block table for each sequence. Block b of a group lies at byte b * block_bytes of the arena of each of its
// planes. The groups are, in this order:
//
//   bodies       one group for each pair of sliding window and retention; layers without a window share one
//   open keys    one group, if any layer quantizes keys per channel
//   fp16 copies  one group, if the cache has fp16 sinks or a window
//
// Example: four layers, of which 0 and 2 have a sliding window of 1024, and fp16 sinks. Groups: bodies of
// layers 0 and 2; bodies of 1 and 3; copies of 1 and 3 (layers with a sliding window have none).
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/fixed_vector.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/detail/page_pool.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::size_t no_plane = (std::numeric_limits<std::size_t>::max)();

enum class plane_kind : std::uint8_t { body, fp16_copy, open_keys };

// A block group.
struct block_group {
    page_pool pool;
    std::size_t window = 0;    // 0: every token stays visible
    std::size_t retention = 0; // tokens behind the window that a commit keeps
    plane_kind kind = plane_kind::body;
    std::size_t block_bytes = 0; // of a block in all planes together
};

// A layer's encodings, and the indices of its planes. The shape lies in the storage's description.
struct layer_planes : layer_encodings {
    std::size_t body = no_plane;
    std::size_t copy = no_plane; // fp16 copies; no_plane: the layer has none
    std::size_t open = no_plane; // fp16 keys of open pages; no_plane: keys are not quantized per channel
};

// The planes of all layers, and the block groups that they form.
class cache_storage {
public:
    [[nodiscard]] const cache_description& description() const noexcept { return description_; }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return description_.page_tokens; }
    [[nodiscard]] std::span<const layer_planes> layers() const noexcept { return layers_; }
    [[nodiscard]] std::span<const plane> planes() const noexcept { return planes_; }
    [[nodiscard]] std::span<plane> planes() noexcept { return planes_; }
    [[nodiscard]] std::span<const block_group> groups() const noexcept { return groups_; }
    [[nodiscard]] std::span<block_group> groups() noexcept { return groups_; }

    // Checks the description and reserves all arenas and pools. Errors: invalid_argument, shape_mismatch,
    // unsupported_format, non_finite, out_of_memory.
    status initialize(cache_description&& d, const kernel_set& kernels, memory_source& memory) noexcept {
        if (d.layers.empty() || d.page_tokens == 0 || d.page_tokens % tile_tokens != 0 ||
            d.capacity_tokens == 0)
            return {errc::invalid_argument, "layers, capacity and page size are positive, pages whole tiles"};
        for (const std::size_t tokens : {d.capacity_tokens, d.window_capacity_tokens, d.fp16_capacity_tokens})
            if (pages_for(tokens, d.page_tokens) > most_pages)
                return {errc::invalid_argument, "more than 2^32 - 2 pages"};
        if (d.fp16_sinks > max_window_tokens || d.fp16_window > max_window_tokens)
            return {errc::invalid_argument, "fp16 sinks and windows are less than 2^48 tokens"};
        if (d.first_position > max_window_tokens)
            return {errc::invalid_argument, "the first position is less than 2^48"};
        description_ = std::move(d);
        const std::size_t count = description_.layers.size();
        if (!layers_.reserve(count) || !planes_.reserve(3 * count) || !groups_.reserve(count + 2))
            return {errc::out_of_memory, "an allocation failed"};
        for (std::size_t i = 0; i < description_.layers.size(); ++i)
            if (const status added = add_layer(i, kernels, memory); !added)
                return added;
        for (std::size_t i = 0; i < layers_.size(); ++i)
            if (const status added = add_open_keys(i, kernels, memory); !added)
                return added;
        if (description_.fp16_sinks != 0 || description_.fp16_window != 0)
            for (std::size_t i = 0; i < layers_.size(); ++i)
                if (const status added = add_copy(i, kernels, memory); !added)
                    return added;
        for (block_group& g : groups_)
            if (const status grown = g.pool.try_grow(capacity_of(g)); !grown)
                return grown;
        for (plane& p : planes_)
            if (!p.allocate(p.arena, groups_[p.group].pool.capacity(), description_.huge_pages))
                return {errc::out_of_memory, "no memory for the arena", at_layer(p.layer)};
        return {};
    }

    // Raises the capacity of the groups that have no capacity of their own. Blocks keep their numbers, their
    // bytes move. Nothing changes on failure. Errors: invalid_argument, out_of_memory.
    status grow(std::size_t capacity_tokens, memory_source& memory) noexcept {
        if (pages_for(capacity_tokens, page_tokens()) > most_pages)
            return {errc::invalid_argument, "more than 2^32 - 2 pages"};
        if (capacity_tokens <= description_.capacity_tokens)
            return {};
        const std::size_t before = std::exchange(description_.capacity_tokens, capacity_tokens);
        fixed_vector<detail::arena> arenas;
        status s;
        if (!arenas.reserve(planes_.size()))
            s = {errc::out_of_memory, "an allocation failed"};
        for (std::size_t i = 0; s && i < planes_.size(); ++i) {
            const plane& p = planes_[i];
            const std::size_t blocks = capacity_of(groups_[p.group]);
            arenas.emplace_back(memory);
            if (!p.allocate(arenas[i], blocks, description_.huge_pages))
                s = {errc::out_of_memory, "no memory for the arena", at_layer(p.layer)};
        }
        for (std::size_t g = 0; s && g < groups_.size(); ++g)
            s = groups_[g].pool.try_grow(capacity_of(groups_[g]));
        if (!s) {
            description_.capacity_tokens = before;
            for (block_group& g : groups_)
                g.pool.limit(capacity_of(g));
            return s;
        }
        for (std::size_t i = 0; i < planes_.size(); ++i) {
            plane& p = planes_[i];
            std::memcpy(arenas[i].data(), p.arena.data(), groups_[p.group].pool.touched() * p.block_bytes);
            p.arena = std::move(arenas[i]);
        }
        return {};
    }

    void clear_block(std::size_t group, std::uint32_t block) noexcept {
        for (plane& p : planes_)
            if (p.group == group)
                p.clear(block);
    }
    void copy_block(std::size_t group, std::uint32_t from, std::uint32_t to) noexcept {
        for (plane& p : planes_)
            if (p.group == group)
                p.copy(from, to);
    }

    static error_location at_layer(std::size_t layer) noexcept {
        return {.layer = static_cast<std::int64_t>(layer)};
    }

private:
    static constexpr std::size_t most_pages = (std::numeric_limits<std::uint32_t>::max)() - 1;
    static constexpr std::size_t max_window_tokens = std::size_t{1} << 48;

    static std::size_t pages_for(std::size_t tokens, std::size_t page) noexcept {
        return tokens / page + (tokens % page != 0 ? 1 : 0);
    }
    [[nodiscard]] std::uint32_t capacity_of(const block_group& g) const noexcept {
        const std::size_t own = g.kind != plane_kind::body ? description_.fp16_capacity_tokens
                                : g.window != 0            ? description_.window_capacity_tokens
                                                           : 0;
        return static_cast<std::uint32_t>(
            pages_for(own != 0 ? own : description_.capacity_tokens, page_tokens()));
    }

    status add_layer(std::size_t i, const kernel_set& kernels, memory_source& memory) noexcept {
        const layer_description& l = description_.layers[i];
        layer_planes& planes = layers_.emplace_back(layer_encodings{l});
        if (const status s = planes.make(page_tokens(), kernels); !s)
            return {s.code(), s.rule(), at_layer(i)};
        if (l.sliding_window > max_window_tokens || l.window_retention > max_window_tokens)
            return {errc::invalid_argument, "a sliding window and its retention are at most 2^48 tokens",
                    at_layer(i)};
        const std::size_t retention = l.sliding_window != 0 ? l.window_retention : 0;
        std::size_t group = 0;
        while (group < groups_.size() &&
               (groups_[group].window != l.sliding_window || groups_[group].retention != retention))
            ++group;
        if (group == groups_.size()) {
            groups_.emplace_back().window = l.sliding_window;
            groups_.back().retention = retention;
        }
        if (const status s = add_plane(i, group, layout_of(l, page_tokens()), memory); !s)
            return s;
        planes.body = planes_.size() - 1;
        return {};
    }

    status add_copy(std::size_t i, const kernel_set& kernels, memory_source& memory) noexcept {
        const layer_description& l = description_.layers[i];
        const bool coded = traits_of(l.key_format).code_bits != 0 || traits_of(l.value_format).code_bits != 0;
        if (l.sliding_window != 0 || !coded)
            return {};
        if (!kernels.contains(kv_format::fp16))
            return {errc::unsupported_format, "fp16 sinks and windows need a cache type with fp16",
                    at_layer(i)};
        const page_layout layout =
            l.values_in_keys
                ? page_layout::with_values_in_keys(kv_format::fp16, l.key_dim, l.value_dim, page_tokens())
                : page_layout(kv_format::fp16, l.key_dim, kv_format::fp16, l.value_dim, page_tokens());
        if (const status s = add_plane(i, last_block_group(plane_kind::fp16_copy), layout, memory); !s)
            return s;
        layers_[i].copy = planes_.size() - 1;
        return {};
    }

    status add_open_keys(std::size_t i, const kernel_set& kernels, memory_source& memory) noexcept {
        const layer_description& l = description_.layers[i];
        if (l.key_axis != quantization_axis::per_channel)
            return {};
        if (!kernels.contains(kv_format::fp16))
            return {errc::unsupported_format, "keys per channel need a cache type with fp16", at_layer(i)};
        const page_layout layout(kv_format::fp16, l.key_dim, kv_format::fp16, 0, page_tokens());
        if (const status s = add_plane(i, last_block_group(plane_kind::open_keys), layout, memory); !s)
            return s;
        layers_[i].open = planes_.size() - 1;
        return {};
    }

    // The index of the last group. If that is of another kind, a group of this kind is added first.
    std::size_t last_block_group(plane_kind kind) noexcept {
        if (groups_.back().kind != kind) {
            groups_.emplace_back().kind = kind;
        }
        return groups_.size() - 1;
    }

    status add_plane(std::size_t layer, std::size_t group, const page_layout& layout,
                     memory_source& memory) noexcept {
        const std::size_t heads = description_.layers[layer].kv_heads, blocks = capacity_of(groups_[group]);
        if (!plane::addressable(layout, heads, blocks))
            return {errc::out_of_memory, "the arena's size overflows", at_layer(layer)};
        planes_.emplace_back(layout, layer, heads, group, heads * layout.bytes(), detail::arena(memory));
        groups_[group].block_bytes += heads * layout.bytes();
        return {};
    }

    cache_description description_;
    fixed_vector<layer_planes> layers_;
    fixed_vector<plane> planes_;
    fixed_vector<block_group> groups_;
};

} // namespace kv1::inline KV1_ABI::detail
