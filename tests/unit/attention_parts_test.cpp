// SPDX-License-Identifier: Apache-2.0
//
// attend()'s options where the cache parts what a query sees: sliding-window layers, dropped pages, fp16
// sinks and windows, explicit masks over any of them. Random caches, options and queries against the model.
#include "cache_model.hpp"
#include "compare.hpp"
#include "random.hpp"
#include "random_masks.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

using kv1::attention_mask;
using kv1::attention_options;
using kv1::kv_cache;
using kv1::kv_format;
using kv1_test::bounded_row;
using kv1_test::cache_model;
using kv1_test::generator;

namespace {

constexpr std::size_t kv_heads = 2, heads = 4, page = 16;

bool one_in(generator& g, std::size_t n) { return g.below(n) == 0; }

// A cache with one layer of each kind beside its model.
struct world {
    cache_model rules;
    kv_cache cache;
    kv1::sequence_id id;
    kv1_test::model_sequence model;

    explicit world(const kv1::cache_description& d)
        : rules(d), cache(d), id(cache.create_sequence()), model(rules.empty(1)) {}

    void append(std::size_t n) {
        const std::size_t from = model.layers[0].size();
        for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
            const kv1::layer_description& l = cache.description().layers[layer];
            std::vector<float> k, v;
            for (std::size_t i = 0; i < n; ++i) {
                const std::uint64_t history = cache_model::history(model, from + i, 3);
                for (const auto& [to, side, dim] : {std::tuple(&k, kv1::kv_side::key, l.key_dim),
                                                    std::tuple(&v, kv1::kv_side::value, l.value_dim)}) {
                    const std::vector<float> x = kv1_test::token_values(history, layer, side, kv_heads * dim);
                    to->insert(to->end(), x.begin(), x.end());
                }
                rules.push(model, layer, {{rules.token(history, layer)}});
            }
            cache.append(id, layer, {k.data(), n, kv_heads, l.key_dim}, {v.data(), n, kv_heads, l.value_dim});
        }
    }

    void drop(std::size_t first, std::size_t pages) {
        cache.drop_pages(id, first, pages);
        for (std::size_t p = first; p < first + pages; ++p)
            model.dropped.insert(p);
    }
};

// How often an attend() was of each kind.
struct tallies {
    std::size_t sloped = 0, masked = 0, refused = 0, parted = 0;
};

