/* SPDX-License-Identifier: Apache-2.0
 *
 * The cache: formats, encodings, layers, what it costs. Part of kv1.h.
 */
#ifndef KV1_C_CACHE_H
#define KV1_C_CACHE_H

#include <kv1/c/error.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** How K or V are stored: one of kv1_format_values. */
typedef int32_t kv1_format;
/** Values of kv1_format, which are kv1::kv_format's. */
enum kv1_format_values {
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
    KV1_CODEBOOK2, /**< compact, with four levels for normally distributed channels */
    KV1_CODEBOOK4  /**< the same with sixteen levels, of which the outer ones lie further apart */
};

/** A format's name, such as "affine2"; "unknown" where there is none. Static text. */
KV1_C_API const char* kv1_format_name(kv1_format format);
/** Bytes of the packed values of one vector as kv1_export_rows gives them; 0 for a format that is none. */
KV1_C_API size_t kv1_packed_bytes(kv1_format format, size_t channels);
/** Bytes of one stored vector with its metadata. group: channels that share metadata; 0: all. 0 for a format
 * that is none, or a group that does not divide the channels. */
KV1_C_API size_t kv1_row_bytes(kv1_format format, size_t channels, size_t group);

/** How the levels of a vector are chosen: one of kv1_levels_values. */
typedef int32_t kv1_levels;
/** Values of kv1_levels, which are kv1::level_choice's. */
enum kv1_levels_values {
    KV1_LEVELS_MIN_MAX,       /**< the range of the vector */
    KV1_LEVELS_LEAST_SQUARES, /**< fitted to the vector */
    KV1_LEVELS_CLIP_SEARCH    /**< the best of several narrower ranges */
};

/** What happens to keys, or values, of a layer before they are stored (kv1/encoding.hpp). The arrays are read
 * by kv1_cache_create alone. */
typedef struct kv1_encoding {
    size_t struct_size; /**< sizeof(kv1_encoding) */
    kv1_levels levels;  /**< affine and compact formats have a choice */
    /** Channels that are rotated together, a power of two that divides the head dim; 0: no rotation. */
    size_t hadamard;
    /** [kv_heads][dim], taken off every vector; or null. Of keys that turn with their position (kv1_rotary): as
     * they are before they turn. */
    const float* means;
    /** [kv_heads][dim][dim], symmetric and positive semidefinite: what errors cost; or null. Not with
     * KV1_LEVELS_MIN_MAX. */
    const float* error_weights;
    /** [kv_heads][dim][dim], each matrix orthogonal: vectors become their products with its rows, before they
     * are rotated, and attention turns them back; or null. Not for values in keys. */
    const float* basis;
} kv1_encoding;

/** Sets struct_size, and all else to zero. */
static inline void kv1_encoding_init(kv1_encoding* encoding) {
    memset(encoding, 0, sizeof *encoding);
    encoding->struct_size = sizeof *encoding;
}

/** The most of so many channels that can be rotated together: the largest power of two that divides them. */
KV1_C_API size_t kv1_rotation_width(size_t channels);

/** Which channels make a pair: one of kv1_rotary_pairs_values. */
typedef int32_t kv1_rotary_pairs;
/** Values of kv1_rotary_pairs, which are kv1::rotary_pairs'. */
enum kv1_rotary_pairs_values {
    KV1_ROTARY_HALF_SPLIT, /**< pair j of n: channels j and n + j */
    KV1_ROTARY_INTERLEAVED /**< pair j: channels 2 j and 2 j + 1 */
};

/** How keys turn with their position (kv1/rotary_embedding.hpp). The array is read by kv1_cache_create
 * alone. */
typedef struct kv1_rotary {
    size_t struct_size;       /**< sizeof(kv1_rotary) */
    const float* frequencies; /**< [pair_count], radians a position */
    size_t pair_count;        /**< 2 * pair_count channels turn */
    kv1_rotary_pairs pairs;   /**< which of them make a pair */
    size_t first_channel;     /**< the first channel that turns */
} kv1_rotary;

/** Sets struct_size, and all else to zero. */
static inline void kv1_rotary_init(kv1_rotary* rotary) {
    memset(rotary, 0, sizeof *rotary);
    rotary->struct_size = sizeof *rotary;
}

/** Writes the frequencies of plain RoPE, [channels / 2]: theta^(-2 j / channels) for pair j. Null is ignored. */
KV1_C_API void kv1_rotary_frequencies(double theta, size_t channels, float* frequencies);

