// SPDX-License-Identifier: Apache-2.0
//
// Writes the saved form (saved_form.hpp). It lists the pages of sequences and prefixes, each once, then
// writes tables, then pages.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/saved_form.hpp>
#include <kv1/layout.hpp>
#include <kv1/model_fingerprint.hpp>
#include <kv1/detail/prefix_tree.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// One save. It holds references to the prefixes' pages as long as it lives, so that nothing evicts them.
class cache_saving {
public:
    cache_saving(const cache_state& cache, std::span<const sequence_id> ids) noexcept
        : cache_(cache), ids_(ids) {}
    cache_saving(const cache_saving&) = delete;
    cache_saving& operator=(const cache_saving&) = delete;
    ~cache_saving() { cache_.index.release(prefixes_); }

    // Finds what there is to save. Call it before the other members.
    status collect(const model_fingerprint& model, bool with_prefixes) noexcept {
        for (const sequence_id id : ids_) {
            const sequence_state* q = cache_.find(id);
            if (q == nullptr)
                return stale();
            if (const status agreed = cache_.agreed(*q); !agreed)
                return agreed;
        }
        if (with_prefixes)
            if (const status s = cache_.index.snapshot(prefixes_); !s)
                return s;
        pages_.reset(new (std::nothrow) page_list[cache_.groups().size()]);
        if (pages_ == nullptr)
            return no_memory();
        for (std::size_t g = 0; g < cache_.groups().size(); ++g) {
            if (!pages_[g].place.resize(cache_.pool(g).capacity(), saved_none))
                return no_memory();
            if (!collect_sequences(g) || !collect_prefixes(g))
                return no_memory();
            sizes_.page_bytes += pages_[g].blocks.size() * cache_.groups()[g].block_bytes;
        }
        sizes_.page_tokens = static_cast<std::uint32_t>(cache_.page_tokens());
        sizes_.layers = static_cast<std::uint32_t>(cache_.layers());
        sizes_.groups = static_cast<std::uint32_t>(cache_.groups().size());
        sizes_.sequences = static_cast<std::uint32_t>(ids_.size());
        sizes_.prefixes = static_cast<std::uint32_t>(prefixes_.nodes.size());
        sizes_.model = model;
        const auto nowhere = [](std::span<const std::byte>) { return true; };
        byte_writer counting(nowhere);
        write_tables(counting);
        sizes_.table_bytes = counting.written();
        return {};
    }

    [[nodiscard]] std::size_t bytes() const noexcept {
        return saved_fixed_bytes + static_cast<std::size_t>(sizes_.table_bytes + sizes_.page_bytes) + 8;
    }

    template <class Sink>
    status write(Sink& sink) const noexcept {
        buffer<std::byte> part; // a copy of a page whose unused slots are cleared
        std::size_t largest = 0;
        for (const plane& p : cache_.storage.planes())
            largest = (std::max)(largest, p.block_bytes);
        if (!part.resize(largest))
            return no_memory();
        byte_writer w(sink);
        bool fine = write_fixed(w, sizes_) && write_tables(w) && w.checksum();
        for (std::size_t g = 0; fine && g < cache_.groups().size(); ++g)
            for (std::size_t n = 0; fine && n < pages_[g].blocks.size(); ++n)
                for (const plane& p : cache_.storage.planes())
                    fine = fine && (p.group != g || write_page(w, p, n, part));
        if (!fine || !w.checksum())
            return {errc::io_error, "the sink took no more bytes"};
        return {};
    }

private:
    // The pages of a block group that are saved.
    struct page_list {
        buffer<std::uint32_t> place;  // [block]: its page number in the file
        buffer<std::uint32_t> blocks; // [page number]: its block
        buffer<std::uint32_t> tokens; // [page number]: how many slots a sequence or prefix uses

        [[nodiscard]] bool add(std::uint32_t block, std::uint32_t used) noexcept {
            if (place[block] == saved_none) {
                place[block] = static_cast<std::uint32_t>(blocks.size());
                if (!blocks.try_push_back(block) || !tokens.try_push_back(0))
                    return false;
            }
            std::uint32_t& most = tokens[place[block]];
            most = (std::max)(most, used);
            return true;
        }
    };

    [[nodiscard]] bool collect_sequences(std::size_t g) noexcept {
        const std::size_t page = cache_.page_tokens();
        for (const sequence_id id : ids_) {
            const sequence_state& q = *cache_.find(id);
            const block_table& table = q.pages[g].table;
            for (std::size_t p = 0; p < table.pages(); ++p)
                if (const auto at = table.find(p))
                    if (!pages_[g].add(table.blocks()[*at],
                                       static_cast<std::uint32_t>((std::min)(page, q.length(0) - p * page))))
                        return false;
        }
        return true;
    }
    [[nodiscard]] bool collect_prefixes(std::size_t g) noexcept {
        for (std::size_t i = 0; i < prefixes_.nodes.size(); ++i)
            if (const std::uint32_t block = prefix_block(i, g); block != prefix_tree::no_block)
                if (!pages_[g].add(block, prefixes_.nodes[i].tokens))
                    return false;
        return true;
    }
    [[nodiscard]] std::uint32_t prefix_block(std::size_t node, std::size_t g) const noexcept {
        return prefixes_.blocks[node * cache_.groups().size() + g];
    }

