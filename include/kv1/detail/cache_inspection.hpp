// SPDX-License-Identifier: Apache-2.0
//
// Statistics of a cache, and the check of its invariants.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/cache_statistics.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace kv1::inline KV1_ABI::detail {

class cache_inspection {
public:
    explicit cache_inspection(const cache_state& cache) noexcept : cache_(cache) {}

    [[nodiscard]] cache_statistics statistics() const noexcept {
        cache_statistics s = empty_statistics();
        cache_.sequences.for_each([&](sequence_id, const sequence_state& q) { add_tokens(s, q); });
        for (const block_group& g : cache_.groups()) {
            s.pages_in_use += g.pool.in_use();
            s.bytes_in_use += g.pool.in_use() * g.block_bytes;
            s.bytes_shared += g.pool.shared() * g.block_bytes;
            if (g.kind != plane_kind::body)
                s.bytes_fp16_copies += g.pool.in_use() * g.block_bytes;
        }
        s.pages_indexed = cache_.index.pages();
        return s;
    }
    [[nodiscard]] cache_statistics statistics(const sequence_state& q) const noexcept {
        cache_statistics s = empty_statistics();
        add_tokens(s, q);
        for (std::size_t i = 0; i < cache_.groups().size(); ++i) {
            const block_group& g = cache_.groups()[i];
            const auto blocks = q.pages[i].table.blocks();
            s.pages_in_use += blocks.size();
            s.bytes_in_use += blocks.size() * g.block_bytes;
            if (g.kind != plane_kind::body)
                s.bytes_fp16_copies += blocks.size() * g.block_bytes;
            for (const std::uint32_t block : blocks)
                s.bytes_shared += g.pool.references(block) > 1 ? g.block_bytes : 0;
        }
        return s;
    }
    [[nodiscard]] std::size_t available_pages() const noexcept {
        std::size_t least = (std::numeric_limits<std::size_t>::max)();
        for (const block_group& g : cache_.groups())
            least = (std::min)(least, g.pool.available());
        return least;
    }

    [[nodiscard]] status validate() const noexcept {
        const auto broken = [](const char* rule) { return status{errc::broken_invariant, rule}; };
        if (!cache_.index.valid())
            return broken("the prefix index contradicts itself");
        for (std::size_t g = 0; g < cache_.groups().size(); ++g) {
            if (!cache_.pool(g).valid())
                return broken("a page pool contradicts itself");
            buffer<std::uint32_t> counts;
            if (!counts.resize(cache_.pool(g).capacity()))
                return no_memory();
            status s;
            cache_.sequences.for_each([&](sequence_id, const sequence_state& q) {
                const sequence_pages& p = q.pages[g];
                for (const std::uint32_t block : p.table.blocks())
                    if (block < counts.size())
                        ++counts[block];
                std::size_t longest = 0;
                for (const plane& each : cache_.storage.planes())
                    if (each.group == g)
                        longest = (std::max)(longest, q.length(each.layer));
                if (!p.table.valid() || p.dropped.load(std::memory_order_relaxed) != p.table.dropped())
                    s = broken("a block table contradicts itself");
                if (p.table.pages() != (longest + cache_.page_tokens() - 1) / cache_.page_tokens())
                    s = broken("a sequence has another number of pages than its tokens need");
                for (const plane& each : cache_.storage.planes())
                    if (const std::size_t n = q.length(each.layer);
                        each.group == g && n % cache_.page_tokens() != 0 &&
                        !p.table.find(n / cache_.page_tokens()) &&
                        (n == longest || cache_.groups()[g].kind == plane_kind::open_keys))
                        s = broken("an open page is dropped");
                if (const std::size_t window = cache_.groups()[g].window, from = p.window_from;
                    from != 0 && (window == 0 || from + window > longest + 1))
                    s = broken("a sliding window has given up what the next query sees");
                if (q.committed.value_or(0) > q.shortest(cache_.layers()))
                    s = broken("a sequence is shorter than what is committed");
            });
            if (!s)
                return s;
            cache_.index.for_each_block([&](std::size_t group, std::uint32_t block) {
                if (group == g && block < counts.size())
                    ++counts[block];
            });
            for (std::uint32_t block = 0; block < counts.size(); ++block)
                if (counts[block] != cache_.pool(g).references(block))
                    return broken("a page's reference count is not the number of its users");
        }
        return {};
    }

private:
    [[nodiscard]] cache_statistics empty_statistics() const noexcept {
        cache_statistics s;
        s.layers = cache_.layers();
        for (const block_group& g : cache_.groups()) {
            s.pages_total += g.pool.capacity();
            s.bytes_reserved += g.pool.capacity() * g.block_bytes;
        }
        return s;
    }

    // Bytes of one KV head's keys, of which `held` of the layer's `length` tokens are there.
    [[nodiscard]] std::size_t key_bytes(const layer_description& d, std::size_t length,
                                        std::size_t held) const noexcept {
        if (d.key_axis == quantization_axis::per_token)
            return held * row_bytes(d.key_format, d.key_dim, d.key_group);
        const std::size_t open = (std::min)(length % cache_.page_tokens(), held), full = held - open;
        return open * packed_bytes(kv_format::fp16, d.key_dim) +
               full / cache_.page_tokens() *
                   channel_page_bytes(d.key_format, d.key_dim, cache_.page_tokens());
    }

    void add_tokens(cache_statistics& s, const sequence_state& q) const noexcept {
        ++s.sequences;
        s.tokens += q.longest(cache_.layers());
        for (std::size_t g = 0; g < cache_.groups().size(); ++g)
            s.bytes_retained +=
                q.pages[g].retained.load(std::memory_order_relaxed) * cache_.groups()[g].block_bytes;
        for (std::size_t i = 0; i < cache_.layers(); ++i) {
            const layer_description& d = cache_.planes_of(i).shape;
            const plane& body = cache_.body_of(i);
            const std::size_t gone =
                q.pages[body.group].dropped.load(std::memory_order_relaxed) * cache_.page_tokens();
            const std::size_t length = q.length(i), held = length > gone ? length - gone : 0;
            const std::size_t value_dim = d.values_in_keys ? 0 : d.value_dim; // with bytes of their own
            if (value_dim != 0)
                s.bytes_stored += held * d.kv_heads * row_bytes(d.value_format, value_dim, d.value_group);
            s.bytes_stored += d.kv_heads * key_bytes(d, length, held);
            s.bytes_as_fp16 += held * d.kv_heads * 2 * (d.key_dim + value_dim);
            const std::size_t open = length % cache_.page_tokens();
            s.bytes_unfilled +=
                open == 0 ? 0 : (cache_.page_tokens() - open) * body.block_bytes / cache_.page_tokens();
        }
    }

    const cache_state& cache_;
};

} // namespace kv1::inline KV1_ABI::detail
