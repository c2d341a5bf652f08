/* SPDX-License-Identifier: Apache-2.0
 *
 * kv1 for C, and for languages that call C. The library behind it is kv1_c (CMake: -DKV1_BUILD_C=ON, target
 * kv1::c), or one C++ file of yours that includes kv1/c_api.hpp.
 *
 *   kv1_layer layer = {.kv_heads = 8, .key_dim = 128, .value_dim = 128, .key_format = KV1_AFFINE2,
 *                      .value_format = KV1_AFFINE2};
 *   kv1_cache* cache;
 *   kv1_error error;
 *   if (kv1_cache_create(&layer, 1, 32, 4096, 64, &cache, &error) != KV1_OK) ...
 *   kv1_sequence sequence;
 *   kv1_sequence_create(cache, &sequence, NULL);
 *   kv1_append(cache, sequence, 0, kv1_contiguous(k, KV1_FP32, tokens, 8, 128),
 *              kv1_contiguous(v, KV1_FP32, tokens, 8, 128), NULL, &error);
 *   kv1_attend(cache, sequence, 0, kv1_contiguous(q, KV1_FP32, tokens, 32, 128),
 *              kv1_contiguous_output(out, KV1_FP32, tokens, 32, 128), NULL, NULL, &error);
 *   ... the other layers ...
 *   kv1_commit(cache, sequence, &error); // the step is whole
 *
 * Every call that can fail returns a code and, where `error` is not null, says there what rule was broken and
 * where. A failed call leaves the cache as it was. No call throws, aborts or keeps a pointer of the caller's.
 * Calls on a const cache may run at the same time; a call that changes the cache needs it for itself. A call
 * needs 64 KiB of its thread's stack at most (a library built without optimization 256), and so does a task of
 * an executor.
 * Formats, layouts and rules are those of kv1/kv_cache.hpp.
 */
#ifndef KV1_KV1_H
#define KV1_KV1_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(KV1_C_SHARED)
#if defined(KV1_C_BUILD)
#define KV1_C_API __declspec(dllexport)
#else
#define KV1_C_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define KV1_C_API __attribute__((visibility("default")))
#else
#define KV1_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Outcome of a call; the values are kv1::errc's. */
typedef enum kv1_code {
    KV1_OK,
    KV1_INVALID_ARGUMENT,   /**< a value that no call accepts, a null pointer among them */
    KV1_SHAPE_MISMATCH,     /**< extents that do not fit the cache or each other */
    KV1_OUT_OF_RANGE,       /**< an index past the end */
    KV1_NON_FINITE,         /**< NaN or infinity in K or V */
    KV1_NOT_REPRESENTABLE,  /**< a number that the storage format cannot hold */
    KV1_OUT_OF_MEMORY,      /**< an allocation failed */
    KV1_CAPACITY_EXCEEDED,  /**< no free page is left */
    KV1_INVALID_SEQUENCE,   /**< a handle that names no living sequence */
    KV1_UNSUPPORTED_FORMAT, /**< a format this build does not have */
    KV1_UNSUPPORTED_TARGET, /**< an instruction set this build or processor does not have */
    KV1_LAYERS_DISAGREE,    /**< a commit of layers that hold different numbers of tokens */
    KV1_DROPPED_TOKENS,     /**< tokens that a sliding window gave up */
    KV1_NOTHING_COMMITTED   /**< a rollback of a sequence that has no commit to return to */
} kv1_code;

/** What was wrong, and where; a place that does not apply is -1. */
typedef struct kv1_error {
    kv1_code code;    /**< why */
    const char* rule; /**< static text, never null */
    int64_t layer;    /**< from 0 */
    int64_t kv_head;  /**< of the layer, from 0 */
    int64_t token;    /**< of the call's tensor, from 0 */
    int64_t channel;  /**< of the vector, from 0 */
} kv1_error;

/** How K or V are stored; the values are kv1::kv_format's. */
typedef enum kv1_format {
    KV1_PLAIN_FP32,
    KV1_PLAIN_FP16,
    KV1_AFFINE8,
    KV1_AFFINE4,
    KV1_AFFINE3,
    KV1_AFFINE2, /**< two bits a value: 36 bytes for 128 channels */
    KV1_SCALED_BINARY,
    KV1_BINARY,
    KV1_COMPACT4, /**< compact: two bytes less a vector, for vectors that lie about zero */
    KV1_COMPACT3,
    KV1_COMPACT2,
    KV1_CODEBOOK2 /**< compact, with four levels for normally distributed channels */
} kv1_format;

