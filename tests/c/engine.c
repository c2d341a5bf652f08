/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine in C: what the library computes is compared with attention over the decoded tokens, and every
 * kind of misuse must come back as a code that says where.
 */
#include "check.h"

#include <math.h>
#include <stdlib.h>

enum { tokens = 70, kv_heads = 2, heads = 4, dim = 48 };

static float k[tokens * kv_heads * dim], v[tokens * kv_heads * dim], q[heads * dim];
static float out[heads * dim], again[heads * dim], lse[heads];
static float keys[tokens * dim], values[tokens * dim];

/* "Threads" of a kind: the last task first. */
static void backwards(void* context, size_t count, kv1_task task, void* task_state) {
    size_t i;
    *(size_t*)context += count;
    for (i = count; i > 0; --i)
        task(task_state, i - 1);
}

static void attend_over_decoded(const kv1_cache* cache, kv1_sequence s) {
    size_t h, t, c;
    double worst = 0, worst_lse = 0;
    for (h = 0; h < heads; ++h) {
        double sums[dim] = {0}, denominator = 0;
        CHECK(kv1_read(cache, s, 0, 0, h / 2, 0, tokens, keys, NULL) == KV1_OK);
        CHECK(kv1_read(cache, s, 0, 1, h / 2, 0, tokens, values, NULL) == KV1_OK);
        for (t = 0; t < tokens; ++t) {
            double score = 0, weight;
            for (c = 0; c < dim; ++c)
                score += (double)q[h * dim + c] * (double)keys[t * dim + c];
            weight = exp(score / sqrt((double)dim));
            denominator += weight;
            for (c = 0; c < dim; ++c)
                sums[c] += weight * (double)values[t * dim + c];
        }
        for (c = 0; c < dim; ++c)
            worst = fmax(worst, fabs(sums[c] / denominator - (double)out[h * dim + c]));
        worst_lse = fmax(worst_lse, fabs(log(denominator) - (double)lse[h]));
    }
    /* 48 products of at most 1 in fp32, divided by sqrt(48): the error of a score is at most 2e-5 */
    CHECK(worst < 1e-4);
    CHECK(worst_lse < 1e-4);
}

static kv1_code create(const kv1_layer* layers, size_t distinct_layers, size_t layer_count,
                       size_t capacity_tokens, size_t page_tokens, kv1_cache** cache, kv1_error* error) {
    kv1_cache_options options;
    kv1_cache_options_init(&options);
    options.layers = layers;
    options.distinct_layers = distinct_layers;
    options.layer_count = layer_count;
    options.capacity_tokens = capacity_tokens;
    options.page_tokens = page_tokens;
    return kv1_cache_create(&options, cache, error);
}

