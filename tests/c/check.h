/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share: checks that are counted, numbers, a cache of one layer.
 */
#ifndef KV1_TESTS_C_CHECK_H
#define KV1_TESTS_C_CHECK_H

#include <kv1/kv1.h>

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

/* Goes on after a failure: every one is shown. */
#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            printf("%s, line %d: %s\n", __FILE__, __LINE__, #condition);                                     \
            ++failures;                                                                                      \
        }                                                                                                    \
    } while (0)

/* main's result. */
static inline int report(void) {
    puts(failures == 0 ? "ok" : "FAILED");
    return failures == 0 ? 0 : 1;
}

/* In [-1, 1), the same in every run. */
static inline float uniform(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

/* The formats there are: those that have a name. */
static inline int formats(void) {
    int n = 0;
    while (strcmp(kv1_format_name((kv1_format)n), "unknown") != 0)
        ++n;
    return n;
}

static inline void fill(float* x, size_t n) {
    size_t i;
    for (i = 0; i < n; ++i)
        x[i] = uniform();
}

/* A layer of one format. */
static inline kv1_layer layer_of(size_t kv_heads, size_t dim, kv1_format format) {
    kv1_layer layer;
    kv1_layer_init(&layer);
    layer.kv_heads = kv_heads;
    layer.key_dim = layer.value_dim = dim;
    layer.key_format = layer.value_format = format;
    return layer;
}

/* Options for layers like this one. */
static inline kv1_cache_options options_for(const kv1_layer* layer, size_t layers, size_t capacity_tokens,
                                            size_t page_tokens) {
    kv1_cache_options options;
    kv1_cache_options_init(&options);
    options.layers = layer;
    options.distinct_layers = 1;
    options.layer_count = layers;
    options.capacity_tokens = capacity_tokens;
    options.page_tokens = page_tokens;
    return options;
}

/* A cache, or null, which is a failure. */
static inline kv1_cache* made(const kv1_cache_options* options) {
    kv1_cache* cache = NULL;
    kv1_error error;
    if (kv1_cache_create(options, &cache, &error) != KV1_OK) {
        char text[200];
        kv1_describe(&error, text, sizeof text);
        printf("no cache: %s\n", text);
        ++failures;
    }
    return cache;
}

static inline kv1_sequence sequence_of(kv1_cache* cache) {
    kv1_sequence s = {0, 0};
    CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
    return s;
}

#endif
