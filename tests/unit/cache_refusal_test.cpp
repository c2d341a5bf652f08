// SPDX-License-Identifier: Apache-2.0
//
// What a cache refuses, with the place that is wrong; a refusal changes nothing.
#include "compare.hpp"
#include "small_cache.hpp"
#include "targets.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv1.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

using kv1::errc;
using kv1::kv2_cache;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1::sequence_id;
using kv1_test::batch;
using kv1_test::everything;
using kv1_test::require_place;
using kv1_test::small_cache;

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

} // namespace

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
