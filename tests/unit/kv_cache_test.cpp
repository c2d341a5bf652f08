// SPDX-License-Identifier: Apache-2.0
//
// The cache as an object: sequences, lengths, refusals that change nothing, statistics.
#include "compare.hpp"
#include "failing_new.hpp"
#include "random.hpp"
#include "recording_allocator.hpp"
#include "targets.hpp"

#include <kv1/kv1.hpp>

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

using kv1::errc;
using kv1::kv2_cache;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1::sequence_id;
using kv1_test::allocation_log;
using kv1_test::open_cache;

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

// Two layers of two KV heads, K and V in different formats, pages of 16 tokens.
kv1::cache_description small_cache(std::size_t capacity = 64) {
    kv1::cache_description d;
    d.layers = {{2, 20, 24, kv_format::affine2, kv_format::affine4},
                {2, 20, 24, kv_format::fp16, kv_format::scaled_binary}};
    d.capacity_tokens = capacity;
    d.page_tokens = 16;
    return d;
}

struct batch {
    std::size_t tokens;
    std::vector<float> k, v;
    explicit batch(std::size_t n, std::uint64_t seed = 1) : tokens(n) {
        kv1_test::generator g(seed);
        k = kv1_test::normal_values(g, n * 2 * 20);
        v = kv1_test::normal_values(g, n * 2 * 24);
    }
    [[nodiscard]] kv1::tensor_view keys() const { return {k.data(), tokens, 2, 20}; }
    [[nodiscard]] kv1::tensor_view values() const { return {v.data(), tokens, 2, 24}; }
    float& key(std::size_t token, std::size_t head, std::size_t channel) {
        return k[(token * 2 + head) * 20 + channel];
    }
    float& value(std::size_t token, std::size_t head, std::size_t channel) {
        return v[(token * 2 + head) * 24 + channel];
    }
};

// All that can be read of a sequence, to see whether it changed.
template <class Cache>
std::vector<float> everything(const Cache& cache, sequence_id id) {
    std::vector<float> all;
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const std::size_t n = cache.length(id, layer);
        all.push_back(static_cast<float>(n));
        for (std::size_t head = 0; head < 2; ++head)
            for (const kv_side side : {kv_side::key, kv_side::value}) {
                std::vector<float> x(n * (side == kv_side::key ? 20 : 24));
                cache.read(id, layer, side, head, 0, n, x);
                all.insert(all.end(), x.begin(), x.end());
            }
    }
    return all;
}

void require_place(const kv1::status& s, std::int64_t layer, std::int64_t head, std::int64_t token,
                   std::int64_t channel) {
    INFO(s.message());
    REQUIRE(s.where().layer == layer);
    REQUIRE(s.where().kv_head == head);
    REQUIRE(s.where().token == token);
    REQUIRE(s.where().channel == channel);
}

} // namespace

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

TEST_CASE("shapes of keys and values that do not fit the layer are refused with the layer", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    std::vector<float> x(4096);
    const auto refused = [&](errc code, std::size_t layer, kv1::tensor_view k, kv1::tensor_view v) {
        const kv1::status s = cache.try_append(id, layer, k, v);
        REQUIRE(s.code() == code);
        require_place(s, static_cast<std::int64_t>(layer), -1, -1, -1);
        REQUIRE(cache.length(id) == 0);
        REQUIRE(cache.available_pages() == 4);
    };
    const float* p = x.data();
    const float* null = nullptr;
    refused(errc::shape_mismatch, 0, {p, 3, 2, 20}, {p, 2, 2, 24}); // tokens
    refused(errc::shape_mismatch, 0, {p, 3, 1, 20}, {p, 3, 2, 24}); // heads of K
    refused(errc::shape_mismatch, 1, {p, 3, 2, 20}, {p, 3, 3, 24}); // heads of V
    refused(errc::shape_mismatch, 1, {p, 3, 2, 24}, {p, 3, 2, 24}); // key_dim
    refused(errc::shape_mismatch, 1, {p, 3, 2, 20}, {p, 3, 2, 20}); // value_dim
    refused(errc::shape_mismatch, 1, {null, 0, 2, 20}, {null, 0, 2, 20});
    refused(errc::invalid_argument, 0, {null, 3, 2, 20}, {p, 3, 2, 24});
    refused(errc::invalid_argument, 0, {p, 3, 2, 20}, {null, 3, 2, 24});
    refused(errc::out_of_range, 2, {p, 3, 2, 20}, {p, 3, 2, 24});
}

