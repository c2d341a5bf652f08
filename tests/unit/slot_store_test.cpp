// SPDX-License-Identifier: Apache-2.0
//
// A slot store holds what a cache makes of the same vectors and attends to it as a cache does, whatever the order in
// which slots were written to. What settle() and failed calls leave.
#include "slot_stores.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/slot_store.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <thread>
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

TEST_CASE("slots that were written to in any order hold and give what a cache does, bit for bit", "[slots]") {
    generator g(4101);
    constexpr std::size_t tokens = 85, queries = 9;
    const std::vector<std::uint32_t> table{6, 1, 4, 99};
    for (const kv1::layer_description& l : layers()) {
        CAPTURE(name_of(l));
        const slot_vectors x(g, l, tokens);
        kv1::slot_store store(one_layer(l, 8 * page));
        const slot_view view = slot_view::table(table, tokens);
        write_over(g, store, kv1_test::slots_of(view, page), x);

        kv1::kv_cache cache(kv1::uniform_cache(1, l, 4 * page, page));
        const kv1::sequence_id id = cache.create_sequence();
        append(cache, id, x, 0, tokens);
        for (std::size_t p = 0; p < 3; ++p)
            for (std::size_t head = 0; head < kv_heads; ++head) {
                const auto theirs = cache.page(0, head, static_cast<std::uint32_t>(p)),
                           mine = store.page(0, head, table[p]);
                REQUIRE(std::memcmp(mine.data(), theirs.data(), theirs.size()) == 0);
            }

        const std::vector<float> q = kv1_test::normal_values(g, queries * heads * l.key_dim);
        const std::vector<float> slopes(heads, 0.25f), sinks = kv1_test::normal_values(g, heads);
        for (const bool causal : {false, true})
            for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
                std::vector<float> expected(queries * heads * l.value_dim), lse(queries * heads),
                    own_lse(lse);
                kv1::attention_options o{.mode = mode, .log_sum_exp = lse, .window = 50, .soft_cap = 20.0f};
                o.mask = causal ? kv1::attention_mask::causal() : kv1::attention_mask::none();
                o.alibi_slopes = slopes;
                o.sink_logits = sinks;
                cache.attend(id, 0, {q.data(), queries, heads, l.key_dim},
                             {expected.data(), queries, heads, l.value_dim}, o);
                const slot_stream stream{queries, view, causal ? slot_mask::causal() : slot_mask::none()};
                const std::vector<float> out = attend(store, {&stream, 1}, q,
                                                      {.mode = mode,
                                                       .log_sum_exp = own_lse,
                                                       .window = 50,
                                                       .soft_cap = 20.0f,
                                                       .alibi_slopes = slopes,
                                                       .sink_logits = sinks});
                REQUIRE(out == expected);
                REQUIRE(own_lse == lse);
            }
    }
}

