/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences and prefixes that leave a cache and come back: by memory, callbacks and files, for one model and
 * no other.
 */
#include "check.h"

#include <stdlib.h>

enum { dim = 32, tokens = 40, page = 16, room = 1 << 16 };

static float x[tokens * dim], before[tokens * dim], after[tokens * dim];
static int32_t ids[tokens];
static unsigned char memory[room], again[room];
static kv1_error error;

typedef struct stream {
    unsigned char* bytes;
    size_t at, size, rewinds;
} stream;

static int32_t write_some(void* context, const void* bytes, size_t size) {
    stream* to = (stream*)context;
    if (size > to->size - to->at)
        return 0;
    memcpy(to->bytes + to->at, bytes, size);
    to->at += size;
    return 1;
}

static int32_t read_some(void* context, void* bytes, size_t size) {
    stream* from = (stream*)context;
    if (size > from->size - from->at)
        return 0;
    memcpy(bytes, from->bytes + from->at, size);
    from->at += size;
    return 1;
}

static int32_t rewind_it(void* context) {
    stream* from = (stream*)context;
    from->at = 0;
    ++from->rewinds;
    return 1;
}

static int same(const kv1_cache* a, kv1_sequence s, const kv1_cache* b, kv1_sequence t, size_t n) {
    return kv1_read(a, s, 0, KV1_VALUES, 0, 0, n, before, &error) == KV1_OK &&
           kv1_read(b, t, 0, KV1_VALUES, 0, 0, n, after, &error) == KV1_OK &&
           memcmp(before, after, n * dim * sizeof(float)) == 0;
}

static void models(void) {
    const char name[] = "a model", weights[] = "an adapter";
    kv1_fingerprint one, same_one, two;
    CHECK(kv1_fingerprint_of(name, sizeof name, NULL, &one) == KV1_OK);
    CHECK(kv1_fingerprint_of(name, sizeof name, NULL, &same_one) == KV1_OK);
    CHECK(memcmp(&one, &same_one, sizeof one) == 0);
    CHECK(kv1_fingerprint_of(weights, sizeof weights, &one, &two) == KV1_OK);
    CHECK(kv1_fingerprint_of(weights, sizeof weights, NULL, &same_one) == KV1_OK);
    CHECK(memcmp(&one, &two, sizeof one) != 0 && memcmp(&two, &same_one, sizeof one) != 0);
}

/* A cache with sequences of 40 and 20 tokens, the first of which is a prefix, too. */
static void by_memory(kv1_cache* cache, const kv1_sequence* sequences, const kv1_cache_options* options) {
    kv1_cache* other = made(options);
    kv1_sequence loaded[2] = {{0, 0}, {0, 0}};
    kv1_save_options save;
    kv1_load_options load;
    kv1_fingerprint model;
    const kv1_prefix_salt no_salt = {0, 0};
    size_t size = 0, written = 0, count = 9, matched = 0;
    CHECK(kv1_fingerprint_of("m", 1, NULL, &model) == KV1_OK);
    kv1_save_options_init(&save);
    kv1_load_options_init(&load);
    save.model = &model;
    save.prefixes = 1;
    CHECK(kv1_saved_bytes(cache, sequences, 2, &save, &size, &error) == KV1_OK && size < room);
    CHECK(kv1_save_memory(cache, sequences, 2, memory, size - 1, &written, &save, &error) ==
          KV1_SHAPE_MISMATCH);
    CHECK(written == 0 && memory[0] == 0);
    CHECK(kv1_save_memory(cache, sequences, 2, memory, room, &written, &save, &error) == KV1_OK);
    CHECK(written == size);

    CHECK(kv1_load_memory(other, memory, size, loaded, 2, &count, NULL, &error) == KV1_DIFFERENT_MODEL);
    load.model = &model;
    CHECK(kv1_load_memory(other, memory, size, loaded, 1, &count, &load, &error) == KV1_SHAPE_MISMATCH);
    CHECK(kv1_load_memory(other, memory, size - 1, loaded, 2, &count, &load, &error) == KV1_TRUNCATED);
    CHECK(kv1_load_memory(other, memory + 1, size - 1, loaded, 2, &count, &load, &error) == KV1_BAD_FORMAT);
    memory[size - 100] ^= 1;
    CHECK(kv1_load_memory(other, memory, size, loaded, 2, &count, &load, &error) == KV1_CHECKSUM_MISMATCH);
    memory[size - 100] ^= 1;
    CHECK(count == 9 && kv1_sequence_lives(other, loaded[0]) == 0 && kv1_prefix_pages(other) == 0);
    CHECK(kv1_load_memory(other, memory, size, loaded, 2, &count, &load, &error) == KV1_OK && count == 2);
    CHECK(same(cache, sequences[0], other, loaded[0], tokens));
    CHECK(same(cache, sequences[1], other, loaded[1], 20));
    CHECK(kv1_prefix_create(other, ids, tokens, no_salt, loaded, &matched, &error) == KV1_OK &&
          matched == 32);
    CHECK(kv1_cache_validate(other, &error) == KV1_OK);
    kv1_cache_destroy(other);
}