TEST_CASE("shapes, scales and masks that do not fit are refused by attention", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    const batch b(10);
    cache.append(id, 0, b.keys(), b.values());
    std::vector<float> q(4096, 1.0f), out(4096, 7.0f), lse(6);
    const float* null = nullptr;
    float* no_output = nullptr;
    const auto refused = [&](errc code, kv1::tensor_view queries, kv1::mutable_tensor_view outputs,
                             const kv1::attention_options& options = {}, std::size_t layer = 0) {
        const kv1::status s = cache.try_attend(id, layer, queries, outputs, options);
        REQUIRE(s.code() == code);
        require_place(s, static_cast<std::int64_t>(layer), -1, -1, -1);
        REQUIRE_THROWS_AS(cache.attend(id, layer, queries, outputs, options), kv1::error);
        REQUIRE(std::all_of(out.begin(), out.end(), [](float x) { return x == 7.0f; }));
    };
    const kv1::tensor_view fits(q.data(), 2, 4, 20);
    const kv1::mutable_tensor_view fitting(out.data(), 2, 4, 24);
    refused(errc::shape_mismatch, {q.data(), 2, 3, 20}, {out.data(), 2, 3, 24}); // not a multiple of KV heads
    refused(errc::shape_mismatch, {q.data(), 2, 0, 20}, {out.data(), 2, 0, 24});
    refused(errc::shape_mismatch, {q.data(), 2, 4, 24}, fitting);
    refused(errc::shape_mismatch, fits, {out.data(), 2, 4, 20});
    refused(errc::shape_mismatch, fits, {out.data(), 1, 4, 24});
    refused(errc::shape_mismatch, fits, {out.data(), 2, 2, 24});
    refused(errc::invalid_argument, {null, 2, 4, 20}, fitting);
    refused(errc::invalid_argument, fits, {no_output, 2, 4, 24});
    refused(errc::out_of_range, fits, fitting, {}, 2);
    refused(errc::invalid_argument, fits, fitting, {.scale = not_a_number});
    refused(errc::invalid_argument, fits, fitting, {.scale = -infinity});
    refused(errc::shape_mismatch, fits, fitting, {.log_sum_exp = std::span(lse)}); // 6 for 8 rows
    refused(errc::shape_mismatch, {q.data(), 11, 4, 20}, {out.data(), 11, 4, 24}); // 11 of 10 tokens
    refused(errc::shape_mismatch, fits, fitting, {}, 1);                           // an empty layer
    const std::vector<std::uint8_t> visible(22, 1);
    const auto mask = [&](std::size_t keys, std::size_t size) {
        return kv1::attention_options{
            .mask = kv1::attention_mask::explicit_for_last(keys, std::span(visible).first(size))};
    };
    refused(errc::shape_mismatch, fits, fitting, mask(10, 19));
    refused(errc::shape_mismatch, fits, fitting, mask(10, 21));
    refused(errc::shape_mismatch, fits, fitting, mask(11, 22)); // more keys than tokens
    refused(errc::shape_mismatch, fits, fitting, mask(10, 0));
    refused(errc::shape_mismatch, fits, fitting, mask(0, 2));
    refused(errc::out_of_range, fits, fitting,
            {.mask = kv1::attention_mask::causal_from(std::numeric_limits<std::size_t>::max())});
}