TEST_CASE("a decoded token sees what a cache with fp16 sinks and window shows it", "[slots]") {
    // Both see the same numbers. With slots in order they also see the same codes in the same chunks, so the body is the
    // same bit for bit, and fp32 sums of the rest differ in their order: a score is off by gamma(D + 3) sum |q k| twice,
    // outputs by e^(4 times that) - 1 of the largest value and a few roundings. Slots in any order make other chunks,
    // whose weights the fast path rounds in other ways.
    generator g(4102);
    kv1::layer_description apart{kv_heads, 64, 64};
    apart.key_encoding.levels = apart.value_encoding.levels = kv1::level_choice::least_squares;
    apart.key_encoding.hadamard = 64;
    kv1::layer_description latent = kv1::latent_layer(96, 64, kv1::kv_format::affine2);
    latent.kv_heads = kv_heads;
    latent.key_encoding.levels = kv1::level_choice::least_squares;
    latent.key_encoding.hadamard = 32;
    constexpr std::size_t tokens = 100;
    for (const auto& [l, in_order] : {std::pair(apart, false), std::pair(apart, true),
                                      std::pair(latent, false), std::pair(latent, true)}) {
        kv1::slot_store_description d = one_layer(l, 8 * page);
        d.fp16_slots = 40;
        d.fp16_sinks = 3;
        d.fp16_window = 7;
        kv1::slot_store store(d);
        kv1::cache_description c = kv1::uniform_cache(1, l, 8 * page, page);
        c.fp16_sinks = 3;
        c.fp16_window = 7;
        kv1::kv_cache cache(c);
        const kv1::sequence_id id = cache.create_sequence();
        const slot_vectors x(g, l, tokens);
        const std::vector<std::uint32_t> slots =
            in_order ? numbers_from(2 * page, tokens) : kv1_test::shuffled(g, numbers_from(40, tokens));
        double largest_key = 0.0, largest_value = 0.0;
        for (const float v : x.keys)
            largest_key = std::max(largest_key, std::fabs(static_cast<double>(v)));
        for (const float v : l.values_in_keys ? x.keys : x.values)
            largest_value = std::max(largest_value, std::fabs(static_cast<double>(v)));
        std::vector<std::int32_t> positions;
        for (std::size_t t = 0; t < tokens; ++t) {
            append(cache, id, x, t, 1);
            store.write(0, std::span(slots).subspan(t, 1), x.key_view(t, 1), x.value_view(t, 1));
            positions.push_back(static_cast<std::int32_t>(t));
            const std::vector<float> q = kv1_test::normal_values(g, heads * l.key_dim);
            double largest_query = 0.0;
            for (const float v : q)
                largest_query = std::max(largest_query, std::fabs(static_cast<double>(v)));
            const kv1::precision mode = in_order && t % 2 == 0 ? kv1::precision::fast : kv1::precision::exact;
            std::vector<float> expected(heads * l.value_dim);
            cache.attend(id, 0, {q.data(), 1, heads, l.key_dim}, {expected.data(), 1, heads, l.value_dim},
                         {.mode = mode});
            const slot_view view =
                in_order ? slot_view::range(slots[0], t + 1) : slot_view::list(std::span(slots).first(t + 1));
            const slot_stream stream{1, view, slot_mask::causal()};
            const std::vector<float> out = attend(store, {&stream, 1}, q, {.mode = mode});
            // sum |q k| / sqrt(D) of D channels, at most
            const auto dim = static_cast<double>(l.key_dim);
            const double score = std::sqrt(dim) * largest_query * largest_key;
            const double bound =
                (std::expm1(4 * kv1_test::gamma(dim + 3) * score) + 64 * kv1_test::unit_roundoff) *
                largest_value;
            for (std::size_t i = 0; i < out.size(); ++i)
                REQUIRE(std::fabs(static_cast<double>(out[i]) - static_cast<double>(expected[i])) <= bound);
            cache.commit(id);
            const kv1::slot_sequence sequence{view, positions};
            store.settle({&sequence, 1});
            REQUIRE(store.fp16_slots_in_use(0) == std::min<std::size_t>(t + 1, 3 + 6));
        }
        for (std::size_t t = 0; t < tokens; ++t)
            REQUIRE(store.has_fp16(0, slots[t]) == (t < 3 || t >= tokens - 6));
        store.flush();
        REQUIRE(store.fp16_slots_in_use(0) == 0);
    }
}

TEST_CASE("a slot is seen as it was given until it is settled, and then as its codes", "[slots]") {
    generator g(4103);
    kv1::slot_store_description d = one_layer({kv_heads, 64, 64}, 3 * page);
    d.fp16_slots = 20;
    kv1::slot_store store(d);
    const slot_vectors x(g, d.layers[0], 20);
    const std::vector<std::uint32_t> slots = kv1_test::shuffled(g, numbers_from(10, 20));
    store.write(0, slots, x.key_view(0, 20), x.value_view(0, 20));
    std::vector<float> given(20 * 64), coded(given);
    store.read(0, kv_side::key, 1, slots, given);
    for (std::size_t t = 0; t < 20; ++t)
        for (std::size_t c = 0; c < 64; ++c)
            REQUIRE(given[t * 64 + c] ==
                    static_cast<float>(kv1::float16(x.keys[(t * kv_heads + 1) * 64 + c])));
    SECTION("there is room for so many copies and no more, until some are settled") {
        const contents before(store);
        const std::vector<std::uint32_t> more{0, 15, 1}; // 15 has one, and 32 fit pages of 32
        const std::vector<std::uint32_t> many = numbers_from(40, 13);
        const kv1::status s = store.try_write(0, many, x.key_view(0, 13), x.value_view(0, 13));
        REQUIRE(s.code() == kv1::errc::capacity_exceeded);
        REQUIRE(contents(store) == before);
        store.write(0, more, x.key_view(0, 3), x.value_view(0, 3));
        REQUIRE(store.fp16_slots_in_use(0) == 22);
    }
    SECTION("some may be released by name") {
        store.release_fp16(std::vector<std::uint32_t>{12, 12, 0});
        REQUIRE_FALSE(store.has_fp16(0, 12));
        REQUIRE(store.fp16_slots_in_use(0) == 19);
    }
    store.flush();
    store.read(0, kv_side::key, 1, slots, coded);
    REQUIRE(coded != given);
    kv1::kv_cache cache(kv1::uniform_cache(1, d.layers[0], 3 * page, page));
    const kv1::sequence_id id = cache.create_sequence();
    slot_vectors rounded = x; // codes are made from fp16
    for (float& v : rounded.keys)
        v = static_cast<float>(kv1::float16(v));
    append(cache, id, rounded, 0, 20);
    if (store.has_fp16(0, 15))
        return;
    std::vector<float> expected(20 * 64);
    cache.read(id, 0, kv_side::key, 1, 0, 20, expected);
    for (std::size_t t = 0; t < 20; ++t)
        if (slots[t] != 15)
            REQUIRE(std::equal(&coded[t * 64], &coded[t * 64] + 64, &expected[t * 64]));
}