/** Element type of a tensor. */
typedef enum kv1_scalar { KV1_FP32, KV1_FP16, KV1_BF16 } kv1_scalar;

/** A cache of one or more layers and any number of sequences. */
typedef struct kv1_cache kv1_cache;

/** Names a sequence of one cache; a plain value. */
typedef struct kv1_sequence {
    uint32_t slot;       /**< of the cache's table */
    uint32_t generation; /**< tells sequences of one slot apart */
} kv1_sequence;

/** Which keys share a scale and minimum. */
typedef enum kv1_axis {
    KV1_PER_TOKEN,  /**< the channels of a token */
    KV1_PER_CHANNEL /**< a channel's, over all tokens of a page; they are kept in fp16 until it is full */
} kv1_axis;

/** Shape of one layer. */
typedef struct kv1_layer {
    size_t kv_heads;         /**< query heads are a multiple of it */
    size_t key_dim;          /**< channels of a key and a query */
    size_t value_dim;        /**< channels of a value and an output */
    kv1_format key_format;   /**< of keys */
    kv1_format value_format; /**< of values */
    size_t key_group;        /**< channels of a key that share a scale and minimum; 0: all of them. Affine and
                                  compact formats; a multiple of 32 that divides key_dim */
    size_t value_group;      /**< the same of values */
    kv1_axis key_axis;       /**< affine and compact formats of at most 4 bits, without key_group */
    int values_in_keys;      /**< not 0: values are the first value_dim channels of keys (multi-head latent
                                  attention) and are stored once; their format and group are the keys' */
    size_t sliding_window;   /**< tokens that a query sees, itself included; 0: all */
    size_t window_retention; /**< tokens behind the window that a commit keeps, for kv1_truncate */
} kv1_layer;

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

/** What kv1_append takes as values of a layer whose values lie in its keys. */
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
 * any threads, and returns when all are done. Results do not depend on it. A null executor: the calling
 * thread. */
typedef struct kv1_executor {
    void (*run)(void* context, size_t count, kv1_task task, void* state); /**< as said above */
    void* context;                                                        /**< its first argument */
} kv1_executor;

/** Which of n cached tokens the queries see; m queries. */
typedef enum kv1_mask {
    KV1_MASK_CAUSAL,      /**< query i sees tokens 0 ... n - m + i */
    KV1_MASK_CAUSAL_FROM, /**< query i sees tokens 0 ... first_position + i */
    KV1_MASK_NONE,        /**< every query sees every token */
    KV1_MASK_EXPLICIT     /**< visible[i * mask_keys + j] != 0: query i sees token n - mask_keys + j; and all
                             before */
} kv1_mask;

/** How attention is computed. */
typedef enum kv1_precision {
    KV1_FAST, /**< integer dot products, queries and weights in 8 bits */
    KV1_EXACT /**< fp32 on the decoded values */
} kv1_precision;

/** Options of kv1_attend; a zeroed struct, like a null pointer, is the usual case. */
typedef struct kv1_attention {
    float scale;             /**< of q . k before the softmax; 0: 1 / sqrt(key_dim) */
    kv1_mask mask;           /**< which tokens queries see */
    size_t first_position;   /**< KV1_MASK_CAUSAL_FROM */
    size_t mask_keys;        /**< KV1_MASK_EXPLICIT */
    const uint8_t* visible;  /**< KV1_MASK_EXPLICIT, [tokens][mask_keys] */
    kv1_precision precision; /**< of coded formats */
    float*
        log_sum_exp; /**< null, or receives [tokens][heads] natural logarithms of the softmax denominators */
} kv1_attention;

/** What a cache holds and costs; sizes in bytes. */
typedef struct kv1_statistics {
    size_t sequences;      /**< living ones */
    size_t tokens;         /**< of the layer that holds most, over all sequences */
    size_t layers;         /**< of the cache */
    size_t pages_in_use;   /**< each page_tokens tokens of every layer */
    size_t pages_total;    /**< that the cache has */
    size_t bytes_reserved; /**< for all pages */
    size_t bytes_in_use;   /**< by pages in use, padding and unfilled tokens included */
    size_t bytes_stored;   /**< of the cached tokens: values and metadata */
    size_t bytes_as_fp16;  /**< the same tokens in fp16 */
    size_t bytes_retained; /**< of bytes_in_use: pages behind sliding windows that are kept all the same */
} kv1_statistics;

