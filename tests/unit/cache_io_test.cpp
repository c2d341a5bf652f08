// SPDX-License-Identifier: Apache-2.0
//
// Saving, loading and swapping, but for files: the same to the bit, and everything that can be wrong with the bytes.
#include "compare.hpp"
#include "failing_new.hpp"
#include "random.hpp"
#include "recording_allocator.hpp"
#include "saved_bytes.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_io.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <span>
#include <string>
#include <vector>

using kv1::errc;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1::sequence_id;

namespace {

using bytes = kv1_test::saved_bytes;
using places = kv1_test::saved_places;
using kv1_test::number_at, kv1_test::one_way, kv1_test::reseal, kv1_test::reseal_fixed,
    kv1_test::write_number;

kv1::cache_description described() {
    kv1::cache_description d;
    d.layers = {{2, 8, 6, kv_format::affine2, kv_format::affine4},
                {1, 5, 7, kv_format::fp16, kv_format::scaled_binary},
                {1, 8, 8, kv_format::affine3, kv_format::fp32, 30}};
    d.capacity_tokens = 256;
    d.page_tokens = 16;
    d.fp16_sinks = 2;
    d.fp16_window = 9;
    return d;
}

void append(kv_cache& cache, sequence_id id, std::size_t n, std::uint64_t seed) {
    kv1_test::generator g(seed);
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const kv1::layer_description& l = cache.description().layers[layer];
        const std::vector<float> k = kv1_test::normal_values(g, n * l.kv_heads * l.key_dim),
                                 v = kv1_test::normal_values(g, n * l.kv_heads * l.value_dim);
        cache.append(id, layer, {k.data(), n, l.kv_heads, l.key_dim}, {v.data(), n, l.kv_heads, l.value_dim});
    }
}

// Outputs of attention in every layer: they see fp16 copies as well.
std::vector<float> attention(const kv_cache& cache, sequence_id id) {
    std::vector<float> all;
    kv1_test::generator g(5);
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const kv1::layer_description& l = cache.description().layers[layer];
        const std::vector<float> q = kv1_test::normal_values(g, 2 * l.kv_heads * l.key_dim);
        std::vector<float> out(2 * l.kv_heads * l.value_dim);
        cache.attend(id, layer, {q.data(), 1, 2 * l.kv_heads, l.key_dim},
                     {out.data(), 1, 2 * l.kv_heads, l.value_dim});
        all.insert(all.end(), out.begin(), out.end());
    }
    return all;
}

bytes saved(const kv_cache& cache, std::span<const sequence_id> ids, const kv1::save_options& options = {}) {
    const bytes b = kv1_test::try_saved(cache, ids, options).value();
    REQUIRE(b.size() == kv1::saved_bytes(cache, ids, options));
    return b;
}

// Three sequences: a fork with a longer original, dropped pages, what a window gave up; and an empty one.
struct world {
    kv_cache cache{described()};
    std::vector<sequence_id> ids;
    world() {
        const sequence_id a = cache.create_sequence();
        append(cache, a, 60, 1);
        cache.commit(a);
        cache.drop_pages(a, 1, 1);
        const sequence_id b = cache.fork(a);
        append(cache, a, 7, 2);
        append(cache, b, 1, 3);
        ids = {a, b, cache.create_sequence()};
    }
};

} // namespace

TEST_CASE("the checksum is CRC-32C", "[io]") {
    const std::string digits = "123456789";
    REQUIRE(kv1::detail::crc32c(0, std::as_bytes(std::span(digits))) == 0xe3069283u);
    REQUIRE(kv1::detail::crc32c(0, {}) == 0);
    const bytes zeros(32);
    REQUIRE(kv1::detail::crc32c(0, zeros) == 0x8a9136aau); // RFC 3720
    for (std::size_t cut = 0; cut <= zeros.size(); ++cut)
        REQUIRE(kv1::detail::crc32c(kv1::detail::crc32c(0, std::span(zeros).first(cut)),
                                    std::span(zeros).subspan(cut)) == 0x8a9136aau);
}

