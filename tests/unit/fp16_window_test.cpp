// SPDX-License-Identifier: Apache-2.0
//
// fp16 sinks and windows against their definition: a query that sees tokens 0 ... t sees the first s and the
// last r of them in fp16 and the others quantized, however the tokens came.
#include "cache_model.hpp"
#include "compare.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <vector>

using kv1::kv_cache;
using kv1::kv_format;
using kv1::sequence_id;
using kv1_test::bounded_row;
using kv1_test::cache_model;
using kv1_test::model_sequence;

namespace {

constexpr std::size_t key_dim = 24, value_dim = 16, kv_heads = 2, heads = 4, total = 90;

kv1::cache_description described(std::size_t sinks, std::size_t window) {
    kv1::cache_description d;
    d.layers = {{kv_heads, key_dim, value_dim, kv_format::affine2, kv_format::affine2}};
    d.capacity_tokens = 256;
    d.page_tokens = 16;
    d.fp16_sinks = sinks;
    d.fp16_window = window;
    return d;
}

// A cache of one layer beside its model, fed from one stream of tokens.
struct world {
    cache_model rules;
    kv_cache cache;
    sequence_id id;
    model_sequence model;

    explicit world(const kv1::cache_description& d)
        : rules(d), cache(d), id(cache.create_sequence()), model(rules.empty(1)) {}

    void append(std::size_t n, std::int32_t token = 0) {
        std::vector<float> k, v;
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint64_t history = cache_model::history(model, model.layers[0].size(), token);
            for (const auto& [to, side, dim] : {std::tuple(&k, kv1::kv_side::key, key_dim),
                                                std::tuple(&v, kv1::kv_side::value, value_dim)}) {
                const std::vector<float> x = kv1_test::token_values(history, 0, side, kv_heads * dim);
                to->insert(to->end(), x.begin(), x.end());
            }
            rules.push(model, 0, {{rules.token(history, 0)}});
        }
        cache.append(id, 0, {k.data(), n, kv_heads, key_dim}, {v.data(), n, kv_heads, value_dim});
    }
    void commit() {
        cache.commit(id);
        rules.commit(model);
    }

    // Queries of the last n tokens, each within the bound of its definition.
    void check(std::size_t n) const {
        const std::size_t length = model.layers[0].size();
        kv1_test::generator g(length);
        const std::vector<float> q = kv1_test::normal_values(g, n * heads * key_dim);
        std::vector<float> out(n * heads * value_dim), lse(n * heads);
        cache.attend(id, 0, {q.data(), n, heads, key_dim}, {out.data(), n, heads, value_dim},
                     {.mode = kv1::precision::exact, .log_sum_exp = lse});
        kv1_test::tally t;
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t h = 0; h < heads; ++h) {
                const std::size_t row = i * heads + h;
                const bounded_row want =
                    rules.attend(model, 0, h / (heads / kv_heads),
                                 std::span(q).subspan(row * key_dim, key_dim), length - n + i + 1);
                for (std::size_t c = 0; c < value_dim; ++c)
                    t.expect(std::fabs(out[row * value_dim + c] - want.out[c]) <= want.out_bound[c],
                             "position", length - n + i, "head", h, "channel", c);
                t.expect(std::fabs(lse[row] - want.lse) <= want.lse_bound, "log-sum-exp", length - n + i);
            }
        KV1_REQUIRE_CLEAN(t);
    }
};

} // namespace

TEST_CASE("the definition holds in one prefill, in chunks and in decode", "[fp16]") {
    for (const std::size_t sinks : {0u, 1u, 4u, 16u, 19u})
        for (const std::size_t window : {0u, 1u, 5u, 16u, 33u, 200u}) {
            if (sinks + window == 0)
                continue;
            INFO("sinks " << sinks << ", window " << window);
            world whole(described(sinks, window)), chunks(described(sinks, window)),
                decode(described(sinks, window));
            whole.append(total);
            whole.check(total);
            whole.commit();
            for (std::size_t done = 0; done < total; done += 18) {
                chunks.append(18);
                chunks.check(18);
                chunks.commit();
            }
            for (std::size_t done = 0; done < total; ++done) {
                decode.append(1);
                decode.check(1);
                decode.commit();
            }
            // what every way of getting here leaves behind is the same
            for (world* w : {&whole, &chunks, &decode}) {
                w->check(1);
                w->append(1);
                w->check(1);
                REQUIRE(w->model.fp16_from == whole.model.fp16_from);
                w->cache.validate();
            }
        }
}