/** major * 10000 + minor * 100 + patch of the library that is linked. */
KV1_C_API int kv1_version(void);

/** A word or two for a code; static text. */
KV1_C_API const char* kv1_code_name(kv1_code code);

/** Writes the error as one line, cut to `size` bytes with the ending zero; returns the length it would have,
 * as snprintf does. `text` may be null where size is 0. */
KV1_C_API size_t kv1_describe(const kv1_error* error, char* text, size_t size);

/** The instruction set that kernels run on now; static text. */
KV1_C_API const char* kv1_target(void);
/** Forces one: "scalar", "baseline", "sse41", "avx2", "avx_vnni", "avx512", "avx512_vnni" or "avx512_vbmi". Errors:
 * KV1_UNSUPPORTED_TARGET. */
KV1_C_API kv1_code kv1_set_target(const char* name);

/** Makes a cache of `layer_count` layers: layers[0 ... distinct_layers - 1], repeated from the first where
 * layer_count is larger; distinct_layers divides layer_count. capacity_tokens over all sequences; page_tokens
 * a multiple of 16. Memory is reserved at once and touched as sequences grow. */
KV1_C_API kv1_code kv1_cache_create(const kv1_layer* layers, size_t distinct_layers, size_t layer_count,
                                    size_t capacity_tokens, size_t page_tokens, kv1_cache** cache,
                                    kv1_error* error);
/** Frees the cache and all that it holds; null is ignored. */
KV1_C_API void kv1_cache_destroy(kv1_cache* cache);

/** An empty sequence. */
KV1_C_API kv1_code kv1_sequence_create(kv1_cache* cache, kv1_sequence* sequence, kv1_error* error);
/** Gives the sequence's pages back; its handle is stale from now on. */
KV1_C_API kv1_code kv1_sequence_destroy(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);
/** Cached tokens of one layer. */
KV1_C_API kv1_code kv1_length(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t* tokens,
                              kv1_error* error);

/** Ends a step: every layer holds the same number of tokens, kv1_rollback() returns here, and sliding windows
 * free what no later query sees. An engine calls it after each step. */
KV1_C_API kv1_code kv1_commit(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);
/** Back to the last commit, from whatever was appended since. Errors: KV1_NOTHING_COMMITTED where there is
 * none, and as kv1_truncate. */
KV1_C_API kv1_code kv1_rollback(kv1_cache* cache, kv1_sequence sequence, kv1_error* error);
/** Cuts every layer to its first tokens. Errors: KV1_OUT_OF_RANGE where a layer holds fewer,
 * KV1_DROPPED_TOKENS where a sliding window has given up tokens that the next query would see, or where keys
 * per channel of a full page would be cut. */
KV1_C_API kv1_code kv1_truncate(kv1_cache* cache, kv1_sequence sequence, size_t tokens, kv1_error* error);

/** Quantizes and stores the next tokens of one layer: keys [tokens][kv_heads][key_dim] after RoPE, values
 * [tokens][kv_heads][value_dim]. Where values lie in keys: kv1_no_values(). */
KV1_C_API kv1_code kv1_append(kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor keys,
                              kv1_tensor values, const kv1_executor* executor, kv1_error* error);

/** Attention from the packed bits: queries [tokens][heads][key_dim], outputs [tokens][heads][value_dim],
 * heads a multiple of the layer's kv_heads. Numbers that fp16 or bf16 outputs can not hold become the type's
 * largest. KV1_DROPPED_TOKENS where a commit has freed what a query would see. */
KV1_C_API kv1_code kv1_attend(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor queries,
                              kv1_output outputs, const kv1_attention* options, const kv1_executor* executor,
                              kv1_error* error);

/** Decodes cached keys (values != 0: values) of one KV head into out[count][channels]. */
KV1_C_API kv1_code kv1_read(const kv1_cache* cache, kv1_sequence sequence, size_t layer, int values,
                            size_t kv_head, size_t first, size_t count, float* out, kv1_error* error);

/** Over all sequences. */
KV1_C_API kv1_code kv1_cache_statistics(const kv1_cache* cache, kv1_statistics* statistics, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