TEST_CASE("what is loaded is what was saved, sharing included, from memory and from a pipe", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    for (const bool rewinds : {true, false}) {
        kv_cache fresh(described());
        std::vector<sequence_id> ids(3);
        if (rewinds)
            REQUIRE(kv1::load(fresh, kv1::memory_source(b), ids) == 3);
        else
            REQUIRE(kv1::load(fresh, one_way{b}, ids) == 3);
        fresh.validate();
        REQUIRE(fresh.statistics().pages_in_use == w.cache.statistics().pages_in_use);
        REQUIRE(fresh.statistics().bytes_shared == w.cache.statistics().bytes_shared);
        for (std::size_t i = 0; i < 2; ++i) {
            REQUIRE(fresh.length(ids[i]) == w.cache.length(w.ids[i]));
            REQUIRE(kv1_test::same_bits(attention(fresh, ids[i]), attention(w.cache, w.ids[i])));
            std::vector<float> x(8);
            REQUIRE(fresh.try_read(ids[i], 0, kv_side::key, 0, 20, 1, x).code() == errc::dropped_tokens);
        }
        REQUIRE(fresh.length(ids[2]) == 0);
        REQUIRE(saved(fresh, ids) == b);
        // and it goes on alike
        kv_cache& original = const_cast<kv_cache&>(w.cache);
        const sequence_id twin = original.fork(w.ids[1]);
        append(original, twin, 20, 9);
        append(fresh, ids[1], 20, 9);
        REQUIRE(kv1_test::same_bits(attention(fresh, ids[1]), attention(original, twin)));
        fresh.rollback(ids[1]);
        REQUIRE(fresh.length(ids[1]) == 60);
        original.destroy_sequence(twin);
    }
}

TEST_CASE("equal sequences give equal bytes, whatever they went through", "[io]") {
    kv1::cache_description d = described();
    d.fp16_sinks = d.fp16_window = 0; // a cut changes which copies there are
    kv_cache a(d), b(d);
    const sequence_id straight = a.create_sequence(), detour = b.create_sequence();
    append(a, straight, 20, 1);
    append(b, detour, 20, 1);
    append(b, detour, 45, 2);
    b.truncate(detour, 20);
    REQUIRE(saved(a, {&straight, 1}) == saved(b, {&detour, 1})); // nothing of the cut tokens is left
}

TEST_CASE("a sequence swapped out and in is the same", "[io]") {
    world w;
    const std::vector<float> before = attention(w.cache, w.ids[0]);
    bytes memory(kv1::saved_bytes(w.cache, {w.ids.data(), 1}));
    REQUIRE(kv1::try_swap_out(w.cache, w.ids[0], std::span(memory).first(memory.size() - 1)).code() ==
            errc::shape_mismatch);
    REQUIRE(w.cache.contains(w.ids[0]));
    kv1::swap_out(w.cache, w.ids[0], memory);
    REQUIRE_FALSE(w.cache.contains(w.ids[0]));
    const sequence_id back = kv1::swap_in(w.cache, memory);
    REQUIRE(kv1_test::same_bits(attention(w.cache, back), before));
    w.cache.validate();
    REQUIRE(kv1::try_swap_in(w.cache, std::span(memory).first(10)).code() == errc::truncated);
    REQUIRE(kv1::try_swap_in(w.cache, saved(w.cache, {})).code() == errc::bad_format);
    const bytes two = saved(w.cache, std::vector<sequence_id>{back, w.ids[1]});
    REQUIRE(kv1::try_swap_in(w.cache, two).code() == errc::shape_mismatch);
}

TEST_CASE("a sequence within a step can not be saved", "[io]") {
    world w;
    const std::vector<float> x(16, 1.0f);
    w.cache.append(w.ids[0], 0, {x.data(), 1, 2, 8}, {x.data(), 1, 2, 6});
    REQUIRE(kv1::try_saved_bytes(w.cache, w.ids).code() == errc::layers_disagree);
    w.cache.destroy_sequence(w.ids[0]);
    REQUIRE(kv1::try_saved_bytes(w.cache, w.ids).code() == errc::invalid_sequence);
    const kv1::status refused =
        kv1::try_save(w.cache, {&w.ids[1], 1}, [](std::span<const std::byte>) { return false; });
    REQUIRE(refused.code() == errc::io_error);
}

