/* SPDX-License-Identifier: Apache-2.0
 *
 * The binary interface: sizes and places of fields, structures of programs that are older or newer than the
 * library, numbers that are no enumerator, null pointers.
 */
#include "check.h"

#include <stddef.h>

#if UINTPTR_MAX == UINT64_MAX
/* A change of one of these breaks programs that are compiled already. Fields may be added to the end of
 * structures that begin with struct_size. */
#define AT(structure, field, place)                                                                          \
    _Static_assert(offsetof(structure, field) == (place), #structure "." #field " has moved")
AT(kv1_error, rule, 8);
AT(kv1_error, channel, 40);
AT(kv1_tensor, type, 8);
AT(kv1_tensor, head_stride, 48);
AT(kv1_output, head_stride, 48);
AT(kv1_encoding, levels, 8);
AT(kv1_encoding, error_weights, 32);
AT(kv1_encoding, basis, 40);
AT(kv1_rotary, frequencies, 8);
AT(kv1_rotary, first_channel, 32);
AT(kv1_layer, key_format, 32);
AT(kv1_layer, key_encoding, 40);
AT(kv1_layer, sliding_window, 72);
AT(kv1_layer, key_axis, 88);
AT(kv1_layer, rotary, 96);
AT(kv1_cache_options, page_tokens, 40);
AT(kv1_cache_options, huge_pages, 80);
AT(kv1_cache_options, memory, 96);
AT(kv1_cache_options, first_position, 104);
AT(kv1_statistics, sequences, 8);
AT(kv1_statistics, pages_indexed, 112);
AT(kv1_attention, scale, 8);
AT(kv1_attention, mask, 32);
AT(kv1_attention, log_sum_exp, 96);
AT(kv1_page_layout, keys, 24);
AT(kv1_page_layout, values, 112);
AT(kv1_save_options, model, 16);
AT(kv1_load_options, model, 8);
AT(kv1_calibrator_options, policy, 8);
AT(kv1_calibrator_options, scale, 32);
AT(kv1_slot_memory, holds_slots, 16);
AT(kv1_slot_options, slots, 32);
AT(kv1_slot_options, fp16_window, 64);
AT(kv1_slot_options, huge_pages, 72);
AT(kv1_slot_options, memory, 80);
AT(kv1_slot_view, items, 24);
AT(kv1_slot_mask, data, 24);
AT(kv1_slot_mask, head_stride, 48);
AT(kv1_slot_stream, mask, 48);
AT(kv1_slot_attention, precision, 16);
AT(kv1_slot_attention, window, 24);
AT(kv1_slot_attention, log_sum_exp, 48);
_Static_assert(sizeof(kv1_error) == 48 && sizeof(kv1_sequence) == 8 && sizeof(kv1_tensor) == 56 &&
                   sizeof(kv1_output) == 56 && sizeof(kv1_executor) == 16 && sizeof(kv1_memory) == 24 &&
                   sizeof(kv1_mask) == 32 && sizeof(kv1_range) == 16 && sizeof(kv1_attention_part) == 16 &&
                   sizeof(kv1_rows) == 24 && sizeof(kv1_const_rows) == 24 && sizeof(kv1_section) == 88 &&
                   sizeof(kv1_block_tables) == 32 && sizeof(kv1_prefix_salt) == 16 &&
                   sizeof(kv1_prefix_pin) == 16 && sizeof(kv1_prefix_event) == 24 &&
                   sizeof(kv1_fingerprint) == 32 && sizeof(kv1_sink) == 16 && sizeof(kv1_source) == 24 &&
                   sizeof(kv1_slot_memory) == 24 && sizeof(kv1_slot_view) == 40 &&
                   sizeof(kv1_slot_mask) == 56 && sizeof(kv1_slot_stream) == 104,
               "a structure without struct_size never changes");
#endif
_Static_assert(sizeof(kv1_code) == 4 && sizeof(kv1_format) == 4 && sizeof(kv1_scalar) == 4 &&
                   sizeof(kv1_axis) == 4 && sizeof(kv1_rotary_pairs) == 4 && sizeof(kv1_levels) == 4 &&
                   sizeof(kv1_mask_kind) == 4 && sizeof(kv1_precision) == 4 && sizeof(kv1_side) == 4 &&
                   sizeof(kv1_prefix_event_kind) == 4 && sizeof(kv1_slot_view_kind) == 4 &&
                   sizeof(kv1_slot_mask_kind) == 4,
               "enumerations are 32 bits wide");

enum { dim = 32, tokens = 20 };

static float k[tokens * dim], q[dim], out[dim];
static kv1_error error;

/* As a program has it that was compiled with a later version. */
typedef struct later_options {
    kv1_cache_options known;
    uint64_t more;
} later_options;
typedef struct later_layer {
    kv1_layer known;
    uint64_t more;
} later_layer;
typedef struct later_statistics {
    kv1_statistics known;
    uint64_t more;
} later_statistics;

static void sizes(void) {
    const kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    kv1_cache_options options = options_for(&layer, 2, 64, 16);
    later_options later;
    later_layer layers[2];
    later_statistics statistics;
    kv1_cache* cache = (kv1_cache*)&later;
    kv1_statistics short_statistics;

    options.struct_size = 0;
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_INVALID_ARGUMENT && cache == NULL);
    CHECK(strcmp(error.rule, "struct_size is the size of the structure") == 0 && error.layer == -1);
    options.struct_size = offsetof(kv1_cache_options, first_position) - 1;
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_INVALID_ARGUMENT);
    options.struct_size = offsetof(kv1_cache_options, first_position); /* as the first version had it */
    options.first_position = SIZE_MAX;                                 /* is not read */
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);

    /* fields of a later version are refused where they ask for something */
    memset(&later, 0, sizeof later);
    later.known = options_for(&layers[0].known, 2, 64, 16);
    later.known.distinct_layers = 2;
    later.known.struct_size = sizeof later;
    memset(layers, 0, sizeof layers);
    layers[0].known = layers[1].known = layer;
    layers[0].known.struct_size = layers[1].known.struct_size = sizeof layers[0];
    layers[1].known.key_format = KV1_AFFINE4;
    later.more = 1;
    CHECK(kv1_cache_create(&later.known, &cache, &error) == KV1_INVALID_ARGUMENT);
    CHECK(strcmp(error.rule, "a structure has a field that this version does not know") == 0);
    later.more = 0;
    layers[1].more = 1;
    CHECK(kv1_cache_create(&later.known, &cache, &error) == KV1_INVALID_ARGUMENT && error.layer == 1);
    layers[1].more = 0;
    CHECK(kv1_cache_create(&later.known, &cache, &error) == KV1_OK && cache != NULL);
    CHECK(kv1_cache_layers(cache) == 2);

    /* and become zero in what is given */
    memset(&statistics, 0xff, sizeof statistics);
    statistics.known.struct_size = sizeof statistics;
    CHECK(kv1_cache_statistics(cache, &statistics.known, &error) == KV1_OK);
    CHECK(statistics.more == 0 && statistics.known.layers == 2);
    CHECK(statistics.known.struct_size == sizeof statistics);
    memset(&short_statistics, 0xff, sizeof short_statistics);
    short_statistics.struct_size = sizeof(size_t);
    CHECK(kv1_cache_statistics(cache, &short_statistics, &error) == KV1_INVALID_ARGUMENT);
    CHECK(short_statistics.sequences == SIZE_MAX);
    kv1_cache_destroy(cache);

    layers[1].known.struct_size = sizeof(kv1_layer);
    CHECK(kv1_cache_create(&later.known, &cache, &error) == KV1_INVALID_ARGUMENT && error.layer == 1);
    CHECK(strcmp(error.rule, "layers have one struct_size") == 0);
}