/** A cache of one or more layers and any number of sequences. */
typedef struct kv1_cache kv1_cache;

/** Names a sequence of one cache; a plain value. */
typedef struct kv1_sequence {
    uint32_t slot;       /**< of the cache's table */
    uint32_t generation; /**< tells sequences of one slot apart */
} kv1_sequence;

/** Which keys share a scale and minimum: one of kv1_axis_values. */
typedef int32_t kv1_axis;
/** Values of kv1_axis, which are kv1::quantization_axis's. */
enum kv1_axis_values {
    KV1_PER_TOKEN,  /**< the channels of a token */
    KV1_PER_CHANNEL /**< a channel's, over all tokens of a page; they are kept in fp16 until it is full */
};

/** Shape of one layer. */
typedef struct kv1_layer {
    size_t struct_size;                 /**< sizeof(kv1_layer) */
    size_t kv_heads;                    /**< query heads are a multiple of it */
    size_t key_dim;                     /**< channels of a key and a query */
    size_t value_dim;                   /**< channels of a value and an output */
    kv1_format key_format;              /**< of keys */
    kv1_format value_format;            /**< of values */
    const kv1_encoding* key_encoding;   /**< of keys; null: the default */
    const kv1_encoding* value_encoding; /**< of values; null: the default */
    /** Channels of a key that share a scale and minimum; 0: all of them. Affine and compact formats; a
     * multiple of 32 that divides key_dim. */
    size_t key_group;
    size_t value_group;      /**< the same of values */
    size_t sliding_window;   /**< tokens that a query sees, its own included; 0: all */
    size_t window_retention; /**< tokens behind the window that a commit keeps, for kv1_truncate */
    kv1_axis key_axis;       /**< affine and compact formats of at most 4 bits, without key_group */
    /** Not 0: values are the first value_dim channels of keys (multi-head latent attention) and are stored
     * once. Their format and group are the keys', value_encoding is null. */
    int32_t values_in_keys;
    /** How keys turn with their position: the means of key_encoding are then those of keys before they turn;
     * null: they do not, or means are those of keys as they are stored. */
    const kv1_rotary* rotary;
} kv1_layer;

/** Sets struct_size, and all else to zero. */
static inline void kv1_layer_init(kv1_layer* layer) {
    memset(layer, 0, sizeof *layer);
    layer->struct_size = sizeof *layer;
}

/** Where a cache's arenas come from; the functions may be called from any thread that calls the cache. */
typedef struct kv1_memory {
    /** Memory of so many bytes, aligned to `alignment`; null where there is none. */
    void* (*allocate)(void* context, size_t bytes, size_t alignment);
    /** Takes back what allocate gave for so many bytes. */
    void (*release)(void* context, void* memory, size_t bytes, size_t alignment);
    void* context; /**< first argument of both */
} kv1_memory;

/** What a cache is made from. */
typedef struct kv1_cache_options {
    size_t struct_size;            /**< sizeof(kv1_cache_options) */
    const kv1_layer* layers;       /**< [distinct_layers], each with the same struct_size */
    size_t distinct_layers;        /**< divides layer_count */
    size_t layer_count;            /**< of the cache: layer i is layers[i % distinct_layers] */
    size_t capacity_tokens;        /**< room over all sequences, in whole pages */
    size_t page_tokens;            /**< a multiple of 16; 0: 64 */
    size_t fp16_sinks;             /**< first tokens of a sequence that stay in fp16 */
    size_t fp16_window;            /**< last tokens of a query, its own included, that it sees in fp16 */
    size_t window_capacity_tokens; /**< room of layers with a sliding window; 0: capacity_tokens */
    size_t fp16_capacity_tokens;   /**< room of fp16 copies and open pages; 0: capacity_tokens */
    int32_t huge_pages;            /**< not 0: asks the system for large pages (Linux) */
    size_t prefix_events;          /**< events of the prefix index that are kept until they are taken */
    const kv1_memory* memory;      /**< null: operator new. Copied; its context outlives the cache */
    size_t first_position;         /**< position of a sequence's first token, for kv1_rotary */
} kv1_cache_options;

