// SPDX-License-Identifier: Apache-2.0
//
// Sequences of a cache: forks, cuts, dropped pages, commit points, windows, prefixes, batches; what they cost
// in pages, and that a call that fails leaves no trace.
#include "cache_model.hpp"
#include "compare.hpp"
#include "failing_new.hpp"
#include "random.hpp"
#include "recording_allocator.hpp"
#include "thread_executor.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <array>
#include <functional>
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

constexpr std::size_t dim = 16;

kv1::cache_description two_layers(std::size_t capacity = 256) {
    kv1::cache_description d;
    d.layers = {{1, dim, dim, kv_format::affine2, kv_format::affine4},
                {1, dim, dim, kv_format::affine8, kv_format::affine2}};
    d.capacity_tokens = capacity;
    d.page_tokens = 16;
    return d;
}

std::vector<float> rows(std::size_t n, std::uint64_t seed) {
    kv1_test::generator g(seed);
    return kv1_test::normal_values(g, n * dim);
}

void append_layer(kv_cache& cache, sequence_id id, std::size_t layer, std::size_t n, std::uint64_t seed) {
    const std::vector<float> k = rows(n, 2 * seed + layer), v = rows(n, 2 * seed + layer + 1000);
    cache.append(id, layer, {k.data(), n, 1, dim}, {v.data(), n, 1, dim});
}
void append(kv_cache& cache, sequence_id id, std::size_t n, std::uint64_t seed) {
    for (std::size_t layer = 0; layer < cache.layers(); ++layer)
        append_layer(cache, id, layer, n, seed);
}

std::vector<float> read(const kv_cache& cache, sequence_id id, std::size_t first, std::size_t n) {
    std::vector<float> all;
    for (std::size_t layer = 0; layer < cache.layers(); ++layer)
        for (const kv_side side : {kv_side::key, kv_side::value}) {
            std::vector<float> x(n * dim);
            cache.read(id, layer, side, 0, first, n, x);
            all.insert(all.end(), x.begin(), x.end());
        }
    return all;
}
std::vector<float> read(const kv_cache& cache, sequence_id id) {
    return read(cache, id, 0, cache.length(id));
}

std::vector<float> attention(const kv_cache& cache, sequence_id id, std::size_t layer,
                             const kv1::attention_options& options = {}) {
    const std::vector<float> q = rows(1, 99);
    std::vector<float> out(dim);
    cache.attend(id, layer, {q.data(), 1, 1, dim}, {out.data(), 1, 1, dim}, options);
    return out;
}

} // namespace

TEST_CASE("a fork shares every page until somebody writes, and then one page is copied", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id a = cache.create_sequence();
    append(cache, a, 40, 1);
    REQUIRE(cache.statistics().pages_in_use == 3);
    const std::vector<float> before = read(cache, a);
    const sequence_id b = cache.fork(a), c = cache.fork(b);
    REQUIRE(cache.statistics().pages_in_use == 3);
    REQUIRE(read(cache, b) == before);
    append(cache, b, 1, 2);
    REQUIRE(cache.statistics().pages_in_use == 4); // the open page alone
    append(cache, a, 1, 3);
    REQUIRE(cache.statistics().pages_in_use == 5);
    append(cache, c, 1, 4); // the last one to hold the page writes in place
    REQUIRE(cache.statistics().pages_in_use == 5);
    for (const sequence_id id : {a, b, c})
        REQUIRE(read(cache, id, 0, 40) == before);
    REQUIRE(read(cache, a) != read(cache, b));
    const auto shared = cache.statistics(a);
    REQUIRE(shared.pages_in_use == 3);
    REQUIRE(shared.bytes_shared == shared.bytes_in_use / 3 * 2);
    REQUIRE(cache.statistics().bytes_shared == 2 * shared.bytes_shared); // two pages, each saved twice
    cache.destroy_sequence(a);
    cache.destroy_sequence(c);
    REQUIRE(read(cache, b, 0, 40) == before);
    REQUIRE(cache.statistics().pages_in_use == 3);
    cache.validate();
}

TEST_CASE("a fork at a page boundary copies nothing", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id a = cache.create_sequence();
    append(cache, a, 32, 1);
    const sequence_id b = cache.fork(a);
    append(cache, a, 1, 2);
    append(cache, b, 1, 3);
    REQUIRE(cache.statistics().pages_in_use == 4); // two shared, one each
    cache.validate();
}

