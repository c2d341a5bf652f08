/* SPDX-License-Identifier: Apache-2.0
 *
 * Each allocation of each call fails in turn: it comes back as a code, and what the call was given stays as
 * it was. And a cache whose memory is the program's own.
 */
#include "check.h"
#include "failing_allocations.h"

#include <stdlib.h>

enum { dim = 32, kv_heads = 2, page = 16, tokens = 40, many = 20, room = 1 << 18, row = kv_heads * dim };

static float x[tokens * row], out[many * row], moments[kv_heads * dim * dim];
static int32_t ids[tokens];
static unsigned char memory[room];
static uint8_t visible[many * many];
static const char* path = "kv1_c_memory_test.kv1";
static size_t saved_size, failed_allocations;
static kv1_error error;

/* What calls are made on. */
static kv1_cache_options options;
static kv1_cache *cache, *other;
static kv1_sequence s, f, batch[many];
static size_t indptr[many + 1];
static kv1_mean_estimator* means;
static kv1_moment_estimator* seconds;
static const kv1_prefix_salt no_salt = {0, 0};

static kv1_tensor some(size_t n) { return kv1_contiguous(x, KV1_FP32, n, kv_heads, dim); }
static kv1_output outputs(size_t n) { return kv1_contiguous_output(out, KV1_FP32, n, kv_heads, dim); }

static kv1_code call_create(void) { return kv1_cache_create(&options, &cache, &error); }
static kv1_code call_create_with_policy(void) {
    kv1_cache* made_of_it;
    const kv1_code code = kv1_cache_create_with_policy("safe/0:c4+ls", &options, &made_of_it, &error);
    kv1_cache_destroy(made_of_it);
    return code;
}
static kv1_code call_capacity(void) {
    size_t n;
    return kv1_capacity_for_bytes(&options, 1 << 20, &n, &error);
}
static kv1_code call_sequence(void) { return kv1_sequence_create(cache, &s, &error); }
static kv1_code call_append(void) {
    return kv1_append(cache, s, 0, some(tokens), some(tokens), NULL, &error);
}
static kv1_code call_append_batch(void) {
    return kv1_append_batch(cache, batch, indptr, many, 0, some(many), some(many), NULL, &error);
}
static kv1_code call_attend(void) { return kv1_attend(cache, s, 0, some(1), outputs(1), NULL, NULL, &error); }
static kv1_code call_attend_batch(void) {
    return kv1_attend_batch(cache, batch, indptr, many, 0, some(many), outputs(many), NULL, NULL, &error);
}
static kv1_code call_commit(void) { return kv1_commit(cache, s, &error); }
static kv1_code call_fork(void) { return kv1_fork(cache, s, &f, &error); }
static kv1_code call_drop(void) { return kv1_drop_pages(cache, f, 1, 1, &error); }
static kv1_code call_grow(void) { return kv1_cache_grow(cache, 2048, &error); }
static kv1_code call_validate(void) { return kv1_cache_validate(cache, &error); }
static kv1_code call_store(void) { return kv1_prefix_store(cache, s, ids, tokens, no_salt, 1, NULL, &error); }
static kv1_code call_prefix(void) {
    size_t matched;
    return kv1_prefix_create(cache, ids, tokens, no_salt, &f, &matched, &error);
}
static kv1_code call_count(void) {
    size_t n;
    return kv1_count_blocks(cache, batch, many, 0, &n, &error);
}
static kv1_code call_saved_bytes(void) {
    return kv1_saved_bytes(cache, batch, many, NULL, &saved_size, &error);
}
static kv1_code call_save_memory(void) {
    return kv1_save_memory(cache, batch, many, memory, room, NULL, NULL, &error);
}
static kv1_code call_load_memory(void) {
    size_t n;
    return kv1_load_memory(other, memory, saved_size, batch, many, &n, NULL, &error);
}
static kv1_code call_save_file(void) { return kv1_save_file(cache, &s, 1, path, NULL, &error); }
static kv1_code call_load_file(void) {
    size_t n;
    return kv1_load_file(other, path, &f, 1, &n, NULL, &error);
}
static kv1_code call_swap_out(void) { return kv1_swap_out(cache, s, memory, room, &error); }
static kv1_code call_swap_in(void) { return kv1_swap_in(cache, memory, room, &s, &error); }
static kv1_code call_tree(void) {
    static int32_t parents[many];
    size_t i;
    for (i = 0; i < many; ++i)
        parents[i] = (int32_t)i - 1;
    return kv1_tree_mask(parents, many, visible, &error);
}
static kv1_code call_merge(void) {
    static kv1_attention_part parts[many];
    size_t i;
    for (i = 0; i < many; ++i) {
        parts[i].outputs = x;
        parts[i].log_sum_exp = x + row;
    }
    return kv1_merge_attention(parts, many, kv_heads, dim, out, NULL, &error);
}
static kv1_code call_means(void) { return kv1_mean_estimator_create(kv_heads, dim, &means, &error); }
static kv1_code call_mean_values(void) { return kv1_mean_estimator_means(means, out, &error); }
static kv1_code call_moments(void) { return kv1_moment_estimator_create(kv_heads, dim, &seconds, &error); }
static kv1_code call_moments_add(void) { return kv1_moment_estimator_add(seconds, some(2), &error); }
static kv1_code call_moment_values(void) { return kv1_moment_estimator_moments(seconds, moments, &error); }