TEST_CASE("settle() counts windows of each sequence by positions, and leaves other slots alone", "[slots]") {
    generator g(4104);
    kv1::slot_store_description d = one_layer({kv_heads, 32, 32}, 4 * page);
    d.layers.push_back(d.layers[0]);
    d.fp16_slots = 64;
    d.fp16_sinks = 2;
    d.fp16_window = 4;
    kv1::slot_store store(d);
    const slot_vectors x(g, d.layers[0], 40);
    store.write(0, numbers_from(0, 40), x.key_view(0, 40), x.value_view(0, 40));
    store.write(1, numbers_from(0, 40), x.key_view(0, 40), x.value_view(0, 40));
    // slots 0-9 hold positions 9 ... 0; slot 10 is empty; slots 20-27 hold 100 ... 107 in order
    std::vector<std::int32_t> first{9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1};
    const std::vector<std::int32_t> second{100, 101, 102, 103, 104, 105, 106, 107};
    const kv1::slot_sequence sequences[] = {{slot_view::range(0, 11), first},
                                            {slot_view::range(20, 8), second}};
    store.settle(sequences);
    for (std::size_t layer = 0; layer < 2; ++layer)
        for (std::uint32_t s = 0; s < 40; ++s) {
            const bool in_first = s < 11, in_second = s >= 20 && s < 28;
            const std::int32_t at = in_first ? first[s] : in_second ? second[s - 20] : 0;
            const bool kept = in_first ? (at >= 0 && at < 2) || at >= 7 : in_second ? at >= 105 : true;
            CAPTURE(layer, s);
            REQUIRE(store.has_fp16(layer, s) == kept);
        }
    const kv1::slot_sequence short_one{slot_view::range(0, 3), std::span(second).first(2)};
    REQUIRE(store.try_settle({&short_one, 1}).code() == kv1::errc::shape_mismatch);
    const kv1::slot_sequence beyond{slot_view::range(100, 100)};
    REQUIRE(store.try_settle({&beyond, 1}).code() == kv1::errc::out_of_range);
}

