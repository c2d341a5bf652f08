// SPDX-License-Identifier: Apache-2.0
//
// Attention over slots against its definition, on every target: views, masks, options, and slots that are overwritten,
// settled and cleared at random.
#include "slot_problem.hpp"
#include "targets.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/float16.hpp>
#include <kv1/format.hpp>
#include <kv1/slot_store.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using kv1::slot_mask;
using kv1::slot_stream;
using kv1::slot_view;
using kv1_test::generator;
using kv1_test::numbers_from;

// A random layer: formats, dims, groups, encodings, values in keys.
kv1::layer_description random_layer(generator& g) {
    const auto& formats = kv1::all_kv_formats;
    const auto any = [&] { return formats[g.below(std::size(formats))]; };
    kv1::layer_description l{g.between(1, 2), 32 * g.between(1, 3), 32 * g.between(1, 3), any(), any()};
    if (g.chance(0.3))
        l.key_dim += g.between(1, 9);
    if (g.chance(0.2)) {
        l.values_in_keys = true;
        l.value_dim = std::min(l.key_dim, l.value_dim);
        l.value_format = l.key_format;
        return l;
    }
    for (const bool keys : {true, false}) {
        kv1::vector_encoding& e = keys ? l.key_encoding : l.value_encoding;
        const std::size_t dim = keys ? l.key_dim : l.value_dim;
        const kv1::kv_format f = keys ? l.key_format : l.value_format;
        if (!kv1::info_of(f).fits_levels || !g.chance(0.6))
            continue;
        e.levels = kv1::level_choice::least_squares;
        if (dim % 32 == 0 && g.chance(0.5))
            e.hadamard = 32;
        if (g.chance(0.5))
            e.means = kv1_test::normal_values(g, l.kv_heads * dim);
        if (!keys || e.means.empty() || !g.chance(0.7))
            continue;
        l.rotary.frequencies = kv1::rotary_frequencies(10000.0, 2 * g.between(1, dim / 2));
        l.rotary.first_channel = g.below(dim - l.rotary.channels() + 1);
        l.rotary.pairs = g.chance(0.5) ? kv1::rotary_pairs::half_split : kv1::rotary_pairs::interleaved;
        for (std::size_t c = g.below(dim); c < dim && g.chance(0.5); ++c) // some pairs may have no mean
            e.means[c] = 0.0f;
    }
    return l;
}

// What one stream is made from; spans of the stream point into it.
struct stream_books {
    std::vector<std::uint32_t> items;
    std::vector<std::int32_t> query_positions, column_positions;
    std::vector<std::uint8_t> visible;
    std::vector<float> additive;
    std::vector<kv1::float16> halves;
    std::vector<kv1::bfloat16> bfloats;
    slot_stream stream;
};

slot_view random_view(generator& g, stream_books& b, std::size_t slots, std::size_t page) {
    const std::size_t most = std::min<std::size_t>(slots, 200);
    switch (g.below(3)) {
    case 0: {
        const std::size_t n = g.between(0, most);
        return slot_view::range(g.between(0, slots - n), n);
    }
    case 1:
        b.items = kv1_test::shuffled(g, numbers_from(0, slots));
        b.items.resize(g.between(0, std::min<std::size_t>(slots, 80)));
        return slot_view::list(b.items);
    default:
        b.items = kv1_test::shuffled(g, numbers_from(0, slots / page));
        return slot_view::table(b.items, g.between(0, most));
    }
}

