/* SPDX-License-Identifier: Apache-2.0
 *
 * How vectors become codes: levels, rotation, means and error weights, and what they are taken from. Tokens
 * that are kept in fp16, and sliding windows.
 */
#include "check.h"

#include <math.h>

enum { heads = 2, dim = 32, tokens = 40, row = heads * dim };

static float x[tokens * row], shifted[tokens * row], q[heads * dim], out[heads * dim], other[heads * dim];
static float means[row], weights[heads * dim * dim], stored[tokens * dim], plain[tokens * dim];
static kv1_error error;

/* Multiples of 1/256 in [-1, 1]: sums of a few, and their fp16, are exact. */
static void fill_grid(float* to, size_t n) {
    size_t i;
    for (i = 0; i < n; ++i)
        to[i] = (float)floor((double)uniform() * 256.0) / 256.0f;
}

static kv1_sequence cache_with(const kv1_layer* layer, const float* data, kv1_cache** cache) {
    const kv1_cache_options options = options_for(layer, 1, 64, 16);
    const kv1_tensor tensor = kv1_contiguous(data, KV1_FP32, tokens, heads, dim);
    kv1_sequence s;
    *cache = made(&options);
    s = sequence_of(*cache);
    CHECK(kv1_append(*cache, s, 0, tensor, tensor, NULL, &error) == KV1_OK);
    return s;
}

/* Of the stored keys: the sum of e^T W e over all tokens and heads, or of e^T e. */
static double cost_of(const kv1_layer* layer, const float* data, const float* by) {
    kv1_cache* cache;
    const kv1_sequence s = cache_with(layer, data, &cache);
    double sum = 0;
    size_t h, t, i, j;
    for (h = 0; h < heads; ++h) {
        CHECK(kv1_read(cache, s, 0, KV1_KEYS, h, 0, tokens, stored, &error) == KV1_OK);
        for (t = 0; t < tokens; ++t)
            for (i = 0; i < dim; ++i) {
                const float* at = data + t * row + h * dim;
                const double e = (double)stored[t * dim + i] - (double)at[i];
                if (by == NULL)
                    sum += e * e;
                for (j = 0; by != NULL && j < dim; ++j)
                    sum += e * (double)by[(h * dim + i) * dim + j] *
                           ((double)stored[t * dim + j] - (double)at[j]);
            }
    }
    kv1_cache_destroy(cache);
    return sum;
}

static void levels_and_rotation(void) {
    kv1_layer layer = layer_of(heads, dim, KV1_AFFINE2);
    kv1_encoding encoding;
    double min_max, fitted, rotated;
    size_t t;
    for (t = 0; t < tokens; ++t) /* channel 5 is large in every token */
        shifted[t * row + 5] = x[t * row + 5] + 20.0f;
    min_max = cost_of(&layer, shifted, NULL);
    kv1_encoding_init(&encoding);
    layer.key_encoding = &encoding;
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    fitted = cost_of(&layer, shifted, NULL);
    encoding.hadamard = kv1_rotation_width(dim);
    rotated = cost_of(&layer, shifted, NULL);
    CHECK(fitted < min_max && rotated < min_max);
    CHECK(kv1_rotation_width(96) == 32 && kv1_rotation_width(0) == 0);
    encoding.levels = KV1_LEVELS_CLIP_SEARCH;
    CHECK(cost_of(&layer, shifted, NULL) < min_max);
}

