/* SPDX-License-Identifier: Apache-2.0
 *
 * Every option of attention, against its formula in double precision; several sequences in one call; parts
 * that are joined.
 */
#include "check.h"

#include <math.h>

enum { kv_heads = 2, heads = 4, dim = 32, tokens = 70, rows = 5, mask_keys = 6 };

static float k[tokens * kv_heads * dim], v[tokens * kv_heads * dim], q[rows * heads * dim];
static float out[rows * heads * dim], lse[rows * heads], slopes[heads], sink_logits[heads];
static kv1_error error;

static int visible(const kv1_attention* o, size_t i, size_t t, size_t position) {
    if (o->range != NULL && (t < o->range->first || t >= o->range->last))
        return 0;
    if (o->window != 0 && t + o->window <= position)
        return 0;
    switch (o->mask.kind) {
    case KV1_MASK_NONE:
        return 1;
    case KV1_MASK_EXPLICIT:
        return t < tokens - mask_keys || o->mask.visible[i * mask_keys + t - (tokens - mask_keys)] != 0;
    default:
        return t <= position;
    }
}

/* Keys and values are stored as they are given. Scores are sums of 32 products of numbers below 1, at most
 * 32 / sqrt(32) large: in fp32 their error is below 32 * 2^-24 * 6, and those of the rest are smaller. */
static void matches_formula(const kv1_attention* o) {
    size_t i, h, t, c;
    double worst = 0, worst_lse = 0;
    for (i = 0; i < rows; ++i)
        for (h = 0; h < heads; ++h) {
            const size_t position =
                o->mask.kind == KV1_MASK_CAUSAL_FROM ? o->mask.first_position + i : tokens - rows + i;
            const double scale = o->scale != 0.0f ? (double)o->scale : 1 / sqrt((double)dim);
            double sums[dim] = {0}, denominator = o->sink_logits != NULL ? exp((double)o->sink_logits[h]) : 0;
            for (t = 0; t < tokens; ++t) {
                const float* key = k + (t * kv_heads + h / 2) * dim;
                const float* value = v + (t * kv_heads + h / 2) * dim;
                double score = 0, weight;
                if (!visible(o, i, t, position))
                    continue;
                for (c = 0; c < dim; ++c)
                    score += (double)q[(i * heads + h) * dim + c] * (double)key[c];
                score *= scale;
                if (o->soft_cap != 0.0f)
                    score = (double)o->soft_cap * tanh(score / (double)o->soft_cap);
                if (o->alibi_slopes != NULL)
                    score += (double)o->alibi_slopes[h] * ((double)t - (double)position);
                weight = exp(score);
                denominator += weight;
                for (c = 0; c < dim; ++c)
                    sums[c] += weight * (double)value[c];
            }
            for (c = 0; c < dim; ++c)
                worst = fmax(worst, fabs(sums[c] / denominator - (double)out[(i * heads + h) * dim + c]));
            worst_lse = fmax(worst_lse, fabs(log(denominator) - (double)lse[i * heads + h]));
        }
    CHECK(worst < 1e-4);
    CHECK(worst_lse < 1e-4);
}

static kv1_code attend(const kv1_cache* cache, kv1_sequence s, const kv1_attention* o) {
    return kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, rows, heads, dim),
                      kv1_contiguous_output(out, KV1_FP32, rows, heads, dim), o, NULL, &error);
}

static void attend_and_compare(const kv1_cache* cache, kv1_sequence s, const kv1_attention* o) {
    memset(out, 0xff, sizeof out);
    CHECK(attend(cache, s, o) == KV1_OK);
    matches_formula(o);
}

static kv1_attention options_now(void) {
    kv1_attention o;
    kv1_attention_init(&o);
    o.precision = KV1_EXACT;
    o.log_sum_exp = lse;
    return o;
}