static kv1_calibrator* calibrator;
static kv1_calibration* calibration;
static kv1_code call_calibrator(void) {
    kv1_calibrator_options o;
    kv1_calibrator_options_init(&o);
    o.policy = "c3+ls+basis+had+mean+ew,c2+ls+had+ew/0:c4+ls+mean+ew@4:8";
    return kv1_calibrator_create(&options, &o, &calibrator, &error);
}
static kv1_code call_projection(void) {
    return kv1_calibrator_set_output_projection(calibrator, 0, some(tokens), NULL, &error);
}
static kv1_code call_calibrate(void) {
    return kv1_calibrator_add(calibrator, 0, some(tokens), some(tokens), some(tokens), 0, NULL, &error);
}
static kv1_code call_calibration(void) {
    return kv1_calibrator_finish(calibrator, NULL, &calibration, &error);
}
static kv1_code call_save_calibration(void) { return kv1_calibration_save_file(calibration, path, &error); }
static kv1_code call_load_calibration(void) {
    kv1_calibration* loaded;
    const kv1_code code = kv1_calibration_load_file(path, NULL, &loaded, &error);
    kv1_calibration_destroy(loaded);
    return code;
}
static kv1_code call_policy(void) {
    return kv1_calibration_set_policy(calibration, "2/0:c4+ls+mean+ew,c4", &error);
}
static kv1_code call_calibrated(void) {
    kv1_cache* made_of_it;
    const kv1_code code = kv1_cache_create_calibrated(calibration, &options, &made_of_it, &error);
    kv1_cache_destroy(made_of_it);
    return code;
}

static size_t sequences_of(const kv1_cache* of) {
    kv1_statistics statistics;
    kv1_statistics_init(&statistics);
    return of != NULL && kv1_cache_statistics(of, &statistics, NULL) == KV1_OK ? statistics.sequences : 0;
}

/* Until the call needs no more allocations than it gets. */
static void fails_cleanly(const char* what, kv1_code (*call)(void)) {
    const size_t before = sequences_of(cache), pages = kv1_cache_available_pages(cache);
    const size_t others = sequences_of(other);
    size_t n;
    for (n = 0; n < 1000; ++n) {
        kv1_code code;
        int failed;
        allow_allocations(n);
        code = call();
        failed = allow_all_allocations();
        if (code != (failed ? KV1_OUT_OF_MEMORY : KV1_OK)) {
            printf("%s, allocation %u: %s\n", what, (unsigned)n, kv1_code_name(code));
            ++failures;
        }
        if (!failed)
            return;
        ++failed_allocations;
        CHECK(error.code == KV1_OUT_OF_MEMORY);
        CHECK(sequences_of(cache) == before && kv1_cache_available_pages(cache) == pages);
        CHECK(sequences_of(other) == others);
        if (cache != NULL)
            CHECK(kv1_cache_validate(cache, NULL) == KV1_OK);
    }
    CHECK(0);
}

