// SPDX-License-Identifier: Apache-2.0
//
// What is done to a sequence as a whole: fork, truncate, drop, commit. A call that fails leaves the sequence as it
// was.
#pragma once

#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

class sequence_edits {
public:
    explicit sequence_edits(cache_state& cache) noexcept : cache_(cache) {}

    // Makes a sequence that shares every page with q.
    [[nodiscard]] result<sequence_id> fork(const sequence_state& q) noexcept {
        const result<std::uint32_t> slot = cache_.new_slot();
        if (!slot)
            return slot.reason();
        sequence_state& twin = cache_.sequences.object(*slot);
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (!twin.pages[g].table.assign(q.pages[g].table)) {
                for (std::size_t other = 0; other < g; ++other)
                    twin.pages[other].table.clear();
                cache_.sequences.cancel(*slot);
                return no_memory();
            }
        for (std::size_t g = 0; g < cache_.groups().size(); ++g) {
            for (const std::uint32_t block : twin.pages[g].table.blocks())
                cache_.pool(g).retain(block);
            twin.pages[g].window_from = q.pages[g].window_from;
            cache_.note_dropped(twin, g);
        }
        for (std::size_t i = 0; i < cache_.layers(); ++i)
            twin.set_length(i, q.length(i));
        twin.committed = q.committed;
        twin.fp16_from = q.fp16_from;
        cache_.note_retained(twin);
        return cache_.sequences.publish(*slot);
    }

    // Cuts every layer to its first `tokens` tokens.
    status truncate(sequence_state& q, std::size_t tokens) noexcept {
        for (std::size_t i = 0; i < cache_.layers(); ++i)
            if (q.length(i) < tokens)
                return placed({errc::out_of_range, "the layer holds fewer tokens"}, i);
        const std::size_t page = tokens / cache_.page_tokens();
        const std::size_t pages = page + (tokens % cache_.page_tokens() != 0 ? 1 : 0);
        for (std::size_t i = 0; i < cache_.layers(); ++i) {
            const plane& body = cache_.body_of(i);
            const sequence_pages& own = q.pages[body.group];
            if (tokens % cache_.page_tokens() != 0 && !own.table.find(page))
                return placed({errc::dropped_tokens, "the cut lies within a dropped page"}, i);
            const std::size_t window = cache_.groups()[body.group].window;
            const std::size_t first =
                tokens + 1 > window ? tokens + 1 - window : 0; // that the next query sees
            if (window != 0 && (std::min)(tokens, own.window_from) > first)
                return placed({errc::dropped_tokens, "the window has given up tokens before the cut"}, i);
            if (tokens % cache_.page_tokens() != 0 && !keeps_open_keys(q, i, page))
                return placed({errc::dropped_tokens, "the cut lies within a page whose keys are codes"}, i);
        }
        const std::size_t copies = cache_.group_of(plane_kind::fp16_copy);
        std::uint32_t open = prefix_tree::no_block; // new fp16 page, if the cut lies in one that was freed
        if (copies != cache_.groups().size() && tokens % cache_.page_tokens() != 0 &&
            !q.pages[copies].table.find(page)) {
            if (!q.pages[copies].table.reserve(1))
                return no_memory();
            if (!cache_.take(copies, {&open, 1}))
                return exhausted();
        }
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            cache_.cut(q, g, g == copies && open != prefix_tree::no_block ? page : pages);
        if (open != prefix_tree::no_block)
            q.pages[copies].table.push_back(open);
        for (std::size_t i = 0; i < cache_.layers(); ++i)
            q.set_length(i, tokens);
        if (q.committed)
            q.committed = (std::min)(*q.committed, tokens);
        q.fp16_from = (std::min)(q.fp16_from, tokens);
        cache_.note_retained(q);
        return {};
    }

    // Frees whole pages in the middle.
    status drop_pages(sequence_state& q, std::size_t first_page, std::size_t pages) noexcept {
        const std::size_t full = q.shortest(cache_.layers()) / cache_.page_tokens();
        if (first_page > full || pages > full - first_page)
            return {errc::out_of_range, "only pages that are full in every layer can be dropped"};
        if (pages == 0)
            return {};
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (!q.pages[g].table.reserve_hole())
                return no_memory();
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            cache_.drop(q, g, first_page, first_page + pages);
        cache_.note_retained(q);
        return {};
    }

    // Marks the length that rollback() returns to, and frees what windows have passed. Gives the length.
    // Precondition: all layers hold the same number of tokens.
    result<std::size_t> commit(sequence_state& q) noexcept {
        const std::size_t n = q.length(0);
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (!q.pages[g].table.reserve_holes(cache_.trim_needs(q.pages[g].table)))
                return no_memory();
        q.committed = n;
        for (std::size_t g = 0; g < cache_.groups().size(); ++g) {
            if (cache_.groups()[g].kind == plane_kind::open_keys) {
                cache_.trim_open_keys(q, g);
                continue;
            }
            const bool copies = cache_.groups()[g].kind == plane_kind::fp16_copy;
            const std::size_t window = copies ? cache_.storage.description().fp16_window
                                              : cache_.groups()[g].window + cache_.groups()[g].retention;
            const std::size_t from = window == 0      ? n
                                     : n + 1 > window ? n + 1 - window
                                                      : 0; // of the next query
            if (copies) {
                const std::size_t sinks =
                    (cache_.storage.description().fp16_sinks + cache_.page_tokens() - 1) /
                    cache_.page_tokens();
                cache_.drop(q, g, sinks, from / cache_.page_tokens());
                q.fp16_from = (std::max)(q.fp16_from, from);
            } else if (window != 0) {
                cache_.drop(q, g, 0, from / cache_.page_tokens());
                q.pages[g].window_from =
                    (std::max)(q.pages[g].window_from, from / cache_.page_tokens() * cache_.page_tokens());
            }
        }
        cache_.note_retained(q);
        return n;
    }

private:
    // Whether a cut may lie within this page of the layer. With keys per token any page will do. With keys
    // per channel a full page holds codes only, which depend on all of its tokens. Then the page must still
    // have its fp16 keys. It has them while it is open, and as long as the last commit lies in it: with 64
    // tokens a page, 130 committed and 200 held, pages 2 (the commit) and 3 (open) have theirs.
    [[nodiscard]] bool keeps_open_keys(const sequence_state& q, std::size_t layer,
                                       std::size_t page) const noexcept {
        const auto within = [&](std::size_t tokens) {
            return tokens % cache_.page_tokens() != 0 && tokens / cache_.page_tokens() == page;
        };
        return cache_.planes_of(layer).open == no_plane ||
               ((within(q.length(layer)) || within(q.committed.value_or(0))) &&
                q.pages[cache_.open_keys_of(layer).group].table.find(page));
    }

    cache_state& cache_;
};

} // namespace kv1::inline KV1_ABI::detail