/* What lies about a mean is stored as what lies about zero: codes see the difference alone. */
static void centring(void) {
    kv1_layer layer = layer_of(heads, dim, KV1_COMPACT3);
    kv1_encoding encoding;
    kv1_mean_estimator* estimator = NULL;
    kv1_cache *centred, *about_zero;
    kv1_sequence c, z;
    float found[row];
    size_t i, t, h;
    CHECK(kv1_mean_estimator_create(heads, dim, &estimator, &error) == KV1_OK);
    CHECK(kv1_mean_estimator_means(estimator, found, &error) == KV1_OK && found[0] == 0.0f);
    CHECK(kv1_mean_estimator_add(estimator, kv1_contiguous(x, KV1_FP32, 10, heads, dim), &error) == KV1_OK);
    CHECK(kv1_mean_estimator_add(estimator, kv1_contiguous(x + 10 * row, KV1_FP32, 30, heads, dim), &error) ==
          KV1_OK);
    CHECK(kv1_mean_estimator_add(estimator, kv1_contiguous(x, KV1_FP32, 1, heads, dim - 1), &error) ==
          KV1_SHAPE_MISMATCH);
    CHECK(kv1_mean_estimator_add(estimator, kv1_contiguous(x, KV1_FP32, 1, 1, dim), &error) ==
          KV1_SHAPE_MISMATCH);
    CHECK(kv1_mean_estimator_add(estimator, kv1_contiguous(x, 9, 1, heads, dim), &error) ==
          KV1_INVALID_ARGUMENT);
    CHECK(kv1_mean_estimator_means(estimator, found, &error) == KV1_OK);
    for (i = 0; i < row; ++i) {
        double sum = 0;
        for (t = 0; t < tokens; ++t)
            sum += (double)x[t * row + i];
        /* rounded to 11 significant bits */
        CHECK(fabs((double)found[i] - sum / tokens) <= fabs(sum / tokens) / 2048 + 1e-7);
    }
    kv1_mean_estimator_destroy(estimator);
    CHECK(kv1_mean_estimator_create(0, dim, &estimator, &error) == KV1_INVALID_ARGUMENT && estimator == NULL);

    fill_grid(means, row);
    for (t = 0; t < tokens; ++t)
        for (i = 0; i < row; ++i)
            shifted[t * row + i] = x[t * row + i] + means[i];
    z = cache_with(&layer, x, &about_zero);
    kv1_encoding_init(&encoding);
    encoding.means = means;
    layer.key_encoding = layer.value_encoding = &encoding;
    c = cache_with(&layer, shifted, &centred);
    for (h = 0; h < heads; ++h) {
        CHECK(kv1_read(about_zero, z, 0, KV1_VALUES, h, 0, tokens, plain, &error) == KV1_OK);
        CHECK(kv1_read(centred, c, 0, KV1_VALUES, h, 0, tokens, stored, &error) == KV1_OK);
        for (i = 0; i < tokens * dim; ++i) /* numbers below 4 in fp32 */
            CHECK(fabs((double)stored[i] - (double)means[h * dim + i % dim] - (double)plain[i]) < 1e-6);
    }
    kv1_cache_destroy(about_zero);
    kv1_cache_destroy(centred);
    means[3] = INFINITY;
    {
        const kv1_cache_options options = options_for(&layer, 1, 64, 16);
        CHECK(kv1_cache_create(&options, &centred, &error) != KV1_OK && error.layer == 0);
    }
}

static void error_weights(void) {
    kv1_layer layer = layer_of(heads, dim, KV1_COMPACT3);
    kv1_encoding encoding;
    kv1_moment_estimator* estimator = NULL;
    const kv1_cache_options options = options_for(&layer, 1, 64, 16);
    kv1_cache* cache;
    double without;
    size_t t, i, j, h;
    static float samples[10 * 2 * heads * dim];
    fill_grid(samples, sizeof samples / sizeof samples[0]);
    for (t = 0; t < 10 * 2 * heads; ++t) /* queries of two directions that matter most */
        samples[t * dim + 1] = samples[t * dim + 2] = 4.0f;
    CHECK(kv1_moment_estimator_create(heads, dim, &estimator, &error) == KV1_OK);
    CHECK(kv1_moment_estimator_add(estimator, kv1_contiguous(samples, KV1_FP32, 10, 2 * heads, dim),
                                   &error) == KV1_OK);
    CHECK(kv1_moment_estimator_add(estimator, kv1_contiguous(samples, KV1_FP32, 1, 3, dim), &error) ==
          KV1_SHAPE_MISMATCH);
    CHECK(kv1_moment_estimator_moments(estimator, weights, &error) == KV1_OK);
    kv1_moment_estimator_destroy(estimator);
    for (h = 0; h < heads; ++h)
        for (i = 0; i < dim; ++i)
            for (j = 0; j < dim; ++j) {
                double sum = 0;
                for (t = 0; t < 10 * 2; ++t) {
                    const float* sample = samples + (t / 2 * 2 * heads + 2 * h + t % 2) * dim;
                    sum += (double)sample[i] * (double)sample[j];
                }
                CHECK(fabs((double)weights[(h * dim + i) * dim + j] - sum / 20) < 1e-5);
            }

    kv1_encoding_init(&encoding);
    layer.key_encoding = &encoding;
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    without = cost_of(&layer, x, weights);
    encoding.error_weights = weights;
    CHECK(cost_of(&layer, x, weights) < without);
    encoding.levels = KV1_LEVELS_MIN_MAX;
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_INVALID_ARGUMENT && error.layer == 0);
}

/* Keys about a mean that turns with their position, as RoPE turns them: they are stored as keys about zero are, and the
 * mean comes back. The bias of a channel is 300. */