TEST_CASE("fork, commit and prefixes need layers that agree, and name the one that lags", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id id = cache.create_sequence();
    append(cache, id, 5, 1);
    append_layer(cache, id, 0, 3, 2);
    const std::vector<std::int32_t> tokens(5, 1);
    for (const kv1::status& s : {cache.try_fork(id).reason(), cache.try_commit(id).reason(),
                                 cache.try_store_prefix(id, tokens).reason()}) {
        REQUIRE(s.code() == errc::layers_disagree);
        REQUIRE(s.where().layer == 1);
    }
    REQUIRE(cache.statistics().sequences == 1);
    append_layer(cache, id, 1, 3, 2);
    REQUIRE(cache.commit(id) == 8);
    REQUIRE(cache.try_fork(id));
}

TEST_CASE("rollback returns to the last commit, from whatever was begun since", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id id = cache.create_sequence();
    append(cache, id, 10, 1);
    cache.commit(id);
    const std::vector<float> kept = read(cache, id);
    append(cache, id, 30, 2);
    append_layer(cache, id, 1, 3, 3);
    cache.rollback(id);
    REQUIRE(cache.length(id, 0) == 10);
    REQUIRE(cache.length(id, 1) == 10);
    REQUIRE(read(cache, id) == kept);
    REQUIRE(cache.statistics().pages_in_use == 1);
    append(cache, id, 2, 4); // and without a commit in between
    cache.rollback(id);
    REQUIRE(cache.length(id) == 10);
    cache.truncate(id, 4);
    append(cache, id, 1, 5);
    cache.rollback(id); // the commit was cut as well
    REQUIRE(cache.length(id) == 4);
}

TEST_CASE("after a cut at any token the sequence goes on as if it had never been longer", "[sequence]") {
    for (const std::size_t cut : {0u, 1u, 15u, 16u, 17u, 31u, 32u, 33u, 40u}) {
        kv_cache cache(two_layers()), fresh(two_layers());
        const sequence_id id = cache.create_sequence(), twin = fresh.create_sequence();
        append(cache, id, cut, 1);
        append(cache, id, 40 - cut, 2);
        append(fresh, twin, cut, 1);
        cache.truncate(id, cut);
        REQUIRE(cache.statistics().pages_in_use == fresh.statistics().pages_in_use);
        append(cache, id, 9, 3);
        append(fresh, twin, 9, 3);
        REQUIRE(read(cache, id) == read(fresh, twin));
        for (const std::size_t layer : {0u, 1u})
            REQUIRE(attention(cache, id, layer) == attention(fresh, twin, layer));
        cache.validate();
    }
    kv_cache cache(two_layers());
    const sequence_id id = cache.create_sequence();
    append(cache, id, 5, 1);
    append_layer(cache, id, 0, 1, 2);
    const kv1::status s = cache.try_truncate(id, 6);
    REQUIRE(s.code() == errc::out_of_range);
    REQUIRE(s.where().layer == 1);
}

TEST_CASE("a cut into shared pages does not change those who share them", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id a = cache.create_sequence();
    append(cache, a, 40, 1);
    const std::vector<float> before = read(cache, a);
    const sequence_id b = cache.fork(a);
    cache.truncate(b, 20);
    append(cache, b, 5, 2);
    REQUIRE(read(cache, a) == before);
    REQUIRE(cache.statistics().pages_in_use == 4);
    cache.validate();
}

TEST_CASE("dropped pages are free, their tokens unreadable, and all others where they were", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id id = cache.create_sequence();
    append(cache, id, 70, 1);
    const std::vector<float> first = read(cache, id, 0, 16), last = read(cache, id, 48, 22);
    cache.drop_pages(id, 1, 2);
    REQUIRE(cache.length(id) == 70);
    REQUIRE(cache.statistics().pages_in_use == 3);
    REQUIRE(cache.statistics(id).bytes_stored == 38 * (8 + 12 + 20 + 8));
    REQUIRE(read(cache, id, 0, 16) == first);
    REQUIRE(read(cache, id, 48, 22) == last);
    std::vector<float> x(dim);
    for (const std::size_t t : {16u, 30u, 47u})
        REQUIRE(cache.try_read(id, 0, kv_side::key, 0, t, 1, x).code() == errc::dropped_tokens);
    REQUIRE(cache.try_drop_pages(id, 4, 1).code() == errc::out_of_range); // the open page
    REQUIRE(cache.try_drop_pages(id, 5, 0).code() == errc::out_of_range);
    REQUIRE(cache.try_truncate(id, 20).code() == errc::dropped_tokens);
    append(cache, id, 30, 2); // and the sequence goes on
    REQUIRE(cache.length(id) == 100);
    REQUIRE(read(cache, id, 48, 22) == last);
    cache.validate();
    cache.truncate(id, 32); // a page boundary within the hole
    append(cache, id, 4, 3);
    REQUIRE(cache.length(id) == 36);
    cache.truncate(id, 16);
    REQUIRE(read(cache, id) == first);
    cache.validate();
}

