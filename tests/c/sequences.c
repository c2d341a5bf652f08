/* SPDX-License-Identifier: Apache-2.0
 *
 * What happens to sequences: forks, cuts, dropped pages, steps that are committed and rolled back, batches, a
 * cache that grows, and what all of it costs.
 */
#include "check.h"

enum { layers = 2, kv_heads = 2, dim = 32, page = 16, most = 64, row = kv_heads * dim };

static float k[most * row], v[most * row], left[most * dim], right[most * dim];
static kv1_error error;

/* Tokens first ... last - 1 of k and v to every layer, or to some of them. */
static kv1_code append(kv1_cache* cache, kv1_sequence s, size_t first, size_t last, size_t some) {
    size_t l;
    for (l = 0; l < some; ++l) {
        const kv1_code code =
            kv1_append(cache, s, l, kv1_contiguous(k + first * row, KV1_FP32, last - first, kv_heads, dim),
                       kv1_contiguous(v + first * row, KV1_FP32, last - first, kv_heads, dim), NULL, &error);
        if (code != KV1_OK)
            return code;
    }
    return KV1_OK;
}

static size_t length_of(const kv1_cache* cache, kv1_sequence s) {
    size_t n = SIZE_MAX;
    CHECK(kv1_sequence_length(cache, s, &n, NULL) == KV1_OK);
    return n;
}

/* Whether two sequences hold the same in tokens first ... last - 1. */
static int same(const kv1_cache* cache, kv1_sequence a, kv1_sequence b, size_t first, size_t last) {
    size_t l, h;
    kv1_side side;
    for (l = 0; l < layers; ++l)
        for (h = 0; h < kv_heads; ++h)
            for (side = KV1_KEYS; side <= KV1_VALUES; ++side)
                if (kv1_read(cache, a, l, side, h, first, last - first, left, NULL) != KV1_OK ||
                    kv1_read(cache, b, l, side, h, first, last - first, right, NULL) != KV1_OK ||
                    memcmp(left, right, (last - first) * dim * sizeof(float)) != 0)
                    return 0;
    return 1;
}

static void forks(const kv1_cache_options* options) {
    kv1_cache* cache = made(options);
    const kv1_sequence s = sequence_of(cache);
    kv1_sequence f = {0, 0};
    kv1_statistics all, one;
    kv1_statistics_init(&all);
    kv1_statistics_init(&one);
    CHECK(append(cache, s, 0, 40, layers) == KV1_OK);
    CHECK(kv1_fork(cache, s, &f, &error) == KV1_OK);
    CHECK(kv1_sequence_lives(cache, s) == 1 && kv1_sequence_lives(cache, f) == 1);
    CHECK(length_of(cache, f) == 40 && same(cache, s, f, 0, 40));
    CHECK(kv1_cache_statistics(cache, &all, &error) == KV1_OK);
    CHECK(kv1_sequence_statistics(cache, f, &one, &error) == KV1_OK);
    CHECK(all.sequences == 2 && all.tokens == 80 && all.pages_in_use == 3 && one.pages_in_use == 3);
    CHECK(one.tokens == 40 && one.bytes_shared == one.bytes_in_use && all.bytes_shared == all.bytes_in_use);

    /* who writes has a page of its own */
    CHECK(append(cache, f, 40, 41, layers) == KV1_OK);
    CHECK(kv1_cache_statistics(cache, &all, &error) == KV1_OK);
    CHECK(all.pages_in_use == 4 && length_of(cache, s) == 40 && same(cache, s, f, 0, 40));
    CHECK(kv1_sequence_destroy(cache, s, &error) == KV1_OK);
    CHECK(kv1_sequence_lives(cache, s) == 0 && kv1_fork(cache, s, &f, &error) == KV1_INVALID_SEQUENCE);
    CHECK(kv1_sequence_statistics(cache, s, &one, &error) == KV1_INVALID_SEQUENCE);
    CHECK(kv1_cache_available_pages(cache) == all.pages_total - 3);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
}

