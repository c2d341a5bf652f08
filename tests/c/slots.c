/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine in C with cells of its own: slots written in any order and over others, an fp16 mask as llama.cpp has it,
 * block tables as vLLM has them. Results are those of a cache with sequences, and of the definition.
 */
#include "check.h"

#include <kv1/kv1.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { KV_HEADS = 2, HEADS = 4, DIM = 32, PAGE = 32, CELLS = 96, TOKENS = 70 };

static float keys[TOKENS * KV_HEADS * DIM], values[TOKENS * KV_HEADS * DIM];
static uint32_t cells[TOKENS]; /* of each token */

static kv1_slot_options slot_options(const kv1_layer* layer) {
    kv1_slot_options options;
    kv1_slot_options_init(&options);
    options.layers = layer;
    options.distinct_layers = options.layer_count = 1;
    options.slots = CELLS;
    options.page_tokens = PAGE;
    return options;
}

static kv1_slot_store* store_of(const kv1_slot_options* options) {
    kv1_slot_store* store = NULL;
    kv1_error error;
    if (kv1_slots_create(options, &store, &error) != KV1_OK) {
        char text[200];
        kv1_describe(&error, text, sizeof text);
        printf("no store: %s\n", text);
        ++failures;
    }
    return store;
}

static kv1_tensor tokens_of(const float* x, size_t first, size_t n) {
    return kv1_contiguous(x + first * KV_HEADS * DIM, KV1_FP32, n, KV_HEADS, DIM);
}

/* Writes every token to its cell, in batches, after others were written there. */
static void write_all(kv1_slot_store* store) {
    size_t t;
    CHECK(kv1_slots_write(store, 0, cells + 20, 50, tokens_of(values, 0, 50), tokens_of(keys, 0, 50), NULL,
                          NULL) == KV1_OK);
    CHECK(kv1_slots_flush(store, NULL) == KV1_OK);
    for (t = TOKENS; t > 0; t -= 10) {
        CHECK(kv1_slots_write(store, 0, cells + t - 10, 10, tokens_of(keys, t - 10, 10), kv1_no_values(),
                              NULL, NULL) == KV1_OK);
        CHECK(kv1_slots_write(store, 0, cells + t - 10, 10, kv1_no_values(), tokens_of(values, t - 10, 10),
                              NULL, NULL) == KV1_OK);
        CHECK(kv1_slots_flush(store, NULL) == KV1_OK);
    }
}