TEST_CASE("attention after a drop is attention over what is left", "[sequence]") {
    kv_cache cache(two_layers()), rest(two_layers());
    const sequence_id id = cache.create_sequence(), twin = rest.create_sequence();
    for (const std::size_t part : {0u, 1u, 2u})
        append(cache, id, 16, part);
    append(cache, id, 6, 3);
    cache.drop_pages(id, 1, 1);
    for (const std::size_t part : {0u, 2u})
        append(rest, twin, 16, part);
    append(rest, twin, 6, 3);
    for (const std::size_t layer : {0u, 1u})
        REQUIRE(kv1_test::same_bits(attention(cache, id, layer), attention(rest, twin, layer)));
}

TEST_CASE("a sliding window frees pages at a commit, for its layers alone", "[sequence]") {
    kv1::cache_description d = two_layers();
    d.layers[1].sliding_window = 20;
    kv_cache cache(d);
    const sequence_id id = cache.create_sequence();
    append(cache, id, 60, 1);
    REQUIRE(cache.statistics().pages_in_use == 8); // four in each group
    const std::vector<float> before = attention(cache, id, 1);
    cache.commit(id);
    REQUIRE(cache.statistics().pages_in_use == 6); // the next query sees tokens 41 to 60
    REQUIRE(kv1_test::same_bits(attention(cache, id, 1), before));
    std::vector<float> x(dim);
    REQUIRE(cache.try_read(id, 1, kv_side::key, 0, 31, 1, x).code() == errc::dropped_tokens);
    REQUIRE(cache.try_read(id, 1, kv_side::key, 0, 32, 1, x));
    REQUIRE(cache.try_read(id, 0, kv_side::key, 0, 0, 1, x));
    // a cut is refused where the window no longer holds what the next query would see
    const kv1::status s = cache.try_truncate(id, 50);
    REQUIRE(s.code() == errc::dropped_tokens);
    REQUIRE(s.where().layer == 1);
    REQUIRE(cache.length(id) == 60);
    REQUIRE(cache.try_truncate(id, 51)); // tokens 32 to 50 are there
    REQUIRE(cache.try_truncate(id, 0));
    REQUIRE(cache.statistics().pages_in_use == 0);
    cache.validate();
}

TEST_CASE("a window stays correct over thousands of tokens in a handful of pages", "[sequence]") {
    kv1::cache_description d = two_layers(4096);
    d.layers = {d.layers[0]};
    d.layers[0].sliding_window = 33;
    d.window_capacity_tokens = 5 * 16;
    kv_cache cache(d);
    REQUIRE(cache.statistics().pages_total == 5);
    const sequence_id id = cache.create_sequence();
    for (std::uint64_t step = 0; step < 600; ++step) {
        append(cache, id, 7, step);
        cache.commit(id);
        REQUIRE(cache.statistics().pages_in_use <= 4);
    }
    REQUIRE(cache.length(id) == 4200);
    // the last 33 tokens, alone in another cache
    kv_cache other(two_layers());
    const sequence_id twin = other.create_sequence();
    std::vector<float> k, v;
    for (std::uint64_t step = 594; step < 600; ++step)
        for (auto& [to, seed] : {std::pair(&k, 2 * step), std::pair(&v, 2 * step + 1000)}) {
            const std::vector<float> x = rows(7, seed);
            to->insert(to->end(), x.begin(), x.end());
        }
    other.append(twin, 0, {k.data() + 9 * dim, 33, 1, dim}, {v.data() + 9 * dim, 33, 1, dim});
    const std::vector<float> found = attention(cache, id, 0, {.mode = kv1::precision::exact}),
                             expected = attention(other, twin, 0, {.mode = kv1::precision::exact});
    for (std::size_t c = 0; c < dim; ++c) // the same sums in other blocks
        REQUIRE(std::fabs(found[c] - expected[c]) <= kv1_test::gamma(200) * 4.0);
}

