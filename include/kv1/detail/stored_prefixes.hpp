// SPDX-License-Identifier: Apache-2.0
//
// Prompts that outlive their sequences: their pages go into the prefix index, and new sequences begin with them.
#pragma once

#include <kv1/cache_views.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/prefix_tree.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

class stored_prefixes {
public:
    explicit stored_prefixes(cache_state& cache) noexcept : cache_(cache) {}

    // Stores a prompt's pages in the prefix index. Gives the number of tokens that are known now.
    // Precondition: all layers hold the same number of tokens, at least tokens.size().
    result<std::size_t> store_prefix(const sequence_state& q, std::span<const token_id> tokens,
                                     prefix_salt salt, bool partial) noexcept {
        std::size_t usable = tokens.size();
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (cache_.groups()[g].kind == plane_kind::body)
                if (const auto holes = q.pages[g].table.holes(); !holes.empty())
                    usable = (std::min)(usable, holes[0].first * cache_.page_tokens());
        const std::size_t keys = cache_.group_of(plane_kind::open_keys);
        const std::size_t tail = usable % cache_.page_tokens() != 0 ? usable / cache_.page_tokens() : no_page;
        if (tail != no_page && keys != cache_.groups().size() && !q.pages[keys].table.find(tail))
            usable = tail * cache_.page_tokens(); // the tail's keys are codes of a page with more tokens
        return cache_.index.insert(
            salt, tokens.first(usable), partial, [&](std::size_t page, std::size_t g) -> std::uint32_t {
                const block_table& table = q.pages[g].table;
                const std::size_t own = page == tail ? usable % cache_.page_tokens() : cache_.page_tokens();
                if (!has_page(g, page, own))
                    return prefix_tree::no_block;
                return table.blocks()[*table.find(page)];
            });
    }

    // Makes a sequence that begins with the longest known beginning of the tokens. Errors: out_of_memory,
    // capacity_exceeded.
    [[nodiscard]] result<prefix_match> create_from_prefix(std::span<const token_id> tokens,
                                                          prefix_salt salt) noexcept {
        const result<std::uint32_t> slot = cache_.new_slot();
        if (!slot)
            return slot.reason();
        sequence_state& q = cache_.sequences.object(*slot);
        const std::size_t pages = (tokens.size() + cache_.page_tokens() - 1) / cache_.page_tokens();
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (!q.pages[g].table.reserve(pages + 1) || !q.pages[g].table.reserve_hole()) {
                cache_.sequences.cancel(*slot);
                return no_memory();
            }
        std::size_t matched =
            cache_.index.match(salt, tokens, [&](std::size_t page, std::span<const std::uint32_t> blocks) {
                for (std::size_t g = 0; g < blocks.size(); ++g) {
                    if (cache_.groups()[g].kind == plane_kind::open_keys && page != 0)
                        cache_.extend(q.pages[g].table, page); // pages before this one are full: no open keys
                    if (blocks[g] != prefix_tree::no_block)
                        q.pages[g].table.push_back(blocks[g]);
                }
            });
        if (const std::size_t g = cache_.group_of(plane_kind::open_keys); g != cache_.groups().size()) {
            if (matched % cache_.page_tokens() != 0 &&
                !q.pages[g].table.find(matched / cache_.page_tokens())) {
                matched -= matched % cache_.page_tokens(); // codes of a full page cannot be shared in part
                for (std::size_t other = 0; other < cache_.groups().size(); ++other)
                    cache_.cut(q, other, matched / cache_.page_tokens());
            }
            cache_.extend(q.pages[g].table, (matched + cache_.page_tokens() - 1) / cache_.page_tokens());
            cache_.note_dropped(q, g);
        }
        for (std::size_t i = 0; i < cache_.layers(); ++i)
            q.set_length(i, matched);
        if (matched != 0)
            q.committed = matched;
        q.fp16_from = matched;
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            if (cache_.groups()[g].kind == plane_kind::fp16_copy)
                if (const status s = pad_copies(q, g, matched); !s) {
                    for (std::size_t other = 0; other < cache_.groups().size(); ++other)
                        cache_.cut(q, other, 0);
                    cache_.sequences.cancel(*slot);
                    return s;
                }
        cache_.note_retained(q);
        return prefix_match{cache_.sequences.publish(*slot), matched};
    }

    // Whether store_prefix() gives a node of the index a page in this block group. The node holds so many
    // tokens of the page: bodies always; fp16 copies only of pages with sinks; open keys only of a page that
    // is not full.
    [[nodiscard]] bool has_page(std::size_t group, std::size_t page, std::size_t tokens) const noexcept {
        switch (cache_.groups()[group].kind) {
        case plane_kind::body:
            return true;
        case plane_kind::fp16_copy:
            return page * cache_.page_tokens() < cache_.storage.description().fp16_sinks;
        case plane_kind::open_keys:
            return tokens != cache_.page_tokens();
        }
        return false;
    }

private:
    // Lengthens the table of fp16 copies of a sequence that was made from a prefix to `tokens` tokens. The
    // table holds the sinks' pages alone. Full pages after them become a hole, since their copies are gone;
    // the open page gets an empty block, which the next tokens are appended to. Precondition: room for a
    // block and a hole. Errors: capacity_exceeded.
    status pad_copies(sequence_state& q, std::size_t group, std::size_t tokens) noexcept {
        block_table& table = q.pages[group].table;
        const std::size_t have = table.pages(), full = tokens / cache_.page_tokens();
        const bool open = tokens % cache_.page_tokens() != 0 && have <= full;
        std::uint32_t block = 0;
        if (open && !cache_.take(group, {&block, 1}))
            return exhausted();
        if (have < full)
            table.append_hole(static_cast<std::uint32_t>(full - have));
        if (open)
            table.push_back(block);
        cache_.note_dropped(q, group);
        return {};
    }

    cache_state& cache_;
};

} // namespace kv1::inline KV1_ABI::detail
