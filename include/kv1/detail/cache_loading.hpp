// SPDX-License-Identifier: Apache-2.0
//
// Reads the saved form (saved_form.hpp) in three steps: check everything; take blocks and read pages into
// them; make sequences and prefixes. Nobody else sees anything before the last step, which makes all or none.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/crc32c.hpp>
#include <kv1/detail/saved_form.hpp>
#include <kv1/detail/stored_prefixes.hpp>
#include <kv1/layout.hpp>
#include <kv1/model_fingerprint.hpp>
#include <kv1/detail/prefix_tree.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// What the caller expects to find.
struct loading_rules {
    model_fingerprint model;
    bool one_sequence = false; // exactly one and no prefixes, as swap_out() writes
};

// One load. It owns the blocks and handles that it takes until it succeeds.
class cache_loading {
public:
    explicit cache_loading(cache_state& cache) noexcept : cache_(cache) {}
    cache_loading(const cache_loading&) = delete;
    cache_loading& operator=(const cache_loading&) = delete;
    ~cache_loading() {
        for (const std::uint32_t slot : slots_)
            cache_.sequences.cancel(slot);
        release_pages();
    }

    template <class Source>
    result<std::size_t> load(Source& source, std::span<sequence_id> out,
                             const loading_rules& rules) noexcept {
        if (const status s = read_tables(source, rules.model); !s)
            return s;
        byte_reader r(tables_.view());
        if (const status s = check_tables(r, out.size(), rules.one_sequence); !s)
            return s;
        if constexpr (requires { source.rewind(); }) {
            if (const status s = check_pages(source); !s)
                return s;
            if (!source.rewind())
                return status{errc::io_error, "the source does not rewind"};
            buffer<std::byte> before = std::move(tables_);
            if (const status s = read_tables(source, rules.model); !s)
                return s;
            if (before.size() != tables_.size() ||
                std::memcmp(before.data(), tables_.data(), before.size()) != 0)
                return status{errc::checksum_mismatch, "the source changed while it was read"};
        }
        r = byte_reader(tables_.view().last(sequences_left_));
        if (const status s = reserve_sequences(r); !s)
            return s;
        if (const status s = take_pages(); !s)
            return s;
        if (const status s = read_pages(source); !s)
            return s;
        if constexpr (!requires { source.rewind(); })
            if (const status s = check_end(source); !s)
                return s;
        place_prefixes();
        if (const status s = cache_.index.merge(prefixes_); !s)
            return s;
        fill_sequences(r);
        release_pages();
        for (std::size_t i = 0; i < slots_.size(); ++i)
            out[i] = cache_.sequences.publish(slots_[i]);
        slots_.clear();
        return static_cast<std::size_t>(sizes_.sequences);
    }

private:
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();
    static constexpr status wrong() noexcept {
        return {errc::bad_format, "the tables contradict themselves"};
    }
    static constexpr status ended(const char* where) noexcept { return {errc::truncated, where}; }

    // ---- the fixed part, and checksums