TEST_CASE("a cache grows when it is asked to, and loses nothing", "[sequence]") {
    kv1::cache_description d = two_layers(32);
    d.layers[1].sliding_window = 100;
    d.huge_pages = true; // a hint: nothing depends on it
    kv_cache cache(d);
    const sequence_id id = cache.create_sequence();
    append(cache, id, 32, 1);
    const std::vector<float> kept = read(cache, id);
    REQUIRE_THROWS_AS(append(cache, id, 1, 2), kv1::error);
    cache.grow(10); // never smaller
    REQUIRE(cache.description().capacity_tokens == 32);
    cache.grow(100);
    REQUIRE(cache.description().capacity_tokens == 100);
    REQUIRE(read(cache, id) == kept);
    append(cache, id, 80, 2);
    REQUIRE(read(cache, id, 0, 32) == kept);
    REQUIRE(cache.available_pages() == 0);
    cache.validate();
    REQUIRE(cache.try_grow(std::numeric_limits<std::size_t>::max()).code() == errc::invalid_argument);
}

TEST_CASE("capacity can be given in bytes", "[sequence]") {
    kv1::cache_description d = two_layers();
    const std::size_t page = kv1::bytes_per_page(d);
    REQUIRE(page == kv_cache(d).statistics().bytes_reserved / 16);
    REQUIRE(kv1::capacity_for_bytes(d, 10 * page + page - 1) == 160);
    REQUIRE(kv1::capacity_for_bytes(d, page - 1) == 0);
    REQUIRE(kv1::capacity_for_bytes({}, 1000) == 0);
}

TEST_CASE("a prompt with a known beginning starts from its pages", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id a = cache.create_sequence();
    append(cache, a, 40, 1);
    std::vector<std::int32_t> tokens(40);
    std::iota(tokens.begin(), tokens.end(), 0);
    REQUIRE(cache.store_prefix(a, tokens) == 32);
    const std::vector<float> kept = read(cache, a);
    cache.destroy_sequence(a);
    REQUIRE(cache.statistics().pages_in_use == 2); // the open page went with the sequence
    REQUIRE(cache.statistics().pages_indexed == 2);

    tokens[20] = 77;
    const kv1::prefix_match match = cache.create_from_prefix(tokens);
    REQUIRE(match.tokens == 20); // a page, and part of one
    REQUIRE(cache.length(match.sequence) == 20);
    append(cache, match.sequence, 20, 2);
    REQUIRE(cache.statistics().pages_in_use == 2 + 2); // the second page is its own now
    const kv1::prefix_match whole = cache.create_from_prefix(std::span(tokens).first(20));
    REQUIRE(read(cache, whole.sequence) != read(cache, match.sequence));
    REQUIRE(read(cache, whole.sequence, 0, 20) == read(cache, match.sequence, 0, 20));
    std::vector<float> x(20 * dim), y(kept.begin(), kept.begin() + 20 * dim);
    cache.read(whole.sequence, 0, kv_side::key, 0, 0, 20, x);
    REQUIRE(x == y);
    REQUIRE(cache.create_from_prefix(tokens, {1, 0}).tokens == 0); // another salt
    REQUIRE(cache.try_store_prefix(whole.sequence, tokens).code() == errc::out_of_range);
    cache.validate();
}

TEST_CASE("a full cache takes pages from unused prefixes, oldest first, and from no pinned one",
          "[sequence]") {
    kv_cache cache(two_layers(64)); // four pages
    for (std::int32_t prompt = 0; prompt < 3; ++prompt) {
        const sequence_id id = cache.create_sequence();
        append(cache, id, 16, static_cast<std::uint64_t>(prompt));
        cache.store_prefix(id, std::vector<std::int32_t>(16, prompt));
        cache.destroy_sequence(id);
    }
    REQUIRE(cache.available_pages() == 1);
    const auto pin = cache.prefixes().pin({}, std::vector<std::int32_t>(16, 0));
    REQUIRE(pin);
    const sequence_id id = cache.create_sequence();
    append(cache, id, 32, 9); // takes the free page and the one of prompt 1
    REQUIRE(cache.prefixes().pages() == 2);
    REQUIRE(cache.try_create_from_prefix(std::vector<std::int32_t>(16, 1))->tokens == 0);
    append(cache, id, 16, 9);
    REQUIRE(cache.prefixes().pages() == 1);
    const std::vector<float> k = rows(1, 1);
    REQUIRE(cache.try_append(id, 0, {k.data(), 1, 1, dim}, {k.data(), 1, 1, dim}).code() ==
            errc::capacity_exceeded);
    REQUIRE(cache.prefixes().unpin(*pin));
    append(cache, id, 1, 10);
    cache.validate();
}

