// SPDX-License-Identifier: Apache-2.0
//
// The cache as an object: sequences, lengths, capacity.
#include "recording_allocator.hpp"
#include "small_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv1.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

using kv1::errc;
using kv1::kv2_cache;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1::sequence_id;
using kv1_test::allocation_log;
using kv1_test::batch;
using kv1_test::everything;
using kv1_test::open_cache;
using kv1_test::small_cache;

TEST_CASE("the try_ forms are noexcept", "[cache]") {
    using cache = kv_cache;
    const sequence_id id;
    const kv1::tensor_view view(static_cast<const float*>(nullptr), 0, 1, 1);
    const kv1::mutable_tensor_view out(static_cast<float*>(nullptr), 0, 1, 1);
    using mutable_ref = cache&;
    using const_ref = const cache&;
    STATIC_REQUIRE(noexcept(cache::create(std::declval<const kv1::cache_description&>())));
    STATIC_REQUIRE(noexcept(std::declval<mutable_ref>().try_create_sequence()));
    STATIC_REQUIRE(noexcept(std::declval<mutable_ref>().try_destroy_sequence(id)));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().contains(id)));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_length(id)));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_length(id, 0)));
    STATIC_REQUIRE(noexcept(std::declval<mutable_ref>().try_append(id, 0, view, view)));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_attend(id, 0, view, out)));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_export_rows(id, 0, kv_side::key, 0, 0, 0, {})));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_read(id, 0, kv_side::key, 0, 0, 0, {})));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().statistics()));
    STATIC_REQUIRE(noexcept(std::declval<const_ref>().try_statistics(id)));
    STATIC_REQUIRE(std::is_nothrow_move_constructible_v<cache>);
    STATIC_REQUIRE(std::is_nothrow_move_assignable_v<cache>);
    STATIC_REQUIRE_FALSE(std::is_copy_constructible_v<cache>);
    STATIC_REQUIRE_FALSE(std::is_copy_assignable_v<cache>);
}

TEST_CASE("a new sequence is empty and lives until it is destroyed", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    REQUIRE(cache.contains(id));
    REQUIRE(cache.length(id) == 0);
    REQUIRE(cache.length(id, 1) == 0);
    cache.destroy_sequence(id);
    REQUIRE_FALSE(cache.contains(id));
}

TEST_CASE("a handle that names no living sequence is recognized by every call", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id destroyed = cache.create_sequence();
    cache.destroy_sequence(destroyed);
    const sequence_id reused = cache.create_sequence();
    REQUIRE(reused.slot == destroyed.slot);
    REQUIRE(reused != destroyed);
    REQUIRE(cache.contains(reused));
    const batch b(1);
    std::vector<float> q(40), out(48);
    for (const sequence_id id : {destroyed, sequence_id{}, sequence_id{reused.slot, reused.generation + 1},
                                 sequence_id{reused.slot + 1, 0}}) {
        REQUIRE_FALSE(cache.contains(id));
        REQUIRE(cache.try_length(id).code() == errc::invalid_sequence);
        REQUIRE(cache.try_length(id, 0).code() == errc::invalid_sequence);
        REQUIRE(cache.try_destroy_sequence(id).code() == errc::invalid_sequence);
        REQUIRE(cache.try_append(id, 0, b.keys(), b.values()).code() == errc::invalid_sequence);
        REQUIRE(cache.try_attend(id, 0, {q.data(), 1, 2, 20}, {out.data(), 1, 2, 24}).code() ==
                errc::invalid_sequence);
        REQUIRE(cache.try_export_rows(id, 0, kv_side::key, 0, 0, 0, {}).code() == errc::invalid_sequence);
        REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 0, {}).code() == errc::invalid_sequence);
        REQUIRE(cache.try_statistics(id).code() == errc::invalid_sequence);
        REQUIRE_THROWS_AS(cache.destroy_sequence(id), kv1::error);
        REQUIRE_THROWS_AS(cache.length(id), kv1::error);
    }
}

TEST_CASE("slots and pages of destroyed sequences are used again", "[cache]") {
    kv_cache cache(small_cache());
    REQUIRE(cache.available_pages() == 4);
    std::vector<sequence_id> seen;
    for (int round = 0; round < 20; ++round) {
        const sequence_id id = cache.create_sequence();
        REQUIRE(id.slot == 0);
        REQUIRE(std::find(seen.begin(), seen.end(), id) == seen.end());
        seen.push_back(id);
        REQUIRE(cache.length(id) == 0);
        const batch b(50, static_cast<std::uint64_t>(round));
        cache.append(id, 0, b.keys(), b.values());
        REQUIRE(cache.available_pages() == 0);
        cache.destroy_sequence(id);
        REQUIRE(cache.available_pages() == 4);
    }
}

TEST_CASE("sequences do not see each other's tokens", "[cache]") {
    kv_cache cache(small_cache(256));
    std::vector<std::pair<sequence_id, std::vector<float>>> kept;
    for (std::uint64_t i = 0; i < 4; ++i) {
        const sequence_id id = cache.create_sequence();
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const batch b(20 + i, 10 * i + layer);
            cache.append(id, layer, b.keys(), b.values());
        }
        kept.emplace_back(id, everything(cache, id));
    }
    cache.destroy_sequence(kept[1].first);
    const sequence_id fresh = cache.create_sequence();
    const batch b(40, 99);
    cache.append(fresh, 0, b.keys(), b.values());
    for (const std::size_t i : {0u, 2u, 3u})
        REQUIRE(everything(cache, kept[i].first) == kept[i].second);
}