TEST_CASE("a context shift turns keys to other positions, and leaves what a cache makes of them there",
          "[slots]") {
    generator g(4112);
    constexpr std::size_t tokens = 70, dropped = page, left = tokens - dropped;
    const kv1::layer_description l = layers().back();
    REQUIRE(kv1::keeps_positions(l));
    const slot_vectors x(g, l, tokens);
    kv1::slot_store store(one_layer(l, 4 * page));
    const std::vector<std::uint32_t> table{2, 0, 3},
        slots = kv1_test::slots_of(slot_view::table(table, tokens), page);
    write_over(g, store, slots, x);
    // an engine reads what is left, turns it back by what is dropped, and writes it again
    const auto shifted = std::span(slots).subspan(dropped);
    slot_vectors turned(g, l, left);
    std::vector<std::int32_t> positions;
    std::vector<float> row(l.key_dim);
    for (std::size_t t = 0; t < left; ++t) {
        positions.push_back(store.key_position(0, shifted[t]) - static_cast<std::int32_t>(dropped));
        REQUIRE(positions[t] == static_cast<std::int32_t>(t));
        for (std::size_t head = 0; head < kv_heads; ++head) {
            store.read(0, kv_side::key, head, shifted.subspan(t, 1), row);
            kv1::apply_rotary(l.rotary, std::span(row), -static_cast<std::int64_t>(dropped));
            std::copy(row.begin(), row.end(), &turned.keys[(t * kv_heads + head) * l.key_dim]);
        }
    }
    turned.values.assign(x.values.begin() + static_cast<std::ptrdiff_t>(dropped * kv_heads * l.value_dim),
                         x.values.end());
    store.write(0, shifted, positions, turned.key_view(0, left), kv1::slot_store::nothing());
    kv1::kv_cache cache(kv1::uniform_cache(1, l, 4 * page, page));
    const kv1::sequence_id id = cache.create_sequence();
    append(cache, id, turned, 0, left);
    for (std::size_t p = 0; p < 2; ++p)
        for (std::size_t head = 0; head < kv_heads; ++head) {
            const auto theirs = cache.page(0, head, static_cast<std::uint32_t>(p)),
                       mine = store.page(0, head, table[1 + p]);
            REQUIRE(std::memcmp(mine.data(), theirs.data(), theirs.size()) == 0);
        }
    const std::vector<float> q = kv1_test::normal_values(g, 3 * heads * l.key_dim);
    std::vector<float> expected(3 * heads * l.value_dim);
    cache.attend(id, 0, {q.data(), 3, heads, l.key_dim}, {expected.data(), 3, heads, l.value_dim});
    const slot_stream stream{3, slot_view::table(std::span(table).subspan(1), left), slot_mask::causal()};
    REQUIRE(attend(store, {&stream, 1}, q) == expected);
}

TEST_CASE("keys whose means turn are refused without their positions", "[slots]") {
    generator g(4113);
    kv1::slot_store store(one_layer(layers().back(), page));
    const slot_vectors x(g, store.description().layers[0], 3);
    const std::vector<std::uint32_t> slots{4, 9, 30};
    store.write(0, slots, std::vector<std::int32_t>{100, 7, 0}, x.key_view(0, 3), x.value_view(0, 3));
    REQUIRE(store.key_position(0, 4) == 100);
    REQUIRE(store.key_position(0, 5) == -1);
    REQUIRE(store.key_position(0, 1000) == -1);
    const contents before(store);
    const auto code_of = [&](const std::vector<std::int32_t>& positions, kv1::tensor_view keys) {
        return store.try_write(0, slots, positions, keys, x.value_view(0, 3)).code();
    };
    REQUIRE(store.try_write(0, slots, x.key_view(0, 3), x.value_view(0, 3)).code() ==
            kv1::errc::shape_mismatch);
    REQUIRE(code_of({1, 2}, x.key_view(0, 3)) == kv1::errc::shape_mismatch);
    REQUIRE(code_of({1, -1, 3}, x.key_view(0, 3)) == kv1::errc::invalid_argument);
    std::vector<std::byte> raw(store.raw_bytes(0));
    store.export_raw(0, std::span(slots).first(1), raw);
    raw.back() = std::byte{0x80}; // of the position
    REQUIRE(store.try_import_raw(0, std::span(slots).first(1), raw).code() == kv1::errc::invalid_argument);
    REQUIRE(contents(store) == before);
    REQUIRE(code_of({}, kv1::slot_store::nothing()) ==
            kv1::errc::ok); // values alone leave keys where they are
    REQUIRE(contents(store) == before);
    store.clear(0, std::span(slots).first(1));
    REQUIRE(store.key_position(0, 4) == -1);

    // A layer that keeps none checks them all the same.
    kv1::slot_store other(one_layer({kv_heads, 64, 64}, page));
    const slot_vectors y(g, other.description().layers[0], 3);
    const auto code = [&](const std::vector<std::int32_t>& positions) {
        return other.try_write(0, slots, positions, y.key_view(0, 3), y.value_view(0, 3)).code();
    };
    REQUIRE(code({1, 2}) == kv1::errc::shape_mismatch);
    REQUIRE(code({1, -1, 3}) == kv1::errc::invalid_argument);
    REQUIRE(code({1, 2, 3}) == kv1::errc::ok);
    REQUIRE(other.key_position(0, 4) == -1);
}