TEST_CASE("rows that are not cached can not be read or exported", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    const batch b(10);
    cache.append(id, 0, b.keys(), b.values());
    std::vector<float> out(200, 7.0f);
    std::vector<std::byte> bytes(50, std::byte{7});
    std::vector<kv1::float16> halves(20);
    const auto all = std::span(out);
    const std::size_t most = std::numeric_limits<std::size_t>::max();
    REQUIRE(cache.try_read(id, 2, kv_side::key, 0, 0, 10, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 2, 0, 10, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 2, 0, 10, all).where().kv_head == 2);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 11, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 11, 0, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 5, most, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, most, 2, all).code() == errc::out_of_range);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 10, all.first(199)).code() == errc::shape_mismatch);
    REQUIRE(cache.try_read(id, 0, kv_side::value, 0, 0, 10, all).code() == errc::shape_mismatch);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 10, 0, {}));
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 10, all));

    const auto span = std::span(bytes);
    const auto half = std::span(halves);
    const auto exporting = [&](std::span<std::byte> packed, std::span<kv1::float16> scales,
                               std::span<kv1::float16> minima) {
        return cache.try_export_rows(id, 0, kv_side::key, 0, 0, 10, {packed, scales, minima}).code();
    };
    REQUIRE(exporting(span.first(49), half.first(10), half.last(10)) == errc::shape_mismatch);
    REQUIRE(exporting(span, half.first(9), half.last(10)) == errc::shape_mismatch);
    REQUIRE(exporting(span, half.first(10), half.last(9)) == errc::shape_mismatch);
    REQUIRE(exporting(span, half.first(10), {}) == errc::shape_mismatch);
    REQUIRE(std::all_of(bytes.begin(), bytes.end(), [](auto x) { return x == std::byte{7}; }));
    REQUIRE(exporting(span, half.first(10), half.last(10)) == errc::ok);
    REQUIRE_THROWS_AS(cache.read(id, 0, kv_side::key, 0, 0, 11, all), kv1::error);
}

TEST_CASE("NaN and infinity amid an append are named by place and change neither sequence nor pool",
          "[cache]") {
    kv1_test::for_each_target([&](kv1::target) {
        for (const float bad : {not_a_number, -not_a_number, infinity, -infinity})
            for (const std::size_t layer : {0u, 1u})
                for (const bool in_keys : {true, false})
                    for (const std::size_t token : {0u, 7u, 21u, 29u})
                        for (const std::size_t head : {0u, 1u}) {
                            kv_cache cache(small_cache());
                            const sequence_id id = cache.create_sequence();
                            const batch before(10, 5);
                            cache.append(id, 0, before.keys(), before.values());
                            cache.append(id, 1, before.keys(), before.values());
                            const std::vector<float> kept = everything(cache, id);
                            batch b(30, 6);
                            (in_keys ? b.key(token, head, 13) : b.value(token, head, 13)) = bad;
                            const kv1::status s = cache.try_append(id, layer, b.keys(), b.values());
                            REQUIRE(s.code() == errc::non_finite);
                            require_place(s, static_cast<std::int64_t>(layer),
                                          static_cast<std::int64_t>(head), static_cast<std::int64_t>(token),
                                          13);
                            REQUIRE(everything(cache, id) == kept);
                            REQUIRE(cache.available_pages() == 3);
                            REQUIRE(cache.statistics().pages_in_use == 1);
                            // and the next append stores what it would have stored without the failed one
                            const batch good(30, 7);
                            REQUIRE(cache.try_append(id, layer, good.keys(), good.values()));
                            kv_cache fresh(small_cache());
                            const sequence_id twin = fresh.create_sequence();
                            fresh.append(twin, 0, before.keys(), before.values());
                            fresh.append(twin, 1, before.keys(), before.values());
                            fresh.append(twin, layer, good.keys(), good.values());
                            REQUIRE(everything(fresh, twin) == everything(cache, id));
                        }
    });
}