    template <class Writer>
    bool write_tables(Writer& w) const {
        return write_shape(w) && write_sequences(w) && write_prefixes(w);
    }

    template <class Writer>
    bool write_shape(Writer& w) const {
        const cache_description& d = cache_.storage.description();
        bool fine =
            w.number(u64(d.fp16_sinks)) && w.number(u64(d.fp16_window)) && w.number(u64(d.first_position));
        for (std::size_t i = 0; fine && i < d.layers.size(); ++i) {
            const layer_description& l = d.layers[i];
            fine = w.number(u32(l.kv_heads)) && w.number(u32(l.key_dim)) && w.number(u32(l.value_dim)) &&
                   w.number(u32(cache_.body_of(i).group)) && w.number(u64(l.sliding_window)) &&
                   w.number(u64(l.window_retention));
            const page_layout& layout = cache_.body_of(i).layout;
            for (const section_layout* half : {&layout.keys(), &layout.values()}) {
                const format_traits t = half->traits();
                fine = fine && w.number(saved_format(half->format)) &&
                       w.number(static_cast<std::uint8_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits)) &&
                       w.number(saved_axis(half->axis)) && w.number(static_cast<std::uint8_t>(t.metadata));
            }
            for (const prepared_encoding* c : {&cache_.planes_of(i).keys, &cache_.planes_of(i).values})
                fine = fine && w.number(u32(c->params.hadamard)) && w.number(c->means_checksum) &&
                       w.number(c->basis.checksum());
            fine = fine && w.number(u32(layout.keys().group_channels)) &&
                   w.number(u32(layout.values().group_channels)) &&
                   w.number(u32(layout.values_in_keys() ? 1 : 0));
        }
        for (std::size_t g = 0; fine && g < cache_.groups().size(); ++g)
            fine = w.number(u32(pages_[g].blocks.size())) && w.number(saved_kind(cache_.groups()[g].kind));
        return fine;
    }

    template <class Writer>
    bool write_sequences(Writer& w) const {
        bool fine = true;
        for (std::size_t i = 0; fine && i < ids_.size(); ++i) {
            const sequence_state& q = *cache_.find(ids_[i]);
            fine = w.number(u64(q.length(0))) && w.number(std::uint64_t{0}) && // position of the first token
                   w.number(q.committed ? u64(*q.committed) : saved_never) && w.number(u64(q.fp16_from));
            for (std::size_t g = 0; fine && g < cache_.groups().size(); ++g) {
                const sequence_pages& own = q.pages[g];
                fine = w.number(u64(own.window_from)) && w.number(u32(own.table.holes().size())) &&
                       w.number(u32(own.table.blocks().size()));
                for (const page_hole& h : own.table.holes())
                    fine = fine && w.number(h.first) && w.number(h.last);
                for (const std::uint32_t block : own.table.blocks())
                    fine = fine && w.number(pages_[g].place[block]);
            }
        }
        return fine;
    }

    template <class Writer>
    bool write_prefixes(Writer& w) const {
        bool fine = true;
        std::size_t first = 0;
        for (std::size_t i = 0; fine && i < prefixes_.nodes.size(); ++i) {
            const prefix_snapshot::node& n = prefixes_.nodes[i];
            fine = w.number(n.parent == prefix_snapshot::none ? saved_none : n.parent) && w.number(n.tokens);
            if (n.parent == prefix_snapshot::none)
                fine = fine && w.number(n.salt.high) && w.number(n.salt.low);
            for (const token_id t : prefixes_.tokens.view().subspan(first, n.tokens))
                fine = fine && w.number(static_cast<std::uint32_t>(t));
            first += n.tokens;
            for (std::size_t g = 0; g < cache_.groups().size(); ++g) {
                const std::uint32_t block = prefix_block(i, g);
                fine = fine && w.number(block == prefix_tree::no_block ? saved_none : pages_[g].place[block]);
            }
        }
        return fine;
    }

    // Page number n of a group, in one plane. Slots that nobody uses are zero.
    template <class Writer>
    bool write_page(Writer& w, const plane& p, std::size_t n, buffer<std::byte>& part) const {
        const std::byte* block = p.block(pages_[p.group].blocks[n]);
        if (const std::size_t used = pages_[p.group].tokens[n]; used != cache_.page_tokens()) {
            std::memcpy(part.data(), block, p.block_bytes);
            for (std::size_t h = 0; h < p.kv_heads; ++h)
                for (const section_layout* each : {&p.layout.keys(), &p.layout.values()})
                    clear_slots(*each, part.data() + h * p.layout.bytes(), used);
            block = part.data();
        }
        return w.bytes({block, p.block_bytes});
    }

    static std::uint32_t u32(std::size_t n) noexcept { return static_cast<std::uint32_t>(n); }
    static std::uint64_t u64(std::size_t n) noexcept { return static_cast<std::uint64_t>(n); }

    const cache_state& cache_;
    std::span<const sequence_id> ids_;
    prefix_snapshot prefixes_;
    std::unique_ptr<page_list[]> pages_; // by group
    saved_sizes sizes_;
};

} // namespace kv1::inline KV1_ABI::detail