static void by_callbacks(kv1_cache* cache, const kv1_sequence* sequences, const kv1_cache_options* options) {
    kv1_cache* other = made(options);
    kv1_sequence loaded = {0, 0};
    stream bytes = {again, 0, room, 0};
    kv1_sink sink = {write_some, NULL};
    kv1_source source = {read_some, NULL, NULL};
    size_t size = 0, count = 0;
    sink.context = source.context = &bytes;
    CHECK(kv1_saved_bytes(cache, sequences, 1, NULL, &size, &error) == KV1_OK);
    CHECK(kv1_save(cache, sequences, 1, sink, NULL, &error) == KV1_OK && bytes.at == size);
    bytes.at = 0;
    CHECK(kv1_load(other, source, &loaded, 1, &count, NULL, &error) == KV1_OK && count == 1);
    CHECK(bytes.at == size && same(cache, sequences[0], other, loaded, tokens));
    source.rewind = rewind_it;
    bytes.at = 0;
    CHECK(kv1_load(other, source, &loaded, 1, &count, NULL, &error) == KV1_OK && count == 1);
    CHECK(bytes.at == size && bytes.rewinds == 1 && same(cache, sequences[0], other, loaded, tokens));
    bytes.at = 0;
    bytes.size = size - 1;
    CHECK(kv1_save(cache, sequences, 1, sink, NULL, &error) == KV1_IO_ERROR);
    CHECK(kv1_cache_validate(other, &error) == KV1_OK);
    kv1_cache_destroy(other);
}

static void by_files(kv1_cache* cache, const kv1_sequence* sequences, const kv1_cache_options* options) {
    const char* path = "kv1_c_saving_test.kv1";
    const kv1_layer wider = layer_of(1, 2 * dim, KV1_AFFINE2);
    kv1_cache_options different = *options;
    kv1_cache *other = made(options), *no_such;
    kv1_sequence loaded[2];
    size_t count = 0;
    different.layers = &wider;
    no_such = made(&different);
    remove(path);
    CHECK(kv1_load_file(other, path, loaded, 2, &count, NULL, &error) == KV1_IO_ERROR);
    CHECK(kv1_save_file(cache, sequences, 2, path, NULL, &error) == KV1_OK);
    CHECK(kv1_load_file(no_such, path, loaded, 2, &count, NULL, &error) == KV1_DIFFERENT_CACHE);
    CHECK(error.layer == 0);
    CHECK(kv1_load_file(other, path, loaded, 2, &count, NULL, &error) == KV1_OK && count == 2);
    CHECK(same(cache, sequences[0], other, loaded[0], tokens));
    CHECK(kv1_save_file(cache, sequences, 2, "no/such/folder/x", NULL, &error) == KV1_IO_ERROR);
    CHECK(remove(path) == 0);
    kv1_cache_destroy(other);
    kv1_cache_destroy(no_such);
}

static void swapped(kv1_cache* cache, kv1_sequence s) {
    kv1_sequence fork = {0, 0}, back = {0, 0};
    size_t size = 0, pages;
    CHECK(kv1_fork(cache, s, &fork, &error) == KV1_OK);
    CHECK(kv1_saved_bytes(cache, &fork, 1, NULL, &size, &error) == KV1_OK);
    CHECK(kv1_swap_out(cache, fork, memory, size - 1, &error) == KV1_SHAPE_MISMATCH);
    CHECK(kv1_sequence_lives(cache, fork) == 1);
    CHECK(kv1_swap_out(cache, fork, memory, size, &error) == KV1_OK && kv1_sequence_lives(cache, fork) == 0);
    pages = kv1_cache_available_pages(cache);
    CHECK(kv1_swap_in(cache, memory, size / 2, &back, &error) != KV1_OK);
    CHECK(kv1_cache_available_pages(cache) == pages);
    CHECK(kv1_swap_in(cache, memory, size, &back, &error) == KV1_OK && same(cache, s, cache, back, tokens));
}

int main(void) {
    const kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    const kv1_cache_options options = options_for(&layer, 1, 256, page);
    kv1_cache* cache = made(&options);
    const kv1_sequence sequences[2] = {sequence_of(cache), sequence_of(cache)};
    const kv1_tensor whole = kv1_contiguous(x, KV1_FP32, tokens, 1, dim);
    const kv1_tensor half = kv1_contiguous(x, KV1_FP32, 20, 1, dim);
    const kv1_prefix_salt no_salt = {0, 0};
    size_t i;
    fill(x, tokens * dim);
    for (i = 0; i < tokens; ++i)
        ids[i] = (int32_t)i;
    CHECK(kv1_append(cache, sequences[0], 0, whole, whole, NULL, &error) == KV1_OK);
    CHECK(kv1_append(cache, sequences[1], 0, half, half, NULL, &error) == KV1_OK);
    CHECK(kv1_prefix_store(cache, sequences[0], ids, tokens, no_salt, 0, NULL, &error) == KV1_OK);
    models();
    by_memory(cache, sequences, &options);
    by_callbacks(cache, sequences, &options);
    by_files(cache, sequences, &options);
    swapped(cache, sequences[0]);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    return report();
}