/* Whether a cache of this layer is refused so. */
static int refused(kv1_layer layer, kv1_code code) {
    const kv1_cache_options options = options_for(&layer, 1, 64, 16);
    kv1_cache* cache = NULL;
    const kv1_code found = kv1_cache_create(&options, &cache, &error);
    kv1_cache_destroy(cache);
    return found == code && cache == NULL && error.layer == 0;
}

static void enumerators(void) {
    static const int32_t none[] = {-1, 100, INT32_MAX, INT32_MIN};
    const kv1_layer good = layer_of(1, dim, KV1_AFFINE2);
    const kv1_cache_options options = options_for(&good, 1, 64, 16);
    const kv1_tensor x = kv1_contiguous(k, KV1_FP32, 1, 1, dim);
    const kv1_tensor query = kv1_contiguous(q, KV1_FP32, 1, 1, dim);
    const kv1_output output = kv1_contiguous_output(out, KV1_FP32, 1, 1, dim);
    kv1_cache* cache = made(&options);
    const kv1_sequence s = sequence_of(cache);
    size_t i;
    CHECK(kv1_append(cache, s, 0, x, x, NULL, &error) == KV1_OK);
    for (i = 0; i < sizeof none / sizeof none[0]; ++i) {
        kv1_layer layer = good;
        kv1_encoding encoding;
        kv1_rotary rotary;
        kv1_tensor typed = x;
        kv1_output typed_output = output;
        kv1_attention attention;
        layer.key_format = none[i];
        CHECK(refused(layer, KV1_UNSUPPORTED_FORMAT));
        layer = good;
        layer.value_format = none[i];
        CHECK(refused(layer, KV1_UNSUPPORTED_FORMAT));
        layer = good;
        layer.key_axis = none[i];
        CHECK(refused(layer, KV1_INVALID_ARGUMENT));
        layer = good;
        kv1_rotary_init(&rotary);
        rotary.pairs = none[i];
        layer.rotary = &rotary;
        CHECK(refused(layer, KV1_INVALID_ARGUMENT));
        layer = good;
        kv1_encoding_init(&encoding);
        encoding.levels = none[i];
        layer.value_encoding = &encoding;
        CHECK(refused(layer, KV1_INVALID_ARGUMENT));
        typed.type = none[i];
        CHECK(kv1_append(cache, s, 0, typed, x, NULL, &error) == KV1_INVALID_ARGUMENT);
        CHECK(kv1_append(cache, s, 0, x, typed, NULL, &error) == KV1_INVALID_ARGUMENT);
        typed = query;
        typed.type = typed_output.type = none[i];
        CHECK(kv1_attend(cache, s, 0, typed, output, NULL, NULL, &error) == KV1_INVALID_ARGUMENT);
        CHECK(kv1_attend(cache, s, 0, query, typed_output, NULL, NULL, &error) == KV1_INVALID_ARGUMENT);
        kv1_attention_init(&attention);
        attention.mask.kind = none[i];
        CHECK(kv1_attend(cache, s, 0, query, output, &attention, NULL, &error) == KV1_INVALID_ARGUMENT);
        kv1_attention_init(&attention);
        attention.precision = none[i];
        CHECK(kv1_attend(cache, s, 0, query, output, &attention, NULL, &error) == KV1_INVALID_ARGUMENT);
        CHECK(kv1_read(cache, s, 0, none[i], 0, 0, 1, out, &error) == KV1_INVALID_ARGUMENT);
        CHECK(strcmp(kv1_format_name(none[i]), "unknown") == 0);
        CHECK(kv1_packed_bytes(none[i], dim) == 0 && kv1_row_bytes(none[i], dim, 0) == 0);
        CHECK(strcmp(kv1_code_name(none[i]), "unknown error") == 0);
    }
    kv1_cache_destroy(cache);
}

