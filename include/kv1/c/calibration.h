/* SPDX-License-Identifier: Apache-2.0
 *
 * What encodings want to know of a model, taken from samples. Part of kv1.h.
 */
#ifndef KV1_C_CALIBRATION_H
#define KV1_C_CALIBRATION_H

#include <kv1/c/cache.h>
#include <kv1/c/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Takes the means of channels, for kv1_encoding. */
typedef struct kv1_mean_estimator kv1_mean_estimator;

/** Of tensors with so many heads and channels. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_mean_estimator_create(size_t heads, size_t channels, kv1_mean_estimator** estimator,
                                             kv1_error* error);
/** Null is ignored. */
KV1_C_API void kv1_mean_estimator_destroy(kv1_mean_estimator* estimator);
/** Adds a sample. Errors: KV1_INVALID_ARGUMENT, KV1_SHAPE_MISMATCH. */
KV1_C_API kv1_code kv1_mean_estimator_add(kv1_mean_estimator* estimator, kv1_tensor sample, kv1_error* error);
/** Writes [heads][channels], rounded to fp16; zeros where nothing was added. Errors: KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_mean_estimator_means(const kv1_mean_estimator* estimator, float* means,
                                            kv1_error* error);

/** Takes second moments of queries over the heads of each KV head, for the error weights of keys. */
typedef struct kv1_moment_estimator kv1_moment_estimator;

/** Of tensors with a multiple of kv_heads heads. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_moment_estimator_create(size_t kv_heads, size_t channels,
                                               kv1_moment_estimator** estimator, kv1_error* error);
/** Null is ignored. */
KV1_C_API void kv1_moment_estimator_destroy(kv1_moment_estimator* estimator);
/** Adds a sample. Errors: KV1_INVALID_ARGUMENT, KV1_SHAPE_MISMATCH, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_moment_estimator_add(kv1_moment_estimator* estimator, kv1_tensor sample,
                                            kv1_error* error);
/** Writes [kv_heads][channels][channels]; zeros where nothing was added. Errors: KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_moment_estimator_moments(const kv1_moment_estimator* estimator, float* moments,
                                                kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