TEST_CASE("every cut of the bytes is found, and leaves the cache as it was", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    for (std::size_t n = 0; n < b.size(); n += n < 1500 ? 1 : 97) {
        REQUIRE(kv1::try_load(fresh, kv1::memory_source(std::span(b).first(n)), ids).code() ==
                errc::truncated);
        REQUIRE(kv1::try_load(fresh, one_way{std::span(b).first(n)}, ids).code() == errc::truncated);
        REQUIRE(fresh.statistics().pages_in_use == 0);
        REQUIRE(fresh.statistics().sequences == 0);
    }
    fresh.validate();
}

TEST_CASE("every flipped bit is found, and leaves the cache as it was", "[io]") {
    const world w;
    bytes b = saved(w.cache, w.ids);
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    kv1_test::tally t;
    for (std::size_t i = 0; i < b.size(); i += i < 1200 ? 1 : 61) {
        const std::byte bit = std::byte{1} << i % 8;
        b[i] ^= bit;
        const errc code = kv1::try_load(fresh, kv1::memory_source(b), ids).code();
        const errc expected = i < 8    ? errc::bad_format
                              : i < 12 ? errc::unsupported_version
                                       : errc::checksum_mismatch;
        t.expect(code == expected, "byte", i, "gives", to_string(code));
        t.expect(kv1::try_load(fresh, one_way{b}, ids).code() == expected, "pipe, byte", i);
        b[i] ^= bit;
    }
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(fresh.statistics().pages_in_use == 0);
    fresh.validate();
    REQUIRE(kv1::load(fresh, kv1::memory_source(b), ids) == 3);
}

TEST_CASE("tables that lie under right checksums are refused, whatever they say", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    const std::size_t tables = number_at(b, places::table_size, 8);
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    kv1_test::generator g(1);
    std::size_t refused = 0;
    for (std::size_t at = 12; at < places::fixed_part + tables; ++at)
        for (const unsigned value : {0u, 1u, 0x7fu, 0x80u, 0xffu, static_cast<unsigned>(g.below(256))}) {
            bytes lie = b;
            if (std::to_integer<unsigned>(lie[at]) == value ||
                (at >= places::fixed_checksum && at < places::fixed_part))
                continue;
            lie[at] = static_cast<std::byte>(value);
            const bool moved = at >= places::table_size && at < places::table_size + 8;
            if (!moved)
                reseal(lie);
            else
                reseal_fixed(lie);
            const auto loaded = kv1::try_load(fresh, kv1::memory_source(lie), ids);
            REQUIRE((loaded || loaded.code() == errc::bad_format || loaded.code() == errc::different_cache ||
                     loaded.code() == errc::different_model || loaded.code() == errc::truncated ||
                     loaded.code() == errc::checksum_mismatch || loaded.code() == errc::unsupported_version ||
                     loaded.code() == errc::capacity_exceeded || loaded.code() == errc::shape_mismatch ||
                     loaded.code() == errc::out_of_memory));
            fresh.validate(); // a lie may be possible, never harmful
            if (loaded)
                for (std::size_t i = 0; i < *loaded; ++i) {
                    if (fresh.length(ids[i]) != 0)
                        attention(fresh, ids[i]);
                    append(fresh, ids[i], 1, 1);
                    fresh.destroy_sequence(ids[i]);
                }
            refused += loaded ? 0u : 1u;
            REQUIRE(fresh.statistics().pages_in_use == 0);
        }
    REQUIRE(refused > tables);
}

