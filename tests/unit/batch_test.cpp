// SPDX-License-Identifier: Apache-2.0
//
// Several sequences in a call: one rule for append and attend, and a mask for each sequence.
#include "compare.hpp"
#include "random.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <array>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

using kv1::attention_mask;
using kv1::errc;
using kv1::kv_cache;
using kv1::kv_format;
using kv1::sequence_id;

namespace {

constexpr std::size_t dim = 16, heads = 4, kv_heads = 2, page = 16;

kv1::cache_description described(std::size_t pages) {
    kv1::cache_description d;
    d.layers = {{kv_heads, dim, dim, kv_format::affine2, kv_format::affine4},
                {kv_heads, dim, dim, kv_format::affine2, kv_format::affine4, 30}};
    d.capacity_tokens = pages * page;
    d.page_tokens = page;
    return d;
}

std::vector<float> values(std::size_t n, std::uint64_t seed) {
    kv1_test::generator g(seed);
    return kv1_test::normal_values(g, n);
}
void append(kv_cache& cache, sequence_id id, std::size_t n, std::uint64_t seed) {
    const std::vector<float> k = values(n * kv_heads * dim, seed), v = values(n * kv_heads * dim, seed + 1);
    for (std::size_t layer = 0; layer < cache.layers(); ++layer)
        cache.append(id, layer, {k.data(), n, kv_heads, dim}, {v.data(), n, kv_heads, dim});
}
kv1::status append_batch(kv_cache& cache, std::span<const sequence_id> ids,
                         std::span<const std::size_t> indptr) {
    const std::size_t n = indptr.back();
    const std::vector<float> k = values((n + 1) * kv_heads * dim, 5);
    return cache.try_append(ids, 0, indptr, {k.data(), n, kv_heads, dim}, {k.data(), n, kv_heads, dim});
}
kv1::status attend_batch(const kv_cache& cache, std::span<const sequence_id> ids,
                         std::span<const std::size_t> indptr, const kv1::attention_options& options = {}) {
    const std::size_t n = indptr.back();
    const std::vector<float> q = values((n + 1) * heads * dim, 6);
    std::vector<float> out(q.size());
    return cache.try_attend(ids, 0, indptr, {q.data(), n, heads, dim}, {out.data(), n, heads, dim}, options);
}

} // namespace

TEST_CASE("a sequence comes once in a batch, for append and attend alike", "[batch]") {
    kv_cache cache(described(600));
    std::vector<sequence_id> ids;
    for (int i = 0; i < 300; ++i) {
        ids.push_back(cache.create_sequence());
        append(cache, ids.back(), 1, 10);
    }
    std::vector<std::size_t> indptr(ids.size() + 1);
    std::iota(indptr.begin(), indptr.end(), std::size_t{0});
    REQUIRE(append_batch(cache, ids, indptr));
    REQUIRE(attend_batch(cache, ids, indptr));
    for (const std::size_t place : {1u, 17u, 299u}) {
        std::vector<sequence_id> twice = ids;
        twice[place] = twice[place / 2];
        for (const kv1::status& s :
             {append_batch(cache, twice, indptr), attend_batch(cache, twice, indptr)}) {
            INFO(s.message());
            REQUIRE(s.code() == errc::invalid_argument);
            REQUIRE(s.where().layer == 0);
            REQUIRE(s.where().token == static_cast<std::int64_t>(place));
        }
    }
    // even where it has no rows the second time
    const sequence_id twice[] = {ids[0], ids[1], ids[0]};
    const std::size_t rows[] = {0, 1, 2, 2};
    REQUIRE(append_batch(cache, twice, rows).code() == errc::invalid_argument);
    REQUIRE(attend_batch(cache, twice, rows).code() == errc::invalid_argument);
    for (const sequence_id id : ids)
        REQUIRE(cache.length(id, 0) == 2);
    // a stale handle is named by its row, too
    std::vector<sequence_id> stale = ids;
    cache.destroy_sequence(stale[40]);
    REQUIRE(append_batch(cache, stale, indptr).code() == errc::invalid_sequence);
    REQUIRE(append_batch(cache, stale, indptr).where().token == 40);
    REQUIRE(attend_batch(cache, stale, indptr).where().token == 40);
    cache.validate();
}

TEST_CASE("thousands of sequences may share a call", "[batch]") {
    kv1::cache_description d = described(1);
    d.layers.resize(1);
    d.capacity_tokens = 5000 * page;
    kv_cache cache(d);
    std::vector<sequence_id> ids;
    for (int i = 0; i < 5000; ++i) // more than the slots that are told apart at once
        ids.push_back(cache.create_sequence());
    std::vector<std::size_t> indptr(ids.size() + 1);
    std::iota(indptr.begin(), indptr.end(), std::size_t{0});
    REQUIRE(append_batch(cache, ids, indptr));
    REQUIRE(attend_batch(cache, ids, indptr));
    ids[4999] = ids[903]; // 4096 slots apart
    REQUIRE(append_batch(cache, ids, indptr).where().token == 4999);
}

