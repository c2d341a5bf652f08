/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences of a cache, and what is appended to them. Part of kv1.h.
 */
#ifndef KV1_C_SEQUENCE_H
#define KV1_C_SEQUENCE_H

#include <kv1/c/cache.h>
#include <kv1/c/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

/** An empty sequence. Errors: KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_sequence_create(kv1_cache* cache, kv1_sequence* sequence, kv1_error* error);
/** Gives the sequence's pages back; its handle is stale from now on. Errors: KV1_INVALID_SEQUENCE. */
KV1_C_API kv1_code kv1_sequence_destroy(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);
/** 1 where the handle names a living sequence, else 0. */
KV1_C_API int32_t kv1_sequence_lives(const kv1_cache* cache, kv1_sequence sequence);
/** Tokens of one layer, dropped ones included: the position of the next one. Errors: KV1_INVALID_SEQUENCE,
 * KV1_OUT_OF_RANGE. */
KV1_C_API kv1_code kv1_length(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t* tokens,
                              kv1_error* error);
/** Tokens that every layer holds. Errors: KV1_INVALID_SEQUENCE. */
KV1_C_API kv1_code kv1_sequence_length(const kv1_cache* cache, kv1_sequence sequence, size_t* tokens,
                                       kv1_error* error);

/** A sequence that shares every page with this one, until one of them writes to it. Errors:
 * KV1_INVALID_SEQUENCE, KV1_LAYERS_DISAGREE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_fork(kv1_cache* cache, kv1_sequence sequence, kv1_sequence* forked, kv1_error* error);
/** Cuts every layer to its first tokens. Errors: KV1_INVALID_SEQUENCE; KV1_OUT_OF_RANGE where a layer holds
 * fewer; KV1_DROPPED_TOKENS where the cut lies within a dropped page, where a sliding window has given up
 * tokens that the next query would see, or within a full page of keys per channel that the last commit does
 * not lie in; with fp16 windows KV1_CAPACITY_EXCEEDED and KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_truncate(kv1_cache* cache, kv1_sequence sequence, size_t tokens, kv1_error* error);
/** Frees pages first_page ... first_page + pages - 1, each full in every layer; the others keep their
 * positions. Errors: KV1_INVALID_SEQUENCE, KV1_OUT_OF_RANGE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_drop_pages(kv1_cache* cache, kv1_sequence sequence, size_t first_page, size_t pages,
                                  kv1_error* error);
/** Ends a step: all layers hold as many tokens, kv1_rollback returns here, and windows free the pages that no
 * later query sees. Errors: KV1_INVALID_SEQUENCE, KV1_LAYERS_DISAGREE (naming the first layer that lags),
 * KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_commit(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);
/** Cuts back to the last commit, or to what is left of it. Errors: as kv1_truncate; KV1_NOTHING_COMMITTED
 * where there was none. */
KV1_C_API kv1_code kv1_rollback(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);

/** Quantizes and stores the next tokens of one layer: keys [tokens][kv_heads][key_dim] after RoPE, values
 * [tokens][kv_heads][value_dim]; where values lie in keys, kv1_no_values(). Errors: KV1_INVALID_SEQUENCE,
 * KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH, KV1_INVALID_ARGUMENT, KV1_CAPACITY_EXCEEDED, KV1_OUT_OF_MEMORY;
 * KV1_NON_FINITE and KV1_NOT_REPRESENTABLE name KV head, token and channel. */
KV1_C_API kv1_code kv1_append(kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor keys,
                              kv1_tensor values, const kv1_executor* executor, kv1_error* error);
/** The same for several sequences, all or none: sequence i takes rows indptr[i] ... indptr[i + 1] - 1 of keys
 * and values. indptr has count + 1 numbers, the first 0 and the last the number of rows. Errors: as
 * kv1_append, the token being a row; KV1_INVALID_ARGUMENT for a sequence that comes twice, named by its first
 * row. */
KV1_C_API kv1_code kv1_append_batch(kv1_cache* cache, const kv1_sequence* sequences, const size_t* indptr,
                                    size_t count, size_t layer, kv1_tensor keys, kv1_tensor values,
                                    const kv1_executor* executor, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