static void nulls(void) {
    const kv1_layer layer = layer_of(1, dim, KV1_AFFINE2);
    kv1_cache_options options = options_for(&layer, 1, 64, 16);
    const kv1_tensor x = kv1_contiguous(k, KV1_FP32, 1, 1, dim);
    const kv1_output output = kv1_contiguous_output(out, KV1_FP32, 1, 1, dim);
    const kv1_prefix_salt salt = {0, 0};
    kv1_cache *cache = made(&options), *none = cache;
    const kv1_sequence s = sequence_of(cache);
    kv1_sequence other = s;
    kv1_memory half;
    size_t n = 7;
    const kv1_code bad = KV1_INVALID_ARGUMENT;
    const kv1_sink sink = {NULL, NULL};
    const kv1_source source = {NULL, NULL, NULL};
    CHECK(kv1_cache_create(NULL, &none, NULL) == bad && none == NULL);
    CHECK(kv1_cache_create(&options, NULL, &error) == bad);
    CHECK(kv1_capacity_for_bytes(&options, 1, NULL, NULL) == bad);
    CHECK(kv1_cache_grow(NULL, 100, NULL) == bad && kv1_cache_validate(NULL, NULL) == bad);
    CHECK(kv1_cache_layers(NULL) == 0 && kv1_cache_available_pages(NULL) == 0);
    CHECK(kv1_cache_statistics(cache, NULL, NULL) == bad);
    CHECK(kv1_sequence_statistics(cache, s, NULL, NULL) == bad);
    CHECK(kv1_sequence_create(cache, NULL, NULL) == bad && kv1_sequence_create(NULL, &other, NULL) == bad);
    CHECK(kv1_sequence_destroy(NULL, s, NULL) == bad && kv1_sequence_lives(NULL, s) == 0);
    CHECK(kv1_length(cache, s, 0, NULL, NULL) == bad && kv1_sequence_length(NULL, s, &n, NULL) == bad);
    CHECK(kv1_fork(cache, s, NULL, NULL) == bad && kv1_truncate(NULL, s, 0, NULL) == bad);
    CHECK(kv1_drop_pages(NULL, s, 0, 1, NULL) == bad && kv1_commit(NULL, s, NULL) == bad);
    CHECK(kv1_rollback(NULL, s, NULL) == bad && kv1_append(NULL, s, 0, x, x, NULL, NULL) == bad);
    CHECK(kv1_append_batch(cache, &s, NULL, 1, 0, x, x, NULL, NULL) == bad);
    CHECK(kv1_append_batch(cache, NULL, &n, 1, 0, x, x, NULL, NULL) == bad);
    CHECK(kv1_attend(NULL, s, 0, x, output, NULL, NULL, NULL) == bad);
    CHECK(kv1_attend_batch(cache, &s, NULL, 1, 0, x, output, NULL, NULL, NULL) == bad);
    CHECK(kv1_tree_mask(NULL, 1, (uint8_t*)out, NULL) == bad);
    CHECK(kv1_merge_attention(NULL, 1, 1, dim, out, NULL, NULL) == bad);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, 1, NULL, NULL) == bad);
    CHECK(kv1_cache_layout(cache, 0, NULL, NULL) == bad);
    CHECK(kv1_count_blocks(cache, NULL, 1, 0, &n, NULL) == bad);
    CHECK(kv1_page(cache, 0, 0, 0, NULL, &n, NULL) == bad);
    CHECK(kv1_open_keys(cache, s, 0, 0, NULL, &n, NULL) == bad);
    CHECK(kv1_prefix_store(cache, s, NULL, 1, salt, 0, &n, NULL) == bad);
    CHECK(kv1_prefix_create(cache, NULL, 1, salt, &other, &n, NULL) == bad);
    CHECK(kv1_prefix_pin_tokens(cache, NULL, 0, salt, NULL, NULL) == bad);
    CHECK(kv1_prefix_evict(NULL, 1) == 0 && kv1_prefix_pages(NULL) == 0 && kv1_prefix_lost_events(NULL) == 0);
    CHECK(kv1_prefix_take_events(cache, NULL, 3) == 0);
    kv1_prefix_clear(NULL);
    CHECK(kv1_saved_bytes(cache, &s, 1, NULL, NULL, NULL) == bad);
    CHECK(kv1_save(cache, &s, 1, sink, NULL, NULL) == bad);
    CHECK(kv1_save_memory(cache, &s, 1, NULL, 10, NULL, NULL, NULL) == bad);
    CHECK(kv1_save_file(cache, &s, 1, NULL, NULL, NULL) == bad);
    CHECK(kv1_load(cache, source, &other, 1, &n, NULL, NULL) == bad);
    CHECK(kv1_load_memory(cache, out, sizeof out, &other, 1, NULL, NULL, NULL) == bad);
    CHECK(kv1_load_file(cache, NULL, &other, 1, &n, NULL, NULL) == bad);
    CHECK(kv1_swap_out(cache, s, NULL, 10, NULL) == bad && kv1_swap_in(cache, out, 10, NULL, NULL) == bad);
    CHECK(kv1_fingerprint_of(NULL, 1, NULL, NULL) == bad);
    CHECK(kv1_mean_estimator_create(1, dim, NULL, NULL) == bad);
    CHECK(kv1_mean_estimator_add(NULL, x, NULL) == bad);
    CHECK(kv1_moment_estimator_moments(NULL, out, NULL) == bad);
    CHECK(kv1_set_target(NULL) == bad);
    CHECK(kv1_describe(NULL, NULL, 0) == 0);
    kv1_mean_estimator_destroy(NULL);
    kv1_moment_estimator_destroy(NULL);
    CHECK(n == 7 && kv1_sequence_lives(cache, s) == 1);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);

    memset(&half, 0, sizeof half);
    options.memory = &half;
    CHECK(kv1_cache_create(&options, &none, &error) == bad);
    options.memory = NULL;
    options.layers = NULL;
    CHECK(kv1_cache_create(&options, &none, &error) == bad);
}

int main(void) {
    fill(k, tokens * dim);
    fill(q, dim);
    sizes();
    enumerators();
    nulls();
    return report();
}
