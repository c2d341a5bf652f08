/* SPDX-License-Identifier: Apache-2.0
 *
 * What encodings want to know of a model, taken from samples. Part of kv1.h.
 */
#ifndef KV1_C_CALIBRATION_H
#define KV1_C_CALIBRATION_H

#include <kv1/c/cache.h>
#include <kv1/c/saving.h>
#include <kv1/c/tensor.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Adds up what a cache wants to know of a model, as a text goes through its layers (kv1/calibration.hpp). */
typedef struct kv1_calibrator kv1_calibrator;
/** What it found: the parts of the layers, and the policy that they were taken for. */
typedef struct kv1_calibration kv1_calibration;

/** What a calibrator is told beside a shape. */
typedef struct kv1_calibrator_options {
    size_t struct_size; /**< sizeof(kv1_calibrator_options) */
    const char* policy; /**< such as "balanced" (kv1/cache_policy.hpp): the parts that it names are taken */
    const kv1_fingerprint* model; /**< whose text it is, which is kept with the result; null: not said */
    size_t query_stride;          /**< 2: every second query, ...; 0 and 1: all of them */
    float scale;                  /**< of scores, as in attention; 0: 1 / sqrt(key_dim) */
} kv1_calibrator_options;

/** Sets struct_size, and all else to zero. */
static inline void kv1_calibrator_options_init(kv1_calibrator_options* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** For the layers of `shape`: KV heads, head dims and sliding windows; the rest of it is not read. Errors:
 * KV1_INVALID_ARGUMENT, KV1_OUT_OF_RANGE for a policy that names a layer too many, KV1_UNSUPPORTED_FORMAT,
 * KV1_OUT_OF_MEMORY. *calibrator is then null. */
KV1_C_API kv1_code kv1_calibrator_create(const kv1_cache_options* shape,
                                         const kv1_calibrator_options* options, kv1_calibrator** calibrator,
                                         kv1_error* error);
/** Null is ignored. */
KV1_C_API void kv1_calibrator_destroy(kv1_calibrator* calibrator);
/** Sets a layer's output projection, [outputs][query heads][value_dim], which error weights need before the first
 * token. Null executor: the calling thread. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH,
 * KV1_NON_FINITE, KV1_NOT_REPRESENTABLE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_calibrator_set_output_projection(kv1_calibrator* calibrator, size_t layer,
                                                        kv1_tensor projection, const kv1_executor* executor,
                                                        kv1_error* error);
/** The same from `count` numbers, its products [kv_heads][g][g][value_dim][value_dim] of every two of the g query
 * heads that share a KV head. Errors: the same. */
KV1_C_API kv1_code kv1_calibrator_set_output_products(kv1_calibrator* calibrator, size_t layer,
                                                      const float* products, size_t count, kv1_error* error);
/** Adds tokens that a layer attends with, all after RoPE: m queries, and the keys and values of their tokens and of
 * those before them, n >= m; the first of n is at first_position of its text. Errors: KV1_INVALID_ARGUMENT,
 * KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH, KV1_NON_FINITE with the place, KV1_NOT_REPRESENTABLE, KV1_OUT_OF_MEMORY;
 * nothing is added then. */
KV1_C_API kv1_code kv1_calibrator_add(kv1_calibrator* calibrator, size_t layer, kv1_tensor queries,
                                      kv1_tensor keys, kv1_tensor values, size_t first_position,
                                      const kv1_executor* executor, kv1_error* error);
/** What was found so far. Errors: KV1_INVALID_ARGUMENT for a layer without tokens, KV1_NOT_REPRESENTABLE,
 * KV1_OUT_OF_MEMORY. *calibration is then null. */
KV1_C_API kv1_code kv1_calibrator_finish(const kv1_calibrator* calibrator, const kv1_executor* executor,
                                         kv1_calibration** calibration, kv1_error* error);
/** Null is ignored. */
KV1_C_API void kv1_calibration_destroy(kv1_calibration* calibration);

/** Writes the policy's text as far as there is room, ends it with a zero, and gives its whole length; 0 if there is no
 * memory for it. */
KV1_C_API size_t kv1_calibration_policy(const kv1_calibration* calibration, char* text, size_t size);
/** Another policy for the same parts. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_RANGE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_calibration_set_policy(kv1_calibration* calibration, const char* policy,
                                              kv1_error* error);

/** Saves a calibration to a file, which is replaced once the new one is whole (kv1/calibration_file.hpp). The path is
 * as kv1_save_file has it. Errors: KV1_IO_ERROR, KV1_OUT_OF_MEMORY, KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_calibration_save_file(const kv1_calibration* calibration, const char* path,
                                             kv1_error* error);
/** The same into a sink. Errors: the same. */
KV1_C_API kv1_code kv1_calibration_save(const kv1_calibration* calibration, kv1_sink sink, kv1_error* error);
/** Loads a calibration of this model; null: of one that was not said. Errors: KV1_BAD_FORMAT,
 * KV1_UNSUPPORTED_VERSION, KV1_CHECKSUM_MISMATCH, KV1_TRUNCATED, KV1_DIFFERENT_MODEL, KV1_NON_FINITE, KV1_IO_ERROR,
 * KV1_OUT_OF_MEMORY, KV1_INVALID_ARGUMENT. *calibration is then null. */
KV1_C_API kv1_code kv1_calibration_load_file(const char* path, const kv1_fingerprint* model,
                                             kv1_calibration** calibration, kv1_error* error);
/** The same from a source, up to the calibration's last byte and no further. Errors: the same. */
KV1_C_API kv1_code kv1_calibration_load(kv1_source source, const kv1_fingerprint* model,
                                        kv1_calibration** calibration, kv1_error* error);

/** Makes a cache of the calibration's policy for a model of this shape: formats, encodings, groups, axes, fp16
 * sinks and window are the policy's, pages too where it names them; the rest is the options'. Errors: KV1_DIFFERENT_CACHE where
 * the shape is another one's, naming the layer; KV1_SHAPE_MISMATCH for a part that the policy names and the
 * calibration lacks; those of kv1_cache_create. *cache is then null. */
KV1_C_API kv1_code kv1_cache_create_calibrated(const kv1_calibration* calibration,
                                               const kv1_cache_options* options, kv1_cache** cache,
                                               kv1_error* error);

/** A way to keep a layer, and what it costs. */
typedef struct kv1_layer_option {
    size_t layer;       /**< from 0 */
    const char* policy; /**< such as "c3+ls+had,c2+ls+had@4:32"; without layers of its own */
    double cost; /**< in any unit that adds up over layers: kv1/layer_choice.hpp says what to measure */
} kv1_layer_option;

/** Chooses one of the options for each layer of `shape`, within `budget` bytes a token over all layers, at a low sum of
 * costs. fp16 tokens and pages are those of the options, which have the same ones. Writes the policy's text as far as there
 * is room, ends it with a zero, and gives its whole length in *length. `policy` may be null where `size` is 0. Errors:
 * KV1_INVALID_ARGUMENT for a layer without options, for what is no policy of one layer, for fp16 tokens or pages that differ
 * (with the option's layer), and where even the fewest bytes do not fit; KV1_OUT_OF_RANGE for a layer that the shape does
 * not have, KV1_NON_FINITE, KV1_OUT_OF_MEMORY. *length is then 0. */
KV1_C_API kv1_code kv1_choose_layers(const kv1_cache_options* shape, const kv1_layer_option* options,
                                     size_t count, double budget, char* policy, size_t size, size_t* length,
                                     kv1_error* error);

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
