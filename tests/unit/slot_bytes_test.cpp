// SPDX-License-Identifier: Apache-2.0
//
// A slot's bytes: exported and imported, copied and moved, in memory that the caller lends, and hostile ones.
#include "../fuzz/slots_body.hpp"
#include "slot_stores.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/slot_store.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <vector>

namespace {

using namespace kv1_test::slots;
using kv1::kv_side;
using kv1::slot_mask;
using kv1::slot_stream;
using kv1::slot_view;
using kv1_test::generator;
using kv1_test::numbers_from;
using kv1_test::slot_vectors;

} // namespace

TEST_CASE("exports put slots back as they were, codes and fp16 copies", "[slots]") {
    generator g(4105);
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(name_of(l));
        kv1::slot_store_description d = one_layer(l, 4 * page);
        d.fp16_slots = 32;
        kv1::slot_store store(d);
        const slot_vectors x(g, l, 30);
        const std::vector<std::uint32_t> slots = kv1_test::shuffled(g, numbers_from(17, 30));
        store.write(0, slots, kv1_test::positions_by_slot(slots), x.key_view(0, 30), x.value_view(0, 30));
        const bool copies = store.fp16_slots_in_use(0) != 0;
        REQUIRE(copies == (l.key_format != kv1::kv_format::fp16));
        const contents before(store);
        std::vector<std::byte> raw(30 * store.raw_bytes(0));
        std::vector<kv1::float16> halves(30 * store.fp16_numbers(0));
        store.export_raw(0, slots, raw);
        if (copies)
            store.export_fp16(0, slots, halves);
        store.clear();
        REQUIRE(contents(store) == contents(kv1::slot_store(d)));
        store.import_raw(0, slots, raw);
        REQUIRE(store.fp16_slots_in_use(0) == 0);
        if (copies)
            store.import_fp16(0, slots, halves);
        REQUIRE(contents(store) == before);
        store.clear(0, slots);
        REQUIRE(contents(store) == contents(kv1::slot_store(d)));
    }
}

TEST_CASE("raw bytes with numbers that are not finite are refused, and nothing changes", "[slots]") {
    generator g(4106);
    kv1::slot_store store(one_layer({kv_heads, 64, 64}, 2 * page));
    const slot_vectors x(g, store.description().layers[0], 5);
    store.write(0, numbers_from(3, 5), x.key_view(0, 5), x.value_view(0, 5));
    REQUIRE(store.raw_bytes(0) == kv_heads * 2 * (16 + 4));
    std::vector<std::byte> raw(2 * store.raw_bytes(0));
    store.export_raw(0, numbers_from(3, 2), raw);
    const contents before(store);
    raw[store.raw_bytes(0) + 40 + 17] =
        std::byte{0x7c}; // slot 1, KV head 1, the key's scale: infinity or NaN
    const kv1::status s = store.try_import_raw(0, numbers_from(10, 2), raw);
    REQUIRE(s.code() == kv1::errc::non_finite);
    REQUIRE(s.where().token == 1);
    REQUIRE(s.where().kv_head == 1);
    REQUIRE(contents(store) == before);
    REQUIRE(store.try_import_raw(0, numbers_from(10, 1), raw).code() == kv1::errc::shape_mismatch);
    REQUIRE(store.try_import_raw(0, std::vector<std::uint32_t>{10, 10}, raw).code() ==
            kv1::errc::invalid_argument);
    REQUIRE(store.try_import_raw(0, std::vector<std::uint32_t>{10, 64}, raw).code() ==
            kv1::errc::out_of_range);
    REQUIRE(contents(store) == before);
}

TEST_CASE("slots are copied and moved as if all were read before any is written", "[slots]") {
    generator g(4107);
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(name_of(l));
        kv1::slot_store_description d = one_layer(l, 6 * page);
        d.fp16_slots = 64;
        for (const bool moves : {false, true})
            for (const bool pages : {false, true}) {
                kv1::slot_store store(d);
                const slot_vectors x(g, l, 40);
                const std::vector<std::uint32_t> written = numbers_from(20, 40);
                store.write(0, written, kv1_test::positions_by_slot(written), x.key_view(0, 40),
                            x.value_view(0, 40));
                store.release_fp16(numbers_from(30, 20));
                // overlapping runs, or pages 1 and 0 to 4 and 3
                std::vector<std::uint32_t> from = numbers_from(22, 30), to = numbers_from(25, 30);
                if (pages) {
                    from = numbers_from(page, page);
                    to = numbers_from(4 * page, page);
                    for (std::uint32_t s = 0; s < page; ++s) {
                        from.push_back(s);
                        to.push_back(static_cast<std::uint32_t>(3 * page) + s);
                    }
                }
                const contents before(store);
                const std::size_t raw = store.raw_bytes(0);
                std::vector<std::byte> expected(before.bytes);
                std::vector<bool> copied(before.copied);
                std::vector<float> read(before.read);
                if (moves)
                    for (const std::uint32_t s : from)
                        copied[s] = false;
                for (std::size_t i = 0; i < from.size(); ++i) {
                    std::copy_n(before.bytes.begin() + static_cast<std::ptrdiff_t>(from[i] * raw), raw,
                                expected.begin() + static_cast<std::ptrdiff_t>(to[i] * raw));
                    copied[to[i]] = before.copied[from[i]];
                }
                if (moves)
                    store.move(0, from, to);
                else
                    store.copy(0, from, to);
                const contents after(store);
                REQUIRE(after.bytes == expected);
                REQUIRE(after.copied == copied);
                for (std::size_t i = 0; i < from.size(); ++i)
                    REQUIRE(after.positions[to[i]] == before.positions[from[i]]);
                const std::vector<std::uint32_t> all = numbers_from(0, store.slots());
                std::vector<float> row(l.key_dim);
                for (std::size_t i = 0; i < from.size(); ++i) { // copies go along
                    store.read(0, kv_side::key, 1, std::span(to).subspan(i, 1), row);
                    REQUIRE(std::equal(row.begin(), row.end(),
                                       before.read.begin() + static_cast<std::ptrdiff_t>(
                                                                 (store.slots() + from[i]) * l.key_dim)));
                }
            }
    }
}