TEST_CASE("the first bad head is named, and in it a key before a value", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    batch b(5);
    b.value(1, 0, 3) = not_a_number;
    b.key(4, 0, 2) = not_a_number;
    b.key(0, 1, 0) = not_a_number;
    require_place(cache.try_append(id, 0, b.keys(), b.values()), 0, 0, 4, 2);
    b.key(4, 0, 2) = 0.0f;
    require_place(cache.try_append(id, 0, b.keys(), b.values()), 0, 0, 1, 3);
    b.value(1, 0, 3) = 0.0f;
    require_place(cache.try_append(id, 0, b.keys(), b.values()), 0, 1, 0, 0);
}

TEST_CASE("what fp16 can not hold is refused with its place: values of fp16, metadata of codes", "[cache]") {
    kv1_test::for_each_target([&](kv1::target) {
        kv_cache cache(small_cache());
        const sequence_id id = cache.create_sequence();
        batch a(20);
        a.key(17, 1, 4) = 65520.0f; // layer 0 has affine keys: a third of this is a fine scale
        REQUIRE(cache.try_append(id, 0, a.keys(), a.values()));
        a.key(17, 1, 4) = 65520.0f * 3.0f + 10.0f;
        kv1::status s = cache.try_append(id, 0, a.keys(), a.values());
        REQUIRE(s.code() == errc::not_representable);
        require_place(s, 0, 1, 17, -1); // the vector is at fault, not the channel alone
        REQUIRE(cache.length(id, 0) == 20);
        REQUIRE(cache.available_pages() == 2);
        cache.destroy_sequence(id);

        // layer 1 has fp16 keys
        const sequence_id other = cache.create_sequence();
        batch b(20);
        b.key(3, 0, 19) = -65519.0f; // the last one that rounds to a number
        REQUIRE(cache.try_append(other, 1, b.keys(), b.values()));
        std::vector<float> row(20);
        cache.read(other, 1, kv_side::key, 0, 3, 1, row);
        REQUIRE(row[19] == -65504.0f);
        b.key(3, 0, 19) = -65520.0f;
        s = cache.try_append(other, 1, b.keys(), b.values());
        REQUIRE(s.code() == errc::not_representable);
        require_place(s, 1, 0, 3, 19);
        // V of layer 1: the mean magnitude overflows
        batch c(20);
        for (std::size_t i = 0; i < 24; ++i)
            c.value(19, 1, i) = 70000.0f;
        const kv1::status v = cache.try_append(other, 1, c.keys(), c.values());
        REQUIRE(v.code() == errc::not_representable);
        require_place(v, 1, 1, 19, -1);
        REQUIRE(cache.length(other, 1) == 20);
    });
}

TEST_CASE("plain fp32 stores every finite float, and refuses the others", "[cache]") {
    kv_cache cache(kv1::uniform_cache(1, {1, 3, 3, kv_format::fp32, kv_format::fp32}, 16, 16));
    const sequence_id id = cache.create_sequence();
    const std::array<float, 3> x{std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(),
                                 -0.0f};
    cache.append(id, 0, {x.data(), 1, 1, 3}, {x.data(), 1, 1, 3});
    std::array<float, 3> y{};
    cache.read(id, 0, kv_side::value, 0, 0, 1, y);
    REQUIRE(kv1_test::same_bits(x, y));
    const std::array<float, 3> bad{1.0f, -infinity, 1.0f};
    require_place(cache.try_append(id, 0, {x.data(), 1, 1, 3}, {bad.data(), 1, 1, 3}), 0, 0, 0, 1);
}