    template <class Source>
    status read_tables(Source& source, const model_fingerprint& model) noexcept {
        std::array<std::byte, saved_fixed_bytes> fixed;
        const auto start = std::span(fixed).template first<saved_start_bytes>();
        if (!source(std::span<std::byte>(start)))
            return ended("the bytes end within the fixed part");
        if (const status s = check_start(start); !s)
            return s;
        if (!source(std::span<std::byte>(fixed).subspan(saved_start_bytes)))
            return ended("the bytes end within the fixed part");
        if (const status s = read_fixed(fixed, sizes_); !s)
            return s;
        if (sizes_.model != model)
            return {errc::different_model, model.empty()
                                               ? "the saved cache names a model, the caller names none"
                                           : sizes_.model.empty() ? "the saved cache names no model"
                                                                  : "the saved cache is of another model"};
        // grows as bytes come, so that a wrong size in the file ends with its bytes, not with the memory
        constexpr std::size_t step = 65536;
        tables_.clear();
        std::array<std::byte, 4> crc;
        for (std::uint64_t done = 0; done < sizes_.table_bytes;) {
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(step, sizes_.table_bytes - done));
            if (!tables_.resize(static_cast<std::size_t>(done) + n))
                return {errc::out_of_memory, "no memory for the tables"};
            if (!source(std::span<std::byte>(tables_.data() + done, n)))
                return ended("the bytes end within the tables");
            done += n;
        }
        if (!source(std::span<std::byte>(crc)))
            return ended("the bytes end within the tables");
        if (byte_reader(crc).number<std::uint32_t>() != crc32c(0, tables_.view()))
            return {errc::checksum_mismatch, "the tables were changed"};
        return {};
    }

    template <class Source>
    status check_pages(Source& source) const noexcept {
        std::array<std::byte, 16384> part;
        std::uint32_t crc = 0;
        for (std::uint64_t done = 0; done < sizes_.page_bytes;) {
            const auto n =
                static_cast<std::size_t>(std::min<std::uint64_t>(part.size(), sizes_.page_bytes - done));
            if (!source(std::span<std::byte>(part.data(), n)))
                return ended("the bytes end within the pages");
            crc = crc32c(crc, {part.data(), n});
            done += n;
        }
        if (const status s = check_page_crc(source, crc); !s)
            return s;
        return check_end(source);
    }
    template <class Source>
    static status check_page_crc(Source& source, std::uint32_t crc) noexcept {
        std::array<std::byte, 4> stored;
        if (!source(std::span<std::byte>(stored)))
            return ended("the bytes end within the pages");
        if (byte_reader(stored).number<std::uint32_t>() != crc)
            return {errc::checksum_mismatch, "the pages were changed"};
        return {};
    }
    template <class Source>
    static status check_end([[maybe_unused]] Source& source) noexcept {
        if constexpr (requires { source.at_end(); })
            if (!source.at_end())
                return {errc::bad_format, "bytes follow the end of the saved cache"};
        return {};
    }

    // ---- tables

    status check_tables(byte_reader& r, std::size_t handles, bool one_sequence) noexcept {
        if (const status s = check_shape(r); !s)
            return s;
        if (const status s = check_groups(r); !s)
            return s;
        sequences_left_ = r.left();
        std::size_t total = 0;
        for (const std::uint32_t n : counts_)
            total += n;
        buffer<std::uint32_t> users; // of each page; one without users is refused
        if (!users.resize(total))
            return no_memory();
        if (const status s = check_sequences(r, users); !s)
            return s;
        if (const status s = check_prefixes(r, users); !s)
            return s;
        if (r.failed() || r.left() != 0)
            return wrong();
        for (const std::uint32_t used : users)
            if (used == 0)
                return wrong();
        if (one_sequence && (sizes_.sequences == 0 || sizes_.prefixes != 0))
            return {errc::bad_format, "the memory holds no single sequence"};
        if (sizes_.sequences > handles)
            return {errc::shape_mismatch, "more sequences were saved than there are handles for"};
        return {};
    }

    status check_shape(byte_reader& r) const noexcept {
        const cache_description& d = cache_.storage.description();
        const auto differs = [](const char* rule, std::size_t layer = no_plane) {
            return status(errc::different_cache, rule,
                          {.layer = layer == no_plane ? -1 : static_cast<std::int64_t>(layer)});
        };
        if (sizes_.layers != d.layers.size())
            return differs("another number of layers");
        if (sizes_.page_tokens != d.page_tokens)
            return differs("another number of tokens a page");
        if (r.number<std::uint64_t>() != d.fp16_sinks || r.number<std::uint64_t>() != d.fp16_window)
            return differs("other fp16 sinks or window");
        if (r.number<std::uint64_t>() != d.first_position)
            return differs("another position of the first token");
        for (std::size_t i = 0; i < d.layers.size(); ++i) {
            const layer_description& l = d.layers[i];
            if (r.number<std::uint32_t>() != l.kv_heads || r.number<std::uint32_t>() != l.key_dim ||
                r.number<std::uint32_t>() != l.value_dim)
                return differs("another number of heads or channels", i);
            const bool same_group = r.number<std::uint32_t>() == cache_.body_of(i).group;
            const auto window = r.number<std::uint64_t>(), retention = r.number<std::uint64_t>();
            if (window != l.sliding_window || retention != l.window_retention || !same_group)
                return differs("another sliding window, or other tokens kept behind it", i);
            const page_layout& layout = cache_.body_of(i).layout;
            for (const section_layout* half : {&layout.keys(), &layout.values()}) {
                const format_traits t = half->traits();
                const auto format = r.number<std::uint8_t>(), bits = r.number<std::uint8_t>(),
                           axis = r.number<std::uint8_t>(), metadata = r.number<std::uint8_t>();
                if (format != saved_format(half->format) ||
                    bits != (t.code_bits != 0 ? t.code_bits : t.plain_bits) ||
                    metadata != static_cast<std::uint8_t>(t.metadata))
                    return differs("another format", i);
                if (axis != saved_axis(half->axis))
                    return differs("keys quantized along another axis", i);
            }
            for (const prepared_encoding* c : {&cache_.planes_of(i).keys, &cache_.planes_of(i).values}) {
                const auto hadamard = r.number<std::uint32_t>(), means = r.number<std::uint32_t>(),
                           basis = r.number<std::uint32_t>();
                if (hadamard != c->params.hadamard || means != c->means_checksum ||
                    basis != c->basis.checksum())
                    return differs("another rotation or basis, or other means", i);
            }
            const auto key_group = r.number<std::uint32_t>(), value_group = r.number<std::uint32_t>();
            if (key_group != layout.keys().group_channels || value_group != layout.values().group_channels)
                return differs("other groups of channels", i);
            if (r.number<std::uint32_t>() != (layout.values_in_keys() ? 1u : 0u))
                return differs("values in keys, or values apart", i);
        }
        if (sizes_.groups != cache_.groups().size())
            return differs("another number of page groups");
        return {};
    }

    status check_groups(byte_reader& r) noexcept {
        const auto& groups = cache_.groups();
        std::uint64_t bytes = 0;
        counts_.clear();
        for (std::size_t g = 0; g < groups.size(); ++g) {
            const auto n = r.number<std::uint32_t>();
            if (r.number<std::uint32_t>() != saved_kind(groups[g].kind))
                return {errc::different_cache, "other fp16 copies or open pages"};
            if (n > groups[g].pool.capacity())
                return exhausted();
            if (!counts_.try_push_back(n))
                return no_memory();
            bytes += std::uint64_t{n} * groups[g].block_bytes;
        }
        if (bytes != sizes_.page_bytes)
            return wrong();
        return {};
    }

    // Checks everything that fill_sequences() relies on.
    status check_sequences(byte_reader& r, buffer<std::uint32_t>& users) const noexcept {
        const std::size_t page = cache_.page_tokens();
        for (std::uint32_t i = 0; i < sizes_.sequences; ++i) {
            const auto length = r.number<std::uint64_t>(), base = r.number<std::uint64_t>(),
                       committed = r.number<std::uint64_t>(), fp16_from = r.number<std::uint64_t>();
            if (r.failed() || length > max_sequence_tokens ||
                (committed > length && committed != saved_never) || fp16_from > length)
                return wrong();
            if (base != 0)
                return {errc::unsupported_version, "positions that begin elsewhere than at zero"};
            const std::uint64_t pages = (length + page - 1) / page;
            std::size_t offset = 0;
            for (std::size_t g = 0; g < counts_.size(); offset += counts_[g], ++g) {
                const auto window_from = r.number<std::uint64_t>();
                const auto holes = r.number<std::uint32_t>(), live = r.number<std::uint32_t>();
                if (r.failed() || window_from > pages * page || holes > r.left() / 8)
                    return wrong();
                std::uint64_t dropped = 0, end = 0, at_front = 0; // pages that are dropped
                for (std::uint32_t h = 0; h < holes; ++h) {
                    const std::uint64_t first = r.number<std::uint32_t>(), last = r.number<std::uint32_t>();
                    if (first >= last || last > pages || (h != 0 && first <= end))
                        return wrong();
                    dropped += last - first;
                    end = last;
                    at_front = first == 0 ? last : at_front;
                }
                // pages that a window freed are dropped, and no later query may see them
                const std::uint64_t window = cache_.groups()[g].window;
                if (window_from != 0 && (window == 0 || window_from % page != 0 ||
                                         window_from > at_front * page || window_from + window > length + 1))
                    return wrong();
                const bool open_dropped = length % page != 0 && end == pages && holes != 0;
                if (open_dropped || live + dropped != pages || live > r.left() / 4)
                    return wrong();
                for (std::uint32_t b = 0; b < live; ++b) {
                    const auto number = r.number<std::uint32_t>();
                    if (number >= counts_[g])
                        return wrong();
                    users[offset + number] = 1;
                }
            }
        }
        return {};
    }

    // Reads the nodes of the prefix index. Each must have the pages that store_prefix() gives such a node.
    status check_prefixes(byte_reader& r, buffer<std::uint32_t>& users) noexcept {
        const std::size_t page = cache_.page_tokens(), groups = counts_.size();
        if (sizes_.prefixes > r.left() / (12 + 4 * groups))
            return wrong();
        buffer<std::uint32_t> depths; // of each node: the number of pages before its own
        if (!depths.reserve(sizes_.prefixes) || !prefixes_.nodes.reserve(sizes_.prefixes) ||
            !prefixes_.blocks.reserve(sizes_.prefixes * groups))
            return no_memory();
        for (std::uint32_t i = 0; i < sizes_.prefixes; ++i) {
            prefix_snapshot::node n;
            n.parent = r.number<std::uint32_t>();
            n.tokens = r.number<std::uint32_t>();
            std::uint32_t depth = 0;
            if (n.parent == saved_none) {
                n.parent = prefix_snapshot::none;
                n.salt.high = r.number<std::uint64_t>();
                n.salt.low = r.number<std::uint64_t>();
            } else {
                if (n.parent >= i || prefixes_.nodes[n.parent].tokens != page)
                    return wrong();
                depth = depths[n.parent] + 1;
            }
            if (n.tokens == 0 || n.tokens > page || n.tokens > r.left() / 4)
                return wrong();
            for (std::uint32_t t = 0; t < n.tokens; ++t)
                if (!prefixes_.tokens.try_push_back(static_cast<token_id>(r.number<std::uint32_t>())))
                    return no_memory();
            std::size_t offset = 0;
            for (std::size_t g = 0; g < groups; offset += counts_[g], ++g) {
                const auto number = r.number<std::uint32_t>();
                if ((number != saved_none) != stored_prefixes(cache_).has_page(g, depth, n.tokens) ||
                    (number != saved_none && number >= counts_[g]))
                    return wrong();
                if (number != saved_none)
                    users[offset + number] = 1;
                prefixes_.blocks.push_back(number);
            }
            depths.push_back(depth);
            prefixes_.nodes.push_back(n);
        }
        return {};
    }

    // ---- handles and blocks

    // Takes handles with room for their tables, so that making the sequences cannot fail.
    status reserve_sequences(byte_reader r) noexcept {
        if (!slots_.reserve(sizes_.sequences))
            return no_memory();
        for (std::uint32_t i = 0; i < sizes_.sequences; ++i) {
            const auto slot = cache_.new_slot();
            if (!slot)
                return slot.reason();
            slots_.push_back(*slot);
            sequence_state& q = cache_.sequences.object(*slot);
            skip(r, 4);
            for (std::size_t g = 0; g < counts_.size(); ++g) {
                skip(r, 1);
                const auto holes = r.number<std::uint32_t>(), live = r.number<std::uint32_t>();
                if (!q.pages[g].table.reserve(live) || !q.pages[g].table.reserve_holes(holes))
                    return no_memory();
                skip(r, holes);
                for (std::uint32_t b = 0; b < live; ++b)
                    r.number<std::uint32_t>();
            }
        }
        return {};
    }

    status take_pages() noexcept {
        std::size_t total = 0;
        for (const std::uint32_t n : counts_)
            total += n;
        if (!blocks_.reserve(total))
            return no_memory();
        for (std::size_t g = 0; g < counts_.size(); ++g) {
            const std::size_t first = blocks_.size();
            blocks_.set_size(first + counts_[g]);
            if (!cache_.take(g, {blocks_.data() + first, counts_[g]})) {
                blocks_.set_size(first);
                return exhausted();
            }
        }
        return {};
    }
    void release_pages() noexcept {
        std::size_t at = 0;
        for (std::size_t g = 0; at < blocks_.size(); ++g)
            for (std::uint32_t i = 0; i < counts_[g]; ++i)
                cache_.pool(g).release(blocks_[at++]);
        blocks_.clear();
    }

    // A NaN or infinity is reported only after the checksum has shown that it was saved like that.
    template <class Source>
    status read_pages(Source& source) noexcept {
        status finite;
        std::uint32_t crc = 0;
        std::size_t at = 0;
        for (std::size_t g = 0; g < counts_.size(); ++g)
            for (std::uint32_t n = 0; n < counts_[g]; ++n, ++at)
                for (plane& p : cache_.storage.planes()) {
                    if (p.group != g)
                        continue;
                    std::byte* block = p.block(blocks_[at]);
                    if (!source(std::span<std::byte>(block, p.block_bytes)))
                        return ended("the bytes end within the pages");
                    crc = crc32c(crc, {block, p.block_bytes});
                    for (std::size_t h = 0; finite && h < p.kv_heads; ++h)
                        for (const section_layout* each : {&p.layout.keys(), &p.layout.values()})
                            if (!finite_section(*each, block + h * p.layout.bytes()))
                                finite = {errc::non_finite,
                                          "saved pages hold finite numbers",
                                          {.layer = static_cast<std::int64_t>(p.layer)}};
                }
        if (const status s = check_page_crc(source, crc); !s)
            return s;
        return finite;
    }

    // ---- sequences and prefixes

    // Replaces page numbers of the file by blocks.
    void place_prefixes() noexcept {
        for (std::size_t i = 0; i < prefixes_.nodes.size(); ++i) {
            std::size_t offset = 0;
            for (std::size_t g = 0; g < counts_.size(); offset += counts_[g], ++g) {
                std::uint32_t& block = prefixes_.blocks[i * counts_.size() + g];
                block = block == saved_none ? prefix_tree::no_block : blocks_[offset + block];
            }
        }
    }

    void fill_sequences(byte_reader r) noexcept {
        for (const std::uint32_t slot : slots_) {
            sequence_state& q = cache_.sequences.object(slot);
            const auto length = static_cast<std::size_t>(r.number<std::uint64_t>());
            skip(r, 1);
            if (const auto n = r.number<std::uint64_t>(); n != saved_never)
                q.committed = static_cast<std::size_t>(n);
            q.fp16_from = static_cast<std::size_t>(r.number<std::uint64_t>());
            for (std::size_t layer = 0; layer < cache_.layers(); ++layer)
                q.set_length(layer, length);
            std::size_t offset = 0;
            for (std::size_t g = 0; g < counts_.size(); offset += counts_[g], ++g) {
                sequence_pages& own = q.pages[g];
                own.window_from = static_cast<std::size_t>(r.number<std::uint64_t>());
                const auto holes = r.number<std::uint32_t>(), live = r.number<std::uint32_t>();
                byte_reader hole = r;
                skip(r, holes);
                page_hole next{none, none};
                std::uint32_t left = holes;
                const auto next_hole = [&] {
                    next = {none, none};
                    if (left != 0) {
                        next.first = hole.number<std::uint32_t>();
                        next.last = hole.number<std::uint32_t>();
                        --left;
                    }
                };
                next_hole();
                for (std::uint32_t b = 0; b < live || next.first != none;) {
                    if (next.first == own.table.pages()) {
                        own.table.append_hole(next.last - next.first);
                        next_hole();
                        continue;
                    }
                    const std::uint32_t block = blocks_[offset + r.number<std::uint32_t>()];
                    cache_.pool(g).retain(block);
                    own.table.push_back(block);
                    ++b;
                }
                cache_state::note_dropped(q, g);
            }
            cache_.note_retained(q);
        }
    }

    static void skip(byte_reader& r, std::size_t numbers) noexcept {
        for (std::size_t i = 0; i < numbers; ++i)
            r.number<std::uint64_t>();
    }

    cache_state& cache_;
    saved_sizes sizes_;
    buffer<std::byte> tables_;
    std::size_t sequences_left_ = 0; // bytes of the tables from the first sequence on
    buffer<std::uint32_t> counts_;   // [group]: pages
    prefix_snapshot prefixes_;       // its blocks are page numbers of the file until pages are read
    buffer<std::uint32_t> blocks_;   // [group][page number]
    buffer<std::uint32_t> slots_;
};

} // namespace kv1::inline KV1_ABI::detail