TEST_CASE("hostile sizes are refused before memory is taken for them", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    for (const std::size_t at : {places::table_size, places::page_size})
        for (const std::uint64_t size : {~std::uint64_t{0}, std::uint64_t{1} << 62, std::uint64_t{1} << 40}) {
            bytes lie = b;
            write_number(lie, at, size, 8);
            reseal_fixed(lie);
            const errc code = kv1::try_load(fresh, kv1::memory_source(lie), ids).code();
            REQUIRE(code == (at == places::table_size ? errc::truncated : errc::bad_format));
        }
}

TEST_CASE("a cache of another shape is named by what differs and where", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    const auto refused = [&](const kv1::cache_description& d, std::int64_t layer) {
        kv_cache other(d);
        std::vector<sequence_id> ids(3);
        const auto loaded = kv1::try_load(other, kv1::memory_source(b), ids);
        REQUIRE(loaded.code() == errc::different_cache);
        INFO(loaded.reason().message());
        REQUIRE(loaded.reason().where().layer == layer);
        REQUIRE(other.statistics().pages_in_use == 0);
    };
    kv1::cache_description d = described();
    d.layers[1].key_dim = 6;
    refused(d, 1);
    d = described();
    d.layers[0].kv_heads = 1;
    refused(d, 0);
    d = described();
    d.layers[2].key_format = kv_format::affine4;
    refused(d, 2);
    d = described();
    d.layers[2].sliding_window = 31;
    refused(d, 2);
    d = described();
    d.page_tokens = 32;
    refused(d, -1);
    d = described();
    d.fp16_window = 10;
    refused(d, -1);
    d = described();
    d.layers.pop_back();
    refused(d, -1);
}

TEST_CASE("metadata by groups of channels are saved, and others are named", "[io]") {
    kv1::layer_description l{1, 64, 96, kv_format::affine2, kv_format::compact3};
    l.key_group = l.value_group = 32;
    kv_cache cache(kv1::uniform_cache(1, l, 128, 16));
    const sequence_id id = cache.create_sequence();
    append(cache, id, 21, 1);
    const bytes b = saved(cache, {&id, 1});
    sequence_id out;
    REQUIRE(kv1::try_load(cache, kv1::memory_source(b), {&out, 1}));
    std::vector<float> before(21 * 96), after(before.size());
    cache.read(id, 0, kv1::kv_side::value, 0, 0, 21, before);
    cache.read(out, 0, kv1::kv_side::value, 0, 0, 21, after);
    REQUIRE(kv1_test::same_bits(before, after));
    for (std::size_t kv1::layer_description::*group :
         {&kv1::layer_description::key_group, &kv1::layer_description::value_group}) {
        kv1::layer_description other = l;
        other.*group = 0;
        kv_cache stranger(kv1::uniform_cache(1, other, 64, 16));
        const auto loaded = kv1::try_load(stranger, kv1::memory_source(b), {&out, 1});
        REQUIRE(loaded.code() == errc::different_cache);
        REQUIRE(loaded.reason().where().layer == 0);
    }
    bytes lie = b; // of the last group's last array, which is padded by nothing
    write_number(lie,
                 b.size() - 4 - cache.layout(0).bytes() + cache.layout(0).values().scale_offset +
                     (2 * 16 + 3) * 2,
                 0x7c01, 2);
    reseal(lie);
    REQUIRE(kv1::try_load(cache, kv1::memory_source(lie), {&out, 1}).code() == errc::non_finite);
}

TEST_CASE("stored numbers that are none are refused, though the checksums are right", "[io]") {
    kv_cache cache(kv1::uniform_cache(1, {1, 16, 16}, 64, 16));
    const sequence_id id = cache.create_sequence();
    append(cache, id, 16, 1);
    const bytes b = saved(cache, {&id, 1});
    const std::size_t page = b.size() - 4 - cache.layout(0).bytes();
    const kv1::page_layout& l = cache.layout(0);
    for (const std::size_t offset : {l.keys().scale_offset, l.keys().minimum_offset, l.values().scale_offset,
                                     l.values().minimum_offset}) {
        bytes lie = b;
        write_number(lie, page + offset + 6, 0x7c01, 2); // a NaN
        reseal(lie);
        sequence_id out;
        REQUIRE(kv1::try_load(cache, kv1::memory_source(lie), {&out, 1}).code() == errc::non_finite);
        REQUIRE(cache.statistics().pages_in_use == 1);
    }
}