// A view, a mask, and as many queries as they allow.
void random_stream(generator& g, stream_books& b, std::size_t slots, std::size_t page, std::size_t heads,
                   bool windows) {
    const slot_view view = random_view(g, b, slots, page);
    const std::size_t n = view.size();
    std::size_t m = g.between(1, 6);
    slot_mask mask = slot_mask::none();
    switch (g.below(windows ? 4u : 5u)) {
    case 0:
        break;
    case 1:
        mask = slot_mask::causal();
        m = std::min(m, n);
        break;
    case 2: {
        // two sequences in one view, and empty slots
        for (std::size_t c = 0; c < n; ++c)
            b.column_positions.push_back(g.chance(0.2) ? -1 : static_cast<std::int32_t>(g.below(n)));
        for (std::size_t i = 0; i < m; ++i)
            b.query_positions.push_back(static_cast<std::int32_t>(g.below(n + 1)));
        mask = slot_mask::by_position(b.query_positions, b.column_positions);
        break;
    }
    case 3: {
        const std::size_t stride = n + g.below(5);
        const double share = g.uniform();
        for (std::size_t i = 0; i < m * stride; ++i)
            b.visible.push_back(g.chance(share) ? static_cast<std::uint8_t>(g.between(1, 3)) : 0);
        mask = slot_mask::bytes(b.visible, stride);
        break;
    }
    default: {
        const bool by_head = g.chance(0.5);
        const std::size_t stride = n + g.below(5), head_stride = m * stride;
        const double share = g.uniform();
        for (std::size_t i = 0; i < (by_head ? heads : 1) * head_stride; ++i)
            b.additive.push_back(g.chance(share) ? static_cast<float>(kv1::bfloat16(g.normal()))
                                                 : -std::numeric_limits<float>::infinity());
        const auto query = static_cast<std::ptrdiff_t>(stride),
                   head = static_cast<std::ptrdiff_t>(by_head ? head_stride : 0);
        // numbers of 8 significant bits are the same in all three types
        switch (g.below(3)) {
        case 0:
            mask = slot_mask::additive(b.additive.data(), query, head);
            break;
        case 1:
            for (float& x : b.additive) {
                b.halves.emplace_back(x);
                x = static_cast<float>(b.halves.back());
            }
            mask = slot_mask::additive(b.halves.data(), query, head);
            break;
        default:
            for (const float x : b.additive)
                b.bfloats.emplace_back(x);
            mask = slot_mask::additive(b.bfloats.data(), query, head);
        }
    }
    }
    b.stream = {m, view, mask};
}

// Writes, settles, clears, copies and moves some slots.
void change(generator& g, kv1::slot_store& store) {
    const kv1::layer_description& l = store.description().layers[0];
    const std::vector<std::uint32_t> order = kv1_test::shuffled(g, numbers_from(0, store.slots()));
    const std::size_t n = g.between(1, 40);
    const auto some = std::span(order).first(std::min(n, order.size()));
    switch (g.below(8)) {
    case 0:
        store.release_fp16(some);
        break;
    case 1:
        if (!kv1::keeps_positions(l)) // scores of such slots mean nothing
            store.clear(0, some);
        break;
    case 2:
    case 3: {
        const auto others = std::span(order).last(some.size());
        const auto code =
            (g.chance(0.5) ? store.try_copy(0, some, others) : store.try_move(0, some, others)).code();
        REQUIRE((code == kv1::errc::ok || code == kv1::errc::capacity_exceeded));
        break;
    }
    default: {
        const kv1_test::slot_vectors x(g, l, some.size());
        const kv1::status s = store.try_write(0, some, kv1_test::positions_by_slot(some),
                                              x.key_view(0, some.size()), x.value_view(0, some.size()));
        if (s.code() == kv1::errc::capacity_exceeded)
            store.flush();
        else
            REQUIRE(s);
    }
    }
}

} // namespace