static void turning_means(void) {
    enum { pairs = dim / 2, first = 1000 };
    kv1_layer layer = layer_of(heads, dim, KV1_COMPACT4);
    kv1_encoding encoding;
    kv1_rotary rotary;
    kv1_cache_options options;
    const kv1_tensor tensor = kv1_contiguous(shifted, KV1_FP32, tokens, heads, dim);
    float frequencies[pairs];
    kv1_cache* cache;
    kv1_sequence s;
    double largest = 0.0;
    size_t t, h, j;
    kv1_rotary_frequencies(10000.0, dim, frequencies);
    CHECK(frequencies[0] == 1.0f && fabs((double)frequencies[pairs / 2] - 0.01) < 1e-8);
    fill_grid(means, row);
    means[3] = 300.0f;
    for (t = 0; t < tokens; ++t)
        for (h = 0; h < heads; ++h)
            for (j = 0; j < pairs; ++j) {
                const float *from = x + t * row + h * dim, *mean = means + h * dim;
                float* to = shifted + t * row + h * dim;
                const double angle = (double)frequencies[j] * (double)(first + t), c = cos(angle),
                             d = sin(angle);
                const double a = (double)from[j] + (double)mean[j];
                const double b = (double)from[pairs + j] + (double)mean[pairs + j];
                to[j] = (float)(a * c - b * d);
                to[pairs + j] = (float)(a * d + b * c);
            }
    kv1_encoding_init(&encoding);
    encoding.levels = KV1_LEVELS_LEAST_SQUARES;
    encoding.means = means;
    layer.key_encoding = &encoding;
    kv1_rotary_init(&rotary);
    rotary.frequencies = frequencies;
    rotary.pair_count = pairs;
    layer.rotary = &rotary;
    options = options_for(&layer, 1, 64, 16);
    options.first_position = first;
    cache = made(&options);
    s = sequence_of(cache);
    CHECK(kv1_append(cache, s, 0, tensor, tensor, NULL, &error) == KV1_OK);
    for (h = 0; h < heads; ++h) {
        CHECK(kv1_read(cache, s, 0, KV1_KEYS, h, 0, tokens, stored, &error) == KV1_OK);
        for (t = 0; t < tokens * dim; ++t) {
            const double off = fabs((double)stored[t] - (double)shifted[t / dim * row + h * dim + t % dim]);
            largest = off > largest ? off : largest;
        }
    }
    /* numbers in [-1, 1) that RoPE mixes by pairs: 16 levels over at most 2 sqrt(2), and half a step at most */
    CHECK(largest < 0.15);
    kv1_cache_destroy(cache);
    rotary.first_channel = 1; /* past the last channel */
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_INVALID_ARGUMENT && error.layer == 0);
    rotary.first_channel = 0;
    frequencies[2] = INFINITY;
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_NON_FINITE && error.layer == 0);
    rotary.frequencies = NULL;
    CHECK(kv1_cache_create(&options, &cache, &error) == KV1_INVALID_ARGUMENT && error.layer == 0);
}

/* Channels in another order are a basis: rows come back as they would without, in that order. */
static void basis(void) {
    kv1_layer layer = layer_of(heads, dim, KV1_AFFINE4);
    kv1_encoding encoding;
    kv1_cache *turned, *as_it_is;
    kv1_sequence a, b;
    const kv1_cache_options options = options_for(&layer, 1, 64, 16);
    static float order[heads * dim * dim];
    size_t i, h;
    for (i = 0; i < heads * dim; ++i)
        order[i * dim + (i * 5 + 2) % dim] = 1.0f;
    as_it_is = NULL;
    b = cache_with(&layer, x, &as_it_is);
    kv1_encoding_init(&encoding);
    encoding.basis = order;
    layer.key_encoding = &encoding;
    a = cache_with(&layer, x, &turned);
    for (h = 0; h < heads; ++h) { /* minimum and maximum do not ask for an order */
        CHECK(kv1_read(turned, a, 0, KV1_KEYS, h, 0, tokens, stored, &error) == KV1_OK);
        CHECK(kv1_read(as_it_is, b, 0, KV1_KEYS, h, 0, tokens, plain, &error) == KV1_OK);
        CHECK(memcmp(stored, plain, sizeof stored) == 0);
    }
    kv1_cache_destroy(turned);
    kv1_cache_destroy(as_it_is);
    order[7] += 0.1f;
    CHECK(kv1_cache_create(&options, &turned, &error) == KV1_INVALID_ARGUMENT && error.layer == 0);
}

