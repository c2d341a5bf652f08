// SPDX-License-Identifier: Apache-2.0
//
// The pages of an append, which has three steps. begin_append() makes the pages of the new tokens the sequence's own:
// it takes new blocks, and copies the blocks that others share. sequence_append (cache_append.hpp) writes the
// vectors. end_append() keeps the tokens, or undoes the first step.
#pragma once

#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

class append_pages {
public:
    explicit append_pages(cache_state& cache) noexcept : cache_(cache) {}

    // Makes room for new tokens in all planes of a layer. Changes nothing on failure. end_append() ends what
    // this begins. Errors: capacity_exceeded, out_of_memory.
    status begin_append(sequence_state& q, std::size_t layer, std::size_t tokens) noexcept {
        const std::size_t length = q.length(layer), body = cache_.body_of(layer).group;
        const layer_planes& planes = cache_.planes_of(layer);
        if (const status s = begin_pages(q, body, length, tokens); !s)
            return s;
        status s;
        if (planes.copy != no_plane) {
            s = begin_pages(q, cache_.copy_of(layer).group, length, tokens);
            if (!s) {
                end_pages(q, body, false);
                return s;
            }
        }
        if (planes.open != no_plane) {
            s = begin_open_keys(q, cache_.open_keys_of(layer).group, length, tokens);
            if (!s) {
                end_pages(q, body, false);
                if (planes.copy != no_plane)
                    end_pages(q, cache_.copy_of(layer).group, false);
            }
        }
        return s;
    }
    // Ends an append. keep: the tokens are the layer's. Else the sequence is as it was before begin_append().
    void end_append(sequence_state& q, std::size_t layer, std::size_t tokens, bool keep) noexcept {
        const layer_planes& planes = cache_.planes_of(layer);
        end_pages(q, cache_.body_of(layer).group, keep);
        if (planes.copy != no_plane)
            end_pages(q, cache_.copy_of(layer).group, keep);
        if (planes.open != no_plane)
            end_open_keys(q, cache_.open_keys_of(layer).group, keep);
        if (!keep)
            return;
        q.set_length(layer, q.length(layer) + tokens);
        if (planes.open != no_plane)
            cache_.trim_open_keys(q, cache_.open_keys_of(layer).group);
    }

private:
    // Makes the pages of tokens length ... length + tokens - 1 the sequence's own: new blocks for new pages,
    // copies of shared ones. Changes nothing on failure. end_pages() ends what this begins.
    status begin_pages(sequence_state& q, std::size_t group, std::size_t length,
                       std::size_t tokens) noexcept {
        sequence_pages& own = q.pages[group];
        block_table& table = own.table;
        own.pages_before = table.pages();
        own.replaced.clear();
        own.fresh.clear();
        if (tokens > cache_.pool(group).capacity() * cache_.page_tokens() ||
            length > max_sequence_tokens - tokens)
            return exhausted();
        const std::size_t first = length / cache_.page_tokens();
        const std::size_t end = (length + tokens + cache_.page_tokens() - 1) / cache_.page_tokens();
        const std::size_t more = end > own.pages_before ? end - own.pages_before : 0;
        std::size_t shared = 0;
        for (std::size_t p = first; p < (std::min)(end, own.pages_before); ++p)
            if (const auto place = table.find(p);
                place && cache_.pool(group).references(table.blocks()[*place]) != 1)
                ++shared;
        if (more + shared == 0)
            return {};
        if (!table.reserve(more) || !own.replaced.reserve(shared) || !own.fresh.resize(more + shared))
            return no_memory();
        if (!cache_.take(group, {own.fresh.data(), own.fresh.size()}))
            return exhausted();
        std::size_t used = 0; // of the fresh blocks, in order, so that consecutive pages lie side by side
        for (std::size_t p = first; p < (std::min)(end, own.pages_before); ++p) {
            const auto place = table.find(p);
            if (!place || used == shared)
                continue;
            const std::uint32_t before = table.blocks()[*place];
            if (cache_.pool(group).references(before) == 1) // others have released it meanwhile
                continue;
            const std::uint32_t mine = own.fresh[used++];
            cache_.storage.copy_block(group, before, mine);
            own.replaced.push_back({*place, before});
            table.replace(*place, mine);
        }
        for (std::size_t i = 0; i < more; ++i)
            table.push_back(own.fresh[used++]);
        for (; used < own.fresh.size(); ++used) // meant for pages that are no longer shared
            cache_.pool(group).release(own.fresh[used]);
        return {};
    }

    // Ends begin_pages(). keep: the sequence keeps the pages, and what they replaced is released. Else its
    // table is as before.
    void end_pages(sequence_state& q, std::size_t group, bool keep) noexcept {
        sequence_pages& own = q.pages[group];
        for (const replaced_block& r : own.replaced) {
            if (keep) {
                cache_.pool(group).release(r.before);
            } else {
                cache_.pool(group).release(own.table.blocks()[r.place]);
                own.table.replace(r.place, r.before);
            }
        }
        own.replaced.clear();
        if (!keep)
            cache_.cut(q, group, own.pages_before);
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
        const std::size_t first = length / cache_.page_tokens(),
                          last = (length + tokens) / cache_.page_tokens();
        const bool begun = length % cache_.page_tokens() != 0,
                   stays_open = (length + tokens) % cache_.page_tokens() != 0;
        const auto shared = [&](std::size_t page) {
            const auto place = table.find(page);
            return place && cache_.pool(group).references(table.blocks()[*place]) != 1;
        };
        const bool opens = stays_open && !(begun && first == last);
        const bool copies_first = begun && shared(first), copies_last = opens && shared(last);
        const bool adds_last = opens && !table.find(last);
        const bool spare = !stays_open && last > first + (begun ? 1 : 0);
        const std::size_t wanted = std::size_t{copies_first} + std::size_t{copies_last} +
                                   std::size_t{adds_last} + std::size_t{spare};
        if (!table.reserve(1) || !table.reserve_holes(cache_.trim_needs(table) + 2) ||
            !own.replaced.reserve(2) || !own.fresh.resize(wanted))
            return no_memory();
        if (wanted != 0 && !cache_.take(group, {own.fresh.data(), wanted}))
            return exhausted();
        std::size_t used = 0;
        for (const auto& [copied, page] : {std::pair(copies_first, first), std::pair(copies_last, last)})
            if (copied) {
                const std::size_t place = *table.find(page);
                const std::uint32_t before = table.blocks()[place], mine = own.fresh[used++];
                cache_.storage.copy_block(group, before, mine);
                own.replaced.push_back({place, before});
                table.replace(place, mine);
            }
        if (adds_last && last < table.pages()) { // another layer holds more tokens, and this page is a hole
            own.filled = last;
            table.fill(static_cast<std::uint32_t>(last), own.fresh[used++]);
        } else if (adds_last) {
            cache_.extend(table, last);
            table.push_back(own.fresh[used++]);
        } else {
            cache_.extend(table, last);
        }
        if (spare)
            own.spare = own.fresh[used++];
        cache_.note_dropped(q, group);
        return {};
    }

    // Ends begin_open_keys().
    void end_open_keys(sequence_state& q, std::size_t group, bool keep) noexcept {
        sequence_pages& own = q.pages[group];
        if (own.spare != no_block)
            cache_.pool(group).release(own.spare);
        if (!keep && own.filled != no_page)
            cache_.drop(q, group, own.filled, own.filled + 1);
        end_pages(q, group, keep);
    }

    cache_state& cache_;
};

} // namespace kv1::inline KV1_ABI::detail