static void failing(void) {
    kv1_layer layer = layer_of(kv_heads, dim, KV1_COMPACT3);
    kv1_encoding encoding;
    kv1_rotary rotary;
    float frequencies[dim / 2];
    static float basis[kv_heads * dim * dim];
    size_t i;
    for (i = 0; i < kv_heads * dim; ++i) /* channels in another order */
        basis[i * dim + (i * 7 + 1) % dim] = 1.0f;
    kv1_rotary_frequencies(10000.0, dim, frequencies);
    kv1_rotary_init(&rotary);
    rotary.frequencies = frequencies;
    rotary.pair_count = dim / 2;
    layer.rotary = &rotary;
    kv1_encoding_init(&encoding);
    encoding.basis = basis;
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    encoding.hadamard = dim;
    encoding.means = x;
    layer.key_encoding = layer.value_encoding = &encoding;
    options = options_for(&layer, 1, 1024, page);
    options.fp16_sinks = 4;
    options.fp16_window = 8;
    options.prefix_events = 4;
    fails_cleanly("capacity", call_capacity);
    fails_cleanly("create", call_create);
    other = made(&options);
    if (cache == NULL || other == NULL)
        return;
    fails_cleanly("sequence", call_sequence);
    for (i = 0; i < many; ++i) {
        batch[i] = sequence_of(cache);
        indptr[i + 1] = i + 1;
    }
    fails_cleanly("append", call_append);
    fails_cleanly("append_batch", call_append_batch);
    fails_cleanly("attend", call_attend);
    fails_cleanly("attend_batch", call_attend_batch);
    fails_cleanly("commit", call_commit);
    fails_cleanly("fork", call_fork);
    fails_cleanly("drop_pages", call_drop);
    fails_cleanly("grow", call_grow);
    fails_cleanly("validate", call_validate);
    fails_cleanly("prefix_store", call_store);
    fails_cleanly("prefix_create", call_prefix);
    fails_cleanly("count_blocks", call_count);
    fails_cleanly("saved_bytes", call_saved_bytes);
    fails_cleanly("save_memory", call_save_memory);
    fails_cleanly("load_memory", call_load_memory);
    fails_cleanly("save_file", call_save_file);
    fails_cleanly("load_file", call_load_file);
    remove(path);
    fails_cleanly("swap_out", call_swap_out);
    fails_cleanly("swap_in", call_swap_in);
    fails_cleanly("tree_mask", call_tree);
    fails_cleanly("merge_attention", call_merge);
    fails_cleanly("mean_estimator", call_means);
    fails_cleanly("means", call_mean_values);
    fails_cleanly("moment_estimator", call_moments);
    fails_cleanly("moment_estimator_add", call_moments_add);
    fails_cleanly("moments", call_moment_values);
    fails_cleanly("cache_create_with_policy", call_create_with_policy);
    fails_cleanly("calibrator", call_calibrator);
    fails_cleanly("output_projection", call_projection);
    fails_cleanly("calibrate", call_calibrate);
    fails_cleanly("calibration", call_calibration);
    fails_cleanly("calibration_save_file", call_save_calibration);
    fails_cleanly("calibration_load_file", call_load_calibration);
    fails_cleanly("cache_create_calibrated", call_calibrated);
    fails_cleanly("calibration_set_policy", call_policy);
    remove(path);
    kv1_calibrator_destroy(calibrator);
    kv1_calibration_destroy(calibration);
    CHECK(failed_allocations > 60); /* two of each call, or so */
    kv1_mean_estimator_destroy(means);
    kv1_moment_estimator_destroy(seconds);
    CHECK(kv1_cache_validate(other, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    kv1_cache_destroy(other);
    cache = other = NULL;
}

/* Memory of the program's: what it gave, and when it gives no more. */
typedef struct pool {
    size_t allocations, releases, bytes, allowed, misalign;
} pool;

static void* take(void* context, size_t bytes, size_t alignment) {
    pool* p = (pool*)context;
    char *begin, *aligned;
    if (p->allocations == p->allowed)
        return NULL;
    begin = (char*)malloc(bytes + 2 * alignment);
    if (begin == NULL)
        return NULL;
    ++p->allocations;
    p->bytes += bytes;
    aligned = begin + alignment - (uintptr_t)begin % alignment;
    ((char**)aligned)[-1] = begin; /* malloc's alignment leaves room for it */
    return aligned + p->misalign;
}

static void give(void* context, void* given, size_t bytes, size_t alignment) {
    pool* p = (pool*)context;
    (void)alignment;
    ++p->releases;
    p->bytes -= bytes;
    free(((char**)((char*)given - p->misalign))[-1]);
}

static void own_memory(void) {
    const kv1_layer layer = layer_of(kv_heads, dim, KV1_AFFINE2);
    pool p = {0, 0, 0, SIZE_MAX, 0};
    kv1_memory own = {take, give, NULL};
    own.context = &p;
    options = options_for(&layer, 2, 256, page);
    options.memory = &own;
    cache = made(&options);
    CHECK(p.allocations == 2 && p.releases == 0);
    s = sequence_of(cache);
    CHECK(kv1_append(cache, s, 0, some(tokens), some(tokens), NULL, &error) == KV1_OK);
    p.allowed = p.allocations + 1;
    CHECK(kv1_cache_grow(cache, 512, &error) == KV1_OUT_OF_MEMORY && p.allocations == 3 && p.releases == 1);
    p.allowed = SIZE_MAX;
    CHECK(kv1_cache_grow(cache, 512, &error) == KV1_OK && p.bytes > 0);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, 1, out, &error) == KV1_OK);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    CHECK(p.releases == p.allocations && p.bytes == 0);

    p.misalign = 8; /* as if there were none */
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_OUT_OF_MEMORY && cache == NULL);
    CHECK(p.releases == p.allocations && p.bytes == 0);
}

int main(void) {
    size_t i;
    fill(x, tokens * row);
    for (i = 0; i < tokens; ++i)
        ids[i] = (int32_t)i;
    failing();
    own_memory();
    return report();
}
