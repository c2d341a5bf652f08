// SPDX-License-Identifier: Apache-2.0
//
// What commits promise: a length to roll back to, windows that free what they have passed and say so when it
// is asked for, and as many tokens behind them as a description wants kept.
#include "compare.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_io.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

using kv1::attention_mask;
using kv1::attention_options;
using kv1::errc;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::kv_side;
using kv1::sequence_id;

namespace {

constexpr std::size_t dim = 16, page = 16;

// A layer that sees everything, and one with a sliding window.
kv1::cache_description described(std::size_t window = 20, std::size_t retention = 0) {
    kv1::cache_description d;
    d.layers = {{1, dim, dim, kv_format::affine2, kv_format::affine4},
                {1, dim, dim, kv_format::affine8, kv_format::affine2, window, retention}};
    d.capacity_tokens = 512;
    d.page_tokens = page;
    return d;
}

// Token t is the same wherever it is appended.
void append(kv_cache& cache, sequence_id id, std::size_t n) {
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const std::size_t from = cache.length(id, layer);
        std::vector<float> k, v;
        for (std::size_t t = from; t < from + n; ++t)
            for (auto* to : {&k, &v}) {
                kv1_test::generator g(7 * t + layer + (to == &k ? 0 : 1000));
                const std::vector<float> x = kv1_test::normal_values(g, dim);
                to->insert(to->end(), x.begin(), x.end());
            }
        cache.append(id, layer, {k.data(), n, 1, dim}, {v.data(), n, 1, dim});
    }
}

struct answer {
    kv1::status status;
    std::vector<float> out;
};
answer attend(const kv_cache& cache, sequence_id id, std::size_t layer, attention_options options,
              std::size_t queries = 1) {
    kv1_test::generator g(99);
    const std::vector<float> q = kv1_test::normal_values(g, queries * dim);
    answer a{{}, std::vector<float>(queries * dim, 7.0f)};
    a.status =
        cache.try_attend(id, layer, {q.data(), queries, 1, dim}, {a.out.data(), queries, 1, dim}, options);
    return a;
}

} // namespace

TEST_CASE("a rollback where nothing was ever committed is refused", "[commit]") {
    kv_cache cache(described());
    const sequence_id id = cache.create_sequence();
    REQUIRE(cache.try_rollback(id).code() == errc::nothing_committed);
    append(cache, id, 30);
    REQUIRE(cache.try_rollback(id).code() == errc::nothing_committed);
    REQUIRE(cache.length(id) == 30);
    REQUIRE_THROWS_AS(cache.rollback(id), kv1::error);
    const sequence_id fork = cache.fork(id); // as its parent
    REQUIRE(cache.try_rollback(fork).code() == errc::nothing_committed);
    REQUIRE(cache.commit(id) == 30);
    REQUIRE(cache.try_rollback(fork).code() == errc::nothing_committed);
    cache.rollback(cache.fork(id));
    cache.truncate(id, 0); // a commit that is cut to nothing is a commit still
    append(cache, id, 5);
    cache.rollback(id);
    REQUIRE(cache.length(id) == 0);
    // a slot that is used again has no commit of its former sequence's
    cache.destroy_sequence(id);
    const sequence_id next = cache.create_sequence();
    REQUIRE(next.slot == id.slot);
    REQUIRE(cache.try_rollback(next).code() == errc::nothing_committed);
    // an empty sequence may be committed, as a place to return to
    cache.commit(next);
    append(cache, next, 3);
    cache.rollback(next);
    REQUIRE(cache.length(next) == 0);
    cache.validate();
}

TEST_CASE("a sequence from a prefix has the prefix committed, one without a match nothing", "[commit]") {
    kv_cache cache(described(0));
    std::vector<std::int32_t> tokens(40);
    std::iota(tokens.begin(), tokens.end(), 0);
    const sequence_id id = cache.create_sequence();
    append(cache, id, 40);
    REQUIRE(cache.store_prefix(id, tokens) == 32);
    const auto known = cache.create_from_prefix(tokens);
    REQUIRE(known.tokens == 32);
    append(cache, known.sequence, 8);
    cache.rollback(known.sequence);
    REQUIRE(cache.length(known.sequence) == 32);
    tokens[0] = 77;
    const auto unknown = cache.create_from_prefix(tokens);
    REQUIRE(unknown.tokens == 0);
    append(cache, unknown.sequence, 8);
    REQUIRE(cache.try_rollback(unknown.sequence).code() == errc::nothing_committed);
}