// One attend() with random options, checked row by row.
void attend(generator& g, const world& w, std::size_t layer, tallies& count) {
    const kv1::layer_description& l = w.cache.description().layers[layer];
    const std::size_t length = w.model.layers[layer].size();
    attention_options o{.mode = kv1::precision::exact};
    std::size_t m = 1 + g.below(one_in(g, 8) ? 90 : 8), keys = 0;
    std::ptrdiff_t first_position = 0;
    bool causal = true;
    std::vector<std::uint8_t> visible;
    switch (g.below(6)) {
    case 0: { // anywhere, past the end too
        const std::size_t at = g.below(length + 40);
        o.mask = attention_mask::causal_from(at);
        first_position = static_cast<std::ptrdiff_t>(at);
        break;
    }
    case 1: // more queries than tokens are allowed here
        o.mask = attention_mask::none();
        causal = false;
        first_position = static_cast<std::ptrdiff_t>(length) - static_cast<std::ptrdiff_t>(m);
        break;
    case 2:
    case 3:
        m = std::min(m, length);
        o.mask = kv1_test::random_mask(g, m, length, visible);
        keys = o.mask.explicit_keys();
        causal = false;
        first_position = static_cast<std::ptrdiff_t>(length - m);
        ++count.masked;
        break;
    default:
        m = std::min(m, length);
        first_position = static_cast<std::ptrdiff_t>(length - m);
    }
    if (one_in(g, 2))
        o.window = 1 + g.below(one_in(g, 2) ? 20 : length + 20);
    if (one_in(g, 3)) {
        o.range.first = g.below(length + 10);
        o.range.last = o.range.first + g.below(length + 10);
    }
    if (one_in(g, 3))
        o.soft_cap = 0.5f + static_cast<float>(g.below(30));
    std::vector<float> sink_logits, slopes;
    for (std::size_t h = 0; h < heads; ++h) {
        sink_logits.push_back(static_cast<float>(g.below(64)) / 16.0f - 2.0f);
        slopes.push_back(static_cast<float>(1 + h) / 8.0f);
    }
    if (one_in(g, 3))
        o.sink_logits = sink_logits;
    if (one_in(g, 3))
        o.alibi_slopes = slopes;

    // by query: one past the last token it may see, and what it asks for
    std::vector<std::pair<std::size_t, kv1_test::row_request>> asked(m);
    std::int64_t lacking = -1;
    for (std::size_t i = m; i-- > 0;) {
        const std::ptrdiff_t position = first_position + static_cast<std::ptrdiff_t>(i);
        auto& [last, request] = asked[i];
        last = causal ? std::min(length, static_cast<std::size_t>(position + 1)) : length;
        request.own = static_cast<std::size_t>(
            std::clamp(position + 1, std::ptrdiff_t{0}, static_cast<std::ptrdiff_t>(length)));
        if (!visible.empty())
            request.shows = [&visible, keys, from = length - keys, i](std::size_t t) {
                return t < from || visible[i * keys + t - from] != 0;
            };
        request.end = o.range.last;
        request.first = o.range.first;
        if (const std::ptrdiff_t from = position + 1 - static_cast<std::ptrdiff_t>(o.window);
            o.window != 0 && from > 0)
            request.first = std::max(request.first, static_cast<std::size_t>(from));
        request.options.soft_cap = o.soft_cap;
        request.options.position = static_cast<double>(position);
        if (w.rules.lacks(w.model, layer, last, request))
            lacking = static_cast<std::int64_t>(i);
    }

    const std::vector<float> q = kv1_test::normal_values(g, m * heads * l.key_dim);
    std::vector<float> out(m * heads * l.value_dim, 77.0f), lse(m * heads);
    o.log_sum_exp = lse;
    const kv1::status s = w.cache.try_attend(w.id, layer, {q.data(), m, heads, l.key_dim},
                                             {out.data(), m, heads, l.value_dim}, o);
    if (lacking >= 0) { // a commit has freed what a query would see
        REQUIRE(s.code() == kv1::errc::dropped_tokens);
        REQUIRE(s.where().layer == static_cast<std::int64_t>(layer));
        REQUIRE(s.where().token == lacking);
        REQUIRE(std::all_of(out.begin(), out.end(), [](float x) { return x == 77.0f; }));
        ++count.refused;
        return;
    }
    INFO(s.message());
    REQUIRE(s);
    const bool parted = w.rules.has_copies(layer) || !w.model.dropped.empty() || l.sliding_window != 0;
    count.parted += parted;
    count.sloped += parted && !o.alibi_slopes.empty();
    kv1_test::tally t;
    for (std::size_t i = 0; i < m; ++i) {
        auto& [last, request] = asked[i];
        for (std::size_t h = 0; h < heads; ++h) {
            const std::size_t row = i * heads + h;
            request.options.alibi_slope = o.alibi_slopes.empty() ? 0.0f : slopes[h];
            if (!o.sink_logits.empty())
                request.options.sink_logit = sink_logits[h];
            const bounded_row want =
                w.rules.attend(w.model, layer, h / (heads / kv_heads),
                               std::span(q).subspan(row * l.key_dim, l.key_dim), last, request);
            for (std::size_t c = 0; c < l.value_dim; ++c)
                t.expect(std::fabs(out[row * l.value_dim + c] - want.out[c]) <= want.out_bound[c], "layer",
                         layer, "query", i, "head", h, "channel", c, "got", out[row * l.value_dim + c],
                         "want", want.out[c]);
            const bool same = std::isinf(want.lse) ? lse[row] == want.lse
                                                   : std::fabs(lse[row] - want.lse) <= want.lse_bound;
            t.expect(same, "log-sum-exp", i, lse[row], want.lse);
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

} // namespace

TEST_CASE("every option means the same wherever the tokens lie", "[cache][attention]") {
    tallies count;
    for (std::uint64_t seed = 0; seed < 36; ++seed) {
        INFO("seed " << seed);
        generator g(seed);
        kv1::cache_description d;
        const auto sliding = [&] { return 1 + g.below(60); };
        d.layers = {{kv_heads, 24, 16, kv_format::affine2, kv_format::affine2},
                    {kv_heads, 16, 24, kv_format::affine4, kv_format::affine2, sliding()},
                    {kv_heads, 16, 16, kv_format::fp16, kv_format::fp32},
                    {kv_heads, 16, 16, kv_format::affine3, kv_format::affine2}};
        if (seed % 2 != 0)
            d.layers[1].window_retention = g.below(50);
        d.layers[3].key_axis = kv1::quantization_axis::per_channel;
        d.layers[3].sliding_window = seed % 4 == 3 ? d.layers[1].sliding_window : 0;
        d.capacity_tokens = 512;
        d.page_tokens = page;
        if (seed % 3 != 0)
            d.fp16_window = g.below(40);
        if (seed % 3 == 1)
            d.fp16_sinks = g.below(20);
        world w(d);
        std::size_t length = 0;
        for (int step = 0; step < 8; ++step) {
            const std::size_t n = 1 + g.below(60);
            w.append(n);
            length += n;
            if (const std::size_t full = length / page; full >= 2 && one_in(g, 3)) {
                const std::size_t first = g.below(full), pages = 1 + g.below(full - first);
                w.drop(first, pages);
            }
            if (one_in(g, 2)) {
                w.cache.commit(w.id);
                w.rules.commit(w.model);
            }
            if (one_in(g, 4)) {
                const std::size_t cut = g.below(length + 1);
                const kv1::errc want = w.rules.can_truncate(w.model, cut);
                REQUIRE(w.cache.try_truncate(w.id, cut).code() == want);
                if (want == kv1::errc::ok) {
                    w.rules.truncate(w.model, cut);
                    length = cut;
                }
            }
            if (length == 0)
                continue;
            for (std::size_t layer = 0; layer < d.layers.size(); ++layer)
                for (int i = 0; i < 3; ++i)
                    attend(g, w, layer, count);
            w.cache.validate();
        }
    }
    CHECK(count.sloped > 300);
    CHECK(count.masked > 300);
    CHECK(count.refused > 50);
    CHECK(count.parted > 1000);
}

TEST_CASE("slopes go with a sliding window whose old pages are gone", "[cache][attention]") {
    kv1::cache_description d;
    d.layers = {{kv_heads, 16, 16, kv_format::affine2, kv_format::affine2, 20}};
    d.capacity_tokens = 256;
    d.page_tokens = page;
    world w(d);
    for (int i = 0; i < 6; ++i) {
        w.append(30);
        w.cache.commit(w.id);
        w.rules.commit(w.model);
    }
    REQUIRE(w.cache.statistics(w.id).pages_in_use == 2); // tokens 160 to 179
    const std::vector<float> q(heads * 16, 0.25f), slopes{0.5f, 0.25f, 0.125f, 0.0625f};
    std::vector<float> out(heads * 16);
    w.append(1);
    w.cache.attend(w.id, 0, {q.data(), 1, heads, 16}, {out.data(), 1, heads, 16},
                   {.mode = kv1::precision::exact, .alibi_slopes = slopes});
    for (std::size_t h = 0; h < heads; ++h) {
        kv1_test::row_request asked;
        asked.options.alibi_slope = slopes[h];
        asked.options.position = 180.0;
        const bounded_row want =
            w.rules.attend(w.model, 0, h / 2, std::span(q).subspan(h * 16, 16), 181, asked);
        for (std::size_t c = 0; c < 16; ++c)
            REQUIRE(std::fabs(out[h * 16 + c] - want.out[c]) <= want.out_bound[c]);
    }
}
