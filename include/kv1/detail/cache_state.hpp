// SPDX-License-Identifier: Apache-2.0
//
// Sequences and their pages: what a cache does besides storing and reading numbers. A call that fails leaves
// the state as it was. basic_kv_cache says which calls may run at once.
//
// A sequence has one block table for each block group (cache_storage.hpp): bodies of layers without a window,
// bodies of layers with one, keys of open pages, fp16 copies. All of them count pages alike: with 64 tokens a
// page, page 2 means positions 128-191 in each.
//
// An append has three steps. begin_append() makes the pages of the new tokens the sequence's own: it takes new
// blocks, and copies the blocks that others share. sequence_append writes the vectors. end_append() keeps
// the tokens, or undoes the first step.
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
#include <kv1/prefix_index.hpp>
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
    prefix_index index;
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

    // Cuts every layer to its first `tokens` tokens.
    status truncate(sequence_state& q, std::size_t tokens) noexcept {
        for (std::size_t i = 0; i < layers(); ++i)
            if (q.length(i) < tokens)
                return placed({errc::out_of_range, "the layer holds fewer tokens"}, i);
        const std::size_t page = tokens / page_tokens();
        const std::size_t pages = page + (tokens % page_tokens() != 0 ? 1 : 0);
        for (std::size_t i = 0; i < layers(); ++i) {
            const plane& body = body_of(i);
            const sequence_pages& own = q.pages[body.group];
            if (tokens % page_tokens() != 0 && !own.table.find(page))
                return placed({errc::dropped_tokens, "the cut lies within a dropped page"}, i);
            const std::size_t window = groups()[body.group].window;
            const std::size_t first =
                tokens + 1 > window ? tokens + 1 - window : 0; // that the next query sees
            if (window != 0 && (std::min)(tokens, own.window_from) > first)
                return placed({errc::dropped_tokens, "the window has given up tokens before the cut"}, i);
            if (tokens % page_tokens() != 0 && !keeps_open_keys(q, i, page))
                return placed({errc::dropped_tokens, "the cut lies within a page whose keys are codes"}, i);
        }
        const std::size_t copies = group_of(plane_kind::fp16_copy);
        std::uint32_t open = prefix_index::no_block; // new fp16 page, if the cut lies in one that was freed
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
        if (q.committed)
            q.committed = (std::min)(*q.committed, tokens);
        q.fp16_from = (std::min)(q.fp16_from, tokens);
        note_retained(q);
        return {};
    }

    // Whether a cut may lie within this page of the layer. With keys per token any page will do. With keys
    // per channel a full page holds codes only, which depend on all of its tokens. Then the page must still
    // have its fp16 keys. It has them while it is open, and as long as the last commit lies in it: with 64
    // tokens a page, 130 committed and 200 held, pages 2 (the commit) and 3 (open) have theirs.
    [[nodiscard]] bool keeps_open_keys(const sequence_state& q, std::size_t layer,
                                       std::size_t page) const noexcept {
        const auto within = [&](std::size_t tokens) {
            return tokens % page_tokens() != 0 && tokens / page_tokens() == page;
        };
        return planes_of(layer).open == no_plane ||
               ((within(q.length(layer)) || within(q.committed.value_or(0))) &&
                q.pages[open_keys_of(layer).group].table.find(page));
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

    // Lengthens the table of fp16 copies of a sequence that was made from a prefix to `tokens` tokens. The
    // table holds the sinks' pages alone. Full pages after them become a hole, since their copies are gone;
    // the open page gets an empty block, which the next tokens are appended to. Precondition: room for a
    // block and a hole. Errors: capacity_exceeded.
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

    // Lengthens a table to `pages` pages with a hole. Precondition: room for a hole.
    static void extend(block_table& table, std::size_t pages) noexcept {
        if (table.pages() < pages)
            table.append_hole(static_cast<std::uint32_t>(pages - table.pages()));
    }

    // Makes a sequence that shares every page with q.
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
        note_retained(twin);
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
        note_retained(q);
        return {};
    }

    // Marks the length that rollback() returns to, and frees what windows have passed. Gives the length.
    // Precondition: all layers hold the same number of tokens.
    result<std::size_t> commit(sequence_state& q) noexcept {
        const std::size_t n = q.length(0);
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q.pages[g].table.reserve_holes(trim_needs(q.pages[g].table)))
                return no_memory();
        q.committed = n;
        for (std::size_t g = 0; g < groups().size(); ++g) {
            if (groups()[g].kind == plane_kind::open_keys) {
                trim_open_keys(q, g);
                continue;
            }
            const bool copies = groups()[g].kind == plane_kind::fp16_copy;
            const std::size_t window =
                copies ? storage.description().fp16_window : groups()[g].window + groups()[g].retention;
            const std::size_t from = window == 0      ? n
                                     : n + 1 > window ? n + 1 - window
                                                      : 0; // of the next query
            if (copies) {
                const std::size_t sinks =
                    (storage.description().fp16_sinks + page_tokens() - 1) / page_tokens();
                drop(q, g, sinks, from / page_tokens());
                q.fp16_from = (std::max)(q.fp16_from, from);
            } else if (window != 0) {
                drop(q, g, 0, from / page_tokens());
                q.pages[g].window_from =
                    (std::max)(q.pages[g].window_from, from / page_tokens() * page_tokens());
            }
        }
        note_retained(q);
        return n;
    }

    // Stores a prompt's pages in the prefix index. Gives the number of tokens that are known now.
    // Precondition: all layers hold the same number of tokens, at least tokens.size().
    result<std::size_t> store_prefix(const sequence_state& q, std::span<const token_id> tokens,
                                     prefix_salt salt, bool partial) noexcept {
        std::size_t usable = tokens.size();
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (groups()[g].kind == plane_kind::body)
                if (const auto holes = q.pages[g].table.holes(); !holes.empty())
                    usable = (std::min)(usable, holes[0].first * page_tokens());
        const std::size_t keys = group_of(plane_kind::open_keys);
        const std::size_t tail = usable % page_tokens() != 0 ? usable / page_tokens() : no_page;
        if (tail != no_page && keys != groups().size() && !q.pages[keys].table.find(tail))
            usable = tail * page_tokens(); // the tail's keys are codes of a page with more tokens
        return index.insert(salt, tokens.first(usable), partial,
                            [&](std::size_t page, std::size_t g) -> std::uint32_t {
                                const block_table& table = q.pages[g].table;
                                const std::size_t own = page == tail ? usable % page_tokens() : page_tokens();
                                if (!prefix_has_page(g, page, own))
                                    return prefix_index::no_block;
                                return table.blocks()[*table.find(page)];
                            });
    }

    // Whether store_prefix() gives a node of the index a page in this block group. The node holds so many
    // tokens of the page: bodies always; fp16 copies only of pages with sinks; open keys only of a page that
    // is not full.
    [[nodiscard]] bool prefix_has_page(std::size_t group, std::size_t page,
                                       std::size_t tokens) const noexcept {
        switch (groups()[group].kind) {
        case plane_kind::body:
            return true;
        case plane_kind::fp16_copy:
            return page * page_tokens() < storage.description().fp16_sinks;
        case plane_kind::open_keys:
            return tokens != page_tokens();
        }
        return false;
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
        std::size_t matched =
            index.match(salt, tokens, [&](std::size_t page, std::span<const std::uint32_t> blocks) {
                for (std::size_t g = 0; g < blocks.size(); ++g) {
                    if (groups()[g].kind == plane_kind::open_keys && page != 0)
                        extend(q.pages[g].table, page); // pages before this one are full: no open keys
                    if (blocks[g] != prefix_index::no_block)
                        q.pages[g].table.push_back(blocks[g]);
                }
            });
        if (const std::size_t g = group_of(plane_kind::open_keys); g != groups().size()) {
            if (matched % page_tokens() != 0 && !q.pages[g].table.find(matched / page_tokens())) {
                matched -= matched % page_tokens(); // codes of a full page cannot be shared in part
                for (std::size_t other = 0; other < groups().size(); ++other)
                    cut(q, other, matched / page_tokens());
            }
            extend(q.pages[g].table, (matched + page_tokens() - 1) / page_tokens());
            note_dropped(q, g);
        }
        for (std::size_t i = 0; i < layers(); ++i)
            q.set_length(i, matched);
        if (matched != 0)
            q.committed = matched;
        q.fp16_from = matched;
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (groups()[g].kind == plane_kind::fp16_copy)
                if (const status s = pad_copies(q, g, matched); !s) {
                    for (std::size_t other = 0; other < groups().size(); ++other)
                        cut(q, other, 0);
                    sequences.cancel(*slot);
                    return s;
                }
        note_retained(q);
        return prefix_match{sequences.publish(*slot), matched};
    }

    // ---- pages of an append

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

    // Makes the pages of tokens length ... length + tokens - 1 the sequence's own: new blocks for new pages,
    // copies of shared ones. Changes nothing on failure. end_pages() ends what this begins.
    status begin_pages(sequence_state& q, std::size_t group, std::size_t length,
                       std::size_t tokens) noexcept {
        sequence_pages& own = q.pages[group];
        block_table& table = own.table;
        own.pages_before = table.pages();
        own.replaced.clear();
        own.fresh.clear();
        if (tokens > pool(group).capacity() * page_tokens() || length > max_sequence_tokens - tokens)
            return exhausted();
        const std::size_t first = length / page_tokens();
        const std::size_t end = (length + tokens + page_tokens() - 1) / page_tokens();
        const std::size_t more = end > own.pages_before ? end - own.pages_before : 0;
        std::size_t shared = 0;
        for (std::size_t p = first; p < (std::min)(end, own.pages_before); ++p)
            if (const auto place = table.find(p);
                place && pool(group).references(table.blocks()[*place]) != 1)
                ++shared;
        if (more + shared == 0)
            return {};
        if (!table.reserve(more) || !own.replaced.reserve(shared) || !own.fresh.resize(more + shared))
            return no_memory();
        if (!take(group, {own.fresh.data(), own.fresh.size()}))
            return exhausted();
        std::size_t used = 0; // of the fresh blocks, in order, so that consecutive pages lie side by side
        for (std::size_t p = first; p < (std::min)(end, own.pages_before); ++p) {
            const auto place = table.find(p);
            if (!place || used == shared)
                continue;
            const std::uint32_t before = table.blocks()[*place];
            if (pool(group).references(before) == 1) // others have released it meanwhile
                continue;
            const std::uint32_t mine = own.fresh[used++];
            storage.copy_block(group, before, mine);
            own.replaced.push_back({*place, before});
            table.replace(*place, mine);
        }
        for (std::size_t i = 0; i < more; ++i)
            table.push_back(own.fresh[used++]);
        for (; used < own.fresh.size(); ++used) // meant for pages that are no longer shared
            pool(group).release(own.fresh[used]);
        return {};
    }

    // Ends begin_pages(). keep: the sequence keeps the pages, and what they replaced is released. Else its
    // table is as before.
    void end_pages(sequence_state& q, std::size_t group, bool keep) noexcept {
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

    // Makes room for the fp16 keys of tokens length ... length + tokens - 1 of a layer with keys per channel:
    //
    //   the page that the first token continues   its block, copied if others share it
    //   the page that is open afterwards          a block; pages that the append begins and fills go through it
    //                                             before, one after the other
    //   no page open afterwards                   a spare block for the pages that the append begins and fills
    //
    // With 64 tokens a page, a length of 100 and 150 new tokens: page 1 continues in its block, pages 2 and 3
    // go through the block of page 3, which stays open with 58 tokens. Changes nothing on failure.
    // end_open_keys() ends what this begins.
    status begin_open_keys(sequence_state& q, std::size_t group, std::size_t length,
                           std::size_t tokens) noexcept {
        sequence_pages& own = q.pages[group];
        block_table& table = own.table;
        own.pages_before = table.pages();
        own.replaced.clear();
        own.fresh.clear();
        own.filled = no_page;
        own.spare = no_block;
        const std::size_t first = length / page_tokens(), last = (length + tokens) / page_tokens();
        const bool begun = length % page_tokens() != 0, stays_open = (length + tokens) % page_tokens() != 0;
        const auto shared = [&](std::size_t page) {
            const auto place = table.find(page);
            return place && pool(group).references(table.blocks()[*place]) != 1;
        };
        const bool opens = stays_open && !(begun && first == last);
        const bool copies_first = begun && shared(first), copies_last = opens && shared(last);
        const bool adds_last = opens && !table.find(last);
        const bool spare = !stays_open && last > first + (begun ? 1 : 0);
        const std::size_t wanted = std::size_t{copies_first} + std::size_t{copies_last} +
                                   std::size_t{adds_last} + std::size_t{spare};
        if (!table.reserve(1) || !table.reserve_holes(trim_needs(table) + 2) || !own.replaced.reserve(2) ||
            !own.fresh.resize(wanted))
            return no_memory();
        if (wanted != 0 && !take(group, {own.fresh.data(), wanted}))
            return exhausted();
        std::size_t used = 0;
        for (const auto& [copied, page] : {std::pair(copies_first, first), std::pair(copies_last, last)})
            if (copied) {
                const std::size_t place = *table.find(page);
                const std::uint32_t before = table.blocks()[place], mine = own.fresh[used++];
                storage.copy_block(group, before, mine);
                own.replaced.push_back({place, before});
                table.replace(place, mine);
            }
        if (adds_last && last < table.pages()) { // another layer holds more tokens, and this page is a hole
            own.filled = last;
            table.fill(static_cast<std::uint32_t>(last), own.fresh[used++]);
        } else if (adds_last) {
            extend(table, last);
            table.push_back(own.fresh[used++]);
        } else {
            extend(table, last);
        }
        if (spare)
            own.spare = own.fresh[used++];
        note_dropped(q, group);
        return {};
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

    // Ends begin_open_keys().
    void end_open_keys(sequence_state& q, std::size_t group, bool keep) noexcept {
        sequence_pages& own = q.pages[group];
        if (own.spare != no_block)
            pool(group).release(own.spare);
        if (!keep && own.filled != no_page)
            drop(q, group, own.filled, own.filled + 1);
        end_pages(q, group, keep);
    }

    // Makes room for new tokens in all planes of a layer. Changes nothing on failure. end_append() ends what
    // this begins. Errors: capacity_exceeded, out_of_memory.
    status begin_append(sequence_state& q, std::size_t layer, std::size_t tokens) noexcept {
        const std::size_t length = q.length(layer), body = body_of(layer).group;
        const layer_planes& planes = planes_of(layer);
        if (const status s = begin_pages(q, body, length, tokens); !s)
            return s;
        status s;
        if (planes.copy != no_plane) {
            s = begin_pages(q, copy_of(layer).group, length, tokens);
            if (!s) {
                end_pages(q, body, false);
                return s;
            }
        }
        if (planes.open != no_plane) {
            s = begin_open_keys(q, open_keys_of(layer).group, length, tokens);
            if (!s) {
                end_pages(q, body, false);
                if (planes.copy != no_plane)
                    end_pages(q, copy_of(layer).group, false);
            }
        }
        return s;
    }
    // Ends an append. keep: the tokens are the layer's. Else the sequence is as it was before begin_append().
    void end_append(sequence_state& q, std::size_t layer, std::size_t tokens, bool keep) noexcept {
        const layer_planes& planes = planes_of(layer);
        end_pages(q, body_of(layer).group, keep);
        if (planes.copy != no_plane)
            end_pages(q, copy_of(layer).group, keep);
        if (planes.open != no_plane)
            end_open_keys(q, open_keys_of(layer).group, keep);
        if (!keep)
            return;
        q.set_length(layer, q.length(layer) + tokens);
        if (planes.open != no_plane)
            trim_open_keys(q, open_keys_of(layer).group);
    }
};

} // namespace kv1::inline KV1_ABI::detail