TEST_CASE("block tables come out in the form that FlashInfer and vLLM take", "[sequence]") {
    kv_cache cache(two_layers());
    std::vector<sequence_id> ids;
    for (const std::size_t n : {0u, 16u, 37u}) {
        ids.push_back(cache.create_sequence());
        append(cache, ids.back(), n, n);
    }
    cache.drop_pages(ids[2], 0, 1);
    REQUIRE(cache.count_blocks(ids, 0) == 3);
    std::vector<std::int32_t> indptr(4), indices(5, -1), last(3);
    REQUIRE(cache.export_block_tables(ids, 1, {indptr, indices, last}) == 3);
    REQUIRE(indptr == std::vector<std::int32_t>{0, 0, 1, 3});
    REQUIRE(last == std::vector<std::int32_t>{0, 16, 5});
    REQUIRE(indices[3] == -1);
    // a token is found in its page's bytes through table and layout
    const kv1::page_layout& layout = cache.layout(1);
    const auto page = cache.page(1, 0, static_cast<std::uint32_t>(indices[2]));
    REQUIRE(page.size() == layout.bytes());
    std::vector<float> expected(dim), found(dim);
    cache.read(ids[2], 1, kv_side::value, 0, 35, 1, expected);
    for (std::size_t c = 0; c < dim; ++c)
        found[c] = kv1::detail::decode_value(layout.values().format,
                                             kv1::detail::load_code(layout.values(), page.data(), 3, c),
                                             kv1::detail::load_metadata(layout.values(), page.data(), 3));
    REQUIRE(found == expected);
    REQUIRE(cache.try_page(1, 0, 15).code() == errc::out_of_range); // not in use
    REQUIRE(cache.try_page(1, 1, 0).code() == errc::out_of_range);
    REQUIRE(cache.try_export_block_tables(ids, 1, {indptr, std::span(indices).first(2), last}).code() ==
            errc::shape_mismatch);
    REQUIRE(cache.try_export_block_tables(ids, 2, {indptr, indices, last}).code() == errc::out_of_range);
}

TEST_CASE("imported rows are refused by size, and for numbers that are none", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id id = cache.create_sequence();
    std::vector<std::byte> k(4 * 3), v(8 * 3);
    std::vector<kv1::float16> scales(3, kv1::float16(1.0f)), minima(3, kv1::float16(0.0f));
    const auto import = [&](std::size_t n) {
        return cache.try_append_rows(id, 0, n, {k, scales, minima}, {v, scales, minima}).code();
    };
    REQUIRE(import(2) == errc::shape_mismatch);
    REQUIRE(import(3) == errc::ok);
    REQUIRE(cache.length(id, 0) == 3);
    scales[2] = kv1::float16::from_bits(0x7c00);
    REQUIRE(import(3) == errc::non_finite);
    REQUIRE(cache.length(id, 0) == 3);
    REQUIRE(cache.try_append_rows(id, 2, 0, {}, {}).code() == errc::out_of_range);
}