TEST_CASE("layers grow on their own, and the sequence is as long as its shortest layer", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    const batch five(5), thirty(30);
    cache.append(id, 1, thirty.keys(), thirty.values());
    REQUIRE(cache.length(id, 0) == 0);
    REQUIRE(cache.length(id, 1) == 30);
    REQUIRE(cache.length(id) == 0);
    REQUIRE(cache.available_pages() == 2);
    cache.append(id, 0, five.keys(), five.values());
    REQUIRE(cache.length(id) == 5);
    REQUIRE(cache.available_pages() == 2); // a block serves every layer
    REQUIRE(cache.try_length(id, 2).code() == errc::out_of_range);
    REQUIRE(cache.try_length(id, 2).reason().where().layer == 2);
}

TEST_CASE("appending no token changes nothing", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    const kv1::tensor_view none_k(static_cast<const float*>(nullptr), 0, 2, 20),
        none_v(static_cast<const float*>(nullptr), 0, 2, 24);
    REQUIRE(cache.try_append(id, 0, none_k, none_v));
    REQUIRE(cache.length(id, 0) == 0);
    REQUIRE(cache.available_pages() == 4);
}

TEST_CASE("a full cache refuses an append and stays as it was, to the byte", "[cache]") {
    allocation_log log;
    open_cache cache(small_cache(), kv1_test::recording_allocator<std::byte>(log));
    const sequence_id id = cache.create_sequence(), other = cache.create_sequence();
    const batch b(40), c(10, 2), too_many(25, 3), huge(200, 4);
    cache.append(id, 0, b.keys(), b.values());
    cache.append(other, 0, c.keys(), c.values());
    REQUIRE(cache.available_pages() == 0);
    const std::vector<std::byte> bytes = kv1_test::arena_bytes(log);
    for (const batch* refused : {&too_many, &huge}) {
        const kv1::status s = cache.try_append(id, 0, refused->keys(), refused->values());
        REQUIRE(s.code() == errc::capacity_exceeded);
        REQUIRE_THROWS_AS(cache.append(other, 1, refused->keys(), refused->values()), kv1::error);
        REQUIRE(kv1_test::arena_bytes(log) == bytes);
        REQUIRE(cache.length(id, 0) == 40);
        REQUIRE(cache.length(other, 1) == 0);
        REQUIRE(cache.available_pages() == 0);
    }
    const batch rest(8, 5); // what is left of the sequence's last page
    REQUIRE(cache.try_append(id, 0, rest.keys(), rest.values()));
    REQUIRE(cache.length(id, 0) == 48);
    const batch one(1, 6);
    REQUIRE(cache.try_append(id, 0, one.keys(), one.values()).code() == errc::capacity_exceeded);
    cache.destroy_sequence(other);
    REQUIRE(cache.try_append(id, 0, one.keys(), one.values()));
}

TEST_CASE("an append that needs more pages than are free takes none of them", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    const batch b(65);
    REQUIRE(cache.try_append(id, 0, b.keys(), b.values()).code() == errc::capacity_exceeded);
    REQUIRE(cache.available_pages() == 4);
    REQUIRE(cache.statistics().pages_in_use == 0);
}

TEST_CASE("capacity is in whole pages, rounded up", "[cache]") {
    kv_cache cache(small_cache(33));
    REQUIRE(cache.available_pages() == 3);
    const sequence_id id = cache.create_sequence();
    const batch b(48);
    REQUIRE(cache.try_append(id, 0, b.keys(), b.values()));
}

TEST_CASE("the 2-bit cache takes affine<2> alone", "[cache]") {
    REQUIRE(kv2_cache::create(kv1::uniform_cache(1, {1, 32, 32}, 64)));
    for (const kv_format f : kv1::all_kv_formats) {
        const auto as_key = kv2_cache::create(kv1::uniform_cache(1, {1, 32, 32, f, kv_format::affine2}, 64));
        const auto as_value =
            kv2_cache::create(kv1::uniform_cache(1, {1, 32, 32, kv_format::affine2, f}, 64));
        const errc expected = f == kv_format::affine2 ? errc::ok : errc::unsupported_format;
        REQUIRE(as_key.code() == expected);
        REQUIRE(as_value.code() == expected);
    }
}

TEST_CASE("a cache moves with its sequences", "[cache]") {
    kv_cache a(small_cache());
    const sequence_id id = a.create_sequence();
    const batch b(20);
    a.append(id, 0, b.keys(), b.values());
    const std::vector<float> kept = everything(a, id);
    kv_cache c = std::move(a);
    REQUIRE(everything(c, id) == kept);
    REQUIRE(c.available_pages() == 2);
    kv_cache d(kv1::uniform_cache(1, {1, 8, 8}, 16));
    const sequence_id gone = d.create_sequence();
    static_cast<void>(gone);
    d = std::move(c);
    REQUIRE(everything(d, id) == kept);
    REQUIRE(d.try_append(id, 0, b.keys(), b.values()));
    REQUIRE(d.length(id, 0) == 40);
    REQUIRE(d.description().layers.size() == 2);
    kv_cache e(small_cache());
    a = std::move(e); // a moved-from cache can be assigned to
    REQUIRE(a.create_sequence().slot == 0);
}