TEST_CASE("fp16 and bf16 input is checked as fp32 is", "[cache]") {
    kv1_test::for_each_target([&](kv1::target) {
        kv2_cache cache(kv1::uniform_cache(1, {1, 20, 20}, 16, 16));
        const sequence_id id = cache.create_sequence();
        std::vector<kv1::float16> halves(20, kv1::float16(1.0f));
        std::vector<kv1::bfloat16> brains(20, kv1::bfloat16(1.0f));
        halves[18] = kv1::float16::from_bits(0xfc01);
        brains[3] = kv1::bfloat16::from_bits(0x7f80);
        const std::vector<float> fine(20, 1.0f);
        require_place(cache.try_append(id, 0, {halves.data(), 1, 1, 20}, {fine.data(), 1, 1, 20}), 0, 0, 0,
                      18);
        require_place(cache.try_append(id, 0, {fine.data(), 1, 1, 20}, {brains.data(), 1, 1, 20}), 0, 0, 0,
                      3);
        brains[3] = kv1::bfloat16(1e30f); // finite, but its fp16 minimum or scale is not
        const kv1::status s = cache.try_append(id, 0, {fine.data(), 1, 1, 20}, {brains.data(), 1, 1, 20});
        REQUIRE(s.code() == errc::not_representable);
    });
}

TEST_CASE("descriptions that no cache can have are refused", "[cache]") {
    const auto refused = [](errc code, const kv1::cache_description& d, std::int64_t layer = -1) {
        const auto cache = kv_cache::create(d);
        REQUIRE(cache.code() == code);
        REQUIRE(cache.reason().where().layer == layer);
        REQUIRE_THROWS_AS(kv_cache(d), kv1::error);
    };
    kv1::cache_description d = small_cache();
    REQUIRE(kv_cache::create(d));
    d.layers.clear();
    refused(errc::invalid_argument, d);
    d = small_cache();
    d.capacity_tokens = 0;
    refused(errc::invalid_argument, d);
    for (const std::size_t page : {0u, 1u, 15u, 24u, 100u}) {
        d = small_cache();
        d.page_tokens = page;
        refused(errc::invalid_argument, d);
    }
    for (std::size_t kv1::layer_description::*field :
         {&kv1::layer_description::kv_heads, &kv1::layer_description::key_dim,
          &kv1::layer_description::value_dim}) {
        d = small_cache();
        d.layers[1].*field = 0;
        refused(errc::invalid_argument, d, 1);
    }
    for (std::size_t kv1::layer_description::*field :
         {&kv1::layer_description::key_dim, &kv1::layer_description::value_dim}) {
        d = small_cache();
        d.layers[0].*field = 4097;
        refused(errc::invalid_argument, d, 0);
    }
    const auto refused_group = [&](kv_format f, std::size_t dim, std::size_t group) {
        for (const bool keys : {true, false}) {
            d = small_cache();
            kv1::layer_description& l = d.layers[1];
            (keys ? l.key_format : l.value_format) = f;
            (keys ? l.key_dim : l.value_dim) = dim;
            (keys ? l.key_group : l.value_group) = group;
            refused(errc::invalid_argument, d, 1);
        }
    };
    refused_group(kv_format::affine2, 64, 16); // lanes of 32 channels
    refused_group(kv_format::affine2, 96, 64);
    refused_group(kv_format::affine2, 64, 128);
    refused_group(kv_format::fp16, 64, 32); // no metadata
    refused_group(kv_format::scaled_binary, 64, 32);
    d = small_cache();
    d.layers[1].key_format = static_cast<kv_format>(99);
    refused(errc::unsupported_format, d, 1);
    d = small_cache();
    d.layers[1].kv_heads = std::numeric_limits<std::size_t>::max() / 2;
    refused(errc::out_of_memory, d, 1);
    d = small_cache(std::numeric_limits<std::size_t>::max());
    refused(errc::invalid_argument, d); // more than 2^32 - 2 pages
    d = small_cache();
    d.page_tokens = std::size_t{1} << 40; // one page that no memory holds
    d.capacity_tokens = 1;
    refused(errc::out_of_memory, d, 0);
}

