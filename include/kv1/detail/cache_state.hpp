// SPDX-License-Identifier: Apache-2.0
//
// Sequences and their pages: everything a cache does but storing and reading numbers. A call that fails
// leaves the state as it was; basic_kv_cache says which calls may run at once.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_storage.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/detail/slot_table.hpp>
#include <kv1/page_pool.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

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

inline constexpr std::size_t most_tokens = std::size_t{1} << 35; // page numbers fit 32 bits

// Locks do not move, so a cache keeps this behind a pointer.
template <class Allocator>
class cache_state {
public:
    explicit cache_state(const Allocator& a) : allocator(a) {}

    Allocator allocator;
    cache_storage<Allocator> storage;
    slot_table<sequence_state> sequences;
    prefix_index index;

    template <class Formats>
    status initialize(cache_description&& d) noexcept {
        if (const status s = storage.template initialize<Formats>(std::move(d), allocator); !s)
            return s;
        buffer<page_pool*> pools;
        for (page_group& g : storage.groups())
            if (!pools.try_push_back(&g.pool))
                return no_memory();
        return index.initialize(page_tokens(), pools.view(), storage.description().prefix_events);
    }

    [[nodiscard]] const sequence_state* find(sequence_id id) const noexcept { return sequences.find(id); }
    [[nodiscard]] sequence_state* find(sequence_id id) noexcept { return sequences.find(id); }
    [[nodiscard]] std::size_t layers() const noexcept { return storage.layers().size(); }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return storage.page_tokens(); }
    [[nodiscard]] const std::vector<page_group>& groups() const noexcept { return storage.groups(); }
    [[nodiscard]] page_pool& pool(std::size_t group) noexcept { return storage.groups()[group].pool; }
    [[nodiscard]] const page_pool& pool(std::size_t group) const noexcept {
        return storage.groups()[group].pool;
    }
    [[nodiscard]] const layer_planes& planes_of(std::size_t layer) const noexcept {
        return storage.layers()[layer];
    }
    [[nodiscard]] const plane<Allocator>& body_of(std::size_t layer) const noexcept {
        return storage.planes()[planes_of(layer).body];
    }
    [[nodiscard]] const plane<Allocator>& copy_of(std::size_t layer) const noexcept {
        return storage.planes()[planes_of(layer).copy];
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

    // Cuts a group's table to its first pages.
    void cut(sequence_state& q, std::size_t group, std::size_t pages) noexcept {
        q.pages[group].table.truncate(pages, [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
        q.pages[group].window_from = std::min(q.pages[group].window_from, pages * page_tokens());
    }

    // Frees pages first ... last - 1. Precondition: room for a hole.
    void drop(sequence_state& q, std::size_t group, std::size_t first, std::size_t last) noexcept {
        block_table& table = q.pages[group].table;
        if (first >= last || (table.find(first) == std::nullopt && table.hole_at(first)->last >= last))
            return;
        table.drop(static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last),
                   [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
    }

    // Cuts every layer to its first `tokens`.
    status truncate(sequence_state& q, std::size_t tokens) noexcept {
        for (std::size_t i = 0; i < layers(); ++i)
            if (q.length(i) < tokens)
                return placed({errc::out_of_range, "the layer holds fewer tokens"}, i);
        const std::size_t page = tokens / page_tokens();
        const std::size_t pages = page + (tokens % page_tokens() != 0 ? 1 : 0);
        for (std::size_t i = 0; i < layers(); ++i) {
            const plane<Allocator>& body = body_of(i);
            const sequence_pages& own = q.pages[body.group];
            if (tokens % page_tokens() != 0 && !own.table.find(page))
                return placed({errc::dropped_tokens, "the cut lies within a dropped page"}, i);
            const std::size_t window = groups()[body.group].window;
            const std::size_t first =
                tokens + 1 > window ? tokens + 1 - window : 0; // that the next query sees
            if (window != 0 && std::min(tokens, own.window_from) > first)
                return placed({errc::dropped_tokens, "the window has given up tokens before the cut"}, i);
        }
        std::size_t copies = groups().size() - 1;
        if (!groups()[copies].fp16_copies)
            copies = groups().size();
        std::uint32_t open = prefix_index::no_block; // a page for tokens whose copies are gone
        if (copies != groups().size() && tokens % page_tokens() != 0 && !q.pages[copies].table.find(page)) {
            if (!q.pages[copies].table.reserve(1))
                return no_memory();
            if (!take(copies, {&open, 1}))
                return exhausted();
        }
        for (std::size_t g = 0; g < groups().size(); ++g)
            cut(q, g, g == copies && open != prefix_index::no_block ? page : pages);
        if (open != prefix_index::no_block)
            q.pages[copies].table.push_back(open);
        for (std::size_t i = 0; i < layers(); ++i)
            q.set_length(i, tokens);
        q.committed = std::min(q.committed, tokens);
        q.fp16_from = std::min(q.fp16_from, tokens);
        return {};
    }

    // Gives the fp16 copies of a sequence that has only its sinks' the pages that its length asks for.
    // Preconditions: room for a block and a hole; pages beyond the sinks' are absent.
    status pad_copies(sequence_state& q, std::size_t group, std::size_t tokens) noexcept {
        block_table& table = q.pages[group].table;
        const std::size_t have = table.pages(), full = tokens / page_tokens();
        const bool open = tokens % page_tokens() != 0 && have <= full;
        std::uint32_t block = 0;
        if (open && !take(group, {&block, 1}))
            return exhausted();
        if (have < full)
            table.append_hole(static_cast<std::uint32_t>(full - have));
        if (open)
            table.push_back(block);
        note_dropped(q, group);
        return {};
    }

    // A sequence that shares every page with q.
    [[nodiscard]] result<sequence_id> fork(const sequence_state& q) noexcept {
        const result<std::uint32_t> slot = new_slot();
        if (!slot)
            return slot.reason();
        sequence_state& twin = sequences.object(*slot);
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!twin.pages[g].table.assign(q.pages[g].table)) {
                for (std::size_t other = 0; other < g; ++other)
                    twin.pages[other].table.clear();
                sequences.cancel(*slot);
                return no_memory();
            }
        for (std::size_t g = 0; g < groups().size(); ++g) {
            for (const std::uint32_t block : twin.pages[g].table.blocks())
                pool(g).retain(block);
            twin.pages[g].window_from = q.pages[g].window_from;
            note_dropped(twin, g);
        }
        for (std::size_t i = 0; i < layers(); ++i)
            twin.set_length(i, q.length(i));
        twin.committed = q.committed;
        twin.fp16_from = q.fp16_from;
        return sequences.publish(*slot);
    }

    status drop_pages(sequence_state& q, std::size_t first_page, std::size_t pages) noexcept {
        const std::size_t full = q.shortest(layers()) / page_tokens();
        if (first_page > full || pages > full - first_page)
            return {errc::out_of_range, "only pages that are full in every layer can be dropped"};
        if (pages == 0)
            return {};
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q.pages[g].table.reserve_hole())
                return no_memory();
        for (std::size_t g = 0; g < groups().size(); ++g)
            drop(q, g, first_page, first_page + pages);
        return {};
    }

    // Precondition: all layers agree.
    result<std::size_t> commit(sequence_state& q) noexcept {
        const std::size_t n = q.length(0);
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q.pages[g].table.reserve_hole())
                return no_memory();
        q.committed = n;
        for (std::size_t g = 0; g < groups().size(); ++g) {
            const std::size_t window =
                groups()[g].fp16_copies ? storage.description().fp16_window : groups()[g].window;
            const std::size_t from = window == 0      ? n
                                     : n + 1 > window ? n + 1 - window
                                                      : 0; // of the next query
            if (groups()[g].fp16_copies) {
                const std::size_t sinks =
                    (storage.description().fp16_sinks + page_tokens() - 1) / page_tokens();
                drop(q, g, sinks, from / page_tokens());
                q.fp16_from = std::max(q.fp16_from, from);
            } else if (window != 0) {
                drop(q, g, 0, from / page_tokens());
                q.pages[g].window_from =
                    std::max(q.pages[g].window_from, from / page_tokens() * page_tokens());
            }
        }
        return n;
    }

    // Precondition: all layers agree, on as many tokens at least.
    result<std::size_t> store_prefix(const sequence_state& q, std::span<const token_id> tokens,
                                     prefix_salt salt, bool partial) noexcept {
        std::size_t usable = tokens.size();
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!groups()[g].fp16_copies)
                if (const auto holes = q.pages[g].table.holes(); !holes.empty())
                    usable = std::min(usable, holes[0].first * page_tokens());
        const std::size_t sinks = storage.description().fp16_sinks;
        return index.insert(salt, tokens.first(usable), partial,
                            [&](std::size_t page, std::size_t g) -> std::uint32_t {
                                const block_table& table = q.pages[g].table;
                                if (groups()[g].fp16_copies && page * page_tokens() >= sinks)
                                    return prefix_index::no_block;
                                return table.blocks()[*table.find(page)];
                            });
    }

    [[nodiscard]] result<prefix_match> create_from_prefix(std::span<const token_id> tokens,
                                                          prefix_salt salt) noexcept {
        const result<std::uint32_t> slot = new_slot();
        if (!slot)
            return slot.reason();
        sequence_state& q = sequences.object(*slot);
        const std::size_t pages = (tokens.size() + page_tokens() - 1) / page_tokens();
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q.pages[g].table.reserve(pages + 1) || !q.pages[g].table.reserve_hole()) {
                sequences.cancel(*slot);
                return no_memory();
            }
        const std::size_t matched =
            index.match(salt, tokens, [&](std::size_t, std::span<const std::uint32_t> blocks) {
                for (std::size_t g = 0; g < blocks.size(); ++g)
                    if (blocks[g] != prefix_index::no_block)
                        q.pages[g].table.push_back(blocks[g]);
            });
        for (std::size_t i = 0; i < layers(); ++i)
            q.set_length(i, matched);
        q.committed = q.fp16_from = matched;
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (groups()[g].fp16_copies)
                if (const status s = pad_copies(q, g, matched); !s) {
                    for (std::size_t other = 0; other < groups().size(); ++other)
                        cut(q, other, 0);
                    sequences.cancel(*slot);
                    return s;
                }
        return prefix_match{sequences.publish(*slot), matched};
    }

    // ---- pages of an append

    // Blocks, cleared; where the pool is empty the prefix index gives some up. All or none.
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

    // Makes the pages of tokens length ... length + tokens - 1 the sequence's own; all or none. close_pages()
    // ends what this begins.
    status open_pages(sequence_state& q, std::size_t group, std::size_t length, std::size_t tokens) noexcept {
        sequence_pages& own = q.pages[group];
        block_table& table = own.table;
        own.pages_before = table.pages();
        own.replaced.clear();
        own.fresh.clear();
        if (tokens > pool(group).capacity() * page_tokens() || length > most_tokens - tokens)
            return exhausted();
        const std::size_t first = length / page_tokens();
        const std::size_t end = (length + tokens + page_tokens() - 1) / page_tokens();
        const std::size_t more = end > own.pages_before ? end - own.pages_before : 0;
        std::size_t shared = 0;
        for (std::size_t p = first; p < std::min(end, own.pages_before); ++p)
            if (const auto place = table.find(p);
                place && pool(group).references(table.blocks()[*place]) != 1)
                ++shared;
        if (more + shared == 0)
            return {};
        if (!table.reserve(more) || !own.replaced.reserve(shared) || !own.fresh.resize(more + shared))
            return no_memory();
        if (!take(group, {own.fresh.data(), own.fresh.size()}))
            return exhausted();
        std::size_t used = 0; // of the fresh blocks, in order: consecutive pages lie side by side
        for (std::size_t p = first; p < std::min(end, own.pages_before); ++p) {
            const auto place = table.find(p);
            if (!place || used == shared)
                continue;
            const std::uint32_t before = table.blocks()[*place];
            if (pool(group).references(before) == 1) // others may have let go of it meanwhile
                continue;
            const std::uint32_t mine = own.fresh[used++];
            storage.copy_block(group, before, mine);
            own.replaced.push_back({*place, before});
            table.replace(*place, mine);
        }
        for (std::size_t i = 0; i < more; ++i)
            table.push_back(own.fresh[used++]);
        for (; used < own.fresh.size(); ++used) // pages that were shared a moment ago
            pool(group).release(own.fresh[used]);
        return {};
    }

    void close_pages(sequence_state& q, std::size_t group, bool keep) noexcept {
        sequence_pages& own = q.pages[group];
        for (const replaced_block& r : own.replaced) {
            if (keep) {
                pool(group).release(r.before);
            } else {
                pool(group).release(own.table.blocks()[r.place]);
                own.table.replace(r.place, r.before);
            }
        }
        own.replaced.clear();
        if (!keep)
            cut(q, group, own.pages_before);
    }

    status open_layer(sequence_state& q, std::size_t layer, std::size_t tokens) noexcept {
        const std::size_t length = q.length(layer), body = body_of(layer).group;
        if (const status s = open_pages(q, body, length, tokens); !s)
            return s;
        if (planes_of(layer).copy == no_plane)
            return {};
        const status s = open_pages(q, copy_of(layer).group, length, tokens);
        if (!s)
            close_pages(q, body, false);
        return s;
    }
    void close_layer(sequence_state& q, std::size_t layer, bool keep) noexcept {
        close_pages(q, body_of(layer).group, keep);
        if (planes_of(layer).copy != no_plane)
            close_pages(q, copy_of(layer).group, keep);
    }

    // ---- statistics and invariants

    [[nodiscard]] cache_statistics statistics() const noexcept {
        cache_statistics s = empty_statistics();
        sequences.for_each([&](sequence_id, const sequence_state& q) { add_tokens(s, q); });
        for (const page_group& g : groups()) {
            s.pages_in_use += g.pool.in_use();
            s.bytes_in_use += g.pool.in_use() * g.block_bytes;
            s.bytes_shared += g.pool.shared() * g.block_bytes;
            if (g.fp16_copies)
                s.bytes_fp16_copies += g.pool.in_use() * g.block_bytes;
        }
        s.pages_indexed = index.pages();
        return s;
    }
    [[nodiscard]] cache_statistics statistics(const sequence_state& q) const noexcept {
        cache_statistics s = empty_statistics();
        add_tokens(s, q);
        for (std::size_t i = 0; i < groups().size(); ++i) {
            const page_group& g = groups()[i];
            const auto blocks = q.pages[i].table.blocks();
            s.pages_in_use += blocks.size();
            s.bytes_in_use += blocks.size() * g.block_bytes;
            if (g.fp16_copies)
                s.bytes_fp16_copies += blocks.size() * g.block_bytes;
            for (const std::uint32_t block : blocks)
                s.bytes_shared += g.pool.references(block) > 1 ? g.block_bytes : 0;
        }
        return s;
    }
    [[nodiscard]] std::size_t available_pages() const noexcept {
        std::size_t least = std::numeric_limits<std::size_t>::max();
        for (const page_group& g : groups())
            least = std::min(least, g.pool.available());
        return least;
    }

    [[nodiscard]] status validate() const noexcept {
        const auto broken = [](const char* rule) { return status{errc::broken_invariant, rule}; };
        if (!index.valid())
            return broken("the prefix index contradicts itself");
        for (std::size_t g = 0; g < groups().size(); ++g) {
            if (!pool(g).valid())
                return broken("a page pool contradicts itself");
            buffer<std::uint32_t> counts;
            if (!counts.resize(pool(g).capacity()))
                return no_memory();
            status s;
            sequences.for_each([&](sequence_id, const sequence_state& q) {
                const sequence_pages& p = q.pages[g];
                for (const std::uint32_t block : p.table.blocks())
                    if (block < counts.size())
                        ++counts[block];
                std::size_t longest = 0;
                for (const plane<Allocator>& each : storage.planes())
                    if (each.group == g)
                        longest = std::max(longest, q.length(each.layer));
                if (!p.table.valid() || p.dropped.load(std::memory_order_relaxed) != p.table.dropped())
                    s = broken("a block table contradicts itself");
                if (p.table.pages() != (longest + page_tokens() - 1) / page_tokens())
                    s = broken("a sequence has another number of pages than its tokens need");
                if (longest % page_tokens() != 0 && !p.table.find(longest / page_tokens()))
                    s = broken("an open page is dropped");
                if (q.committed > q.shortest(layers()) || q.appending)
                    s = broken("a sequence is shorter than what is committed");
            });
            if (!s)
                return s;
            index.for_each_block([&](std::size_t group, std::uint32_t block) {
                if (group == g && block < counts.size())
                    ++counts[block];
            });
            for (std::uint32_t block = 0; block < counts.size(); ++block)
                if (counts[block] != pool(g).references(block))
                    return broken("a page's reference count is not the number of its users");
        }
        return {};
    }