int main(void) {
    const kv1_layer layer = {.struct_size = sizeof(kv1_layer),
                             .kv_heads = kv_heads,
                             .key_dim = dim,
                             .value_dim = dim,
                             .key_format = KV1_AFFINE2,
                             .value_format = KV1_AFFINE2};
    kv1_cache* cache = NULL;
    kv1_sequence s, other;
    kv1_error error;
    kv1_attention options;
    kv1_executor executor;
    kv1_statistics statistics;
    kv1_tensor tensor;
    size_t i, length = 0, tasks = 0;
    char text[200], cut[8];

    kv1_statistics_init(&statistics);
    CHECK(kv1_version() >= 100);
    CHECK(strlen(kv1_target()) > 0);
    for (i = 0; i < tokens * kv_heads * dim; ++i) {
        k[i] = uniform();
        v[i] = uniform();
    }
    for (i = 0; i < heads * dim; ++i)
        q[i] = uniform();

    /* two layers alike, four pages of 32 tokens */
    CHECK(create(&layer, 1, 2, 128, 32, &cache, &error) == KV1_OK);
    if (cache == NULL)
        return 1;
    CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
    CHECK(kv1_append(cache, s, 0, kv1_contiguous(k, KV1_FP32, tokens, kv_heads, dim),
                     kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), NULL, &error) == KV1_OK);
    CHECK(kv1_length(cache, s, 0, &length, NULL) == KV1_OK && length == tokens);
    CHECK(kv1_length(cache, s, 1, &length, NULL) == KV1_OK && length == 0);

    kv1_attention_init(&options);
    options.precision = KV1_EXACT;
    options.log_sum_exp = lse;
    CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                     kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &options, NULL, &error) == KV1_OK);
    attend_over_decoded(cache, s);

    /* the caller's threads change nothing; heads lie apart here */
    executor.run = backwards;
    executor.context = &tasks;
    CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                     kv1_contiguous_output(again, KV1_FP32, 1, heads, dim), &options, &executor,
                     &error) == KV1_OK);
    CHECK(tasks > 0 && memcmp(out, again, sizeof out) == 0);
    tensor = kv1_contiguous(k, KV1_FP32, 1, kv_heads, dim);
    tensor.head_stride = 5 * dim;
    CHECK(kv1_append(cache, s, 1, tensor, tensor, NULL, &error) == KV1_OK);

    CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
    CHECK(statistics.layers == 2 && statistics.tokens == tokens && statistics.pages_in_use == 3);
    CHECK(statistics.bytes_stored == (tokens + 1) * kv_heads * 2 * (dim / 4 + 4));

    /* a step ends when every layer has it */
    CHECK(kv1_rollback(cache, s, &error) == KV1_NOTHING_COMMITTED);
    CHECK(kv1_commit(cache, s, &error) == KV1_LAYERS_DISAGREE && error.layer == 1);

    /* refusals name what and where */
    k[5 * kv_heads * dim + dim + 7] = NAN;
    CHECK(kv1_append(cache, s, 1, kv1_contiguous(k, KV1_FP32, 20, kv_heads, dim),
                     kv1_contiguous(v, KV1_FP32, 20, kv_heads, dim), NULL, &error) == KV1_NON_FINITE);
    CHECK(error.code == KV1_NON_FINITE && error.layer == 1 && error.kv_head == 1 && error.token == 5 &&
          error.channel == 7);
    CHECK(kv1_length(cache, s, 1, &length, NULL) == KV1_OK && length == 1);
    CHECK(kv1_describe(&error, text, sizeof text) == strlen(text));
    CHECK(strcmp(text, "non-finite value: K and V must be finite (layer 1, KV head 1, token 5, channel 7)") ==
          0);
    CHECK(kv1_describe(&error, cut, sizeof cut) == strlen(text) && strcmp(cut, "non-fin") == 0);
    CHECK(strcmp(kv1_code_name(KV1_NON_FINITE), "non-finite value") == 0);

    CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim),
                     kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), NULL,
                     NULL) == KV1_CAPACITY_EXCEEDED);
    CHECK(kv1_append(cache, s, 2, tensor, tensor, NULL, NULL) == KV1_OUT_OF_RANGE);
    CHECK(kv1_append(cache, s, 0, kv1_contiguous(NULL, KV1_FP32, 1, kv_heads, dim), tensor, NULL, NULL) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, (kv1_scalar)3, 1, kv_heads, dim), tensor, NULL, NULL) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, 3, dim),
                     kv1_contiguous_output(out, KV1_FP32, 1, 3, dim), NULL, NULL,
                     &error) == KV1_SHAPE_MISMATCH);
    CHECK(kv1_read(cache, s, 0, 0, 0, 60, 20, keys, NULL) == KV1_OUT_OF_RANGE);
    CHECK(kv1_sequence_destroy(cache, s, NULL) == KV1_OK);
    CHECK(kv1_sequence_destroy(cache, s, &error) == KV1_INVALID_SEQUENCE);
    CHECK(kv1_sequence_create(cache, &other, NULL) == KV1_OK);
    CHECK(other.slot != s.slot || other.generation != s.generation);
    CHECK(kv1_sequence_create(NULL, &other, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_set_target("pentium") == KV1_UNSUPPORTED_TARGET);
    CHECK(kv1_set_target("scalar") == KV1_OK && strcmp(kv1_target(), "scalar") == 0);
    kv1_cache_destroy(cache);
    kv1_cache_destroy(NULL);

    /* every format by its name, keys of one and values of the next */
    CHECK(formats() > KV1_CODEBOOK2);
    for (i = 0; i < (size_t)formats(); ++i) {
        kv1_layer mixed = layer;
        mixed.key_format = (kv1_format)i;
        mixed.value_format = (kv1_format)((i + 1) % (size_t)formats());
        CHECK(create(&mixed, 1, 1, 128, 32, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim),
                         kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), NULL, &error) == KV1_OK);
        CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                         kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &options, NULL,
                         &error) == KV1_OK);
        attend_over_decoded(cache, s);
        CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
        if (mixed.key_format == KV1_COMPACT3)
            CHECK(statistics.bytes_stored == tokens * kv_heads * (dim * 3 / 8 + 2 + dim / 4 + 2));
        kv1_cache_destroy(cache);
    }
    {
        kv1_layer unknown = layer;
        unknown.value_format = (kv1_format)formats();
        CHECK(create(&unknown, 1, 1, 128, 32, &cache, &error) == KV1_UNSUPPORTED_FORMAT);
    }

    /* metadata by groups of channels: each is stored as a vector of its own would be */
    {
        enum { wide = 96, few = tokens / 2 };
        kv1_layer grouped = layer, apart = layer;
        size_t t, c;
        grouped.key_dim = grouped.value_dim = wide;
        grouped.value_format = KV1_COMPACT3;
        grouped.key_group = 32;
        grouped.value_group = wide;
        CHECK(create(&grouped, 1, 1, 128, 32, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, few, kv_heads, wide),
                         kv1_contiguous(v, KV1_FP32, few, kv_heads, wide), NULL, &error) == KV1_OK);
        CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
        CHECK(statistics.bytes_stored == few * kv_heads * (wide / 4 + 3 * 4 + wide * 3 / 8 + 2));
        CHECK(kv1_read(cache, s, 0, 0, 1, 0, few, keys, NULL) == KV1_OK);
        kv1_cache_destroy(cache);
        apart.kv_heads = 3 * kv_heads;
        apart.key_dim = apart.value_dim = 32;
        CHECK(create(&apart, 1, 1, 128, 32, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, few, 3 * kv_heads, 32),
                         kv1_contiguous(v, KV1_FP32, few, 3 * kv_heads, 32), NULL, &error) == KV1_OK);
        for (c = 0; c < wide; ++c) {
            CHECK(kv1_read(cache, s, 0, 0, 3 + c / 32, 0, few, values, NULL) == KV1_OK);
            for (t = 0; t < few; ++t)
                CHECK(keys[t * wide + c] == values[t * 32 + c % 32]);
        }
        kv1_cache_destroy(cache);
        grouped.value_group = 64;
        CHECK(create(&grouped, 1, 1, 128, 32, &cache, &error) == KV1_INVALID_ARGUMENT);
        CHECK(error.layer == 0 && strstr(error.rule, "a group is a multiple of 32 channels") == error.rule);
    }

    /* keys per channel: fp16 in the open page, 4 bytes a channel in full ones */
    {
        kv1_layer turned = layer;
        size_t t;
        turned.key_axis = KV1_PER_CHANNEL;
        CHECK(create(&turned, 1, 1, 128, 32, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, 40, kv_heads, dim),
                         kv1_contiguous(v, KV1_FP32, 40, kv_heads, dim), NULL, &error) == KV1_OK);
        CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
        CHECK(statistics.bytes_stored ==
              kv_heads * (32 * dim / 4 + dim * 4 + 8 * dim * 2) + 40 * kv_heads * (dim / 4 + 4));
        CHECK(kv1_read(cache, s, 0, 0, 1, 39, 1, keys, NULL) == KV1_OK);
        for (t = 0; t < dim; ++t) /* of the open page: 11 significant bits */
            CHECK(fabs((double)keys[t] - (double)v[(39 * kv_heads + 1) * dim + t]) < 0x1p-11);
        kv1_cache_destroy(cache);
        turned.key_axis = (kv1_axis)7;
        CHECK(create(&turned, 1, 1, 128, 32, &cache, &error) == KV1_INVALID_ARGUMENT);
    }

    /* values in keys: stored once, appended as keys alone, attended as their first channels */
    {
        kv1_layer latent = layer;
        size_t t, c;
        latent.kv_heads = 1;
        latent.value_dim = 32;
        latent.values_in_keys = 1;
        CHECK(create(&latent, 1, 1, 128, 32, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, 40, 1, dim), kv1_no_values(), NULL,
                         &error) == KV1_OK);
        CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
        CHECK(statistics.bytes_stored == 40 * (dim / 4 + 4));
        CHECK(kv1_read(cache, s, 0, 0, 0, 0, 40, keys, NULL) == KV1_OK);
        CHECK(kv1_read(cache, s, 0, 1, 0, 0, 40, values, NULL) == KV1_OK);
        for (t = 0; t < 40; ++t)
            for (c = 0; c < 32; ++c)
                CHECK(keys[t * dim + c] == values[t * 32 + c]);
        CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                         kv1_contiguous_output(out, KV1_FP32, 1, heads, 32), NULL, NULL, &error) == KV1_OK);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, 1, 1, dim),
                         kv1_contiguous(k, KV1_FP32, 1, 1, 32), NULL, &error) == KV1_INVALID_ARGUMENT);
        kv1_cache_destroy(cache);
        latent.value_format = KV1_AFFINE4;
        CHECK(create(&latent, 1, 1, 128, 32, &cache, &error) == KV1_INVALID_ARGUMENT);
    }

    /* steps, and a sliding window that keeps a few tokens for a cut behind the last of them */
    {
        enum { window = 32, kept = 8 };
        kv1_layer sliding = layer;
        sliding.sliding_window = window;
        sliding.window_retention = kept;
        CHECK(create(&sliding, 1, 1, 128, 16, &cache, &error) == KV1_OK);
        CHECK(kv1_sequence_create(cache, &s, NULL) == KV1_OK);
        for (i = 0; i < tokens; ++i) {
            const float* row = v + i * kv_heads * dim;
            CHECK(kv1_append(cache, s, 0, kv1_contiguous(row, KV1_FP32, 1, kv_heads, dim),
                             kv1_contiguous(row, KV1_FP32, 1, kv_heads, dim), NULL, &error) == KV1_OK);
            CHECK(kv1_attend(
                      cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                      kv1_contiguous_output(i == tokens - kept - 1 ? again : out, KV1_FP32, 1, heads, dim),
                      NULL, NULL, &error) == KV1_OK);
            CHECK(kv1_commit(cache, s, &error) == KV1_OK);
        }
        CHECK(kv1_cache_statistics(cache, &statistics, NULL) == KV1_OK);
        CHECK(statistics.pages_in_use == 4 && statistics.bytes_retained == statistics.bytes_in_use / 4);
        CHECK(kv1_truncate(cache, s, 40, &error) == KV1_DROPPED_TOKENS && error.layer == 0);
        CHECK(kv1_truncate(cache, s, tokens - kept, &error) == KV1_OK);
        CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                         kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), NULL, NULL, &error) == KV1_OK);
        CHECK(memcmp(out, again, sizeof out) == 0);
        kv1_attention_init(&options);
        options.mask.kind = KV1_MASK_CAUSAL_FROM;
        options.mask.first_position = 40;
        CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                         kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &options, NULL,
                         &error) == KV1_DROPPED_TOKENS);
        CHECK(error.token == 0);
        CHECK(kv1_append(cache, s, 0, kv1_contiguous(v, KV1_FP32, 3, kv_heads, dim),
                         kv1_contiguous(v, KV1_FP32, 3, kv_heads, dim), NULL, &error) == KV1_OK);
        CHECK(kv1_rollback(cache, s, &error) == KV1_OK);
        CHECK(kv1_length(cache, s, 0, &length, NULL) == KV1_OK && length == tokens - kept);
        kv1_cache_destroy(cache);
    }

    /* page sizes are whole tiles; distinct layers divide the layers */
    CHECK(create(&layer, 1, 1, 128, 20, &cache, &error) == KV1_INVALID_ARGUMENT && cache == NULL);
    CHECK(create(&layer, 0, 1, 128, 32, &cache, &error) == KV1_INVALID_ARGUMENT);
    CHECK(create(NULL, 1, 1, 128, 32, &cache, &error) == KV1_INVALID_ARGUMENT);

    return report();
}