TEST_CASE("a cache with metadata by groups counts all of them", "[cache]") {
    kv1::layer_description l{2, 128, 64, kv_format::affine2, kv_format::compact3};
    l.key_group = l.value_group = 32;
    kv_cache cache(kv1::uniform_cache(1, l, 64));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> k(3 * 2 * 128, 1.0f), v(3 * 2 * 64, 2.0f);
    cache.append(id, 0, {k.data(), 3, 2, 128}, {v.data(), 3, 2, 64});
    REQUIRE(cache.statistics().bytes_stored == 3 * 2 * (32 + 4 * 4 + 24 + 2 * 2));
    REQUIRE(kv1::bytes_per_page(cache.description()) == 2 * 64 * (32 + 4 * 4 + 24 + 2 * 2));
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

TEST_CASE("statistics count tokens, pages and bytes", "[cache]") {
    kv_cache cache(small_cache());
    const kv1::cache_statistics empty = cache.statistics();
    REQUIRE(empty.sequences == 0);
    REQUIRE(empty.tokens == 0);
    REQUIRE(empty.layers == 2);
    REQUIRE(empty.pages_in_use == 0);
    REQUIRE(empty.pages_total == 4);
    REQUIRE(empty.bytes_in_use == 0);
    REQUIRE(empty.bytes_stored == 0);
    REQUIRE(empty.shrink_vs_fp16() == 0.0);
    const std::size_t block = 2 * (cache.layout(0).bytes() + cache.layout(1).bytes());
    REQUIRE(empty.bytes_reserved == 4 * block);

    const sequence_id a = cache.create_sequence(), b = cache.create_sequence();
    const batch twenty(20), five(5);
    cache.append(a, 0, twenty.keys(), twenty.values());
    cache.append(a, 1, five.keys(), five.values());
    cache.append(b, 1, five.keys(), five.values());
    const kv1::cache_statistics s = cache.statistics(a);
    REQUIRE(s.sequences == 1);
    REQUIRE(s.tokens == 20);
    REQUIRE(s.pages_in_use == 2);
    REQUIRE(s.bytes_in_use == 2 * block);
    // affine2 of 20: 5 + 4, affine4 of 24: 12 + 4, fp16 of 20: 40, scaled binary of 24: 3 + 2
    REQUIRE(s.bytes_stored == 20 * 2 * (9 + 16) + 5 * 2 * (40 + 5));
    REQUIRE(s.bytes_as_fp16 == 25 * 2 * 2 * 44);
    REQUIRE(s.shrink_vs_fp16() == static_cast<double>(s.bytes_as_fp16) / static_cast<double>(s.bytes_stored));
    const kv1::cache_statistics all = cache.statistics();
    REQUIRE(all.sequences == 2);
    REQUIRE(all.tokens == 25);
    REQUIRE(all.pages_in_use == 3);
    REQUIRE(all.bytes_stored == s.bytes_stored + 5 * 2 * 45);
}

TEST_CASE("2 bits at head_dim 32 are 12 bytes a vector and 5.33 times smaller than fp16", "[cache]") {
    kv2_cache cache(kv1::uniform_cache(10, {2, 32, 32}, 128));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> x(100 * 2 * 32, 0.5f);
    for (std::size_t layer = 0; layer < 10; ++layer)
        cache.append(id, layer, {x.data(), 100, 2, 32}, {x.data(), 100, 2, 32});
    const kv1::cache_statistics s = cache.statistics(id);
    REQUIRE(s.bytes_stored == 100 * 10 * 2 * 2 * 12);
    REQUIRE(s.bytes_in_use == 128 * 10 * 2 * 2 * 12); // nothing is lost to the layout
    REQUIRE(std::fabs(s.shrink_vs_fp16() - 64.0 / 12.0) < 1e-12);
    REQUIRE(to_string(s) ==
            "100 tokens x 10 layers in 46.88 KiB (fp16: 250.00 KiB, 5.33x smaller), 2 of 2 pages, "
            "60.00 KiB in use");
    REQUIRE(to_string(kv1::cache_statistics{}) ==
            "0 tokens x 0 layers in 0 B (fp16: 0 B, 0.00x smaller), 0 of 0 pages, 0 B in use");
}

TEST_CASE("statistics of an empty sequence and of a destroyed one are zero and an error", "[cache]") {
    kv_cache cache(small_cache());
    const sequence_id id = cache.create_sequence();
    REQUIRE(cache.statistics(id).tokens == 0);
    REQUIRE(cache.statistics(id).sequences == 1);
    cache.destroy_sequence(id);
    REQUIRE(cache.statistics().sequences == 0);
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

TEST_CASE("arenas come from the given allocator, one a layer, and go back to it", "[cache]") {
    allocation_log log;
    {
        open_cache cache(small_cache(), kv1_test::recording_allocator<std::byte>(log));
        REQUIRE(log.living.size() == 2);
        REQUIRE(kv1_test::arena_bytes(log).size() == cache.statistics().bytes_reserved);
        for (const std::span<std::byte> arena : log.living)
            REQUIRE(reinterpret_cast<std::uintptr_t>(arena.data()) % 64 == 0);
        open_cache moved = std::move(cache);
        REQUIRE(log.living.size() == 2);
    }
    REQUIRE(log.living.empty());
    REQUIRE(log.made == log.freed);
}

TEST_CASE("an allocator that fails at any layer gives out_of_memory and no leak", "[cache]") {
    for (std::size_t allowed = 0; allowed < 2; ++allowed) {
        allocation_log log;
        log.allowed = allowed;
        const auto cache = open_cache::create(small_cache(), kv1_test::recording_allocator<std::byte>(log));
        REQUIRE(cache.code() == errc::out_of_memory);
        REQUIRE(cache.reason().where().layer == static_cast<std::int64_t>(allowed));
        REQUIRE(log.living.empty());
        REQUIRE(log.made == log.freed);
        REQUIRE_THROWS_AS(open_cache(small_cache(), kv1_test::recording_allocator<std::byte>(log)),
                          kv1::error);
    }
}

TEST_CASE("operator new that fails at any point of making a cache gives out_of_memory", "[cache]") {
    const kv1::cache_description d = small_cache();
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        REQUIRE(allowed < 100);
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            const auto cache = kv_cache::create(d);
            code = cache.code();
            failed = failing.failed();
        }
        REQUIRE(code == (failed ? errc::out_of_memory : errc::ok));
        if (!failed)
            break;
        ++failures;
    }
    REQUIRE(failures >= 4); // description, page list, layers, an arena a layer
}