TEST_CASE("attention over slots is attention, whatever the view, the mask and what happened to the slots",
          "[slots]") {
    generator g(4201);
    for (int round = 0; round < 150; ++round) {
        const kv1::layer_description l = random_layer(g);
        kv1::slot_store_description d;
        d.layers = {l};
        d.page_tokens = 16 * g.between(1, 4);
        d.slots = d.page_tokens * g.between(1, 10);
        d.fp16_slots = g.chance(0.6) ? g.between(1, 100) : 0;
        kv1::slot_store store(d);
        if (kv1::keeps_positions(l)) {
            const kv1_test::slot_vectors x(g, l, store.slots());
            const std::vector<std::uint32_t> all = numbers_from(0, store.slots());
            for (std::size_t s = 0; s < all.size(); s += d.page_tokens / 2) {
                const auto some = std::span(all).subspan(s, d.page_tokens / 2);
                if (d.fp16_slots != 0)
                    store.flush();
                const kv1::status written =
                    store.try_write(0, some, kv1_test::positions_by_slot(some), x.key_view(s, some.size()),
                                    x.value_view(s, some.size()));
                REQUIRE(written);
            }
        }
        for (std::size_t i = g.between(1, 25); i > 0; --i)
            change(g, store);
        const std::size_t heads = l.kv_heads * g.between(1, 5);
        kv1::slot_attention_options o;
        o.mode = kv1::precision::exact;
        if (g.chance(0.3))
            o.scale = 0.3f;
        if (g.chance(0.3))
            o.soft_cap = 15.0f;
        if (g.chance(0.3))
            o.window = g.between(1, 60);
        std::vector<float> slopes, sinks;
        if (g.chance(0.3))
            o.alibi_slopes = slopes = kv1_test::normal_values(g, heads, 0.1f);
        if (g.chance(0.3))
            o.sink_logits = sinks = kv1_test::normal_values(g, heads, 2.0f);
        std::vector<stream_books> books(g.between(1, 4));
        std::vector<slot_stream> streams;
        std::size_t m = 0;
        for (stream_books& b : books) {
            random_stream(g, b, store.slots(), d.page_tokens, heads, o.window != 0);
            streams.push_back(b.stream);
            m += b.stream.queries;
        }
        const std::vector<float> q = kv1_test::normal_values(g, m * heads * l.key_dim);
        std::vector<float> out(m * heads * l.value_dim), lse(m * heads);
        o.log_sum_exp = lse;
        CAPTURE(round, std::string(to_string(l.key_format)), std::string(to_string(l.value_format)),
                l.key_dim, l.value_dim);
        kv1_test::for_each_target([&](kv1::target) {
            std::fill(out.begin(), out.end(), 777.0f);
            std::fill(lse.begin(), lse.end(), 777.0f);
            store.attend(0, streams, {q.data(), m, heads, l.key_dim}, {out.data(), m, heads, l.value_dim}, o);
            std::size_t first = 0;
            for (const stream_books& b : books) {
                CAPTURE(static_cast<int>(b.stream.slots.kind()), static_cast<int>(b.stream.mask.kind()),
                        b.stream.slots.size());
                kv1::slot_attention_options own = o;
                kv1_test::slot_oracle(store, 0).check(
                    b.stream, own, kv1_test::added_by(b.stream, own, b.additive), q, heads, out, first);
                first += b.stream.queries;
            }
        });
    }
}

TEST_CASE("sequences that lie between each other get the means of their own positions", "[slots]") {
    generator g(4204);
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    for (int round = 0; round < 25; ++round) {
        constexpr std::size_t page = 32;
        kv1::layer_description l{g.between(1, 2), 64, 32, kv1::kv_format::compact2};
        l.key_encoding.levels = kv1::level_choice::least_squares;
        l.key_encoding.means = kv1_test::normal_values(g, l.kv_heads * l.key_dim);
        l.rotary.frequencies = kv1::rotary_frequencies(10000.0, l.key_dim);
        kv1::slot_store_description d;
        d.layers = {l};
        d.page_tokens = page;
        d.slots = page * g.between(1, 25);
        d.fp16_slots = g.chance(0.3) ? d.slots : 0;
        kv1::slot_store store(d);

        // a token of each sequence in turn, and sometimes of another one; some slots stay empty
        const std::size_t sequences = g.between(1, 20), n = store.slots();
        std::vector<std::int32_t> next(sequences), positions;
        for (std::int32_t& p : next)
            p = static_cast<std::int32_t>(g.below(100000));
        std::vector<std::uint32_t> used;
        std::vector<std::size_t> owner(n, sequences); // of a slot
        for (std::uint32_t s = 0; s < n; ++s) {
            if (g.chance(0.05))
                continue;
            owner[s] = g.chance(0.1) ? g.below(sequences) : s % sequences;
            used.push_back(s);
            positions.push_back(next[owner[s]]++);
        }
        const kv1_test::slot_vectors x(g, l, used.size());
        const std::size_t coded =
            used.size() * 3 / 4; // the others keep their fp16 copies, where there are any
        for (const auto& [first, last] : {std::pair(std::size_t{0}, coded), std::pair(coded, used.size())}) {
            store.flush();
            store.write(0, std::span(used).subspan(first, last - first),
                        std::span(positions).subspan(first, last - first), x.key_view(first, last - first),
                        x.value_view(first, last - first));
        }

        // each query sees one sequence, and not all of it
        const std::size_t m = g.between(1, 6), heads = l.kv_heads * g.between(1, 4);
        std::vector<float> added;
        std::vector<kv1::float16> halves;
        std::vector<std::uint8_t> visible;
        for (std::size_t i = 0; i < m; ++i) {
            const std::size_t own = g.below(sequences);
            for (std::size_t s = 0; s < n; ++s)
                added.push_back(owner[s] == own && !g.chance(0.05) ? 0.0f : hidden);
        }
        for (const float a : added) {
            halves.emplace_back(a);
            visible.push_back(a == 0.0f ? 1 : 0);
        }
        const std::vector<float> q = kv1_test::normal_values(g, m * heads * l.key_dim);
        std::vector<float> out(m * heads * l.value_dim), lse(m * heads);
        const slot_view view = slot_view::range(0, n);
        const auto stride = static_cast<std::ptrdiff_t>(n);
        for (const slot_mask& mask :
             {slot_mask::additive(halves.data(), stride), slot_mask::bytes(visible, n)}) {
            CAPTURE(round, sequences, n, m, static_cast<int>(mask.kind()));
            const slot_stream stream{m, view, mask};
            kv1::slot_attention_options o;
            o.mode = kv1::precision::exact;
            o.log_sum_exp = lse;
            kv1_test::for_each_target([&](kv1::target) {
                store.attend(0, {&stream, 1}, {q.data(), m, heads, l.key_dim},
                             {out.data(), m, heads, l.value_dim}, o);
                kv1_test::slot_oracle(store, 0).check(stream, o, kv1_test::added_by(stream, o, added), q,
                                                      heads, out, 0);
            });
        }
    }
}