/** Sets struct_size, and all else to zero. */
static inline void kv1_cache_options_init(kv1_cache_options* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** Makes a cache. Memory is reserved at once and touched as sequences grow. Errors: KV1_INVALID_ARGUMENT and
 * KV1_SHAPE_MISMATCH for options that no cache can have (naming the layer), KV1_UNSUPPORTED_FORMAT,
 * KV1_UNSUPPORTED_TARGET (the environment's KV1_TARGET), KV1_OUT_OF_MEMORY. *cache is then null. */
KV1_C_API kv1_code kv1_cache_create(const kv1_cache_options* options, kv1_cache** cache, kv1_error* error);
/** Makes a cache of a policy such as "safe" or "c3+ls+had+mean,c2+ls+had@4:32" (kv1/cache_policy.hpp). Formats, levels,
 * rotations, groups, axes, fp16 sinks and window are the policy's, pages too where it names them; the rest is the
 * options'. What the policy takes from a calibration (+mean, +ew, +basis) are the arrays of each layer's encodings, the
 * means being a projection's bias, say. Errors: KV1_INVALID_ARGUMENT for what is no policy; KV1_OUT_OF_RANGE for a layer
 * that the options do not have; KV1_SHAPE_MISMATCH for an array that is missing; those of kv1_cache_create. *cache is
 * then null. */
KV1_C_API kv1_code kv1_cache_create_with_policy(const char* policy, const kv1_cache_options* options,
                                                kv1_cache** cache, kv1_error* error);
/** Frees the cache and all that it holds; null is ignored. */
KV1_C_API void kv1_cache_destroy(kv1_cache* cache);

/** capacity_tokens of a cache with these options whose pages take so many bytes at most, fp16 copies left
 * out. Errors: as kv1_cache_create. */
KV1_C_API kv1_code kv1_capacity_for_bytes(const kv1_cache_options* options, size_t bytes, size_t* tokens,
                                          kv1_error* error);
/** Raises the capacity; pages keep their numbers and move. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_MEMORY.
 * */
KV1_C_API kv1_code kv1_cache_grow(kv1_cache* cache, size_t capacity_tokens, kv1_error* error);
/** How many layers there are; 0 for null. */
KV1_C_API size_t kv1_cache_layers(const kv1_cache* cache);
/** Free pages, of the layers that have fewest; 0 for null. */
KV1_C_API size_t kv1_cache_available_pages(const kv1_cache* cache);
/** Checks every invariant, for tests and debugging. Errors: KV1_BROKEN_INVARIANT, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_cache_validate(const kv1_cache* cache, kv1_error* error);

/** What a cache, or a sequence, holds and costs; sizes in bytes. Tokens count each sequence as if it were
 * alone, pages count once. */
typedef struct kv1_statistics {
    size_t struct_size;       /**< sizeof(kv1_statistics), set by the caller */
    size_t sequences;         /**< living ones */
    size_t tokens;            /**< of the layer that holds most, over all sequences */
    size_t layers;            /**< of the cache */
    size_t pages_in_use;      /**< each page_tokens tokens of every layer */
    size_t pages_total;       /**< that the cache has */
    size_t bytes_reserved;    /**< for all pages */
    size_t bytes_in_use;      /**< by pages in use, padding and unfilled tokens included */
    size_t bytes_stored;      /**< of the cached tokens: values and metadata */
    size_t bytes_as_fp16;     /**< the same tokens in fp16 */
    size_t bytes_fp16_copies; /**< of bytes_in_use: fp16 sinks, windows and open keys */
    size_t bytes_retained;    /**< of bytes_in_use: pages behind sliding windows that are kept all the same */
    size_t bytes_unfilled;    /**< token slots of open pages that hold nothing yet */
    size_t bytes_shared;      /**< that sharing saves; of one sequence: of pages that others hold, too */
    size_t pages_indexed;     /**< held by the prefix index */
} kv1_statistics;

/** Sets struct_size, and all else to zero. */
static inline void kv1_statistics_init(kv1_statistics* statistics) {
    memset(statistics, 0, sizeof *statistics);
    statistics->struct_size = sizeof *statistics;
}

/** Over all sequences. Fields that this library does not know become 0. Errors: KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_cache_statistics(const kv1_cache* cache, kv1_statistics* statistics, kv1_error* error);
/** Of one sequence. Errors: KV1_INVALID_ARGUMENT, KV1_INVALID_SEQUENCE. */
KV1_C_API kv1_code kv1_sequence_statistics(const kv1_cache* cache, kv1_sequence sequence,
                                           kv1_statistics* statistics, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