TEST_CASE("slots lie in memory that the caller lends, and are found there again", "[slots]") {
    generator g(4110);
    kv1::slot_store_description turning = one_layer(layers().back(), 3 * page + 1);
    kv1::slot_store_description d = one_layer({kv_heads, 64, 64}, 3 * page + 1);
    const std::size_t bytes = kv1::slot_memory_bytes(d, 0);
    REQUIRE(bytes == 5 * kv_heads * page * 40);
    REQUIRE(kv1::slot_memory_bytes(turning, 0) == 5 * page * (kv_heads * (26 + 18) + 4));
    struct alignas(64) line {
        std::byte bytes[64];
    };
    // whatever was there before is neither seen nor attended to
    std::vector<line> lines(bytes / 64);
    std::memset(lines.data(), 0xff, bytes);
    const kv1::slot_memory memory{{lines[0].bytes, bytes}, false};
    const slot_vectors x(g, d.layers[0], 20);
    const std::vector<float> q = kv1_test::normal_values(g, heads * 64);
    const slot_stream stream{1, slot_view::range(20, 100), slot_mask::none()};
    std::vector<float> expected;
    {
        kv1::slot_store store(d, {&memory, 1});
        REQUIRE(store.slots() == 4 * page);
        for (const float v : attend(store, {&stream, 1}, q))
            REQUIRE(v == 0.0f);
        store.write(0, numbers_from(30, 20), x.key_view(0, 20), x.value_view(0, 20));
        expected = attend(store, {&stream, 1}, q);
        // pages that no slot was written to are not touched
        REQUIRE(std::all_of(lines.begin() + static_cast<std::ptrdiff_t>(3 * lines.size() / 5),
                            lines.begin() + static_cast<std::ptrdiff_t>(4 * lines.size() / 5),
                            [](const line& l) { return l.bytes[7] == std::byte{0xff}; }));
        for (const std::uint32_t s : {0u, 64u, 127u}) // make them a store's
            store.write(0, {&s, 1}, x.key_view(0, 1), x.value_view(0, 1));
        expected = attend(store, {&stream, 1}, q);
    }
    const kv1::slot_memory kept{memory.bytes, true};
    {
        std::vector<line> more(kv1::slot_memory_bytes(turning, 0) / 64);
        std::memset(more.data(), 0xff, more.size() * 64);
        kv1::slot_memory own{{more[0].bytes, more.size() * 64}, false};
        const std::vector<std::uint32_t> slots{33, 2, 40};
        kv1::slot_store first(turning, {&own, 1});
        const slot_vectors y(g, turning.layers[0], 3);
        first.write(0, slots, kv1_test::positions_by_slot(slots), y.key_view(0, 3), y.value_view(0, 3));
        for (const std::uint32_t s : {64u, 127u}) // make all pages a store's
            first.write(0, {&s, 1}, std::vector<std::int32_t>{1}, y.key_view(0, 1), y.value_view(0, 1));
        own.holds_slots = true;
        REQUIRE(contents(kv1::slot_store(turning, {&own, 1})) == contents(first));
    }
    REQUIRE(attend(kv1::slot_store(d, {&kept, 1}), {&stream, 1}, q) == expected);
    const kv1::slot_memory too_short{memory.bytes.first(bytes - 64), false};
    REQUIRE(kv1::slot_store::create(d, {&too_short, 1}).code() == kv1::errc::shape_mismatch);
    const kv1::slot_memory crooked{memory.bytes.subspan(4), false};
    REQUIRE_FALSE(kv1::slot_store::create(d, {&crooked, 1}));
}

TEST_CASE("whatever a slot's raw bytes are, they are refused or come out again", "[slots][fuzz]") {
    kv1_test::slots_body::tallies tallies;
    std::size_t seeds = 0;
    for (const auto& seed : std::filesystem::directory_iterator(KV1_FUZZ_SEED_DIR "/slots")) {
        INFO(seed.path());
        std::ifstream in(seed.path(), std::ios::binary);
        const std::vector<char> input{std::istreambuf_iterator<char>(in), {}};
        REQUIRE_NOTHROW(kv1_test::slots_body::run(
            {reinterpret_cast<const std::uint8_t*>(input.data()), input.size()}, tallies));
        ++seeds;
    }
    REQUIRE(seeds >= 10);
    generator g(4111);
    for (int trial = 0; trial < 500; ++trial) {
        std::vector<std::uint8_t> input(g.between(2, 60));
        for (std::uint8_t& b : input)
            b = static_cast<std::uint8_t>(g.bits() & (trial % 2 == 0 ? 0x3fu : 0xffu));
        input[0] = static_cast<std::uint8_t>(g.bits());
        kv1_test::slots_body::run(input, tallies);
    }
    REQUIRE(tallies.refused > 20);
    REQUIRE(tallies.taken > 100);
    REQUIRE(tallies.positions > 20);
}