TEST_CASE("slots in any order get the means of their own positions", "[slots]") {
    generator g(4205);
    constexpr std::size_t page = 64;
    for (int round = 0; round < 12; ++round) {
        // more pairs than a register has lanes, slow ones and not; in some rounds none is slow
        kv1::layer_description l{2, 96, 32, kv1::kv_format::compact2};
        l.key_encoding.levels = kv1::level_choice::least_squares;
        l.key_encoding.means = kv1_test::normal_values(g, l.kv_heads * l.key_dim);
        l.rotary.frequencies =
            kv1::rotary_frequencies(round % 3 == 0 ? 10.0 : 1.0e6, 2 * g.between(1, l.key_dim / 2));
        if (round % 4 == 0) // a KV head without a mean
            std::fill_n(l.key_encoding.means.begin(), l.key_dim, 0.0f);
        kv1::slot_store_description d;
        d.layers = {l};
        d.page_tokens = page;
        d.slots = page * g.between(1, 16);
        d.fp16_slots = g.chance(0.3) ? page : 0;
        kv1::slot_store store(d);
        const std::size_t n = store.slots();
        const std::vector<std::uint32_t> slots = kv1_test::shuffled(g, numbers_from(0, n));
        std::vector<std::int32_t> positions(n);
        auto at = static_cast<std::int32_t>(g.chance(0.3) ? 0x7fff0000 - n : g.below(100000));
        for (std::int32_t& p : positions)
            p = at += g.chance(0.005) ? 1000 : 1; // runs that are not there between others
        const kv1_test::slot_vectors x(g, l, n);
        for (std::size_t first = 0; first < n; first += page) {
            store.flush();
            store.write(0, std::span(slots).subspan(first, page), std::span(positions).subspan(first, page),
                        x.key_view(first, page), x.value_view(first, page));
        }

        const std::size_t m = g.between(1, 6), heads = l.kv_heads * g.between(1, 3);
        std::vector<float> added;
        for (std::size_t i = 0; i < m * heads * n; ++i)
            added.push_back(g.chance(0.7) ? g.normal() : -std::numeric_limits<float>::infinity());
        const std::vector<float> q = kv1_test::normal_values(g, m * heads * l.key_dim),
                                 logits = kv1_test::normal_values(g, heads);
        std::vector<float> out(m * heads * l.value_dim), lse(m * heads);
        const std::vector<std::uint32_t> blocks = kv1_test::shuffled(g, numbers_from(0, n / page));
        for (const slot_view& view :
             {slot_view::range(g.below(n / 2), n / 2), slot_view::table(blocks, n - g.below(page)),
              slot_view::list(std::span(slots).first(n - g.below(n / 2)))})
            for (const bool by_mask : {false, true}) {
                const auto stride = static_cast<std::ptrdiff_t>(n);
                const slot_stream stream{
                    m, view,
                    by_mask ? slot_mask::additive(added.data(), static_cast<std::ptrdiff_t>(heads) * stride,
                                                  stride)
                            : slot_mask::causal()};
                CAPTURE(round, n, m, heads, static_cast<int>(view.kind()), by_mask);
                kv1::slot_attention_options o;
                o.mode = kv1::precision::exact;
                o.log_sum_exp = lse;
                o.sink_logits = logits;
                o.soft_cap = round % 5 == 4 ? 20.0f : 0.0f;
                kv1_test::for_each_target([&](kv1::target) {
                    store.attend(0, {&stream, 1}, {q.data(), m, heads, l.key_dim},
                                 {out.data(), m, heads, l.value_dim}, o);
                    kv1_test::slot_oracle(store, 0).check(stream, o, kv1_test::added_by(stream, o, added), q,
                                                          heads, out, 0);
                });
            }
    }
}

