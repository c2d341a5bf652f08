// SPDX-License-Identifier: Apache-2.0
//
// The saved form of sequences (cache_io.hpp describes it): writing it, and reading it with every check before
// anything is allocated or changed.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/crc32c.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>
#include <kv1/version.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::array<char, 8> saved_magic{'K', 'V', '1', 'C', 'A', 'C', 'H', 'E'};
inline constexpr std::uint32_t saved_version = 3;  // 2: rotations and means, 3: groups of channels
inline constexpr std::uint32_t layout_version = 1; // of layout.hpp
inline constexpr std::size_t saved_fixed_bytes = 64;
// the form's own numbers of formats and the like do not move when an enumeration does
constexpr std::uint8_t saved_format(kv_format f) noexcept {
    switch (f) {
    case kv_format::fp32:
        return 1;
    case kv_format::fp16:
        return 2;
    case kv_format::affine8:
        return 3;
    case kv_format::affine4:
        return 4;
    case kv_format::affine3:
        return 5;
    case kv_format::affine2:
        return 6;
    case kv_format::scaled_binary:
        return 7;
    case kv_format::binary:
        return 8;
    case kv_format::compact4:
        return 9;
    case kv_format::compact3:
        return 10;
    case kv_format::compact2:
        return 11;
    case kv_format::codebook2:
        return 12;
    }
    return 0;
}

constexpr std::uint8_t saved_axis(quantization_axis a) noexcept {
    return a == quantization_axis::per_channel ? 1 : 0;
}
constexpr std::uint32_t saved_kind(plane_kind k) noexcept {
    return k == plane_kind::open_keys ? 2 : k == plane_kind::fp16_copy ? 1 : 0;
}

// Numbers to bytes, counted and checksummed; the bytes go to a sink.
template <class Sink>
class byte_writer {
public:
    explicit byte_writer(Sink& sink) noexcept : sink_(sink) {}
    bool bytes(std::span<const std::byte> b) {
        crc_ = crc32c(crc_, b);
        written_ += b.size();
        return b.empty() || static_cast<bool>(sink_(b));
    }
    template <std::unsigned_integral T>
    bool number(T value) {
        std::array<std::byte, sizeof(T)> b;
        for (std::size_t i = 0; i < sizeof(T); ++i)
            b[i] = static_cast<std::byte>(value >> (8 * i) & 0xffu);
        return bytes(b);
    }
    bool checksum() { // of all since the last one
        const std::uint32_t crc = crc_;
        const bool fine = number(crc);
        crc_ = 0;
        return fine;
    }
    [[nodiscard]] std::size_t written() const noexcept { return written_; }

private:
    Sink& sink_;
    std::uint32_t crc_ = 0;
    std::size_t written_ = 0;
};

// Bytes to numbers. What lies past the end reads as zero, and sets failed().
class byte_reader {
public:
    explicit byte_reader(std::span<const std::byte> bytes) noexcept : bytes_(bytes) {}
    template <std::unsigned_integral T>
    T number() noexcept {
        T value = 0;
        if (bytes_.size() < sizeof(T)) {
            failed_ = true;
            bytes_ = {};
            return value;
        }
        for (std::size_t i = 0; i < sizeof(T); ++i)
            value = static_cast<T>(value | std::to_integer<T>(bytes_[i]) << (8 * i));
        bytes_ = bytes_.subspan(sizeof(T));
        return value;
    }
    [[nodiscard]] bool failed() const noexcept { return failed_; }
    [[nodiscard]] std::size_t left() const noexcept { return bytes_.size(); }

private:
    std::span<const std::byte> bytes_;
    bool failed_ = false;
};

// The fixed part.
struct saved_sizes {
    std::uint32_t library = 0, page_tokens = 0, layers = 0, groups = 0, sequences = 0;
    std::uint64_t table_bytes = 0, page_bytes = 0; // checksums not counted
};

