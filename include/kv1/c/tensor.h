/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensors of the caller, and the caller's threads. Part of kv1.h.
 */
#ifndef KV1_C_TENSOR_H
#define KV1_C_TENSOR_H

#include <kv1/c/error.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Element type of a tensor: one of kv1_scalar_values. */
typedef int32_t kv1_scalar;
/** Values of kv1_scalar, which are kv1::scalar_type's. */
enum kv1_scalar_values { KV1_FP32, KV1_FP16, KV1_BF16 };

/** [tokens][heads][channels], read by the call; strides in elements, channels are contiguous. */
typedef struct kv1_tensor {
    const void* data;       /**< channel 0 of head 0 of token 0 */
    kv1_scalar type;        /**< of the elements */
    size_t tokens;          /**< first extent */
    size_t heads;           /**< second extent */
    size_t channels;        /**< third extent */
    ptrdiff_t token_stride; /**< elements between tokens */
    ptrdiff_t head_stride;  /**< elements between heads */
} kv1_tensor;

/** The same, written by the call. */
typedef struct kv1_output {
    void* data;             /**< channel 0 of head 0 of token 0 */
    kv1_scalar type;        /**< of the elements */
    size_t tokens;          /**< first extent */
    size_t heads;           /**< second extent */
    size_t channels;        /**< third extent */
    ptrdiff_t token_stride; /**< elements between tokens */
    ptrdiff_t head_stride;  /**< elements between heads */
} kv1_output;

/** A tensor without gaps. */
static inline kv1_tensor kv1_contiguous(const void* data, kv1_scalar type, size_t tokens, size_t heads,
                                        size_t channels) {
    kv1_tensor t;
    t.data = data;
    t.type = type;
    t.tokens = tokens;
    t.heads = heads;
    t.channels = channels;
    t.token_stride = (ptrdiff_t)(heads * channels);
    t.head_stride = (ptrdiff_t)channels;
    return t;
}

/** The values of a layer whose values lie in its keys. */
static inline kv1_tensor kv1_no_values(void) { return kv1_contiguous(NULL, KV1_FP32, 0, 0, 0); }

/** An output without gaps. */
static inline kv1_output kv1_contiguous_output(void* data, kv1_scalar type, size_t tokens, size_t heads,
                                               size_t channels) {
    kv1_output t;
    t.data = data;
    t.type = type;
    t.tokens = tokens;
    t.heads = heads;
    t.channels = channels;
    t.token_stride = (ptrdiff_t)(heads * channels);
    t.head_stride = (ptrdiff_t)channels;
    return t;
}

/** One piece of work, called with its state and an index. */
typedef void (*kv1_task)(void* state, size_t index);

/** The caller's threads. run() calls task(state, 0) ... task(state, count - 1), each once, in any order, on
 * any threads, and returns when all are done. Results do not depend on it. A null executor, or one without a
 * function: the calling thread. */
typedef struct kv1_executor {
    void (*run)(void* context, size_t count, kv1_task task, void* state); /**< as said above */
    void* context;                                                        /**< its first argument */
} kv1_executor;

#ifdef __cplusplus
}
#endif

#endif