static void steps(const kv1_cache_options* options) {
    kv1_cache* cache = made(options);
    const kv1_sequence s = sequence_of(cache);
    kv1_sequence f = {0, 0};
    size_t n = 0;
    CHECK(append(cache, s, 0, 20, layers) == KV1_OK && kv1_commit(cache, s, &error) == KV1_OK);
    CHECK(append(cache, s, 20, 24, layers - 1) == KV1_OK);
    CHECK(kv1_commit(cache, s, &error) == KV1_LAYERS_DISAGREE && error.layer == 1);
    CHECK(kv1_fork(cache, s, &f, &error) == KV1_LAYERS_DISAGREE);
    CHECK(length_of(cache, s) == 20 && kv1_length(cache, s, 0, &n, &error) == KV1_OK && n == 24);
    CHECK(kv1_rollback(cache, s, &error) == KV1_OK);
    CHECK(kv1_length(cache, s, 0, &n, &error) == KV1_OK && n == 20);

    CHECK(append(cache, s, 20, 50, layers) == KV1_OK);
    CHECK(kv1_truncate(cache, s, 51, &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_truncate(cache, s, 48, &error) == KV1_OK && length_of(cache, s) == 48);
    CHECK(kv1_drop_pages(cache, s, 3, 1, &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_drop_pages(cache, s, 1, 1, &error) == KV1_OK && length_of(cache, s) == 48);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 15, 1, left, &error) == KV1_OK);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 15, 2, left, &error) == KV1_DROPPED_TOKENS);
    CHECK(kv1_truncate(cache, s, 20, &error) == KV1_DROPPED_TOKENS && length_of(cache, s) == 48);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
}

static void batches(const kv1_cache_options* options) {
    kv1_cache* cache = made(options);
    const kv1_sequence alone[2] = {sequence_of(cache), sequence_of(cache)};
    kv1_sequence together[2] = {sequence_of(cache), sequence_of(cache)};
    const size_t indptr[3] = {0, 23, 30}, backwards[3] = {0, 31, 30};
    const kv1_tensor keys = kv1_contiguous(k, KV1_FP32, 30, kv_heads, dim);
    const kv1_tensor values = kv1_contiguous(v, KV1_FP32, 30, kv_heads, dim);
    size_t l;
    CHECK(append(cache, alone[0], 0, 23, layers) == KV1_OK);
    CHECK(append(cache, alone[1], 23, 30, layers) == KV1_OK);
    for (l = 0; l < layers; ++l)
        CHECK(kv1_append_batch(cache, together, indptr, 2, l, keys, values, NULL, &error) == KV1_OK);
    CHECK(length_of(cache, together[0]) == 23 && length_of(cache, together[1]) == 7);
    CHECK(same(cache, alone[0], together[0], 0, 23) && same(cache, alone[1], together[1], 0, 7));

    CHECK(kv1_append_batch(cache, together, backwards, 2, 0, keys, values, NULL, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_append_batch(cache, NULL, indptr, 0, 0, kv1_contiguous(k, KV1_FP32, 0, kv_heads, dim),
                           kv1_contiguous(v, KV1_FP32, 0, kv_heads, dim), NULL, &error) == KV1_OK);
    together[1] = together[0];
    CHECK(kv1_append_batch(cache, together, indptr, 2, 0, keys, values, NULL, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(length_of(cache, together[0]) == 23);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
}

static void growth(kv1_cache_options options) {
    kv1_cache* cache;
    kv1_sequence s;
    size_t n = 0;
    kv1_statistics statistics;
    options.capacity_tokens = 2 * page;
    cache = made(&options);
    s = sequence_of(cache);
    CHECK(append(cache, s, 0, 32, layers) == KV1_OK);
    CHECK(append(cache, s, 32, 33, layers) == KV1_CAPACITY_EXCEEDED);
    CHECK(kv1_cache_grow(cache, SIZE_MAX, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_cache_available_pages(cache) == 0);
    CHECK(kv1_cache_grow(cache, 3 * page, &error) == KV1_OK && kv1_cache_available_pages(cache) == 1);
    CHECK(append(cache, s, 32, 33, layers) == KV1_OK && length_of(cache, s) == 33);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);

    /* what a budget has room for */
    kv1_statistics_init(&statistics);
    CHECK(kv1_cache_statistics(cache, &statistics, &error) == KV1_OK && statistics.pages_total == 3);
    CHECK(kv1_capacity_for_bytes(&options, statistics.bytes_reserved, &n, &error) == KV1_OK && n == 3 * page);
    CHECK(kv1_capacity_for_bytes(&options, statistics.bytes_reserved - 1, &n, &error) == KV1_OK &&
          n == 2 * page);
    options.page_tokens = 20;
    CHECK(kv1_capacity_for_bytes(&options, 1 << 20, &n, &error) == KV1_INVALID_ARGUMENT && n == 2 * page);
    kv1_cache_destroy(cache);
}

int main(void) {
    const kv1_layer layer = layer_of(kv_heads, dim, KV1_AFFINE2);
    const kv1_cache_options options = options_for(&layer, layers, 16 * page, page);
    fill(k, most * row);
    fill(v, most * row);
    forks(&options);
    steps(&options);
    batches(&options);
    growth(options);
    return report();
}