template <class Writer>
bool write_fixed(Writer& w, const saved_sizes& s) {
    return w.bytes(std::as_bytes(std::span(saved_magic))) && w.number(saved_version) &&
           w.number(static_cast<std::uint32_t>(KV1_VERSION)) && w.number(layout_version) &&
           w.number(s.page_tokens) && w.number(s.layers) && w.number(s.groups) && w.number(s.sequences) &&
           w.number(s.table_bytes) && w.number(s.page_bytes) && w.number(std::uint64_t{0}) && w.checksum();
}

inline status read_fixed(std::span<const std::byte, saved_fixed_bytes> bytes, saved_sizes& s) noexcept {
    if (std::memcmp(bytes.data(), saved_magic.data(), saved_magic.size()) != 0)
        return {errc::bad_format, "the bytes do not begin like a saved cache"};
    byte_reader r(bytes.subspan(saved_magic.size()));
    if (r.number<std::uint32_t>() != saved_version)
        return {errc::unsupported_version, "the saved cache is of another version"};
    s.library = r.number<std::uint32_t>();
    const auto layout = r.number<std::uint32_t>();
    s.page_tokens = r.number<std::uint32_t>();
    s.layers = r.number<std::uint32_t>();
    s.groups = r.number<std::uint32_t>();
    s.sequences = r.number<std::uint32_t>();
    s.table_bytes = r.number<std::uint64_t>();
    s.page_bytes = r.number<std::uint64_t>();
    const auto unused = r.number<std::uint64_t>();
    if (r.number<std::uint32_t>() != crc32c(0, bytes.first(saved_fixed_bytes - 4)))
        return {errc::checksum_mismatch, "the fixed part was changed"};
    if (layout != layout_version || unused != 0)
        return {errc::unsupported_version, "the saved cache has another page layout"};
    return {};
}

// The slots of a page from a token on, as if never written. Keys per channel are there once a page is full.
inline void clear_slots(const section_layout& s, std::byte* page, std::size_t first) noexcept {
    if (s.axis == quantization_axis::per_channel) {
        std::memset(page + s.offset, 0, s.bytes());
        for (std::size_t c = 0; c < s.channels; ++c)
            store_channel_metadata(s, page, c, {});
        return;
    }
    for (std::size_t t = first; t < s.tokens; ++t) {
        for (std::size_t c = 0; c < s.channels; ++c)
            store_code(s, page, t, c, 0);
        for (std::size_t g = 0; g < s.groups(); ++g)
            store_metadata(s, page, t, {}, g);
    }
}

// Whether all that kernels read of a page as numbers is finite.
inline bool finite_section(const section_layout& s, const std::byte* page) noexcept {
    const auto halves = [&](std::size_t offset, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) {
            std::uint16_t h = 0;
            std::memcpy(&h, page + offset + 2 * i, 2);
            if ((h & 0x7c00u) == 0x7c00u)
                return false;
        }
        return true;
    };
    if (s.format == kv_format::fp16)
        return halves(s.offset, s.bytes() / 2);
    if (s.format == kv_format::fp32) {
        for (std::size_t i = 0; i < s.bytes() / 4; ++i)
            if (!is_finite(std::bit_cast<float>(load_lane(page + s.offset, i))))
                return false;
        return true;
    }
    const metadata_kind kind = s.traits().metadata;
    const std::size_t n = s.metadata_count();
    return (kind == metadata_kind::none || halves(s.scale_offset, n)) &&
           (kind != metadata_kind::scale_and_minimum || halves(s.minimum_offset, n));
}

// Writing and reading the form. Cache is a cache_state.
struct saved_cache {
    static constexpr std::uint32_t none = (std::numeric_limits<std::uint32_t>::max)();

    // Which pages are saved, by group: their numbers in the file, and their tokens.
    struct page_list {
        buffer<std::uint32_t> place;  // [block] number in the file
        buffer<std::uint32_t> blocks; // [number] block
        buffer<std::uint32_t> tokens; // [number] slots that some sequence uses
    };
    template <class Cache>
    struct saving {
        const Cache& cache;
        std::span<const sequence_id> ids;
        std::unique_ptr<page_list[]> pages; // by group
        saved_sizes sizes;
    };