TEST_CASE("a batch is appended whole or not at all", "[sequence]") {
    kv_cache cache(two_layers(64));
    const std::vector<sequence_id> ids{cache.create_sequence(), cache.create_sequence(),
                                       cache.create_sequence()};
    std::vector<float> k = rows(20, 1), v = rows(20, 2);
    const std::vector<std::size_t> indptr{0, 3, 3, 20};
    const auto batch = [&](std::size_t layer, std::span<const std::size_t> ptr) {
        kv1_test::thread_executor four(4);
        return cache.try_append(ids, layer, ptr, {k.data(), 20, 1, dim}, {v.data(), 20, 1, dim}, four);
    };
    v[7 * dim + 5] = std::numeric_limits<float>::infinity();
    const kv1::status s = batch(0, indptr);
    REQUIRE(s.code() == errc::non_finite);
    REQUIRE(s.where().layer == 0);
    REQUIRE(s.where().token == 7);
    REQUIRE(s.where().channel == 5);
    for (const sequence_id id : ids)
        REQUIRE(cache.length(id, 0) == 0);
    REQUIRE(cache.statistics().pages_in_use == 0);
    v[7 * dim + 5] = 0.0f;
    REQUIRE(batch(0, indptr));
    REQUIRE(cache.length(ids[0], 0) == 3);
    REQUIRE(cache.length(ids[1], 0) == 0);
    REQUIRE(cache.length(ids[2], 0) == 17);
    REQUIRE(cache.statistics().pages_in_use == 3);
    // equal to single calls
    kv_cache other(two_layers(64));
    const sequence_id twin = other.create_sequence();
    other.append(twin, 0, {k.data() + 3 * dim, 17, 1, dim}, {v.data() + 3 * dim, 17, 1, dim});
    std::vector<float> x(17 * dim), y(17 * dim);
    cache.read(ids[2], 0, kv_side::value, 0, 0, 17, x);
    other.read(twin, 0, kv_side::value, 0, 0, 17, y);
    REQUIRE(x == y);
    // one page is left: two sequences would need it
    REQUIRE(batch(0, std::vector<std::size_t>{0, 14, 15, 20}).code() == errc::capacity_exceeded);
    REQUIRE(cache.length(ids[0], 0) == 3);
    REQUIRE(cache.statistics().pages_in_use == 3);
    REQUIRE(batch(0, std::vector<std::size_t>{0, 3, 4, 21}).code() == errc::invalid_argument);
    REQUIRE(batch(0, std::vector<std::size_t>{0, 4, 3, 20}).code() == errc::invalid_argument);
    const std::vector<sequence_id> twice{ids[0], ids[0], ids[1]};
    REQUIRE(cache
                .try_append(twice, 0, std::vector<std::size_t>{0, 1, 2, 3}, {k.data(), 3, 1, dim},
                            {v.data(), 3, 1, dim})
                .code() == errc::invalid_argument);
    REQUIRE(cache.length(ids[0], 0) == 3);
    cache.validate();
}

TEST_CASE("operator new that fails anywhere leaves sequences, pages and prefixes as they were",
          "[sequence]") {
    kv1::cache_description d = two_layers(16 * 40);
    d.layers.push_back(d.layers[0]);
    d.layers[2].sliding_window = 20;
    d.fp16_sinks = 3;
    d.fp16_window = 5;
    std::vector<std::int32_t> tokens(70);
    std::iota(tokens.begin(), tokens.end(), 0);
    const std::vector<float> k = rows(90, 1), v = rows(90, 2);
    const std::vector<std::size_t> ninety{0, 90};
    // each case: a call on a cache of its own, failing at its first, second, ... allocation
    using call = std::function<kv1::status(kv_cache&, sequence_id)>;
    const std::vector<std::pair<std::string, call>> calls{
        {"create", [](kv_cache& c, sequence_id) { return c.try_create_sequence().reason(); }},
        {"fork", [](kv_cache& c, sequence_id id) { return c.try_fork(id).reason(); }},
        {"append",
         [&](kv_cache& c, sequence_id id) {
             return c.try_append(id, 0, {k.data(), 90, 1, dim}, {v.data(), 90, 1, dim});
         }},
        {"batch",
         [&](kv_cache& c, sequence_id id) {
             return c.try_append(std::span(&id, 1), 0, ninety, {k.data(), 90, 1, dim},
                                 {v.data(), 90, 1, dim});
         }},
        {"drop", [](kv_cache& c, sequence_id id) { return c.try_drop_pages(id, 1, 1); }},
        {"commit", [](kv_cache& c, sequence_id id) { return c.try_commit(id).reason(); }},
        {"store", [&](kv_cache& c, sequence_id id) { return c.try_store_prefix(id, tokens).reason(); }},
        {"match", [&](kv_cache& c, sequence_id) { return c.try_create_from_prefix(tokens).reason(); }},
        {"grow", [](kv_cache& c, sequence_id) { return c.try_grow(16 * 50); }},
        {"attend in parts",
         [&](kv_cache& c, sequence_id id) {
             std::array<float, 2 * dim> out{};
             return c.try_attend(id, 0, {k.data(), 2, 1, dim}, {out.data(), 2, 1, dim});
         }},
        {"attend under a mask",
         [&](kv_cache& c, sequence_id id) {
             const std::array<std::uint8_t, 4> visible{1, 0, 1, 1};
             std::array<float, 2 * dim> out{};
             return c.try_attend(id, 2, {k.data(), 2, 1, dim}, {out.data(), 2, 1, dim},
                                 {.mask = kv1::attention_mask::explicit_for_last(2, visible)});
         }},
        {"validate", [](kv_cache& c, sequence_id) { return c.try_validate(); }}};
    for (const auto& [name, run] : calls) {
        INFO(name);
        std::size_t failures = 0;
        for (std::size_t allowed = 0;; ++allowed) {
            REQUIRE(allowed < 100);
            kv_cache cache(d);
            const sequence_id id = cache.create_sequence();
            append(cache, id, 70, 3);
            const std::vector<float> before = read(cache, id);
            const auto pages = cache.statistics();
            errc code{};
            bool failed = false;
            {
                const kv1_test::failing_new failing(allowed);
                code = run(cache, id).code();
                failed = failing.failed();
            }
            cache.validate();
            if (!failed) {
                REQUIRE(code == errc::ok);
                break;
            }
            ++failures;
            REQUIRE(code == errc::out_of_memory);
            REQUIRE(read(cache, id) == before);
            REQUIRE(cache.statistics().pages_in_use == pages.pages_in_use);
            REQUIRE(cache.statistics().sequences == 1);
            REQUIRE(cache.statistics().bytes_reserved == pages.bytes_reserved);
            REQUIRE(cache.prefixes().pages() == 0);
        }
        REQUIRE(failures >= 1);
    }
}

