// SPDX-License-Identifier: Apache-2.0
//
// Sequences and their pages: what a cache keeps besides numbers. A call that fails leaves the state as it was.
// basic_kv_cache says which calls may run at once.
//
// A sequence has one block table for each block group (cache_storage.hpp): bodies of layers without a window,
// bodies of layers with one, keys of open pages, fp16 copies. All of them count pages alike: with 64 tokens a
// page, page 2 means positions 128-191 in each.
//
// Beside them stand the calls that change sequences: append_pages.hpp, sequence_edits.hpp, stored_prefixes.hpp.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_storage.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/detail/slot_table.hpp>
#include <kv1/detail/page_pool.hpp>
#include <kv1/detail/prefix_tree.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

inline status stale() noexcept { return {errc::invalid_sequence, "the handle names no living sequence"}; }
inline status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }
inline status exhausted() noexcept { return {errc::capacity_exceeded, "no free page is left"}; }
inline status no_such_layer(std::size_t layer) noexcept {
    return {errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}};
}
inline status no_such_head(std::size_t kv_head) noexcept {
    return {errc::out_of_range, "no such KV head", {.kv_head = static_cast<std::int64_t>(kv_head)}};
}
inline status placed(const status& s, std::size_t layer) noexcept {
    error_location where = s.where();
    where.layer = static_cast<std::int64_t>(layer);
    return {s.code(), s.rule(), where};
}

inline constexpr std::size_t max_sequence_tokens = std::size_t{1} << 35; // page numbers fit 32 bits

// Cannot be moved, since it holds locks: a cache keeps it behind a pointer.
class cache_state {
public:
    cache_state(std::unique_ptr<memory_source> its_memory, const kernel_set& its_kernels) noexcept
        : memory(std::move(its_memory)), kernels(its_kernels) {}

    std::unique_ptr<memory_source> memory; // of the storage's arenas
    kernel_set kernels;
    cache_storage storage;
    slot_table<sequence_state> sequences;
    prefix_tree index;
    mutable scratch_pool scratches; // from any thread, const calls included

    status initialize(cache_description&& d) noexcept {
        if (const status s = storage.initialize(std::move(d), kernels, *memory); !s)
            return s;
        if (!scratches.begin())
            return no_memory();
        buffer<page_pool*> pools;
        for (block_group& g : storage.groups())
            if (!pools.try_push_back(&g.pool))
                return no_memory();
        return index.initialize(page_tokens(), pools.view(), storage.description().prefix_events);
    }