    template <class Cache>
    static status collect(saving<Cache>& s) noexcept {
        const auto& groups = s.cache.groups();
        s.pages.reset(new (std::nothrow) page_list[groups.size()]);
        if (s.pages == nullptr)
            return no_memory();
        for (const sequence_id id : s.ids) {
            const sequence_state* q = s.cache.find(id);
            if (q == nullptr)
                return stale();
            if (const status agreed = s.cache.agreed(*q); !agreed)
                return agreed;
        }
        const std::size_t page = s.cache.page_tokens();
        for (std::size_t g = 0; g < groups.size(); ++g) {
            page_list& list = s.pages[g];
            if (!list.place.resize(groups[g].pool.capacity(), none))
                return no_memory();
            for (const sequence_id id : s.ids) {
                const sequence_state& q = *s.cache.find(id);
                const block_table& table = q.pages[g].table;
                for (std::size_t p = 0; p < table.pages(); ++p) {
                    const auto at = table.find(p);
                    if (!at)
                        continue;
                    const std::uint32_t block = table.blocks()[*at];
                    const auto used = static_cast<std::uint32_t>((std::min)(page, q.length(0) - p * page));
                    if (list.place[block] == none) {
                        list.place[block] = static_cast<std::uint32_t>(list.blocks.size());
                        if (!list.blocks.try_push_back(block) || !list.tokens.try_push_back(0))
                            return no_memory();
                    }
                    std::uint32_t& tokens = list.tokens[list.place[block]];
                    tokens = (std::max)(tokens, used);
                }
            }
            s.sizes.page_bytes += list.blocks.size() * groups[g].block_bytes;
        }
        s.sizes.page_tokens = static_cast<std::uint32_t>(page);
        s.sizes.layers = static_cast<std::uint32_t>(s.cache.layers());
        s.sizes.groups = static_cast<std::uint32_t>(groups.size());
        s.sizes.sequences = static_cast<std::uint32_t>(s.ids.size());
        const auto nowhere = [](std::span<const std::byte>) { return true; };
        byte_writer counting(nowhere);
        write_tables(s, counting);
        s.sizes.table_bytes = counting.written();
        return {};
    }