TEST_CASE("a saved sequence comes back with its commit, or without one", "[commit][io]") {
    kv_cache cache(described()), other(described());
    for (const bool committed : {false, true}) {
        sequence_id id = cache.create_sequence();
        append(cache, id, 20);
        if (committed)
            cache.commit(id);
        std::vector<std::byte> bytes(kv1::saved_bytes(cache, {&id, 1}));
        kv1::swap_out(cache, id, bytes);
        id = kv1::swap_in(other, bytes);
        append(other, id, 4);
        const kv1::status s = other.try_rollback(id);
        REQUIRE(s.code() == (committed ? errc::ok : errc::nothing_committed));
        REQUIRE(other.length(id) == (committed ? 20u : 24u));
    }
    other.validate();
}

TEST_CASE("a query that would see what a commit freed is refused, in every form", "[commit][attention]") {
    kv1::cache_description d = described();
    for (const bool copies : {false, true}) {
        d.fp16_sinks = copies ? 3 : 0;
        d.fp16_window = copies ? 8 : 0;
        kv_cache cache(d);
        const sequence_id id = cache.create_sequence(), whole = cache.create_sequence();
        append(cache, id, 100);
        append(cache, whole, 100);
        cache.commit(
            id); // the next query sees from token 81 on, the page of tokens 80 to 95 is the first one left
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
            const auto at = [&](std::size_t position) {
                return attention_options{.mask = attention_mask::causal_from(position), .mode = mode};
            };
            // position 99 sees from 80 on, 98 from 79
            REQUIRE(attend(cache, id, 1, at(99)).status);
            const answer gone = attend(cache, id, 1, at(98));
            REQUIRE(gone.status.code() == errc::dropped_tokens);
            REQUIRE(gone.status.where().layer == 1);
            REQUIRE(gone.status.where().token == 0);
            REQUIRE(std::all_of(gone.out.begin(), gone.out.end(), [](float x) { return x == 7.0f; }));
            REQUIRE(attend(cache, id, 1, at(0)).status.code() == errc::dropped_tokens);
            REQUIRE(attend(cache, id, 1, {.mode = mode}, 3).status.code() == errc::dropped_tokens);
            REQUIRE(attend(cache, id, 1, {.mask = attention_mask::none(), .mode = mode}, 3).status.code() ==
                    errc::dropped_tokens);
            // reading says the same
            std::vector<float> x(dim);
            REQUIRE(cache.try_read(id, 1, kv_side::key, 0, 79, 1, x).code() == errc::dropped_tokens);
            // the other layer has all of them
            REQUIRE(attend(cache, id, 0, at(50)).status);
            // what is asked for is there: a narrower window, a range, a mask that hides the rest
            attention_options narrow = at(98), ranged = at(98), ahead = at(60);
            narrow.window = 19;
            ranged.range.first = 80;
            ahead.range.first = 80; // sees nothing at all
            for (const attention_options& o : {narrow, ranged, ahead})
                REQUIRE(kv1_test::same_bits(attend(cache, id, 1, o).out, attend(cache, whole, 1, o).out));
            std::vector<std::uint8_t> visible(2 * 60, 1);
            const attention_options masked{.mask = attention_mask::explicit_for_last(60, visible),
                                           .mode = mode};
            REQUIRE(attend(cache, id, 1, masked, 2).status.code() == errc::dropped_tokens);
            std::fill_n(visible.begin(), 40, std::uint8_t{0}); // tokens 40 to 79 of the first query
            REQUIRE(attend(cache, id, 1, masked, 2).status.code() ==
                    errc::dropped_tokens); // others before them
            attention_options both = masked;
            both.range.first = 80;
            REQUIRE(
                kv1_test::same_bits(attend(cache, id, 1, both, 2).out, attend(cache, whole, 1, both, 2).out));
            // in a batch the row is named, and the sequence that has everything is served
            const sequence_id ids[] = {whole, id};
            const std::size_t indptr[] = {0, 2, 5};
            std::vector<float> q(5 * dim, 0.5f), out(5 * dim);
            const kv1::status s = cache.try_attend(ids, 1, indptr, {q.data(), 5, 1, dim},
                                                   {out.data(), 5, 1, dim}, {.mode = mode});
            REQUIRE(s.code() == errc::dropped_tokens);
            REQUIRE(s.where().layer == 1);
            REQUIRE(s.where().token == 2);
        }
        // pages that were dropped on purpose are no error
        cache.drop_pages(whole, 5, 1);
        REQUIRE(attend(cache, whole, 1, {.mask = attention_mask::causal_from(98)}).status);
    }
}