TEST_CASE("a vector that is refused leaves every slot as it was", "[slots]") {
    generator g(4108);
    kv1::layer_description l{kv_heads, 64, 64};
    l.key_format = kv1::kv_format::compact3;
    l.key_encoding.levels = kv1::level_choice::least_squares;
    l.key_encoding.hadamard = 64;
    for (const std::size_t copies : {0u, 64u})
        for (const std::size_t n : {3u, 30u}) {
            kv1::slot_store_description d = one_layer(l, 4 * page);
            d.fp16_slots = copies;
            kv1::slot_store store(d);
            const slot_vectors x(g, l, 30);
            store.write(0, numbers_from(5, 10), x.key_view(0, 10), x.value_view(0, 10));
            const contents before(store);
            const std::vector<std::uint32_t> slots = kv1_test::shuffled(g, numbers_from(0, n));
            for (const float bad : {std::numeric_limits<float>::quiet_NaN(), 60000.0f}) {
                slot_vectors y = x;
                // all channels large: fp16 holds each, and not what the rotation makes of them
                for (std::size_t c = 0; c < 64; ++c)
                    y.keys[(2 * kv_heads + 1) * 64 + c] = bad;
                const kv1::status s = store.try_write(0, slots, y.key_view(0, n), y.value_view(0, n));
                REQUIRE(s.code() == (std::isnan(bad) ? kv1::errc::non_finite : kv1::errc::not_representable));
                REQUIRE(s.where().layer == 0);
                REQUIRE(s.where().kv_head == 1);
                REQUIRE(s.where().token == 2);
                REQUIRE(contents(store) == before);
            }
            const auto refuses = [&](kv1::errc code, std::span<const std::uint32_t> to, kv1::tensor_view k,
                                     kv1::tensor_view v) {
                REQUIRE(store.try_write(0, to, k, v).code() == code);
                REQUIRE(contents(store) == before);
            };
            const std::vector<std::uint32_t> twice{7, 3, 7}, beyond{1, 2, 128};
            refuses(kv1::errc::invalid_argument, twice, x.key_view(0, 3), x.value_view(0, 3));
            refuses(kv1::errc::out_of_range, beyond, x.key_view(0, 3), x.value_view(0, 3));
            refuses(kv1::errc::shape_mismatch, numbers_from(0, 3), x.key_view(0, 2), x.value_view(0, 3));
            refuses(kv1::errc::invalid_argument, numbers_from(0, 3), kv1::slot_store::nothing(),
                    kv1::slot_store::nothing());
            // large numbers that fit go in, and stay
            slot_vectors y = x;
            y.keys[64] = 50000.0f;
            store.write(0, slots, y.key_view(0, n), y.value_view(0, n));
            REQUIRE(contents(store) != before);
        }
}

TEST_CASE("a plan gives what the call gives, for any threads", "[slots]") {
    generator g(4109);
    kv1::slot_store_description d = one_layer({kv_heads, 64, 64}, 200 * page);
    d.fp16_slots = 320;
    kv1::slot_store called(d), threaded(d), planned(d);
    constexpr std::size_t tokens = 6000;
    const slot_vectors x(g, d.layers[0], tokens);
    const std::vector<std::uint32_t> slots = numbers_from(50, tokens);
    kv1_test::thread_executor threads(3);
    const auto run_plan = [](kv1::work_plan plan) {
        for (std::size_t phase = 0; phase < plan.phases(); ++phase) {
            std::vector<std::thread> team;
            for (std::size_t ith = 0; ith < 3; ++ith)
                team.emplace_back([&, ith] {
                    for (std::size_t i = ith; i < plan.tasks(phase); i += 3)
                        plan.run(phase, i);
                });
            for (std::thread& t : team)
                t.join();
        }
        REQUIRE(plan.finish());
    };
    for (std::size_t t = 0; t < tokens; t += 250) {
        const auto some = std::span(slots).subspan(t, 250);
        called.write(0, some, x.key_view(t, 250), x.value_view(t, 250));
        threaded.write(0, some, x.key_view(t, 250), x.value_view(t, 250), threads);
        run_plan(planned.plan_write(0, some, x.key_view(t, 250), x.value_view(t, 250)));
        if (t + 250 < tokens) {
            called.flush();
            threaded.flush();
            planned.flush();
        }
    }
    REQUIRE(contents(called) == contents(threaded));
    REQUIRE(contents(called) == contents(planned));
    const std::vector<float> q = kv1_test::normal_values(g, 3 * heads * 64);
    const slot_stream streams[] = {{2, slot_view::range(50, tokens), slot_mask::causal()},
                                   {1, slot_view::range(100, 20), slot_mask::none()}};
    const std::vector<float> expected = attend(called, streams, q);
    std::vector<float> out(expected.size());
    planned.attend(0, streams, {q.data(), 3, heads, 64}, {out.data(), 3, heads, 64}, {}, threads);
    REQUIRE(out == expected);
    out.assign(out.size(), 0.0f);
    run_plan(planned.plan_attention(0, streams, {q.data(), 3, heads, 64}, {out.data(), 3, heads, 64}));
    REQUIRE(out == expected);
    {
        const contents before(planned); // a plan that is given up changes nothing
        const kv1::work_plan dropped =
            planned.plan_write(0, numbers_from(0, 20), x.key_view(0, 20), x.value_view(0, 20));
    }
    REQUIRE(contents(called) == contents(planned));
}