TEST_CASE("an arena that can not grow leaves the cache as it was", "[sequence]") {
    for (std::size_t more = 0; more < 2; ++more) {
        kv1_test::allocation_log log;
        kv1_test::open_cache cache(two_layers(32), kv1_test::recording_allocator<std::byte>(log));
        const sequence_id id = cache.create_sequence();
        const std::vector<float> k = rows(20, 1);
        cache.append(id, 0, {k.data(), 20, 1, dim}, {k.data(), 20, 1, dim});
        const auto bytes = kv1_test::arena_bytes(log);
        log.allowed = log.made + more;
        const kv1::status s = cache.try_grow(64);
        REQUIRE(s.code() == errc::out_of_memory);
        REQUIRE(s.where().layer == static_cast<std::int64_t>(more));
        REQUIRE(kv1_test::arena_bytes(log) == bytes);
        REQUIRE(cache.description().capacity_tokens == 32);
        REQUIRE(cache.available_pages() == 0);
        log.allowed = std::numeric_limits<std::size_t>::max();
        REQUIRE(cache.try_grow(64));
        REQUIRE(cache.available_pages() == 2);
    }
}

TEST_CASE("a hundred thousand sequences come and go in the same memory", "[sequence]") {
    kv_cache cache(two_layers());
    const std::vector<float> k = rows(20, 1);
    const auto cycle = [&] {
        const sequence_id id = *cache.try_create_sequence();
        bool fine = true;
        for (const std::size_t layer : {0u, 1u})
            fine = fine && cache.try_append(id, layer, {k.data(), 1, 1, dim}, {k.data(), 1, 1, dim});
        return fine && cache.try_destroy_sequence(id);
    };
    REQUIRE(cycle());
    const kv1_test::failing_new failing(0); // not one allocation more
    bool all = true;
    for (int i = 0; i < 100000; ++i)
        all = all && cycle();
    const bool failed = failing.failed();
    REQUIRE(all);
    REQUIRE_FALSE(failed);
}

TEST_CASE("the summary says where the memory goes", "[sequence]") {
    kv_cache cache(two_layers());
    const sequence_id a = cache.create_sequence();
    append(cache, a, 20, 1);
    const sequence_id b = cache.fork(a);
    append(cache, b, 1, 2);
    const kv1::cache_statistics s = cache.statistics();
    REQUIRE(s.pages_in_use == 3);
    REQUIRE(s.bytes_unfilled == (12 + 11) * s.bytes_in_use / 3 / 16);
    REQUIRE(s.bytes_shared == s.bytes_in_use / 3);
    const std::string text = summary(s);
    REQUIRE(text.find("2 sequences: " + to_string(s)) == 0);
    REQUIRE(text.find("shared: " + kv1::human_bytes(s.bytes_shared)) != std::string::npos);
    REQUIRE(text.find("unfilled slots of open pages: " + kv1::human_bytes(s.bytes_unfilled)) !=
            std::string::npos);
}