TEST_CASE("retention keeps what a cut behind a commit brings back into view, and no more", "[commit]") {
    constexpr std::size_t window = 20, length = 150;
    for (const std::size_t retention : {0u, 1u, 5u, 16u, 40u, 1000u}) {
        INFO("retention " << retention);
        kv_cache cache(described(window, retention));
        const sequence_id id = cache.create_sequence();
        for (std::size_t done = 0; done < length; done += 10) {
            append(cache, id, 10);
            cache.commit(id);
        }
        const std::size_t behind = length + 1 > window + retention ? length + 1 - window - retention : 0;
        std::vector<float> x(dim);
        const std::size_t first = behind / page * page; // that is kept
        REQUIRE(cache.try_read(id, 1, kv_side::key, 0, first, 1, x));
        if (first != 0)
            REQUIRE(cache.try_read(id, 1, kv_side::key, 0, first - 1, 1, x).code() == errc::dropped_tokens);
        // what it costs
        const auto s = cache.statistics(id);
        const std::size_t block = cache.layout(1).bytes();
        REQUIRE(s.bytes_retained == ((length + 1 - window) / page - behind / page) * block);
        REQUIRE(cache.statistics().bytes_retained == s.bytes_retained);
        REQUIRE(s.bytes_in_use == 10 * cache.layout(0).bytes() + (10 - behind / page) * block);

        // every cut within the retention works, and goes on like a sequence that was never longer
        for (const std::size_t back : {std::size_t{1}, retention / 2, retention}) {
            if (back > retention || back > length)
                continue;
            const sequence_id cut = cache.fork(id), fresh = cache.create_sequence();
            cache.truncate(cut, length - back);
            append(cache, fresh, length - back);
            for (const sequence_id q : {cut, fresh})
                append(cache, q, 1);
            for (const std::size_t layer : {0u, 1u})
                REQUIRE(kv1_test::same_bits(attend(cache, cut, layer, {}).out,
                                            attend(cache, fresh, layer, {}).out));
            cache.commit(cut);
            cache.validate();
            cache.destroy_sequence(cut);
            cache.destroy_sequence(fresh);
        }
        // queries at those positions are served, too
        if (const std::size_t p = length - 1 - std::min(retention, length - 1); retention != 0)
            REQUIRE(attend(cache, id, 1, {.mask = attention_mask::causal_from(p)}).status);
        // one token further than what is left of whole pages is refused
        if (first > 0) {
            const std::size_t last = first + window - 1; // the next query sees its page's first token
            REQUIRE(cache.try_truncate(id, last - 1).code() == errc::dropped_tokens);
            REQUIRE(cache.try_truncate(id, last));
        }
        cache.destroy_sequence(id);
        REQUIRE(cache.statistics().bytes_retained == 0);
    }
}

TEST_CASE("layers with one window and different retentions free their own pages", "[commit]") {
    kv1::cache_description d = described(20, 0);
    d.layers.push_back(d.layers[1]);
    d.layers.push_back(d.layers[1]);
    d.layers[2].window_retention = 40;
    d.layers[0].window_retention = 5; // of no window: nothing to say
    kv_cache cache(d);
    const sequence_id id = cache.create_sequence();
    append(cache, id, 100);
    cache.commit(id);
    std::vector<float> x(dim);
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 1, x));
    for (const std::size_t layer : {1u, 3u}) {
        REQUIRE(cache.try_read(id, layer, kv_side::key, 0, 79, 1, x).code() == errc::dropped_tokens);
        REQUIRE(cache.try_read(id, layer, kv_side::key, 0, 80, 1, x));
    }
    REQUIRE(cache.try_read(id, 2, kv_side::key, 0, 31, 1, x).code() == errc::dropped_tokens);
    REQUIRE(cache.try_read(id, 2, kv_side::key, 0, 32, 1, x));
    // a cache that keeps other tokens behind its windows is another cache
    std::vector<std::byte> bytes(kv1::saved_bytes(cache, {&id, 1}));
    kv1::save(cache, {&id, 1}, kv1::memory_sink(bytes));
    REQUIRE(kv1::swap_in(cache, bytes) != id);
    d.layers[2].window_retention = 41;
    kv_cache other(d);
    const auto refused = kv1::try_swap_in(other, bytes);
    REQUIRE(refused.code() == errc::different_cache);
    REQUIRE(refused.reason().where().layer == 2);
    d.layers[2].window_retention = std::size_t{1} << 50;
    REQUIRE(kv_cache::create(d).code() == errc::invalid_argument);
}
