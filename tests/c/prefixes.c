/* SPDX-License-Identifier: Apache-2.0
 *
 * Prompts that begin alike: stored, found again, pinned, evicted, and told apart by salts.
 */
#include "check.h"

enum { dim = 32, tokens = 40, page = 16 };

static float x[tokens * dim], first[tokens * dim], second[tokens * dim];
static int32_t ids[tokens];
static const kv1_prefix_salt no_salt = {0, 0};
static kv1_error error;

int main(void) {
    const kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    kv1_cache_options options = options_for(&layer, 1, 256, page);
    const kv1_tensor tensor = kv1_contiguous(x, KV1_FP32, tokens, 1, dim);
    const kv1_prefix_salt salt = {1, 2};
    kv1_cache* cache;
    kv1_sequence s, found = {0, 0};
    kv1_prefix_pin pin = {0, 0, 0};
    kv1_prefix_event events[8];
    size_t known = 0, matched = 99, i;
    fill(x, tokens * dim);
    for (i = 0; i < tokens; ++i)
        ids[i] = (int32_t)(1000 + i);
    options.prefix_events = 4;
    cache = made(&options);
    s = sequence_of(cache);
    CHECK(kv1_append(cache, s, 0, tensor, tensor, NULL, &error) == KV1_OK);

    /* whole pages, and the open one where it is asked for */
    CHECK(kv1_prefix_store(cache, s, ids, tokens, no_salt, 0, &known, &error) == KV1_OK && known == 32);
    CHECK(kv1_prefix_pages(cache) == 2);
    CHECK(kv1_prefix_create(cache, ids, tokens, no_salt, &found, &matched, &error) == KV1_OK &&
          matched == 32);
    CHECK(kv1_sequence_length(cache, found, &known, &error) == KV1_OK && known == 32);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, 32, first, &error) == KV1_OK);
    CHECK(kv1_read(cache, found, 0, KV1_KEYS, 0, 0, 32, second, &error) == KV1_OK);
    CHECK(memcmp(first, second, 32 * dim * sizeof(float)) == 0);
    CHECK(kv1_prefix_store(cache, s, ids, tokens, no_salt, 1, NULL, &error) == KV1_OK);
    ids[36] = -1;
    CHECK(kv1_prefix_create(cache, ids, tokens, no_salt, &found, &matched, &error) == KV1_OK &&
          matched == 36);
    ids[36] = 1036;
    CHECK(kv1_prefix_create(cache, ids, tokens, salt, &found, &matched, &error) == KV1_OK && matched == 0);
    CHECK(kv1_sequence_lives(cache, found) == 1);
    CHECK(kv1_prefix_store(cache, found, ids, tokens, salt, 0, &known, &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_sequence_destroy(cache, found, &error) == KV1_OK);
    CHECK(kv1_prefix_store(cache, found, ids, 0, salt, 0, &known, &error) == KV1_INVALID_SEQUENCE);

    /* pinned pages stay, the others go when nothing shares them */
    CHECK(kv1_prefix_pin_tokens(cache, ids, page, no_salt, &pin, &error) == KV1_OK && pin.tokens == page);
    CHECK(kv1_prefix_pin_tokens(cache, ids, page, salt, &pin, &error) == KV1_OUT_OF_RANGE);
    CHECK(pin.tokens == page);
    kv1_prefix_clear(cache);
    CHECK(kv1_prefix_pages(cache) == 1);
    CHECK(kv1_prefix_unpin(cache, pin, &error) == KV1_OK);
    CHECK(kv1_prefix_unpin(cache, pin, &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_prefix_evict(cache, 5) == 0); /* a sequence holds the page */
    kv1_prefix_clear(cache);
    CHECK(kv1_prefix_pages(cache) == 0);
    CHECK(kv1_prefix_create(cache, ids, tokens, no_salt, &found, &matched, &error) == KV1_OK && matched == 0);

    /* three blocks came and three went; there was room for four */
    CHECK(kv1_prefix_lost_events(cache) == 2);
    CHECK(kv1_prefix_take_events(cache, events, 1) == 1 && events[0].kind == KV1_PREFIX_STORED);
    CHECK(events[0].tokens == page);
    CHECK(kv1_prefix_take_events(cache, events + 1, 7) == 3 && events[1].kind == KV1_PREFIX_STORED);
    CHECK(events[1].previous == events[0].hash && events[2].tokens == tokens - 2 * page);
    CHECK(events[3].kind == KV1_PREFIX_EVICTED && events[3].hash == events[2].hash);
    CHECK(kv1_prefix_take_events(cache, events, 8) == 0);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    return report();
}