TEST_CASE("an additive mask of zeros and -infinity gives what a mask of bytes gives, on the fast path",
          "[slots]") {
    // The same scores, hidden in the same places: the same bits.
    generator g(4202);
    constexpr std::size_t slots = 700, kv_heads = 2, heads = 6, dim = 64, m = 5;
    kv1::slot_store_description d;
    d.layers = {{kv_heads, dim, dim}};
    d.slots = slots;
    for (const std::size_t copies : {0u, 128u}) {
        d.fp16_slots = copies;
        kv1::slot_store store(d);
        const kv1_test::slot_vectors x(g, d.layers[0], slots);
        for (std::size_t t = 0; t < slots; t += 100) {
            store.write(0, numbers_from(t, 100), x.key_view(t, 100), x.value_view(t, 100));
            if (t + 100 < slots)
                store.flush();
        }
        std::vector<std::uint8_t> visible;
        std::vector<float> added;
        for (std::size_t i = 0; i < m * slots; ++i) {
            visible.push_back(g.chance(0.5) ? 1 : 0);
            added.push_back(visible.back() != 0 ? 0.0f : -std::numeric_limits<float>::infinity());
        }
        std::vector<kv1::float16> halves(added.begin(), added.end());
        const std::vector<float> q = kv1_test::normal_values(g, m * heads * dim);
        kv1_test::for_each_target([&](kv1::target) {
            const auto attend = [&](const slot_mask& mask) {
                std::vector<float> out(m * heads * dim), lse(m * heads);
                const slot_stream s{m, slot_view::range(0, slots), mask};
                store.attend(0, {&s, 1}, {q.data(), m, heads, dim}, {out.data(), m, heads, dim},
                             {.log_sum_exp = lse});
                out.insert(out.end(), lse.begin(), lse.end());
                return out;
            };
            const std::vector<float> expected = attend(slot_mask::bytes(visible, slots));
            REQUIRE(attend(slot_mask::additive(added.data(), slots)) == expected);
            REQUIRE(attend(slot_mask::additive(halves.data(), slots)) == expected);
        });
    }
}

TEST_CASE("ALiBi as ggml has it, slopes times a mask of distances, is ALiBi by positions", "[slots]") {
    // fp32 holds the distances, so both add the same products to the same scores.
    generator g(4203);
    constexpr std::size_t slots = 128, heads = 4, dim = 32, m = 3;
    kv1::slot_store_description d;
    d.layers = {{2, dim, dim}};
    d.slots = slots;
    kv1::slot_store store(d);
    const kv1_test::slot_vectors x(g, d.layers[0], slots);
    store.write(0, numbers_from(0, slots), x.key_view(0, slots), x.value_view(0, slots));
    std::vector<std::int32_t> columns, queries{90, 127, 60};
    for (const std::uint32_t t : kv1_test::shuffled(g, numbers_from(0, slots)))
        columns.push_back(static_cast<std::int32_t>(t));
    std::vector<float> added;
    for (const std::int32_t p : queries)
        for (const std::int32_t c : columns)
            added.push_back(c <= p ? static_cast<float>(c - p) : -std::numeric_limits<float>::infinity());
    const std::vector<float> q = kv1_test::normal_values(g, m * heads * dim),
                             slopes{0.5f, 0.25f, 0.125f, 0.0625f};
    kv1_test::for_each_target([&](kv1::target) {
        const auto attend = [&](const slot_mask& mask) {
            std::vector<float> out(m * heads * dim);
            const slot_stream s{m, slot_view::range(0, slots), mask};
            store.attend(0, {&s, 1}, {q.data(), m, heads, dim}, {out.data(), m, heads, dim},
                         {.alibi_slopes = slopes});
            return out;
        };
        REQUIRE(attend(slot_mask::additive(added.data(), slots)) ==
                attend(slot_mask::by_position(queries, columns)));
    });
}