    [[nodiscard]] const sequence_state* find(sequence_id id) const noexcept { return sequences.find(id); }
    [[nodiscard]] sequence_state* find(sequence_id id) noexcept { return sequences.find(id); }
    [[nodiscard]] std::size_t layers() const noexcept { return storage.layers().size(); }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return storage.page_tokens(); }
    [[nodiscard]] std::span<const block_group> groups() const noexcept { return storage.groups(); }
    [[nodiscard]] page_pool& pool(std::size_t group) noexcept { return storage.groups()[group].pool; }
    [[nodiscard]] const page_pool& pool(std::size_t group) const noexcept {
        return storage.groups()[group].pool;
    }
    [[nodiscard]] const layer_planes& planes_of(std::size_t layer) const noexcept {
        return storage.layers()[layer];
    }
    [[nodiscard]] layer_store store_of(std::size_t layer) const noexcept {
        const layer_planes& l = planes_of(layer);
        const auto optional = [&](std::size_t i) { return i == no_plane ? nullptr : &storage.planes()[i]; };
        return {l, kernels, storage.planes()[l.body], optional(l.copy), optional(l.open), scratches};
    }
    [[nodiscard]] const plane& body_of(std::size_t layer) const noexcept {
        return storage.planes()[planes_of(layer).body];
    }
    [[nodiscard]] const plane& copy_of(std::size_t layer) const noexcept {
        return storage.planes()[planes_of(layer).copy];
    }
    [[nodiscard]] const plane& open_keys_of(std::size_t layer) const noexcept {
        return storage.planes()[planes_of(layer).open];
    }
    // The index of the block group of open keys or of fp16 copies; groups().size() if there is none.
    [[nodiscard]] std::size_t group_of(plane_kind kind) const noexcept {
        std::size_t g = 0;
        while (g < groups().size() && groups()[g].kind != kind)
            ++g;
        return g;
    }
    // The block with the fp16 keys of a layer's open page. Preconditions: the layer quantizes keys per
    // channel and has an open page.
    [[nodiscard]] std::uint32_t open_block(const sequence_state& q, std::size_t layer) const noexcept {
        const block_table& table = q.pages[open_keys_of(layer).group].table;
        return table.blocks()[*table.find(q.length(layer) / page_tokens())];
    }

    // The blocks that begin_open_keys() made ready: `begun` for the page that the first token continues,
    // `later` for the pages after it. A block that the append does not need may be any.
    struct key_blocks {
        std::uint32_t begun, later;
    };
    [[nodiscard]] key_blocks open_key_blocks(const sequence_state& q, std::size_t layer,
                                             std::size_t tokens) const noexcept {
        const sequence_pages& own = q.pages[open_keys_of(layer).group];
        const std::size_t length = q.length(layer);
        const auto block_of = [&](std::size_t page) {
            const auto place = own.table.find(page);
            return place ? own.table.blocks()[*place] : 0;
        };
        return {block_of(length / page_tokens()),
                own.spare != no_block ? own.spare : block_of((length + tokens) / page_tokens())};
    }

    // ---- sequences

    result<std::uint32_t> new_slot() noexcept {
        const std::optional<std::uint32_t> slot = sequences.reserve();
        if (!slot)
            return no_memory();
        if (!sequences.object(*slot).prepare(groups().size(), layers())) {
            sequences.cancel(*slot);
            return no_memory();
        }
        return *slot;
    }

    [[nodiscard]] status agreed(const sequence_state& q) const noexcept {
        const std::size_t longest = q.longest(layers());
        for (std::size_t i = 0; i < layers(); ++i)
            if (q.length(i) != longest)
                return placed({errc::layers_disagree, "the layer holds fewer tokens than another"}, i);
        return {};
    }

    static void note_dropped(sequence_state& q, std::size_t group) noexcept {
        q.pages[group].dropped.store(q.pages[group].table.dropped(), std::memory_order_relaxed);
    }

    // Counts, for statistics, the pages of each group that are kept though the next query after the last
    // commit no longer sees them: with a window of 128, 1000 committed tokens and 64 a page, those of pages
    // 0-12.
    void note_retained(sequence_state& q) noexcept {
        for (std::size_t g = 0; g < groups().size(); ++g) {
            const std::size_t window = groups()[g].window, n = q.committed.value_or(0);
            const std::size_t behind = window != 0 && n + 1 > window ? (n + 1 - window) / page_tokens() : 0;
            q.pages[g].retained.store(q.pages[g].table.kept_before(behind, 1), std::memory_order_relaxed);
        }
    }

    // Cuts the table of a block group to its first `pages` pages.
    void cut(sequence_state& q, std::size_t group, std::size_t pages) noexcept {
        q.pages[group].table.truncate(pages, [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
        q.pages[group].window_from = (std::min)(q.pages[group].window_from, pages * page_tokens());
    }

    // Frees pages first ... last - 1 of a block group. Precondition: the table has room for a hole.
    void drop(sequence_state& q, std::size_t group, std::size_t first, std::size_t last) noexcept {
        block_table& table = q.pages[group].table;
        if (first >= last || (table.find(first) == std::nullopt && table.hole_at(first)->last >= last))
            return;
        table.drop(static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last),
                   [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
    }

    // Frees the blocks of open keys that are no longer needed: a page needs its block while it is open in
    // some layer, or while the last commit lies in it. Precondition: the table has room for trim_needs()
    // holes.
    void trim_open_keys(sequence_state& q, std::size_t group) noexcept {
        const auto needed = [&](std::size_t page) {
            const auto is_open = [&](std::size_t length) {
                return length / page_tokens() == page && length % page_tokens() != 0;
            };
            if (is_open(q.committed.value_or(0)))
                return true;
            for (const plane& p : storage.planes())
                if (p.group == group && is_open(q.length(p.layer)))
                    return true;
            return false;
        };
        const block_table& table = q.pages[group].table;
        for (std::size_t page = table.next_kept(0); page < table.pages(); page = table.next_kept(page + 1))
            if (!needed(page))
                drop(q, group, page, page + 1);
    }
    [[nodiscard]] static std::size_t trim_needs(const block_table& table) noexcept {
        return table.blocks().size() + 1;
    }

    // Lengthens a table to `pages` pages with a hole. Precondition: room for a hole.
    static void extend(block_table& table, std::size_t pages) noexcept {
        if (table.pages() < pages)
            table.append_hole(static_cast<std::uint32_t>(pages - table.pages()));
    }

    // Takes as many blocks as the span has elements and clears them. If the pool has too few, the prefix
    // index evicts pages. Takes none on failure: false.
    [[nodiscard]] bool take(std::size_t group, std::span<std::uint32_t> blocks) noexcept {
        while (!pool(group).allocate(blocks)) {
            const std::size_t there = pool(group).available();
            if (blocks.size() > pool(group).capacity() ||
                index.evict(blocks.size() > there ? blocks.size() - there : 1) == 0)
                return false;
        }
        for (const std::uint32_t block : blocks)
            storage.clear_block(group, block);
        return true;
    }
};

} // namespace kv1::inline KV1_ABI::detail
