/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over cached tokens. Part of kv1.h.
 */
#ifndef KV1_C_ATTENTION_H
#define KV1_C_ATTENTION_H

#include <kv1/c/cache.h>
#include <kv1/c/tensor.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Which of n cached tokens the m queries see: one of kv1_mask_kind_values. */
typedef int32_t kv1_mask_kind;
/** Values of kv1_mask_kind. */
enum kv1_mask_kind_values {
    KV1_MASK_CAUSAL,      /**< query i sees tokens 0 ... n - m + i */
    KV1_MASK_CAUSAL_FROM, /**< query i sees tokens 0 ... first_position + i */
    KV1_MASK_NONE,        /**< every query sees every token, also those after its own position n - m + i */
    KV1_MASK_EXPLICIT     /**< visible[i * keys + j] != 0: query i sees token n - keys + j; and all before */
};

/** A mask; zeros are the causal one. Windows take off from what it shows. */
typedef struct kv1_mask {
    kv1_mask_kind kind;     /**< which */
    size_t first_position;  /**< KV1_MASK_CAUSAL_FROM */
    size_t keys;            /**< KV1_MASK_EXPLICIT */
    const uint8_t* visible; /**< KV1_MASK_EXPLICIT, [queries][keys] */
} kv1_mask;

/** Tokens first ... last - 1 of a sequence, clipped to those that are cached. */
typedef struct kv1_range {
    size_t first; /**< the first position */
    size_t last;  /**< one past the last position */
} kv1_range;

/** How attention is computed: one of kv1_precision_values. */
typedef int32_t kv1_precision;
/** Values of kv1_precision, which are kv1::precision's. */
enum kv1_precision_values {
    KV1_FAST, /**< integer dot products, queries and weights in 8 bits */
    KV1_EXACT /**< fp32 on the decoded values */
};

/** Options of kv1_attend; kv1/attention.hpp has the formula. Arrays are read, or written, during the call. */
typedef struct kv1_attention {
    size_t struct_size;        /**< sizeof(kv1_attention) */
    float scale;               /**< of q . k before the softmax; 0: 1 / sqrt(key_dim) */
    float soft_cap;            /**< of scores, as Gemma 2 has it; 0: none */
    kv1_precision precision;   /**< of coded formats */
    size_t window;             /**< tokens that a query sees, its own included; 0: all */
    kv1_mask mask;             /**< which tokens queries see */
    const kv1_mask* masks;     /**< kv1_attend_batch: null, or one a sequence, instead of mask */
    const kv1_range* range;    /**< null: all tokens; else only these are attended to (kv1_merge_attention) */
    const float* alibi_slopes; /**< null, or one a query head */
    const float* sink_logits;  /**< null, or one a query head: logits without a value (gpt-oss) */
    /** Null, or receives [tokens][heads] natural logarithms of the softmax denominators. */
    float* log_sum_exp;
} kv1_attention;

/** Sets struct_size, and all else to zero. */
static inline void kv1_attention_init(kv1_attention* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** Attention from the packed bits: queries [tokens][heads][key_dim], outputs [tokens][heads][value_dim],
 * heads a multiple of the layer's kv_heads. A query that sees no token gets zeros, and -infinity as its
 * log_sum_exp. Numbers that fp16 or bf16 outputs can not hold become the type's largest. Null options are the
 * default. Errors: KV1_INVALID_SEQUENCE, KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH, KV1_INVALID_ARGUMENT,
 * KV1_OUT_OF_MEMORY; KV1_DROPPED_TOKENS, with the query as token, where a commit has freed what the layer's
 * sliding window would show it. */
KV1_C_API kv1_code kv1_attend(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor queries,
                              kv1_output outputs, const kv1_attention* options, const kv1_executor* executor,
                              kv1_error* error);
/** The same for several sequences: queries and outputs of sequence i are rows indptr[i] ... indptr[i + 1] -
 * 1. The mask holds for each sequence by itself; it is causal without a first position, or none. masks has
 * any mask for each. Errors: as kv1_attend, the token being a row; outputs are then unspecified.
 * KV1_INVALID_ARGUMENT also for a sequence that comes twice. */
KV1_C_API kv1_code kv1_attend_batch(const kv1_cache* cache, const kv1_sequence* sequences,
                                    const size_t* indptr, size_t count, size_t layer, kv1_tensor queries,
                                    kv1_output outputs, const kv1_attention* options,
                                    const kv1_executor* executor, kv1_error* error);

/** The explicit mask of a token tree: of `count` newest tokens token i sees itself and its ancestors.
 * parents[i] is -1 for a child of the cached prefix, else less than i; visible is [count][count]. Errors:
 * KV1_INVALID_ARGUMENT, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_tree_mask(const int32_t* parents, size_t count, uint8_t* visible, kv1_error* error);

/** The explicit mask of bidirectional blocks: of `count` newest tokens token i sees those up to itself and,
 * where blocks[i] is not negative, all that have the same number. visible is [count][count]. Errors:
 * KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_block_mask(const int32_t* blocks, size_t count, uint8_t* visible, kv1_error* error);

/** Attention of the same rows over one of several disjoint sets of tokens. */
typedef struct kv1_attention_part {
    const float* outputs;     /**< [rows][channels], each row divided by its denominator */
    const float* log_sum_exp; /**< [rows]; -infinity where a row saw no token */
} kv1_attention_part;

/** Joins parts to attention over all of their tokens. outputs is [rows][channels] and may be one of the
 * parts; log_sum_exp is [rows] or null. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_merge_attention(const kv1_attention_part* parts, size_t count, size_t rows,
                                       size_t channels, float* outputs, float* log_sum_exp, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