static void attends_as_a_cache(void) {
    enum { QUERIES = 3 };
    const kv1_layer layer = layer_of(KV_HEADS, DIM, KV1_AFFINE4);
    const kv1_slot_options options = slot_options(&layer);
    const kv1_cache_options cache_options = options_for(&layer, 1, CELLS, PAGE);
    kv1_slot_store* store = store_of(&options);
    kv1_cache* cache = made(&cache_options);
    const kv1_sequence sequence = sequence_of(cache);
    static float q[QUERIES * HEADS * DIM], out[QUERIES * HEADS * DIM], expected[QUERIES * HEADS * DIM];
    static uint16_t mask[QUERIES * CELLS]; /* fp16 */
    int32_t query_positions[QUERIES], cell_positions[CELLS];
    const uint32_t blocks[3] = {0, 1, 2};
    kv1_slot_attention exact;
    kv1_attention cache_exact;
    kv1_slot_stream stream;
    kv1_plan* plan = NULL;
    size_t i, t, phase;
    kv1_slot_attention_init(&exact);
    exact.precision = KV1_EXACT;
    kv1_attention_init(&cache_exact);
    cache_exact.precision = KV1_EXACT;
    memset(&stream, 0, sizeof stream);
    fill(q, sizeof q / sizeof *q);
    CHECK(kv1_slots_count(store) == CELLS);
    write_all(store);
    CHECK(kv1_append(cache, sequence, 0, tokens_of(keys, 0, TOKENS), tokens_of(values, 0, TOKENS), NULL,
                     NULL) == KV1_OK);
    CHECK(kv1_attend(cache, sequence, 0, kv1_contiguous(q, KV1_FP32, QUERIES, HEADS, DIM),
                     kv1_contiguous_output(expected, KV1_FP32, QUERIES, HEADS, DIM), &cache_exact, NULL,
                     NULL) == KV1_OK);

    /* cells in any order: an additive mask, 0 or -infinity */
    for (i = 0; i < QUERIES * CELLS; ++i)
        mask[i] = 0xfc00;
    for (i = 0; i < QUERIES; ++i)
        for (t = 0; t <= TOKENS - QUERIES + i; ++t)
            mask[i * CELLS + cells[t]] = 0;
    stream.queries = QUERIES;
    stream.slots = kv1_slot_range(0, CELLS);
    stream.mask.kind = KV1_SLOT_MASK_ADDITIVE;
    stream.mask.data = mask;
    stream.mask.type = KV1_FP16;
    stream.mask.query_stride = CELLS;
    CHECK(kv1_slots_attend(store, 0, &stream, 1, kv1_contiguous(q, KV1_FP32, QUERIES, HEADS, DIM),
                           kv1_contiguous_output(out, KV1_FP32, QUERIES, HEADS, DIM), &exact, NULL,
                           NULL) == KV1_OK);
    /* fp32 sums in another order: 70 numbers below 1, from scores whose 32 products are below 1 */
    for (i = 0; i < QUERIES * HEADS * DIM; ++i)
        CHECK(fabsf(out[i] - expected[i]) < 1e-4f);

    /* the same by positions, as a plan */
    for (t = 0; t < CELLS; ++t)
        cell_positions[t] = -1;
    for (t = 0; t < TOKENS; ++t)
        cell_positions[cells[t]] = (int32_t)t;
    for (i = 0; i < QUERIES; ++i)
        query_positions[i] = (int32_t)(TOKENS - QUERIES + i);
    stream.slots = kv1_slot_table(blocks, 3, CELLS);
    stream.mask.kind = KV1_SLOT_MASK_BY_POSITION;
    stream.mask.query_positions = query_positions;
    stream.mask.column_positions = cell_positions;
    memset(out, 0, sizeof out);
    CHECK(kv1_slots_plan_attend(store, 0, &stream, 1, kv1_contiguous(q, KV1_FP32, QUERIES, HEADS, DIM),
                                kv1_contiguous_output(out, KV1_FP32, QUERIES, HEADS, DIM), &exact, &plan,
                                NULL) == KV1_OK);
    CHECK(kv1_plan_phases(plan) != 0);
    for (phase = 0; phase < kv1_plan_phases(plan); ++phase)
        for (i = kv1_plan_tasks(plan, phase); i > 0; --i)
            kv1_plan_run(plan, phase, i - 1);
    CHECK(kv1_plan_finish(plan, NULL) == KV1_OK);
    for (i = 0; i < QUERIES * HEADS * DIM; ++i)
        CHECK(fabsf(out[i] - expected[i]) < 1e-4f);

    stream.mask.kind = 7;
    CHECK(kv1_slots_attend(store, 0, &stream, 1, kv1_contiguous(q, KV1_FP32, QUERIES, HEADS, DIM),
                           kv1_contiguous_output(out, KV1_FP32, QUERIES, HEADS, DIM), NULL, NULL,
                           NULL) == KV1_INVALID_ARGUMENT);
    kv1_cache_destroy(cache);
    kv1_slots_destroy(store);
}