TEST_CASE("descriptions and calls that no store can have are refused by name", "[slots]") {
    const kv1::layer_description l{kv_heads, 64, 64};
    const auto refused = [&](auto&& change, kv1::errc code) {
        kv1::slot_store_description d = one_layer(l, 2 * page);
        change(d);
        REQUIRE(kv1::slot_store::create(d).code() == code);
    };
    using description = kv1::slot_store_description;
    constexpr kv1::errc invalid = kv1::errc::invalid_argument;
    refused([](description& d) { d.layers.clear(); }, invalid);
    refused([](description& d) { d.slots = 0; }, invalid);
    refused([](description& d) { d.slots = std::size_t{1} << 31; }, invalid);
    refused([](description& d) { d.page_tokens = 24; }, invalid);
    refused([](description& d) { d.fp16_window = 4; }, invalid);
    refused([](description& d) { d.layers[0].sliding_window = 4; }, invalid);
    refused([](description& d) { d.layers[0].key_axis = kv1::quantization_axis::per_channel; }, invalid);
    refused([](description& d) { d.layers[0].kv_heads = 0; }, invalid);
    REQUIRE(kv1::basic_slot_store<kv1::formats<kv1::affine<4>>>::create(one_layer(l, page)).code() ==
            kv1::errc::unsupported_format);

    const kv1::slot_store store(one_layer(l, 2 * page));
    std::vector<float> q(2 * heads * 64), out(q.size());
    const kv1::tensor_view queries(q.data(), 2, heads, 64);
    const kv1::mutable_tensor_view outputs(out.data(), 2, heads, 64);
    const auto code_of = [&](const slot_stream& s, const kv1::slot_attention_options& o = {}) {
        return store.try_attend(0, {&s, 1}, queries, outputs, o).code();
    };
    const std::vector<std::uint32_t> twice{3, 4, 3}, blocks{0, 0}, far{7};
    const std::vector<std::int32_t> positions{1, 2};
    const std::vector<std::uint8_t> visible(30);
    REQUIRE(code_of({1, slot_view::range(0, 4), slot_mask::none()}) == kv1::errc::shape_mismatch);
    REQUIRE(code_of({3, slot_view::range(0, 4), slot_mask::none()}) == kv1::errc::shape_mismatch);
    REQUIRE(code_of({2, slot_view::range(60, 5), slot_mask::none()}) == kv1::errc::out_of_range);
    REQUIRE(code_of({2, slot_view::list(twice), slot_mask::none()}) == invalid);
    REQUIRE(code_of({2, slot_view::table(blocks, 40), slot_mask::none()}) == invalid);
    REQUIRE(code_of({2, slot_view::table(blocks, 65), slot_mask::none()}) == kv1::errc::out_of_range);
    REQUIRE(code_of({2, slot_view::table(far, 3), slot_mask::none()}) == kv1::errc::out_of_range);
    REQUIRE(code_of({2, slot_view::range(0, 1), slot_mask::causal()}) == kv1::errc::shape_mismatch);
    REQUIRE(code_of({2, slot_view::range(0, 3), slot_mask::by_position(positions, positions)}) ==
            kv1::errc::shape_mismatch);
    REQUIRE(code_of({2, slot_view::range(0, 16), slot_mask::bytes(visible, 16)}) ==
            kv1::errc::shape_mismatch);
    REQUIRE(code_of({2, slot_view::range(0, 3), slot_mask::additive(q.data(), 3)}, {.window = 2}) == invalid);
    REQUIRE(code_of({2, slot_view::range(0, 3),
                     slot_mask::additive(static_cast<const float*>(nullptr), 3)}) == invalid);
    REQUIRE(code_of({2, slot_view::range(0, 3), slot_mask::none()}, {.soft_cap = -1.0f}) == invalid);
    REQUIRE(store.try_attend(1, {}, queries, outputs).code() == kv1::errc::out_of_range);
}