TEST_CASE("operator new that fails in a call leaves the cache as it was", "[cache]") {
    kv_cache cache(small_cache(256));
    const batch b(20, 1), more(90, 2);
    std::vector<sequence_id> living;
    const auto failing_call = [&](auto&& call) { // the call, failing at its first, second, ... allocation
        for (std::size_t allowed = 0;; ++allowed) {
            REQUIRE(allowed < 100);
            errc code{};
            bool failed = false;
            {
                const kv1_test::failing_new failing(allowed);
                code = call();
                failed = failing.failed();
            }
            if (!failed) {
                REQUIRE(code == errc::ok);
                return allowed;
            }
            REQUIRE(code == errc::out_of_memory);
            REQUIRE(cache.statistics().sequences == living.size());
        }
    };
    for (int i = 0; i < 5; ++i) {
        sequence_id made;
        REQUIRE(failing_call([&] {
                    const auto id = cache.try_create_sequence();
                    if (id)
                        made = *id;
                    return id.code();
                }) >= 1);
        living.push_back(made);
        cache.append(made, 0, b.keys(), b.values());
    }
    const std::size_t free_pages = cache.available_pages();
    const std::vector<float> kept = everything(cache, living[2]);
    REQUIRE(failing_call([&] {
                if (cache.length(living[2], 0) != 20 || cache.available_pages() != free_pages)
                    return errc::invalid_argument; // a failed call left a trace
                return cache.try_append(living[2], 0, more.keys(), more.values()).code();
            }) >= 1);
    REQUIRE(cache.length(living[2], 0) == 110);
    // reading, attending over few tokens and destroying allocate nothing at all
    const kv1_test::failing_new failing(0);
    std::array<float, 2 * 20> q{};
    std::array<float, 2 * 24> out{};
    const errc attended = cache.try_attend(living[2], 0, {q.data(), 1, 2, 20}, {out.data(), 1, 2, 24}).code();
    std::size_t destroyed = 0;
    for (const sequence_id id : living)
        destroyed += cache.try_destroy_sequence(id) ? 1u : 0u;
    const bool failed = failing.failed();
    REQUIRE(attended == errc::ok);
    REQUIRE(destroyed == living.size());
    REQUIRE_FALSE(failed);
}