static void copies_exports_and_moves(void) {
    const kv1_layer layer = layer_of(KV_HEADS, DIM, KV1_AFFINE2);
    kv1_slot_options options = slot_options(&layer);
    kv1_slot_store *store, *other;
    float row[DIM], again[DIM], given[DIM];
    unsigned char* raw;
    uint16_t* numbers;
    const uint32_t from[2] = {3, 40}, to[2] = {80, 81};
    const int32_t positions[2] = {9, 0};
    const int32_t* all_positions[1];
    kv1_slot_view view;
    kv1_error error;
    size_t i;
    options.fp16_slots = 64;
    options.fp16_sinks = 1;
    options.fp16_window = 1;
    store = store_of(&options);
    other = store_of(&options);
    CHECK(kv1_slots_write(store, 0, from, 2, tokens_of(keys, 0, 2), tokens_of(values, 0, 2), NULL, NULL) ==
          KV1_OK);
    CHECK(kv1_slots_has_fp16(store, 0, 3) == 1 && kv1_slots_fp16_in_use(store, 0) == 2);
    CHECK(kv1_slots_read(store, 0, KV1_KEYS, 1, from, 1, given, NULL) == KV1_OK);
    for (i = 0; i < DIM; ++i)
        CHECK(fabsf(given[i] - keys[DIM + i]) <= 0x1p-11f); /* as it was given, rounded to fp16 */

    /* position 0 is a sink, position 9 is not the newest but of a window of none */
    memset(&view, 0, sizeof view);
    view.kind = KV1_SLOT_LIST;
    view.items = from;
    view.count = 2;
    all_positions[0] = positions;
    CHECK(kv1_slots_settle(store, &view, all_positions, 1, NULL) == KV1_OK);
    CHECK(kv1_slots_has_fp16(store, 0, 3) == 0 && kv1_slots_has_fp16(store, 0, 40) == 1);

    CHECK(kv1_slots_raw_bytes(store, 0) == KV_HEADS * 2 * kv1_row_bytes(KV1_AFFINE2, DIM, 0));
    CHECK(kv1_slots_fp16_numbers(store, 0) == KV_HEADS * 2 * DIM);
    raw = (unsigned char*)malloc(2 * kv1_slots_raw_bytes(store, 0));
    numbers = (uint16_t*)malloc(2 * kv1_slots_fp16_numbers(store, 0));
    CHECK(kv1_slots_export(store, 0, from, 2, raw, NULL) == KV1_OK);
    CHECK(kv1_slots_export_fp16(store, 0, from + 1, 1, numbers, NULL) == KV1_OK);
    CHECK(kv1_slots_export_fp16(store, 0, from, 1, numbers, &error) == KV1_OUT_OF_RANGE && error.token == 0);
    CHECK(kv1_slots_import(other, 0, to, 2, raw, NULL) == KV1_OK);
    CHECK(kv1_slots_import_fp16(other, 0, to + 1, 1, numbers, NULL) == KV1_OK);
    for (i = 0; i < 2; ++i) {
        CHECK(kv1_slots_read(store, 0, KV1_VALUES, 1, from + i, 1, row, NULL) == KV1_OK);
        CHECK(kv1_slots_read(other, 0, KV1_VALUES, 1, to + i, 1, again, NULL) == KV1_OK);
        CHECK(memcmp(row, again, sizeof row) == 0);
    }
    raw[(KV_HEADS * 2 - 1) * (DIM / 4 + 4) + DIM / 4 + 1] = 0x7c; /* a scale of infinity */
    CHECK(kv1_slots_import(other, 0, to, 1, raw, &error) == KV1_NON_FINITE && error.kv_head == 1);

    CHECK(kv1_slots_move(store, 0, from, to, 2, NULL) == KV1_OK);
    CHECK(kv1_slots_has_fp16(store, 0, 40) == 0 && kv1_slots_has_fp16(store, 0, 81) == 1);
    CHECK(kv1_slots_copy(store, 0, to, from, 2, NULL) == KV1_OK);
    CHECK(kv1_slots_release_fp16(store, to, 2, NULL) == KV1_OK);
    CHECK(kv1_slots_fp16_in_use(store, 0) == 1);
    CHECK(kv1_slots_clear(store, 0, from, 2, NULL) == KV1_OK && kv1_slots_fp16_in_use(store, 0) == 0);
    CHECK(kv1_slots_clear_all(store, NULL) == KV1_OK);
    CHECK(kv1_slots_read(store, 0, KV1_KEYS, 0, to, 1, row, NULL) == KV1_OK);
    for (i = 0; i < DIM; ++i)
        CHECK(row[i] == 0.0f);
    free(raw);
    free(numbers);
    kv1_slots_destroy(store);
    kv1_slots_destroy(other);
}