static void options(const kv1_cache* cache, kv1_sequence s) {
    static const int32_t parents[mask_keys] = {-1, 0, 0, 1, 2, 4};
    static const int32_t blocks[mask_keys] = {-1, 3, 3, 3, 3, -1};
    const int32_t late[2] = {-1, 1};
    uint8_t tree[mask_keys * mask_keys];
    const kv1_range range = {16, 61};
    kv1_attention o = options_now();
    attend_and_compare(cache, s, &o);
    o.scale = 0.75f;
    attend_and_compare(cache, s, &o);
    o.soft_cap = 1.5f;
    attend_and_compare(cache, s, &o);
    o.window = 9;
    attend_and_compare(cache, s, &o);
    o.sink_logits = sink_logits;
    attend_and_compare(cache, s, &o);
    o.mask.kind = KV1_MASK_CAUSAL_FROM;
    o.mask.first_position = 30;
    attend_and_compare(cache, s, &o);
    o = options_now();
    o.alibi_slopes = slopes;
    attend_and_compare(cache, s, &o);
    o = options_now();
    o.mask.kind = KV1_MASK_NONE;
    attend_and_compare(cache, s, &o);
    o.range = &range;
    attend_and_compare(cache, s, &o);

    /* a token tree, of whose tokens all but the first are queries */
    CHECK(kv1_tree_mask(parents, mask_keys, tree, &error) == KV1_OK);
    CHECK(tree[3 * mask_keys + 1] == 1 && tree[3 * mask_keys + 2] == 0 && tree[5 * mask_keys + 2] == 1);
    CHECK(kv1_tree_mask(late, 2, tree, &error) == KV1_INVALID_ARGUMENT && error.token == 1);
    CHECK(tree[3 * mask_keys + 1] == 1);
    o = options_now();
    o.mask.kind = KV1_MASK_EXPLICIT;
    o.mask.keys = mask_keys;
    o.mask.visible = tree + mask_keys;
    attend_and_compare(cache, s, &o);
    o.alibi_slopes = slopes;
    attend_and_compare(cache, s, &o);

    /* an image of which every token sees every other */
    CHECK(kv1_block_mask(blocks, mask_keys, tree, &error) == KV1_OK);
    CHECK(tree[2 * mask_keys + 4] == 1 && tree[2 * mask_keys + 5] == 0 && tree[5 * mask_keys] == 1);
    attend_and_compare(cache, s, &o);
    o.mask.visible = NULL;
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    o.mask.visible = tree;
    o.mask.keys = SIZE_MAX;
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    o.mask.keys = tokens + 1;
    CHECK(attend(cache, s, &o) == KV1_SHAPE_MISMATCH);
}

static void refusals(const kv1_cache* cache, kv1_sequence s) {
    const kv1_tensor queries = kv1_contiguous(q, KV1_FP32, rows, heads, dim);
    kv1_attention o = options_now();
    o.soft_cap = -1.0f;
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    o = options_now();
    o.scale = NAN;
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    o = options_now();
    o.struct_size = 8;
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_attend(cache, s, 1, queries, kv1_contiguous_output(out, KV1_FP32, rows, heads, dim), NULL, NULL,
                     &error) == KV1_OUT_OF_RANGE);
    CHECK(kv1_attend(cache, s, 0, queries, kv1_contiguous_output(out, KV1_FP32, rows - 1, heads, dim), NULL,
                     NULL, &error) == KV1_SHAPE_MISMATCH);
    CHECK(kv1_attend(cache, s, 0, kv1_contiguous(q, KV1_FP32, SIZE_MAX / 2, heads, dim),
                     kv1_contiguous_output(out, KV1_FP32, SIZE_MAX / 2, heads, dim), &o, NULL,
                     &error) != KV1_OK);
}

/* The cache is attended to in two ranges, the sink logits in one of them. */
static void parts(const kv1_cache* cache, kv1_sequence s) {
    static float outputs[2][rows * heads * dim], sums[2][rows * heads];
    const kv1_range ranges[2] = {{0, 40}, {40, SIZE_MAX}};
    kv1_attention_part each[2];
    kv1_attention o = options_now();
    size_t i;
    o.sink_logits = sink_logits;
    for (i = 0; i < 2; ++i) {
        o.range = &ranges[i];
        CHECK(attend(cache, s, &o) == KV1_OK);
        memcpy(outputs[i], out, sizeof out);
        memcpy(sums[i], lse, sizeof lse);
        each[i].outputs = outputs[i];
        each[i].log_sum_exp = sums[i];
        o.sink_logits = NULL;
    }
    CHECK(kv1_merge_attention(each, 2, rows * heads, dim, outputs[0], sums[0], &error) == KV1_OK);
    memcpy(out, outputs[0], sizeof out);
    memcpy(lse, sums[0], sizeof lse);
    o.range = NULL;
    o.sink_logits = sink_logits;
    matches_formula(&o);
    CHECK(kv1_merge_attention(each, 2, rows * heads, 0, out, lse, &error) == KV1_INVALID_ARGUMENT);
    CHECK(kv1_merge_attention(each, 2, SIZE_MAX, dim, out, lse, &error) == KV1_SHAPE_MISMATCH);
}