TEST_CASE("attention over a long sequence reports missing memory for its partial results", "[cache]") {
    kv2_cache cache(kv1::uniform_cache(1, {1, 8, 8}, 8192));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> x(6000 * 8, 1.0f);
    cache.append(id, 0, {x.data(), 6000, 1, 8}, {x.data(), 6000, 1, 8});
    std::array<float, 8> q{}, out{};
    errc code{};
    {
        const kv1_test::failing_new failing(0);
        code = cache.try_attend(id, 0, {q.data(), 1, 1, 8}, {out.data(), 1, 1, 8}).code();
    }
    REQUIRE(code == errc::out_of_memory);
    REQUIRE(cache.try_attend(id, 0, {q.data(), 1, 1, 8}, {out.data(), 1, 1, 8}));
    REQUIRE(std::fabs(out[0] - 1.0f) <= kv1_test::gamma(6010)); // a mean of ones
}

TEST_CASE("a status says in one line what is wrong and where", "[cache]") {
    REQUIRE(kv1::status{}.message() == "ok");
    REQUIRE(kv1::status(errc::out_of_range, "no such layer", {.layer = 3}).message() ==
            "out of range: no such layer (layer 3)");
    const kv1::status s(errc::non_finite, "K and V must be finite",
                        {.layer = 1, .kv_head = 0, .token = 12, .channel = 5});
    REQUIRE(s.message() ==
            "non-finite value: K and V must be finite (layer 1, KV head 0, token 12, channel 5)");
    const kv1::error e(s);
    REQUIRE(std::string(e.what()) == "kv1: " + s.message());
    REQUIRE(e.code() == errc::non_finite);
    REQUIRE(e.reason().where().token == 12);
    for (unsigned code = 0; code <= static_cast<unsigned>(errc::broken_invariant); ++code)
        REQUIRE(to_string(static_cast<errc>(code)) != "unknown error");
}

TEST_CASE("a result holds a value or the reason there is none", "[cache]") {
    kv1::result<int> good(7);
    REQUIRE(good);
    REQUIRE(*good == 7);
    REQUIRE(good.value() == 7);
    REQUIRE(good.code() == errc::ok);
    kv1::result<int> bad(kv1::status(errc::out_of_range, "rule"));
    REQUIRE_FALSE(bad);
    REQUIRE(bad.code() == errc::out_of_range);
    REQUIRE_THROWS_AS(bad.value(), kv1::error);
    REQUIRE_THROWS_AS(std::move(bad).value(), kv1::error);
}

TEST_CASE("the page pool hands out each block once, last freed first", "[cache]") {
    kv1::page_pool pool(3);
    REQUIRE(pool.capacity() == 3);
    REQUIRE(pool.allocate() == 0u);
    REQUIRE(pool.allocate() == 1u);
    REQUIRE(pool.allocate() == 2u);
    REQUIRE_FALSE(pool.allocate().has_value());
    REQUIRE(pool.available() == 0);
    pool.release(0);
    pool.release(2);
    REQUIRE(pool.in_use() == 1);
    REQUIRE(pool.allocate() == 2u);
    REQUIRE(pool.allocate() == 0u);
    REQUIRE_FALSE(pool.allocate().has_value());
}