static void lives_in_lent_memory(void) {
    const kv1_layer layer = layer_of(KV_HEADS, DIM, KV1_AFFINE2);
    kv1_slot_options options = slot_options(&layer);
    kv1_slot_memory memory;
    kv1_slot_store* store;
    size_t bytes = 0;
    float row[DIM], again[DIM];
    unsigned char* room;
    CHECK(kv1_slot_memory_bytes(&options, 0, &bytes, NULL) == KV1_OK);
    CHECK(bytes == (CELLS + PAGE) * KV_HEADS * 2 * kv1_row_bytes(KV1_AFFINE2, DIM, 0));
    CHECK(kv1_slot_memory_bytes(&options, 1, &bytes, NULL) == KV1_OUT_OF_RANGE);
    room = (unsigned char*)malloc(bytes + 64);
    memory.bytes = room + (64 - (uintptr_t)room % 64);
    memory.size = bytes;
    memory.holds_slots = 0;
    options.memory = &memory;
    store = store_of(&options);
    write_all(store);
    CHECK(kv1_slots_read(store, 0, KV1_KEYS, 1, cells + 60, 1, row, NULL) == KV1_OK);
    kv1_slots_destroy(store);
    memory.holds_slots = 1;
    store = store_of(&options);
    CHECK(kv1_slots_read(store, 0, KV1_KEYS, 1, cells + 60, 1, again, NULL) == KV1_OK);
    CHECK(memcmp(row, again, sizeof row) == 0);
    kv1_slots_destroy(store);
    memory.size -= 64;
    CHECK(kv1_slots_create(&options, &store, NULL) == KV1_SHAPE_MISMATCH && store == NULL);
    free(room);
}

/* Keys about a mean that turns: a cache and a store that holds them in other places give the same. */
static void keys_turn_about_their_means(void) {
    enum { PAIRS = DIM / 2 };
    kv1_layer layer = layer_of(KV_HEADS, DIM, KV1_COMPACT4);
    kv1_encoding encoding;
    kv1_rotary rotary;
    kv1_slot_options options;
    kv1_cache_options cache_options;
    kv1_slot_store* store;
    kv1_cache* cache;
    kv1_sequence sequence;
    kv1_slot_stream stream;
    kv1_plan* plan = NULL;
    float frequencies[PAIRS], means[KV_HEADS * DIM], row[DIM], again[DIM];
    static float out[HEADS * DIM], expected[HEADS * DIM];
    int32_t positions[TOKENS];
    uint32_t slots[TOKENS];
    size_t t, i, phase, bytes = 0, without = 0;
    kv1_rotary_frequencies(10000.0, DIM, frequencies);
    fill(means, sizeof means / sizeof *means);
    kv1_encoding_init(&encoding);
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    encoding.means = means;
    kv1_rotary_init(&rotary);
    rotary.frequencies = frequencies;
    rotary.pair_count = PAIRS;
    options = slot_options(&layer);
    layer.key_encoding = &encoding;
    CHECK(kv1_slot_memory_bytes(&options, 0, &without, NULL) == KV1_OK);
    layer.rotary = &rotary;
    CHECK(kv1_slot_memory_bytes(&options, 0, &bytes, NULL) == KV1_OK);
    CHECK(bytes == without + (CELLS + PAGE) * sizeof(int32_t));
    store = store_of(&options);
    cache_options = options_for(&layer, 1, CELLS, PAGE);
    cache = made(&cache_options);
    sequence = sequence_of(cache);
    CHECK(kv1_append(cache, sequence, 0, tokens_of(keys, 0, TOKENS), tokens_of(values, 0, TOKENS), NULL,
                     NULL) == KV1_OK);
    for (t = 0; t < TOKENS; ++t) { /* pages 1, 2, 0 */
        positions[t] = (int32_t)t;
        slots[t] = (uint32_t)((t + PAGE) % CELLS);
    }
    CHECK(kv1_slots_write(store, 0, slots, 3, tokens_of(keys, 0, 3), tokens_of(values, 0, 3), NULL, NULL) ==
          KV1_SHAPE_MISMATCH);
    CHECK(kv1_slots_write_at(store, 0, slots, NULL, 3, tokens_of(keys, 0, 3), tokens_of(values, 0, 3), NULL,
                             NULL) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_slots_write_at(store, 0, slots, positions, 50, tokens_of(keys, 0, 50), tokens_of(values, 0, 50),
                             NULL, NULL) == KV1_OK);
    CHECK(kv1_slots_plan_write_at(store, 0, slots + 50, positions + 50, TOKENS - 50,
                                  tokens_of(keys, 50, TOKENS - 50), tokens_of(values, 50, TOKENS - 50), &plan,
                                  NULL) == KV1_OK);
    for (phase = 0; phase < kv1_plan_phases(plan); ++phase)
        for (i = 0; i < kv1_plan_tasks(plan, phase); ++i)
            kv1_plan_run(plan, phase, i);
    CHECK(kv1_plan_finish(plan, NULL) == KV1_OK);
    CHECK(kv1_slots_key_position(store, 0, slots[69]) == 69 && kv1_slots_key_position(store, 0, CELLS) == -1);
    CHECK(kv1_slots_key_position(NULL, 0, 0) == -1);
    CHECK(kv1_slots_read(store, 0, KV1_KEYS, 1, slots + 60, 1, row, NULL) == KV1_OK);
    CHECK(kv1_read(cache, sequence, 0, KV1_KEYS, 1, 60, 1, again, NULL) == KV1_OK);
    CHECK(memcmp(row, again, sizeof row) == 0);
    memset(&stream, 0, sizeof stream);
    stream.queries = 1;
    {
        const uint32_t blocks[3] = {1, 2, 0};
        stream.slots = kv1_slot_table(blocks, 3, TOKENS);
        CHECK(kv1_slots_attend(store, 0, &stream, 1, tokens_of(keys, 0, 1),
                               kv1_contiguous_output(out, KV1_FP32, 1, KV_HEADS, DIM), NULL, NULL,
                               NULL) == KV1_OK);
    }
    CHECK(kv1_attend(cache, sequence, 0, tokens_of(keys, 0, 1),
                     kv1_contiguous_output(expected, KV1_FP32, 1, KV_HEADS, DIM), NULL, NULL,
                     NULL) == KV1_OK);
    CHECK(memcmp(out, expected, KV_HEADS * DIM * sizeof(float)) == 0);
    kv1_cache_destroy(cache);
    kv1_slots_destroy(store);
}