private:
    [[nodiscard]] cache_statistics empty_statistics() const noexcept {
        cache_statistics s;
        s.layers = layers();
        for (const page_group& g : groups()) {
            s.pages_total += g.pool.capacity();
            s.bytes_reserved += g.pool.capacity() * g.block_bytes;
        }
        return s;
    }

    void add_tokens(cache_statistics& s, const sequence_state& q) const noexcept {
        ++s.sequences;
        s.tokens += q.longest(layers());
        for (std::size_t i = 0; i < layers(); ++i) {
            const layer_description& d = planes_of(i).shape;
            const plane<Allocator>& body = body_of(i);
            const std::size_t gone =
                q.pages[body.group].dropped.load(std::memory_order_relaxed) * page_tokens();
            const std::size_t length = q.length(i), held = length > gone ? length - gone : 0;
            s.bytes_stored += held * d.kv_heads *
                              (row_bytes(d.key_format, d.key_dim, d.key_group) +
                               row_bytes(d.value_format, d.value_dim, d.value_group));
            s.bytes_as_fp16 += held * d.kv_heads * 2 * (d.key_dim + d.value_dim);
            const std::size_t open = length % page_tokens();
            s.bytes_unfilled += open == 0 ? 0 : (page_tokens() - open) * body.block_bytes / page_tokens();
        }
    }
};

} // namespace kv1::inline KV1_ABI::detail
