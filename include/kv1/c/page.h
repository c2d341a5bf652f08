/* SPDX-License-Identifier: Apache-2.0
 *
 * What is stored, as it is stored: rows, pages, block tables. Part of kv1.h.
 */
#ifndef KV1_C_PAGE_H
#define KV1_C_PAGE_H

#include <kv1/c/cache.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Keys or values: one of kv1_side_values. */
typedef int32_t kv1_side;
/** Values of kv1_side, which are kv1::kv_side's. */
enum kv1_side_values { KV1_KEYS, KV1_VALUES };

/** Decodes cached vectors of one KV head into out[count][channels], rotated back and with their means.
 * Errors: KV1_INVALID_SEQUENCE, KV1_OUT_OF_RANGE, KV1_DROPPED_TOKENS, KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_read(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_side side,
                            size_t kv_head, size_t first, size_t count, float* out, kv1_error* error);

/** Destination of stored rows. Null where the format has no such part: affine formats have scales and minima,
 * compact and scaled binary ones scales alone, the others neither. */
typedef struct kv1_rows {
    void* packed;     /**< [rows][kv1_packed_bytes] */
    uint16_t* scales; /**< [rows][groups of channels], fp16 (compact formats: 16 bits of their own) */
    uint16_t* minima; /**< [rows][groups of channels], fp16 */
} kv1_rows;

/** The same to read from. */
typedef struct kv1_const_rows {
    const void* packed;     /**< [rows][kv1_packed_bytes] */
    const uint16_t* scales; /**< as above */
    const uint16_t* minima; /**< as above */
} kv1_const_rows;

/** Copies stored rows of one KV head out, bit for bit. Errors: KV1_INVALID_SEQUENCE, KV1_OUT_OF_RANGE,
 * KV1_DROPPED_TOKENS; KV1_INVALID_ARGUMENT for keys per channel, which have no rows. */
KV1_C_API kv1_code kv1_export_rows(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_side side,
                                   size_t kv_head, size_t first, size_t count, kv1_rows out,
                                   kv1_error* error);
/** Appends rows that are quantized already, bit for bit: [tokens][kv_heads]. Errors: as kv1_append;
 * KV1_NON_FINITE for metadata or plain values that are no numbers; KV1_INVALID_ARGUMENT for layers with fp16
 * copies or keys per channel. Where values lie in keys, `values` is all null. */
KV1_C_API kv1_code kv1_append_rows(kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t tokens,
                                   kv1_const_rows keys, kv1_const_rows values, kv1_error* error);

/** How the K or the V half of a page lies; kv1/layout.hpp says what lines, shared lines and units are. Offsets are
 * in bytes from the page's beginning. */
typedef struct kv1_section {
    kv1_format format;     /**< of this half */
    kv1_axis axis;         /**< of its metadata */
    size_t channels;       /**< of a vector */
    size_t group_channels; /**< that share metadata */
    size_t offset;         /**< of the lines */
    size_t units;          /**< tiles of keys, runs of 16 channels of values */
    size_t unit_lines;     /**< lines of 64 bytes of a unit */
    size_t own_lines;      /**< of a unit, without shared ones */
    size_t shared_lines;   /**< of a unit, for 3-bit codes: two lines share one */
    size_t first_shared;   /**< lines from the first of a unit to its first shared one */
    size_t scale_offset;   /**< of the fp16 scales */
    size_t minimum_offset; /**< of the fp16 minima */
} kv1_section;

/** How a page of one layer and KV head lies. */
typedef struct kv1_page_layout {
    size_t struct_size;     /**< sizeof(kv1_page_layout), set by the caller */
    size_t page_tokens;     /**< of a page */
    size_t bytes;           /**< of a page */
    kv1_section keys;       /**< the K half */
    kv1_section values;     /**< the V half; where values lie in keys, these as sections of keys */
    int32_t values_in_keys; /**< whether they do */
} kv1_page_layout;

/** Sets struct_size, and all else to zero. */
static inline void kv1_page_layout_init(kv1_page_layout* layout) {
    memset(layout, 0, sizeof *layout);
    layout->struct_size = sizeof *layout;
}

/** A layer's page. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_RANGE. */
KV1_C_API kv1_code kv1_cache_layout(const kv1_cache* cache, size_t layer, kv1_page_layout* layout,
                                    kv1_error* error);

/** Block tables as FlashInfer and vLLM have them: sequence i owns indices indptr[i] ... indptr[i + 1] - 1,
 * and its last page holds last_page_tokens[i] tokens (0 where there is none). */
typedef struct kv1_block_tables {
    int32_t* indptr;           /**< [sequences + 1] */
    int32_t* indices;          /**< [index_capacity] */
    size_t index_capacity;     /**< at least kv1_count_blocks */
    int32_t* last_page_tokens; /**< [sequences] */
} kv1_block_tables;

/** Indices that the block tables of these sequences need. Errors: KV1_INVALID_SEQUENCE, KV1_OUT_OF_RANGE,
 * KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_count_blocks(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                                    size_t layer, size_t* blocks, kv1_error* error);
/** Block tables of a layer: pages that are not dropped, in order of position. *blocks, unless it is null,
 * becomes the number of indices. Errors: as kv1_count_blocks; KV1_SHAPE_MISMATCH. */
KV1_C_API kv1_code kv1_export_block_tables(const kv1_cache* cache, const kv1_sequence* sequences,
                                           size_t count, size_t layer, kv1_block_tables out, size_t* blocks,
                                           kv1_error* error);
/** The bytes of one KV head's page, as kv1_cache_layout says. They stay where they are until the cache grows
 * or is destroyed. Errors: KV1_OUT_OF_RANGE for a block that is not in use. */
KV1_C_API kv1_code kv1_page(const kv1_cache* cache, size_t layer, size_t kv_head, uint32_t block,
                            const void** page, size_t* bytes, kv1_error* error);
/** Keys per channel of the open page: fp16, rotated and less their means, in the keys' half of a page of fp16
 * keys. Errors: KV1_INVALID_SEQUENCE; KV1_OUT_OF_RANGE where the layer has no such keys or no open page. */
KV1_C_API kv1_code kv1_open_keys(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t kv_head,
                                 const void** keys, size_t* bytes, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