    template <class Cache, class Writer>
    static bool write_tables(const saving<Cache>& s, Writer& w) {
        const auto u32 = [](std::size_t n) { return static_cast<std::uint32_t>(n); };
        const auto u64 = [](std::size_t n) { return static_cast<std::uint64_t>(n); };
        const cache_description& d = s.cache.storage.description();
        bool fine = w.number(u64(d.fp16_sinks)) && w.number(u64(d.fp16_window));
        for (std::size_t i = 0; fine && i < d.layers.size(); ++i) {
            const layer_description& l = d.layers[i];
            fine = w.number(u32(l.kv_heads)) && w.number(u32(l.key_dim)) && w.number(u32(l.value_dim)) &&
                   w.number(u32(s.cache.body_of(i).group)) && w.number(u64(l.sliding_window));
            const page_layout& layout = s.cache.body_of(i).layout;
            for (const section_layout* half : {&layout.keys(), &layout.values()}) {
                const format_traits t = half->traits();
                fine = fine && w.number(saved_format(half->format)) &&
                       w.number(static_cast<std::uint8_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits)) &&
                       w.number(saved_axis(half->axis)) && w.number(static_cast<std::uint8_t>(t.metadata));
            }
            for (const vector_codec* c : {&s.cache.planes_of(i).keys, &s.cache.planes_of(i).values})
                fine = fine && w.number(u32(c->recipe.hadamard)) && w.number(c->means_checksum());
            fine = fine && w.number(u32(layout.keys().group_channels)) &&
                   w.number(u32(layout.values().group_channels));
        }
        for (std::size_t g = 0; fine && g < s.cache.groups().size(); ++g)
            fine = w.number(u32(s.pages[g].blocks.size())) && w.number(saved_kind(s.cache.groups()[g].kind));
        for (std::size_t i = 0; fine && i < s.ids.size(); ++i) {
            const sequence_state& q = *s.cache.find(s.ids[i]);
            fine = w.number(u64(q.length(0))) && w.number(std::uint64_t{0}) && // position of the first token
                   w.number(u64(q.committed)) && w.number(u64(q.fp16_from));
            for (std::size_t g = 0; fine && g < s.cache.groups().size(); ++g) {
                const sequence_pages& own = q.pages[g];
                fine = w.number(u64(own.window_from)) && w.number(u32(own.table.holes().size())) &&
                       w.number(u32(own.table.blocks().size()));
                for (const page_hole& h : own.table.holes())
                    fine = fine && w.number(h.first) && w.number(h.last);
                for (const std::uint32_t block : own.table.blocks())
                    fine = fine && w.number(s.pages[g].place[block]);
            }
        }
        return fine;
    }

    template <class Cache, class Sink>
    static status write(const saving<Cache>& s, Sink& sink) noexcept {
        const auto& groups = s.cache.groups();
        buffer<std::byte> part; // a page with slots to clear
        std::size_t largest = 0;
        for (const auto& p : s.cache.storage.planes())
            largest = (std::max)(largest, p.block_bytes);
        if (!part.resize(largest))
            return no_memory();
        byte_writer w(sink);
        bool fine = write_fixed(w, s.sizes) && write_tables(s, w) && w.checksum();
        for (std::size_t g = 0; fine && g < groups.size(); ++g)
            for (std::size_t n = 0; fine && n < s.pages[g].blocks.size(); ++n)
                for (const auto& p : s.cache.storage.planes()) {
                    if (p.group != g || !fine)
                        continue;
                    const std::byte* block = p.block(s.pages[g].blocks[n]);
                    if (const std::size_t used = s.pages[g].tokens[n]; used != s.cache.page_tokens()) {
                        std::memcpy(part.data(), block, p.block_bytes);
                        for (std::size_t h = 0; h < p.kv_heads; ++h)
                            for (const section_layout* each : {&p.layout.keys(), &p.layout.values()})
                                clear_slots(*each, part.data() + h * p.layout.bytes(), used);
                        block = part.data();
                    }
                    fine = w.bytes({block, p.block_bytes});
                }
        if (!fine || !w.checksum())
            return {errc::io_error, "the sink took no more bytes"};
        return {};
    }

    // ---- loading

    // One sequence as its table describes it.
    struct loaded_sequence {
        std::uint64_t length = 0, committed = 0, fp16_from = 0;
    };

    template <class Source>
    static status read_tables(Source& source, saved_sizes& sizes, buffer<std::byte>& tables) noexcept {
        std::array<std::byte, saved_fixed_bytes> fixed;
        if (!source(std::span<std::byte>(fixed)))
            return {errc::truncated, "the bytes end within the fixed part"};
        if (const status s = read_fixed(fixed, sizes); !s)
            return s;
        // as the bytes come: a size that lies ends with them, not with the memory
        constexpr std::size_t step = 65536;
        std::array<std::byte, 4> crc;
        for (std::uint64_t done = 0; done < sizes.table_bytes;) {
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(step, sizes.table_bytes - done));
            if (!tables.resize(static_cast<std::size_t>(done) + n))
                return {errc::out_of_memory, "no memory for the tables"};
            if (!source(std::span<std::byte>(tables.data() + done, n)))
                return {errc::truncated, "the bytes end within the tables"};
            done += n;
        }
        if (!source(std::span<std::byte>(crc)))
            return {errc::truncated, "the bytes end within the tables"};
        if (byte_reader(crc).number<std::uint32_t>() != crc32c(0, tables.view()))
            return {errc::checksum_mismatch, "the tables were changed"};
        return {};
    }

    template <class Cache>
    static status check_shape(const Cache& cache, const saved_sizes& sizes, byte_reader& r) noexcept {
        const cache_description& d = cache.storage.description();
        const auto differs = [](const char* rule, std::size_t layer = no_plane) {
            return status(errc::different_cache, rule,
                          {.layer = layer == no_plane ? -1 : static_cast<std::int64_t>(layer)});
        };
        if (sizes.layers != d.layers.size())
            return differs("another number of layers");
        if (sizes.page_tokens != d.page_tokens)
            return differs("another number of tokens a page");
        if (r.number<std::uint64_t>() != d.fp16_sinks || r.number<std::uint64_t>() != d.fp16_window)
            return differs("other fp16 sinks or window");
        for (std::size_t i = 0; i < d.layers.size(); ++i) {
            const layer_description& l = d.layers[i];
            if (r.number<std::uint32_t>() != l.kv_heads || r.number<std::uint32_t>() != l.key_dim ||
                r.number<std::uint32_t>() != l.value_dim)
                return differs("another number of heads or channels", i);
            const bool same_group = r.number<std::uint32_t>() == cache.body_of(i).group;
            if (r.number<std::uint64_t>() != l.sliding_window || !same_group)
                return differs("another sliding window", i);
            const page_layout& layout = cache.body_of(i).layout;
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
            for (const vector_codec* c : {&cache.planes_of(i).keys, &cache.planes_of(i).values}) {
                const auto hadamard = r.number<std::uint32_t>(), means = r.number<std::uint32_t>();
                if (hadamard != c->recipe.hadamard || means != c->means_checksum())
                    return differs("another rotation, or other means", i);
            }
            const auto key_group = r.number<std::uint32_t>(), value_group = r.number<std::uint32_t>();
            if (key_group != layout.keys().group_channels || value_group != layout.values().group_channels)
                return differs("other groups of channels", i);
        }
        if (sizes.groups != cache.groups().size())
            return differs("another number of page groups");
        return {};
    }

    // Walks the sequences' tables: f(sequence, group, own window_from, holes, blocks) after each check.
    // Everything that loading relies on is checked here.
    template <class Cache>
    static status check_tables(const Cache& cache, const saved_sizes& sizes, byte_reader r,
                               std::span<const std::uint32_t> blocks) noexcept {
        const std::size_t page = cache.page_tokens();
        const status wrong{errc::bad_format, "the tables contradict themselves"};
        buffer<std::uint32_t> users; // whether each page has one
        std::size_t total = 0;
        for (const std::uint32_t n : blocks)
            total += n;
        if (!users.resize(total))
            return no_memory();
        for (std::uint32_t i = 0; i < sizes.sequences; ++i) {
            const auto length = r.number<std::uint64_t>(), base = r.number<std::uint64_t>(),
                       committed = r.number<std::uint64_t>(), fp16_from = r.number<std::uint64_t>();
            if (r.failed() || length > most_tokens || committed > length || fp16_from > length)
                return wrong;
            if (base != 0)
                return {errc::unsupported_version, "positions that begin elsewhere than at zero"};
            const std::uint64_t pages = (length + page - 1) / page;
            std::size_t offset = 0;
            for (std::size_t g = 0; g < cache.groups().size(); offset += blocks[g], ++g) {
                const auto window_from = r.number<std::uint64_t>();
                const auto holes = r.number<std::uint32_t>(), live = r.number<std::uint32_t>();
                if (r.failed() || window_from > pages * page || holes > r.left() / 8)
                    return wrong;
                std::uint64_t dropped = 0, end = 0;
                for (std::uint32_t h = 0; h < holes; ++h) {
                    const std::uint64_t first = r.number<std::uint32_t>(), last = r.number<std::uint32_t>();
                    if (first >= last || last > pages || (h != 0 && first <= end))
                        return wrong;
                    dropped += last - first;
                    end = last;
                }
                const bool open_dropped = length % page != 0 && end == pages && holes != 0;
                if (open_dropped || live + dropped != pages || live > r.left() / 4)
                    return wrong;
                for (std::uint32_t b = 0; b < live; ++b) {
                    const auto number = r.number<std::uint32_t>();
                    if (number >= blocks[g])
                        return wrong;
                    users[offset + number] = 1;
                }
            }
        }
        if (r.failed() || r.left() != 0)
            return wrong;
        for (const std::uint32_t used : users)
            if (used == 0)
                return wrong;
        return {};
    }

    template <class Source>
    static status check_pages(Source& source, std::uint64_t bytes) noexcept {
        std::array<std::byte, 16384> part;
        std::uint32_t crc = 0;
        for (std::uint64_t done = 0; done < bytes;) {
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(part.size(), bytes - done));
            if (!source(std::span<std::byte>(part.data(), n)))
                return {errc::truncated, "the bytes end within the pages"};
            crc = crc32c(crc, {part.data(), n});
            done += n;
        }
        return check_page_crc(source, crc);
    }
    template <class Source>
    static status check_page_crc(Source& source, std::uint32_t crc) noexcept {
        std::array<std::byte, 4> stored;
        if (!source(std::span<std::byte>(stored)))
            return {errc::truncated, "the bytes end within the pages"};
        if (byte_reader(stored).number<std::uint32_t>() != crc)
            return {errc::checksum_mismatch, "the pages were changed"};
        return {};
    }

    // Pages and slots that a load holds until it succeeds.
    template <class Cache>
    struct loading {
        Cache& cache;
        buffer<std::uint32_t> blocks; // by group and number in the file
        buffer<std::uint32_t> counts; // by group
        buffer<std::uint32_t> slots;
        bool done = false;

        explicit loading(Cache& c) noexcept : cache(c) {}
        ~loading() {
            if (done)
                return;
            for (const std::uint32_t slot : slots)
                cache.sequences.cancel(slot);
            std::size_t at = 0;
            for (std::size_t g = 0; g < counts.size(); ++g)
                for (std::uint32_t i = 0; i < counts[g]; ++i)
                    cache.pool(g).release(blocks[at++]);
        }
    };

    template <class Cache, class Source>
    static result<std::size_t> load(Cache& cache, Source& source, std::span<sequence_id> out) noexcept {
        saved_sizes sizes;
        buffer<std::byte> tables;
        if (const status s = read_tables(source, sizes, tables); !s)
            return s;
        byte_reader r(tables.view());
        if (const status s = check_shape(cache, sizes, r); !s)
            return s;
        const auto& groups = cache.groups();
        buffer<std::uint32_t> counts;
        std::uint64_t bytes = 0;
        for (std::size_t g = 0; g < groups.size(); ++g) {
            const auto n = r.template number<std::uint32_t>();
            if (r.template number<std::uint32_t>() != saved_kind(groups[g].kind))
                return status{errc::different_cache, "other fp16 copies or open pages"};
            if (n > groups[g].pool.capacity())
                return exhausted();
            if (!counts.try_push_back(n))
                return no_memory();
            bytes += std::uint64_t{n} * groups[g].block_bytes;
        }
        if (bytes != sizes.page_bytes)
            return status{errc::bad_format, "the tables contradict themselves"};
        if (const status s = check_tables(cache, sizes, r, counts.view()); !s)
            return s;
        if (sizes.sequences > out.size())
            return status{errc::shape_mismatch, "more sequences were saved than there are handles for"};
        if constexpr (requires { source.rewind(); }) {
            if (const status s = check_pages(source, bytes); !s)
                return s;
            saved_sizes again;
            buffer<std::byte> same;
            if (!source.rewind())
                return status{errc::io_error, "the source does not rewind"};
            if (const status s = read_tables(source, again, same); !s)
                return s;
            if (same.size() != tables.size() || std::memcmp(same.data(), tables.data(), same.size()) != 0)
                return status{errc::checksum_mismatch, "the source changed while it was read"};
        }
        return load_checked(cache, source, sizes, r, std::move(counts), out);
    }

    template <class Cache, class Source>
    static result<std::size_t> load_checked(Cache& cache, Source& source, const saved_sizes& sizes,
                                            byte_reader r, buffer<std::uint32_t> counts,
                                            std::span<sequence_id> out) noexcept {
        loading<Cache> held(cache);
        std::size_t total = 0;
        for (const std::uint32_t n : counts)
            total += n;
        if (!held.blocks.reserve(total) || !held.counts.reserve(counts.size()) ||
            !held.slots.reserve(sizes.sequences))
            return no_memory();
        // slots with room for their tables: nothing fails any more once the pages are read
        byte_reader ahead = r;
        for (std::uint32_t i = 0; i < sizes.sequences; ++i) {
            const auto slot = cache.new_slot();
            if (!slot)
                return slot.reason();
            held.slots.push_back(*slot);
            sequence_state& q = cache.sequences.object(*slot);
            skip(ahead, 4);
            for (std::size_t g = 0; g < counts.size(); ++g) {
                skip(ahead, 1);
                const auto holes = ahead.template number<std::uint32_t>(),
                           live = ahead.template number<std::uint32_t>();
                if (!q.pages[g].table.reserve(live) || !q.pages[g].table.reserve_holes(holes))
                    return no_memory();
                skip(ahead, holes);
                for (std::uint32_t b = 0; b < live; ++b)
                    ahead.template number<std::uint32_t>();
            }
        }
        for (std::size_t g = 0; g < counts.size(); ++g) {
            const std::size_t first = held.blocks.size();
            held.blocks.set_size(first + counts[g]);
            if (!cache.take(g, {held.blocks.data() + first, counts[g]})) {
                held.blocks.set_size(first);
                return exhausted();
            }
            held.counts.push_back(counts[g]);
        }
        if (const status s = read_pages(cache, source, held); !s)
            return s;

        buffer<std::uint32_t>& blocks = held.blocks;
        for (std::uint32_t i = 0; i < sizes.sequences; ++i) {
            sequence_state& q = cache.sequences.object(held.slots[i]);
            const auto length = static_cast<std::size_t>(r.template number<std::uint64_t>());
            skip(r, 1);
            q.committed = static_cast<std::size_t>(r.template number<std::uint64_t>());
            q.fp16_from = static_cast<std::size_t>(r.template number<std::uint64_t>());
            for (std::size_t layer = 0; layer < cache.layers(); ++layer)
                q.set_length(layer, length);
            std::size_t offset = 0;
            for (std::size_t g = 0; g < counts.size(); offset += counts[g], ++g) {
                sequence_pages& own = q.pages[g];
                own.window_from = static_cast<std::size_t>(r.template number<std::uint64_t>());
                const auto holes = r.template number<std::uint32_t>(),
                           live = r.template number<std::uint32_t>();
                byte_reader hole = r;
                skip(r, holes);
                page_hole next{none, none};
                std::uint32_t left = holes;
                const auto next_hole = [&] {
                    next = {none, none};
                    if (left != 0) {
                        next.first = hole.template number<std::uint32_t>();
                        next.last = hole.template number<std::uint32_t>();
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
                    const std::uint32_t block = blocks[offset + r.template number<std::uint32_t>()];
                    cache.pool(g).retain(block);
                    own.table.push_back(block);
                    ++b;
                }
                Cache::note_dropped(q, g);
            }
        }
        // the references of the load itself
        std::size_t at = 0;
        for (std::size_t g = 0; g < counts.size(); ++g)
            for (std::uint32_t n = 0; n < counts[g]; ++n)
                cache.pool(g).release(blocks[at++]);
        for (std::uint32_t i = 0; i < sizes.sequences; ++i)
            out[i] = cache.sequences.publish(held.slots[i]);
        held.done = true;
        return static_cast<std::size_t>(sizes.sequences);
    }

    template <class Cache, class Source>
    static status read_pages(Cache& cache, Source& source, const loading<Cache>& held) noexcept {
        std::uint32_t crc = 0;
        std::size_t at = 0;
        for (std::size_t g = 0; g < held.counts.size(); ++g)
            for (std::uint32_t n = 0; n < held.counts[g]; ++n, ++at)
                for (auto& p : cache.storage.planes()) {
                    if (p.group != g)
                        continue;
                    std::byte* block = p.block(held.blocks[at]);
                    if (!source(std::span<std::byte>(block, p.block_bytes)))
                        return {errc::truncated, "the bytes end within the pages"};
                    crc = crc32c(crc, {block, p.block_bytes});
                    for (std::size_t h = 0; h < p.kv_heads; ++h)
                        for (const section_layout* each : {&p.layout.keys(), &p.layout.values()})
                            if (!finite_section(*each, block + h * p.layout.bytes()))
                                return {errc::non_finite,
                                        "saved pages hold finite numbers",
                                        {.layer = static_cast<std::int64_t>(p.layer)}};
                }
        return check_page_crc(source, crc);
    }

    static void skip(byte_reader& r, std::size_t numbers) noexcept {
        for (std::size_t i = 0; i < numbers; ++i)
            r.number<std::uint64_t>();
    }
};

} // namespace kv1::inline KV1_ABI::detail