/* A cache of a policy is the cache that its encodings, formats and fp16 tokens make. What the policy takes from a
 * calibration is in the encodings that it is given. */
static void policies(void) {
    kv1_layer by_hand = layer_of(heads, dim, KV1_COMPACT3), named;
    kv1_encoding keys, values, parts;
    kv1_cache_options options, shape;
    kv1_cache *a = NULL, *b = NULL;
    const kv1_tensor tensor = kv1_contiguous(x, KV1_FP32, tokens, heads, dim);
    size_t i, h;
    kv1_encoding_init(&keys);
    keys.levels = KV1_LEVELS_LEAST_SQUARES;
    keys.hadamard = dim;
    values = keys;
    keys.means = means;
    by_hand.value_format = KV1_COMPACT2;
    by_hand.key_encoding = &keys;
    by_hand.value_encoding = &values;
    options = options_for(&by_hand, 2, 64, 16);
    options.fp16_sinks = 2;
    options.fp16_window = 5;
    a = made(&options);

    named = layer_of(heads, dim, KV1_AFFINE2); /* whose format the policy replaces */
    kv1_encoding_init(&parts);
    parts.means = means;
    named.key_encoding = &parts;
    named.value_encoding = &parts; /* which the policy does not name */
    shape = options_for(&named, 2, 64, 16);
    CHECK(kv1_cache_create_with_policy("c3+ls+had+mean,c2+ls+had@2:5", &shape, &b, &error) == KV1_OK);
    for (i = 0; i < 2; ++i) {
        kv1_cache* cache = i == 0 ? a : b;
        const kv1_sequence s = sequence_of(cache);
        for (h = 0; h < 2; ++h)
            CHECK(kv1_append(cache, s, h, tensor, tensor, NULL, &error) == KV1_OK);
        CHECK(kv1_attend(cache, s, 1, kv1_contiguous(q, KV1_FP32, 1, heads, dim),
                         kv1_contiguous_output(i == 0 ? out : other, KV1_FP32, 1, heads, dim), NULL, NULL,
                         &error) == KV1_OK);
        CHECK(kv1_read(cache, s, 1, KV1_VALUES, 1, 0, tokens, i == 0 ? stored : plain, &error) == KV1_OK);
        kv1_cache_destroy(cache);
    }
    CHECK(memcmp(out, other, sizeof out) == 0 && memcmp(stored, plain, sizeof stored) == 0);

    CHECK(kv1_cache_create_with_policy("c3+lss", &shape, &b, &error) == KV1_INVALID_ARGUMENT && b == NULL);
    CHECK(kv1_cache_create_with_policy("2/2:4", &shape, &b, &error) == KV1_OUT_OF_RANGE && error.layer == 2);
    CHECK(kv1_cache_create_with_policy("2+g5", &shape, &b, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_cache_create_with_policy("c2+ls+ew", &shape, &b, &error) == KV1_SHAPE_MISMATCH);
    CHECK(error.layer == 0 && strstr(error.rule, "+ew") != NULL);
    CHECK(kv1_cache_create_with_policy(NULL, &shape, &b, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_cache_create_with_policy("safe", NULL, &b, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_cache_create_with_policy("safe", &shape, NULL, &error) == KV1_INVALID_ARGUMENT);
    named.key_encoding = named.value_encoding = NULL;
    CHECK(kv1_cache_create_with_policy("safe", &shape, &b, &error) == KV1_OK);
    kv1_cache_destroy(b);
    CHECK(kv1_cache_create_with_policy("balanced", &shape, &b, &error) == KV1_SHAPE_MISMATCH && b == NULL);
}

/* Few enough tokens are all seen in fp16, which holds these numbers exactly. */
static void fp16_copies(void) {
    const kv1_layer coarse = layer_of(heads, dim, KV1_AFFINE2), exact = layer_of(heads, dim, KV1_PLAIN_FP16);
    kv1_cache_options options = options_for(&coarse, 1, 64, 16);
    const kv1_cache_options exact_options = options_for(&exact, 1, 64, 16);
    kv1_cache *cache, *reference = made(&exact_options);
    kv1_attention attention;
    kv1_statistics statistics;
    kv1_sequence s, r = sequence_of(reference);
    kv1_tensor tensor = kv1_contiguous(x, KV1_FP32, 10, heads, dim);
    const kv1_tensor query = kv1_contiguous(q, KV1_FP32, 1, heads, dim);
    size_t i;
    options.fp16_sinks = 4;
    options.fp16_window = 6;
    options.fp16_capacity_tokens = 48;
    cache = made(&options);
    s = sequence_of(cache);
    kv1_attention_init(&attention);
    attention.precision = KV1_EXACT;
    CHECK(kv1_append(cache, s, 0, tensor, tensor, NULL, &error) == KV1_OK);
    CHECK(kv1_append(reference, r, 0, tensor, tensor, NULL, &error) == KV1_OK);
    CHECK(kv1_attend(cache, s, 0, query, kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &attention,
                     NULL, &error) == KV1_OK);
    CHECK(kv1_attend(reference, r, 0, query, kv1_contiguous_output(other, KV1_FP32, 1, heads, dim),
                     &attention, NULL, &error) == KV1_OK);
    for (i = 0; i < heads * dim; ++i)
        CHECK(fabs((double)out[i] - (double)other[i]) < 1e-5);
    kv1_statistics_init(&statistics);
    CHECK(kv1_cache_statistics(cache, &statistics, &error) == KV1_OK && statistics.bytes_fp16_copies > 0);

    /* those between are quantized, and rows are as quantized */
    tensor = kv1_contiguous(x + 10 * row, KV1_FP32, 20, heads, dim);
    CHECK(kv1_append(cache, s, 0, tensor, tensor, NULL, &error) == KV1_OK);
    CHECK(kv1_append(reference, r, 0, tensor, tensor, NULL, &error) == KV1_OK);
    CHECK(kv1_commit(cache, s, &error) == KV1_OK);
    CHECK(kv1_attend(cache, s, 0, query, kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &attention,
                     NULL, &error) == KV1_OK);
    CHECK(kv1_attend(reference, r, 0, query, kv1_contiguous_output(other, KV1_FP32, 1, heads, dim),
                     &attention, NULL, &error) == KV1_OK);
    CHECK(memcmp(out, other, sizeof out) != 0);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    kv1_cache_destroy(reference);
}

static void sliding_windows(void) {
    kv1_layer layers[2];
    kv1_cache_options options;
    kv1_cache* cache;
    kv1_sequence s;
    kv1_attention attention;
    kv1_statistics statistics;
    const kv1_tensor query = kv1_contiguous(q, KV1_FP32, 1, heads, dim);
    size_t l, i;
    layers[0] = layer_of(heads, dim, KV1_AFFINE4);
    layers[1] = layers[0];
    layers[1].sliding_window = 16;
    options = options_for(layers, 2, 64, 16);
    options.distinct_layers = 2;
    options.window_capacity_tokens = 48;
    cache = made(&options);
    s = sequence_of(cache);
    for (i = 0; i < 2; ++i) {
        const kv1_tensor tensor = kv1_contiguous(x + i * 20 * row, KV1_FP32, 20, heads, dim);
        for (l = 0; l < 2; ++l)
            CHECK(kv1_append(cache, s, l, tensor, tensor, NULL, &error) == KV1_OK);
        CHECK(kv1_commit(cache, s, &error) == KV1_OK);
    }
    kv1_attention_init(&attention);
    attention.precision = KV1_EXACT;
    CHECK(kv1_attend(cache, s, 1, query, kv1_contiguous_output(out, KV1_FP32, 1, heads, dim), &attention,
                     NULL, &error) == KV1_OK);
    attention.window = 16;
    CHECK(kv1_attend(cache, s, 0, query, kv1_contiguous_output(other, KV1_FP32, 1, heads, dim), &attention,
                     NULL, &error) == KV1_OK);
    for (i = 0; i < heads * dim; ++i)
        CHECK(fabs((double)out[i] - (double)other[i]) < 1e-5);

    /* the first page of the layer with a window is gone, and the step behind it */
    kv1_statistics_init(&statistics);
    CHECK(kv1_cache_statistics(cache, &statistics, &error) == KV1_OK && statistics.pages_in_use == 3 + 2);
    CHECK(kv1_read(cache, s, 1, KV1_KEYS, 0, 0, 1, stored, &error) == KV1_DROPPED_TOKENS);
    CHECK(kv1_read(cache, s, 0, KV1_KEYS, 0, 0, 1, stored, &error) == KV1_OK);
    CHECK(kv1_truncate(cache, s, 20, &error) == KV1_DROPPED_TOKENS && error.layer == 1);
    kv1_cache_destroy(cache);
}

int main(void) {
    fill_grid(x, tokens * row);
    fill_grid(q, heads * dim);
    memcpy(shifted, x, sizeof x);
    levels_and_rotation();
    centring();
    error_weights();
    turning_means();
    basis();
    policies();
    fp16_copies();
    sliding_windows();
    return report();
}