static void batches(kv1_cache* cache, kv1_sequence s) {
    static float together[rows * heads * dim], sums[rows * heads];
    const kv1_sequence other = sequence_of(cache);
    const kv1_sequence both[2] = {s, other};
    const size_t indptr[3] = {0, 3, rows}, short_of[3] = {0, 3, 4};
    const uint8_t seen[9] = {1, 0, 0, 1, 1, 1, 0, 0, 1};
    const kv1_tensor queries = kv1_contiguous(q, KV1_FP32, rows, heads, dim);
    kv1_mask masks[2];
    kv1_attention o = options_now();
    size_t i;
    CHECK(kv1_append(cache, other, 0, kv1_contiguous(v, KV1_FP32, 33, kv_heads, dim),
                     kv1_contiguous(k, KV1_FP32, 33, kv_heads, dim), NULL, &error) == KV1_OK);
    o.soft_cap = 2.0f;
    o.log_sum_exp = sums;
    CHECK(kv1_attend_batch(cache, both, indptr, 2, 0, queries,
                           kv1_contiguous_output(together, KV1_FP32, rows, heads, dim), &o, NULL,
                           &error) == KV1_OK);
    for (i = 0; i < 2; ++i) {
        const size_t first = indptr[i], n = indptr[i + 1] - first;
        o.log_sum_exp = lse + first * heads;
        CHECK(kv1_attend(cache, both[i], 0, kv1_contiguous(q + first * heads * dim, KV1_FP32, n, heads, dim),
                         kv1_contiguous_output(out + first * heads * dim, KV1_FP32, n, heads, dim), &o, NULL,
                         &error) == KV1_OK);
    }
    CHECK(memcmp(out, together, sizeof out) == 0 && memcmp(lse, sums, sizeof lse) == 0);

    /* a mask for each */
    memset(masks, 0, sizeof masks);
    masks[0].kind = KV1_MASK_EXPLICIT;
    masks[0].keys = 3;
    masks[0].visible = seen;
    masks[1].kind = KV1_MASK_CAUSAL_FROM;
    masks[1].first_position = 11;
    o.masks = masks;
    o.log_sum_exp = NULL;
    CHECK(kv1_attend_batch(cache, both, indptr, 2, 0, queries,
                           kv1_contiguous_output(together, KV1_FP32, rows, heads, dim), &o, NULL,
                           &error) == KV1_OK);
    CHECK(attend(cache, s, &o) == KV1_INVALID_ARGUMENT);
    o.masks = NULL;
    for (i = 0; i < 2; ++i) {
        const size_t first = indptr[i], n = indptr[i + 1] - first;
        o.mask = masks[i];
        CHECK(kv1_attend(cache, both[i], 0, kv1_contiguous(q + first * heads * dim, KV1_FP32, n, heads, dim),
                         kv1_contiguous_output(out + first * heads * dim, KV1_FP32, n, heads, dim), &o, NULL,
                         &error) == KV1_OK);
    }
    CHECK(memcmp(out, together, sizeof out) == 0);
    masks[1].kind = 17;
    o = options_now();
    o.masks = masks;
    CHECK(kv1_attend_batch(cache, both, indptr, 2, 0, queries,
                           kv1_contiguous_output(together, KV1_FP32, rows, heads, dim), &o, NULL,
                           &error) == KV1_INVALID_ARGUMENT);
    CHECK(error.token == 3);
    CHECK(kv1_attend_batch(cache, both, short_of, 2, 0, queries,
                           kv1_contiguous_output(together, KV1_FP32, rows, heads, dim), NULL, NULL,
                           &error) == KV1_INVALID_ARGUMENT);
}

int main(void) {
    const kv1_layer layer = layer_of(kv_heads, dim, KV1_PLAIN_FP32);
    const kv1_cache_options shape = options_for(&layer, 1, 256, 16);
    kv1_cache* cache = made(&shape);
    const kv1_sequence s = sequence_of(cache);
    size_t h;
    fill(k, tokens * kv_heads * dim);
    fill(v, tokens * kv_heads * dim);
    fill(q, rows * heads * dim);
    for (h = 0; h < heads; ++h) {
        slopes[h] = 1.0f / (float)(2 << h);
        sink_logits[h] = (float)h - 1.5f;
    }
    CHECK(kv1_append(cache, s, 0, kv1_contiguous(k, KV1_FP32, tokens, kv_heads, dim),
                     kv1_contiguous(v, KV1_FP32, tokens, kv_heads, dim), NULL, &error) == KV1_OK);
    options(cache, s);
    refusals(cache, s);
    parts(cache, s);
    batches(cache, s);
    CHECK(kv1_cache_validate(cache, &error) == KV1_OK);
    kv1_cache_destroy(cache);
    return report();
}