TEST_CASE("a pipe whose bytes were changed is corrupt, whatever the changed bytes mean", "[io]") {
    kv_cache cache(kv1::uniform_cache(2, {1, 16, 16}, 64, 16));
    const sequence_id id = cache.create_sequence();
    append(cache, id, 20, 1);
    const bytes b = saved(cache, {&id, 1});
    const std::size_t page = b.size() - 4 - cache.layout(0).bytes();
    bytes changed = b;
    write_number(changed, page + cache.layout(0).keys().scale_offset + 2, 0x7c00, 2); // an infinity
    sequence_id out;
    REQUIRE(kv1::try_load(cache, one_way{changed}, {&out, 1}).code() == errc::checksum_mismatch);
    reseal(changed); // whoever wrote it meant it
    const auto loaded = kv1::try_load(cache, one_way{changed}, {&out, 1});
    REQUIRE(loaded.code() == errc::non_finite);
    REQUIRE(loaded.reason().where().layer == 1);
    REQUIRE(cache.statistics().pages_in_use == 2);
}

TEST_CASE("a stream may hold more than what was saved; a source that knows its end may not", "[io]") {
    const world w;
    bytes b = saved(w.cache, w.ids);
    const std::size_t once = b.size();
    b.insert(b.end(), b.begin(), b.end());
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    one_way stream{b};
    REQUIRE(kv1::load(fresh, stream, ids) == 3);
    REQUIRE(stream.left.size() == once); // and the next save follows
    REQUIRE(kv1::load(fresh, stream, ids) == 3);
    REQUIRE(stream.left.empty());
    REQUIRE(kv1::load(fresh, kv1::memory_source(b), ids) == 3);

    struct ending : one_way {
        [[nodiscard]] bool at_end() const noexcept { return left.empty(); }
    };
    kv_cache strict(described());
    REQUIRE(kv1::try_load(strict, ending{{b}}, ids).code() == errc::bad_format);
    REQUIRE(strict.statistics().sequences == 0);
    strict.validate();
    REQUIRE(kv1::load(strict, ending{{std::span(b).first(once)}}, ids) == 3);
}

TEST_CASE("what a model's cache held is loaded by that model", "[io]") {
    world w;
    const kv1::model_fingerprint model = kv1::fingerprint_of("a model"),
                                 other = kv1::fingerprint_of("another");
    const bytes named = saved(w.cache, w.ids, {.model = model}), nameless = saved(w.cache, w.ids);
    kv_cache fresh(described());
    std::vector<sequence_id> ids(3);
    const auto refused = [&](const bytes& b, const kv1::model_fingerprint& mine) {
        const auto loaded = kv1::try_load(fresh, kv1::memory_source(b), ids, {.model = mine});
        REQUIRE(loaded.code() == errc::different_model);
        REQUIRE(fresh.statistics().pages_in_use == 0);
        return std::string(loaded.reason().rule());
    };
    // three mistakes, three sentences
    const std::string wrong = refused(named, other), unasked = refused(named, {}),
                      unknown = refused(nameless, model);
    REQUIRE((wrong != unasked && unasked != unknown && unknown != wrong));
    REQUIRE(kv1::try_swap_in(fresh, named).code() == errc::different_model);
    REQUIRE(kv1::load(fresh, kv1::memory_source(named), ids, {.model = model}) == 3);
    REQUIRE(saved(fresh, ids, {.model = model}) == named);
    // another shape of another model: the model is what is said
    kv1::cache_description d = described();
    d.layers.pop_back();
    kv_cache smaller(d);
    REQUIRE(kv1::try_load(smaller, kv1::memory_source(named), ids, {.model = other}).code() ==
            errc::different_model);
}