TEST_CASE("a sequence without rows in a batch is left alone", "[batch]") {
    for (const bool copies : {false, true}) {
        kv1::cache_description d = described(3);
        d.layers.resize(1);
        if (copies) {
            d.layers[0].key_axis = kv1::quantization_axis::per_channel;
            d.fp16_window = 4;
            d.fp16_capacity_tokens = 3 * page;
        }
        kv_cache cache(d);
        const sequence_id a = cache.create_sequence(), b = cache.create_sequence();
        append(cache, a, 10, 1);
        const sequence_id shares = cache.fork(a);
        append(cache, b, 10, 3);
        const sequence_id other = cache.fork(b);
        const std::size_t pages = cache.statistics().pages_in_use;
        const sequence_id ids[] = {a, shares, b};
        const std::size_t indptr[] = {0, 1, 1, 1}; // a's page is copied: the last one
        REQUIRE(append_batch(cache, ids, indptr));
        REQUIRE(cache.length(a) == 11);
        REQUIRE(cache.length(shares) == 10);
        REQUIRE(cache.length(b) == 10);
        REQUIRE(cache.available_pages() == 0);
        REQUIRE(cache.statistics().pages_in_use == pages + (copies ? 3 : 1));
        cache.validate();
        // none is free now, and a row for `other` needs one: the batch says which row
        const sequence_id more[] = {a, shares, other};
        const std::size_t rows[] = {0, 2, 2, 3};
        const kv1::status s = append_batch(cache, more, rows);
        INFO(s.message());
        REQUIRE(s.code() == errc::capacity_exceeded);
        REQUIRE(s.where().layer == 0);
        REQUIRE(s.where().token == 2);
        REQUIRE(cache.length(a) == 11);
        REQUIRE(cache.length(other) == 10);
        cache.validate();
        // no rows at all are no work, however full the cache is
        const std::size_t none[] = {0, 0, 0, 0};
        REQUIRE(append_batch(cache, more, none));
        REQUIRE(attend_batch(cache, more, none));
    }
}

TEST_CASE("a batch has a mask for each sequence: bit for bit what single calls give", "[batch][attention]") {
    kv1::cache_description d = described(200);
    for (const bool copies : {false, true}) {
        d.fp16_sinks = copies ? 2 : 0;
        d.fp16_window = copies ? 9 : 0;
        kv_cache cache(d);
        kv1_test::generator g(3);
        std::vector<sequence_id> ids;
        std::vector<std::size_t> indptr{0};
        std::vector<std::vector<std::uint8_t>> trees(8);
        std::vector<attention_mask> masks;
        for (std::size_t i = 0; i < 8; ++i) {
            const std::size_t before = g.between(0, 120), draft = g.between(1, 12);
            ids.push_back(cache.create_sequence());
            append(cache, ids[i], before + draft, 50 + i);
            indptr.push_back(indptr[i] + draft);
            std::vector<std::int32_t> parents;
            for (std::size_t t = 0; t < draft; ++t)
                parents.push_back(static_cast<std::int32_t>(g.below(t + 1)) - 1);
            trees[i] = kv1::tree_mask(parents);
            masks.push_back(i == 2   ? attention_mask::causal()
                            : i == 5 ? attention_mask::causal_from(before / 2)
                            : i == 6 ? attention_mask::none()
                                     : attention_mask::explicit_for_last(draft, trees[i]));
        }
        cache.drop_pages(ids[3], 0, 1);
        const std::size_t n = indptr.back();
        const std::vector<float> q = values(n * heads * dim, 9);
        kv1_test::thread_executor four(4);
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact})
            for (const std::size_t layer : {0u, 1u}) {
                std::vector<float> out(q.size()), lse(n * heads), alone(q.size()), lse_alone(lse.size());
                cache.attend(ids, layer, indptr, {q.data(), n, heads, dim}, {out.data(), n, heads, dim},
                             {.masks = masks, .mode = mode, .log_sum_exp = lse}, four);
                for (std::size_t i = 0; i < ids.size(); ++i) {
                    const std::size_t first = indptr[i], m = indptr[i + 1] - first;
                    cache.attend(ids[i], layer, {q.data() + first * heads * dim, m, heads, dim},
                                 {alone.data() + first * heads * dim, m, heads, dim},
                                 {.mask = masks[i],
                                  .mode = mode,
                                  .log_sum_exp = std::span(lse_alone).subspan(first * heads, m * heads)});
                }
                REQUIRE(kv1_test::same_bits(out, alone));
                REQUIRE(kv1_test::same_bits(lse, lse_alone));
            }
        // a mask too few, one that does not fit its sequence, one for all that fits none
        REQUIRE(attend_batch(cache, ids, indptr, {.masks = std::span(masks).first(7)}).code() ==
                errc::shape_mismatch);
        masks[4] = attention_mask::explicit_for_last(3, std::span(trees[7]).first(1));
        const kv1::status s = attend_batch(cache, ids, indptr, {.masks = masks});
        REQUIRE(s.code() == errc::shape_mismatch);
        REQUIRE(s.where().token == static_cast<std::int64_t>(indptr[4]));
        for (const attention_mask& one : {masks[5], masks[0]})
            REQUIRE(attend_batch(cache, ids, indptr, {.mask = one}).code() == errc::invalid_argument);
        // and a single sequence has the one
        std::vector<float> out(heads * dim);
        REQUIRE(cache
                    .try_attend(ids[0], 0, {q.data(), 1, heads, dim}, {out.data(), 1, heads, dim},
                                {.masks = std::span(masks).first(1)})
                    .code() == errc::invalid_argument);
    }
}
