/* SPDX-License-Identifier: Apache-2.0
 *
 * Saving and loading sequences and prefixes: memory, files, callbacks. Part of kv1.h.
 */
#ifndef KV1_C_SAVING_H
#define KV1_C_SAVING_H

#include <kv1/c/cache.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Names a model; zeros name none (kv1/model_fingerprint.hpp). */
typedef struct kv1_fingerprint {
    uint8_t bytes[32]; /**< a digest, or what kv1_fingerprint_of gives */
} kv1_fingerprint;

/** A fingerprint of any bytes, after what came `before` unless that is null. Errors: KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_fingerprint_of(const void* bytes, size_t size, const kv1_fingerprint* before,
                                      kv1_fingerprint* fingerprint);

/** What a save stores beside sequences. */
typedef struct kv1_save_options {
    size_t struct_size;           /**< sizeof(kv1_save_options) */
    int32_t prefixes;             /**< not 0: the prefix index, too */
    const kv1_fingerprint* model; /**< whose keys and values they are; null: not said */
} kv1_save_options;

/** Sets struct_size, and all else to zero. */
static inline void kv1_save_options_init(kv1_save_options* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** What a load expects. */
typedef struct kv1_load_options {
    size_t struct_size;           /**< sizeof(kv1_load_options) */
    const kv1_fingerprint* model; /**< the one that was given when it was saved */
} kv1_load_options;

/** Sets struct_size, and all else to zero. */
static inline void kv1_load_options_init(kv1_load_options* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** Where saved bytes go. */
typedef struct kv1_sink {
    /** Takes all bytes, or returns 0. */
    int32_t (*write)(void* context, const void* bytes, size_t size);
    void* context; /**< its first argument */
} kv1_sink;

/** Where saved bytes come from. */
typedef struct kv1_source {
    /** Fills all bytes, or returns 0. */
    int32_t (*read)(void* context, void* bytes, size_t size);
    /** Goes back to where reading began, or returns 0. Null: the source is read once, and verified meanwhile.
     * */
    int32_t (*rewind)(void* context);
    void* context; /**< first argument of both */
} kv1_source;

/** Bytes that saving these sequences takes. Errors: KV1_INVALID_SEQUENCE, KV1_LAYERS_DISAGREE,
 * KV1_OUT_OF_MEMORY, KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_saved_bytes(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                                   const kv1_save_options* options, size_t* bytes, kv1_error* error);
/** Saves sequences, in this order; none where only prefixes are wanted. Null options are the default. Errors:
 * as kv1_saved_bytes; KV1_IO_ERROR where the sink refused. */
KV1_C_API kv1_code kv1_save(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                            kv1_sink sink, const kv1_save_options* options, kv1_error* error);
/** The same into memory. *written, unless it is null, becomes the bytes that it took. Errors: as
 * kv1_saved_bytes; KV1_SHAPE_MISMATCH where the memory does not suffice. */
KV1_C_API kv1_code kv1_save_memory(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                                   void* memory, size_t size, size_t* written,
                                   const kv1_save_options* options, kv1_error* error);
/** The same into a file, which is replaced once the new one is whole (kv1/cache_file.hpp). The path is UTF-8
 * on Windows, elsewhere the system's bytes. Errors: as kv1_saved_bytes; KV1_IO_ERROR. */
KV1_C_API kv1_code kv1_save_file(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                                 const char* path, const kv1_save_options* options, kv1_error* error);

/** Loads what was saved, beside what the cache holds: handles in the order of saving, and how many. Null
 * options are the default. Errors: KV1_BAD_FORMAT, KV1_UNSUPPORTED_VERSION, KV1_CHECKSUM_MISMATCH,
 * KV1_TRUNCATED, KV1_DIFFERENT_MODEL, KV1_DIFFERENT_CACHE (naming the layer), KV1_SHAPE_MISMATCH for too few
 * handles, KV1_CAPACITY_EXCEEDED, KV1_OUT_OF_MEMORY, KV1_NON_FINITE, KV1_IO_ERROR, KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_load(kv1_cache* cache, kv1_source source, kv1_sequence* sequences, size_t capacity,
                            size_t* count, const kv1_load_options* options, kv1_error* error);
/** The same from memory. Errors: as kv1_load. */
KV1_C_API kv1_code kv1_load_memory(kv1_cache* cache, const void* memory, size_t size, kv1_sequence* sequences,
                                   size_t capacity, size_t* count, const kv1_load_options* options,
                                   kv1_error* error);
/** The same from a file, whose path is as kv1_save_file has it. Errors: as kv1_load; KV1_BAD_FORMAT where
 * bytes follow the end. */
KV1_C_API kv1_code kv1_load_file(kv1_cache* cache, const char* path, kv1_sequence* sequences, size_t capacity,
                                 size_t* count, const kv1_load_options* options, kv1_error* error);

/** Saves one sequence to memory of at least kv1_saved_bytes and destroys it. Errors: as kv1_save_memory. */
KV1_C_API kv1_code kv1_swap_out(kv1_cache* cache, kv1_sequence sequence, void* memory, size_t size,
                                kv1_error* error);
/** Brings it back under another handle. Errors: as kv1_load; KV1_BAD_FORMAT where the memory holds anything
 * but one sequence. */
KV1_C_API kv1_code kv1_swap_in(kv1_cache* cache, const void* memory, size_t size, kv1_sequence* sequence,
                               kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
