/* SPDX-License-Identifier: Apache-2.0
 *
 * What the calls of kv1.h say: codes, errors, and the instruction set in use. Part of kv1.h.
 */
#ifndef KV1_C_ERROR_H
#define KV1_C_ERROR_H

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

/** Outcome of a call: one of kv1_code_values. */
typedef int32_t kv1_code;
/** Values of kv1_code, which are kv1::errc's. */
enum kv1_code_values {
    KV1_OK,
    KV1_INVALID_ARGUMENT,    /**< a value that no call accepts, a null pointer among them */
    KV1_SHAPE_MISMATCH,      /**< extents that do not fit the cache or each other */
    KV1_OUT_OF_RANGE,        /**< an index past the end */
    KV1_NON_FINITE,          /**< NaN or infinity where a number is needed */
    KV1_NOT_REPRESENTABLE,   /**< a number that the storage format cannot hold */
    KV1_OUT_OF_MEMORY,       /**< an allocation failed */
    KV1_CAPACITY_EXCEEDED,   /**< no free page is left */
    KV1_INVALID_SEQUENCE,    /**< a handle that names no living sequence */
    KV1_UNSUPPORTED_FORMAT,  /**< a format this build does not have */
    KV1_UNSUPPORTED_TARGET,  /**< an instruction set this build or processor does not have */
    KV1_LAYERS_DISAGREE,     /**< a commit point is needed, and layers hold different numbers of tokens */
    KV1_DROPPED_TOKENS,      /**< tokens that were dropped, or that a sliding window gave up */
    KV1_NOTHING_COMMITTED,   /**< a rollback of a sequence that has no commit to return to */
    KV1_BAD_FORMAT,          /**< bytes that are no saved cache, or whose parts contradict each other */
    KV1_UNSUPPORTED_VERSION, /**< a saved cache of a newer or unknown version */
    KV1_CHECKSUM_MISMATCH,   /**< a saved cache with changed bytes */
    KV1_TRUNCATED,           /**< a saved cache that ends too early */
    KV1_DIFFERENT_CACHE,     /**< a saved cache whose shape or formats are not this one's */
    KV1_DIFFERENT_MODEL,     /**< a saved cache of another model, or one that does not say which */
    KV1_IO_ERROR,            /**< a file, sink or source refused */
    KV1_BROKEN_INVARIANT     /**< kv1_cache_validate found a contradiction */
};

/** What was wrong, and where; a place that does not apply is -1. */
typedef struct kv1_error {
    kv1_code code;    /**< why */
    const char* rule; /**< static text, never null */
    int64_t layer;    /**< from 0 */
    int64_t kv_head;  /**< of the layer, from 0 */
    int64_t token;    /**< of the call's tensor, from 0 */
    int64_t channel;  /**< of the vector, from 0 */
} kv1_error;

/** major * 10000 + minor * 100 + patch of the library that is linked. */
KV1_C_API int32_t kv1_version(void);

/** A word or two for a code; static text. */
KV1_C_API const char* kv1_code_name(kv1_code code);

/** Writes the error as one line, cut to `size` bytes with the ending zero; returns the length it would have,
 * as snprintf does. `text` may be null where size is 0. Null for `error` is an empty text. */
KV1_C_API size_t kv1_describe(const kv1_error* error, char* text, size_t size);

/** The instruction set that kernels run on now; static text. */
KV1_C_API const char* kv1_target(void);
/** Forces one: "scalar", "baseline", "sse41", "avx2", "avx_vnni", "avx512", "avx512_vnni" or "avx512_vbmi".
 * Errors: KV1_UNSUPPORTED_TARGET. */
KV1_C_API kv1_code kv1_set_target(const char* name);

#ifdef __cplusplus
}
#endif

#endif