TEST_CASE("a fingerprint is the same everywhere, and another for every change", "[io]") {
    const auto hex = [](const kv1::model_fingerprint& f) {
        std::string text;
        for (const std::uint8_t b : f.bytes)
            for (const int digit : {b >> 4, b & 15})
                text += "0123456789abcdef"[digit];
        return text;
    };
    // it is stored: no version may change it
    REQUIRE(hex(kv1::fingerprint_of("")) ==
            "6f848caa6bd2eb0acbf154495d4ce911d74819300f94a891c8ae268f0140e08c");
    REQUIRE(hex(kv1::fingerprint_of("The quick brown fox jumps over the lazy dog")) ==
            "f9744b5c7463a64303da761fe77e21e7cdb174aea91f809ece6c5733bd0e8f87");
    REQUIRE(hex(kv1::fingerprint_of(std::string(32, 'x'))) ==
            "4676780a2b51aa4412104d436e144042a5f2950a734636feba9d1c586d0807e8");
    REQUIRE(hex(kv1::fingerprint_of("b", kv1::fingerprint_of("a"))) ==
            "f45698cf6b4040d2f1d60b6d9beca8f19262b8099b7fa730b44c5249664a86f9");
    static_assert(kv1::model_fingerprint{}.empty());
    static_assert(!kv1::fingerprint_of("a").empty());

    std::vector<kv1::model_fingerprint> seen;
    for (std::size_t n = 0; n < 100; ++n) // lengths, single bits, and orders
        seen.push_back(kv1::fingerprint_of(bytes(n)));
    for (std::size_t i = 0; i < 70 * 8; ++i) {
        bytes b(70);
        b[i / 8] = std::byte{1} << i % 8;
        seen.push_back(kv1::fingerprint_of(b));
    }
    seen.push_back(kv1::fingerprint_of("a", kv1::fingerprint_of("b")));
    seen.push_back(kv1::fingerprint_of("b", kv1::fingerprint_of("a")));
    std::sort(seen.begin(), seen.end(), [](const auto& a, const auto& b) { return a.bytes < b.bytes; });
    REQUIRE(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
}

TEST_CASE("a load that finds no room leaves the cache as it was", "[io]") {
    const world w;
    const bytes b = saved(w.cache, w.ids);
    kv1::cache_description d = described();
    d.capacity_tokens = 96;
    kv_cache small(d);
    const sequence_id there = small.create_sequence();
    append(small, there, 40, 1);
    const std::vector<float> before = attention(small, there);
    std::vector<sequence_id> ids(3);
    REQUIRE(kv1::try_load(small, kv1::memory_source(b), ids).code() == errc::capacity_exceeded);
    REQUIRE(kv1::try_load(small, kv1::memory_source(b), std::span(ids).first(2)).code() ==
            errc::shape_mismatch);
    REQUIRE(kv1_test::same_bits(attention(small, there), before));
    REQUIRE(small.statistics().sequences == 1);
    small.validate();
}

TEST_CASE("operator new that fails anywhere in saving and loading leaves no trace", "[io]") {
    world w;
    const bytes b = saved(w.cache, w.ids);
    std::vector<sequence_id> ids(3);
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        kv_cache fresh(described());
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            code = kv1::try_load(fresh, kv1::memory_source(b), ids).code();
            failed = failing.failed();
        }
        fresh.validate();
        REQUIRE(code == (failed ? errc::out_of_memory : errc::ok));
        REQUIRE(fresh.statistics().sequences == (failed ? 0u : 3u));
        REQUIRE((failed ? fresh.statistics().pages_in_use == 0 : fresh.statistics().pages_in_use != 0));
        if (!failed)
            break;
        ++failures;
    }
    REQUIRE(failures >= 10);
    bytes memory(b.size());
    failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            code = kv1::try_swap_out(w.cache, w.ids[0], memory).code();
            failed = failing.failed();
        }
        if (!failed) {
            REQUIRE(code == errc::ok);
            break;
        }
        REQUIRE(code == errc::out_of_memory);
        REQUIRE(w.cache.contains(w.ids[0]));
        ++failures;
    }
    REQUIRE(failures >= 4);
}