static void refuses_what_it_cannot_do(void) {
    const kv1_layer layer = layer_of(KV_HEADS, DIM, KV1_AFFINE2);
    kv1_slot_options options = slot_options(&layer);
    kv1_slot_store* store = store_of(&options);
    const uint32_t twice[2] = {5, 5}, beyond[1] = {CELLS};
    kv1_plan* plan = NULL;
    kv1_error error;
    CHECK(kv1_slots_write(store, 0, twice, 2, tokens_of(keys, 0, 2), tokens_of(values, 0, 2), NULL, &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(error.token == 1);
    CHECK(kv1_slots_write(store, 0, beyond, 1, tokens_of(keys, 0, 1), tokens_of(values, 0, 1), NULL, NULL) ==
          KV1_OUT_OF_RANGE);
    CHECK(kv1_slots_write(store, 1, twice, 1, tokens_of(keys, 0, 1), tokens_of(values, 0, 1), NULL, NULL) ==
          KV1_OUT_OF_RANGE);
    CHECK(kv1_slots_plan_write(store, 0, twice, 1, tokens_of(keys, 0, 2), tokens_of(values, 0, 2), &plan,
                               NULL) == KV1_SHAPE_MISMATCH &&
          plan == NULL);
    CHECK(kv1_slots_write(NULL, 0, twice, 1, tokens_of(keys, 0, 1), tokens_of(values, 0, 1), NULL, NULL) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_slots_write(store, 0, NULL, 1, tokens_of(keys, 0, 1), tokens_of(values, 0, 1), NULL, NULL) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_slots_plan_write(store, 0, twice, 1, tokens_of(keys, 0, 1), tokens_of(values, 0, 1), &plan,
                               NULL) == KV1_OK &&
          kv1_plan_phases(plan) == 2);
    kv1_plan_destroy(plan);
    kv1_plan_destroy(NULL);
    CHECK(kv1_slots_flush(NULL, NULL) == KV1_INVALID_ARGUMENT && kv1_slots_count(NULL) == 0);
    CHECK(kv1_plan_finish(NULL, NULL) == KV1_OK && kv1_plan_phases(NULL) == 0);
    kv1_slots_destroy(store);
    options.struct_size = 4;
    CHECK(kv1_slots_create(&options, &store, NULL) == KV1_INVALID_ARGUMENT && store == NULL);
}

int main(void) {
    size_t t;
    fill(keys, sizeof keys / sizeof *keys);
    fill(values, sizeof values / sizeof *values);
    for (t = 0; t < TOKENS; ++t)
        cells[t] = (uint32_t)(t * 37 % CELLS); /* 37 and 96 have no common divisor */
    attends_as_a_cache();
    copies_exports_and_moves();
    lives_in_lent_memory();
    keys_turn_about_their_means();
    refuses_what_it_cannot_do();
    return report();
}