TEST_CASE("fp16 copies are freed behind the window, and the sinks' are kept", "[fp16]") {
    world w(described(4, 20));
    w.append(total);
    const std::size_t copies = w.cache.statistics().bytes_fp16_copies;
    w.commit();
    const std::size_t page = copies / 6;                         // 90 tokens
    REQUIRE(w.cache.statistics().bytes_fp16_copies == 3 * page); // tokens 0 to 15, 64 to 89
}

TEST_CASE("a cut does not bring precision back, and what comes after it is precise again", "[fp16]") {
    for (const std::size_t cut : {75u, 70u, 69u, 64u, 40u, 17u, 16u, 3u, 0u}) {
        INFO("cut to " << cut);
        world w(described(4, 20)), never(described(4, 20));
        w.append(total);
        w.commit(); // fp16 from token 71 on
        w.cache.truncate(w.id, cut);
        w.rules.truncate(w.model, cut);
        never.append(cut);
        if (cut != 0)
            w.check(1);
        // the model says which form each token has: the first tokens after the cut see few in fp16
        w.append(30, 1);
        w.check(30);
        if (cut == 40) { // against a sequence that was never cut: it still has its copies
            const auto lost = w.rules.visible(w.model, 0, 41).window,
                       kept = never.rules.visible(never.model, 0, 40).window;
            REQUIRE(kept.size() == 20);
            REQUIRE(lost.size() == 1); // token 40 alone, appended anew
        }
        w.commit();
        w.append(1, 1);
        w.check(1);
        w.cache.validate();
    }
}

TEST_CASE("a body under fp16 windows is quantized from fp16, once", "[fp16]") {
    world w(described(0, 8));
    w.append(40);
    std::vector<float> x(40 * key_dim);
    w.cache.read(w.id, 0, kv1::kv_side::key, 1, 0, 40, x);
    const std::vector<float> before = x;
    for (std::size_t t = 0; t < 40; ++t)
        for (std::size_t c = 0; c < key_dim; ++c)
            REQUIRE(x[t * key_dim + c] == w.model.layers[0][t].keys[key_dim + c]);
    w.commit();
    w.append(20);
    w.commit();
    w.cache.read(w.id, 0, kv1::kv_side::key, 1, 0, 40, x);
    REQUIRE(x == before); // leaving the window changed nothing
}

TEST_CASE("values that fp16 can not hold are refused under fp16 windows", "[fp16]") {
    world w(described(0, 8));
    std::vector<float> k(kv_heads * key_dim, 1.0f), v(kv_heads * value_dim, 1.0f);
    v[value_dim + 2] = 70000.0f; // the quantizer alone would take it
    const kv1::status s =
        w.cache.try_append(w.id, 0, {k.data(), 1, kv_heads, key_dim}, {v.data(), 1, kv_heads, value_dim});
    REQUIRE(s.code() == kv1::errc::not_representable);
    REQUIRE(s.where().kv_head == 1);
    REQUIRE(s.where().channel == 2);
    REQUIRE(w.cache.statistics().pages_in_use == 0);
    kv_cache plain(described(0, 0));
    REQUIRE(plain.try_append(plain.create_sequence(), 0, {k.data(), 1, kv_heads, key_dim},
                             {v.data(), 1, kv_heads, value_dim}));
}

TEST_CASE("plain layers and layers with a sliding window take no copies", "[fp16]") {
    kv1::cache_description d = described(4, 20);
    d.layers = {{1, 8, 8, kv_format::fp16, kv_format::fp32},
                {1, 8, 8, kv_format::affine2, kv_format::affine2, 30}};
    kv_cache cache(d);
    REQUIRE(cache.statistics().bytes_reserved == 16 * (cache.layout(0).bytes() + cache.layout(1).bytes()));
    // and a cache type without fp16 can have none
    REQUIRE(kv1::kv2_cache::create(described(4, 20)).code() == kv1::errc::unsupported_format);
}
