/* SPDX-License-Identifier: Apache-2.0
 *
 * Slots for engines that keep their own books: cells, block tables, slot mappings. Part of kv1.h.
 * kv1/slot_store.hpp says what each call does.
 */
#ifndef KV1_C_SLOTS_H
#define KV1_C_SLOTS_H

#include <kv1/c/attention.h>
#include <kv1/c/cache.h>
#include <kv1/c/page.h>
#include <kv1/c/tensor.h>

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Layers of numbered slots. */
typedef struct kv1_slot_store kv1_slot_store;

/** Memory for the slots of one layer, which the caller owns and keeps for as long as the store lives. */
typedef struct kv1_slot_memory {
    void* bytes;         /**< aligned to 64 bytes */
    size_t size;         /**< at least kv1_slot_memory_bytes() */
    int32_t holds_slots; /**< not 0: it holds those of a store with the same options; else anything */
} kv1_slot_memory;

/** What a slot store is made from. */
typedef struct kv1_slot_options {
    size_t struct_size;            /**< sizeof(kv1_slot_options) */
    const kv1_layer* layers;       /**< [distinct_layers], each with the same struct_size */
    size_t distinct_layers;        /**< divides layer_count */
    size_t layer_count;            /**< of the store: layer i is layers[i % distinct_layers] */
    size_t slots;                  /**< of each layer, in whole pages */
    size_t page_tokens;            /**< slots of a page, a multiple of 16; 0: 64 */
    size_t fp16_slots;             /**< that may have an fp16 copy at a time; 0: none */
    size_t fp16_sinks;             /**< kv1_slots_settle leaves the copies of positions below this */
    size_t fp16_window;            /**< and of the newest fp16_window - 1 positions of a sequence */
    int32_t huge_pages;            /**< not 0: asks the system for large pages (Linux) */
    const kv1_slot_memory* memory; /**< null: the library's; else [layer_count] */
} kv1_slot_options;

/** Sets struct_size, and all else to zero. */
static inline void kv1_slot_options_init(kv1_slot_options* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** Bytes that the slots of a layer take. Errors: KV1_INVALID_ARGUMENT, KV1_OUT_OF_RANGE for the layer,
 * KV1_UNSUPPORTED_FORMAT. */
KV1_C_API kv1_code kv1_slot_memory_bytes(const kv1_slot_options* options, size_t layer, size_t* bytes,
                                         kv1_error* error);
/** Makes a store; *store is null where that fails. Errors: KV1_INVALID_ARGUMENT, KV1_SHAPE_MISMATCH, KV1_NON_FINITE,
 * KV1_UNSUPPORTED_FORMAT, KV1_UNSUPPORTED_TARGET, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_create(const kv1_slot_options* options, kv1_slot_store** store,
                                    kv1_error* error);
/** Frees the store; memory that was lent to it stays as it is. Null is ignored. */
KV1_C_API void kv1_slots_destroy(kv1_slot_store* store);
/** The number of slots of each layer; 0 for null. */
KV1_C_API size_t kv1_slots_count(const kv1_slot_store* store);

/** How a view names its slots: one of kv1_slot_view_kind_values. */
typedef int32_t kv1_slot_view_kind;
/** Values of kv1_slot_view_kind, which are kv1::slot_view_kind's. */
enum kv1_slot_view_kind_values {
    KV1_SLOT_RANGE, /**< slots first ... first + count - 1 */
    KV1_SLOT_LIST,  /**< slots items[0] ... items[count - 1], none twice */
    KV1_SLOT_TABLE  /**< the first count slots of the blocks items[0] ... items[blocks - 1] */
};

/** The slots of one stream, in the order of its mask's columns; zeros are none. */
typedef struct kv1_slot_view {
    kv1_slot_view_kind kind; /**< which */
    size_t first;            /**< KV1_SLOT_RANGE */
    size_t count;            /**< slots */
    const uint32_t* items;   /**< KV1_SLOT_LIST, KV1_SLOT_TABLE */
    size_t blocks;           /**< KV1_SLOT_TABLE: items that there are */
} kv1_slot_view;

/** Slots first ... first + count - 1. */
static inline kv1_slot_view kv1_slot_range(size_t first, size_t count) {
    kv1_slot_view v;
    memset(&v, 0, sizeof v);
    v.first = first;
    v.count = count;
    return v;
}
/** The first `tokens` slots of these blocks. */
static inline kv1_slot_view kv1_slot_table(const uint32_t* items, size_t blocks, size_t tokens) {
    kv1_slot_view v;
    memset(&v, 0, sizeof v);
    v.kind = KV1_SLOT_TABLE;
    v.items = items;
    v.blocks = blocks;
    v.count = tokens;
    return v;
}

/** Which columns of a view a query sees: one of kv1_slot_mask_kind_values. */
typedef int32_t kv1_slot_mask_kind;
/** Values of kv1_slot_mask_kind, which are kv1::slot_mask_kind's. With n columns and m queries: */
enum kv1_slot_mask_kind_values {
    KV1_SLOT_MASK_NONE,        /**< every query sees every column */
    KV1_SLOT_MASK_CAUSAL,      /**< query i sees columns 0 ... n - m + i */
    KV1_SLOT_MASK_BY_POSITION, /**< query i sees column c if 0 <= column_positions[c] <= query_positions[i] */
    KV1_SLOT_MASK_BYTES,       /**< query i sees column c if data[i * query_stride + c], a byte, is not 0 */
    KV1_SLOT_MASK_ADDITIVE     /**< data[i * query_stride + h * head_stride + c] is added; -infinity hides */
};

/** A mask; zeros are none. */
typedef struct kv1_slot_mask {
    kv1_slot_mask_kind kind;         /**< which */
    const int32_t* query_positions;  /**< KV1_SLOT_MASK_BY_POSITION, [queries] */
    const int32_t* column_positions; /**< KV1_SLOT_MASK_BY_POSITION, [columns]; -1: the slot is empty */
    const void* data;                /**< KV1_SLOT_MASK_BYTES, KV1_SLOT_MASK_ADDITIVE */
    kv1_scalar type;                 /**< KV1_SLOT_MASK_ADDITIVE: of data */
    ptrdiff_t query_stride;          /**< elements between queries; of bytes, not negative */
    ptrdiff_t head_stride; /**< KV1_SLOT_MASK_ADDITIVE: elements between query heads; 0: all have one */
} kv1_slot_mask;

/** The next `queries` queries of a call, the slots that they attend to, and what they see of them. */
typedef struct kv1_slot_stream {
    size_t queries;      /**< tokens of the query tensor, after those of the streams before */
    kv1_slot_view slots; /**< the columns of the mask */
    kv1_slot_mask mask;  /**< which columns a query sees */
} kv1_slot_stream;

/** Options of kv1_slots_attend. Arrays are read, or written, during the call, or until a plan is finished. */
typedef struct kv1_slot_attention {
    size_t struct_size;      /**< sizeof(kv1_slot_attention) */
    float scale;             /**< of q . k before the softmax; 0: 1 / sqrt(key_dim) */
    float soft_cap;          /**< of scores, as Gemma 2 has it; 0: none */
    kv1_precision precision; /**< of coded formats */
    size_t window; /**< positions that a query sees, its own included; 0: all. Not with additive masks */
    const float*
        alibi_slopes;         /**< null, or one a query head, of positions' distance or of an additive mask */
    const float* sink_logits; /**< null, or one a query head: logits without a value (gpt-oss) */
    /** Null, or receives [queries][heads] natural logarithms of the softmax denominators. */
    float* log_sum_exp;
} kv1_slot_attention;

/** Sets struct_size, and all else to zero. */
static inline void kv1_slot_attention_init(kv1_slot_attention* options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/** Encodes vectors into slots, over whatever they hold: keys [count][kv_heads][key_dim], values
 * [count][kv_heads][value_dim]; kv1_no_values() in the place of one leaves its side as it is. Errors:
 * KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH, KV1_INVALID_ARGUMENT, KV1_CAPACITY_EXCEEDED for fp16 copies, KV1_NON_FINITE,
 * KV1_NOT_REPRESENTABLE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_write(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                                   kv1_tensor keys, kv1_tensor values, const kv1_executor* executor,
                                   kv1_error* error);
/** kv1_slots_write with the positions that RoPE has turned the keys by, [count], none negative. Layers whose means turn
 * (kv1_layer.rotary, with means of keys) take keys in no other way; others check positions, and do not keep them.
 * Errors: as kv1_slots_write. */
KV1_C_API kv1_code kv1_slots_write_at(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                      const int32_t* positions, size_t count, kv1_tensor keys,
                                      kv1_tensor values, const kv1_executor* executor, kv1_error* error);
/** The position that a slot's key was written with, in a layer whose means turn; -1: there is none. */
KV1_C_API int32_t kv1_slots_key_position(const kv1_slot_store* store, size_t layer, uint32_t slot);
/** Attention of queries [queries][heads][key_dim] to their streams' slots, to outputs [queries][heads][value_dim].
 * Null options are the default. Errors: KV1_OUT_OF_RANGE, KV1_SHAPE_MISMATCH, KV1_INVALID_ARGUMENT, the token being a
 * stream's first query; KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_attend(const kv1_slot_store* store, size_t layer, const kv1_slot_stream* streams,
                                    size_t count, kv1_tensor queries, kv1_output outputs,
                                    const kv1_slot_attention* options, const kv1_executor* executor,
                                    kv1_error* error);

/** A call cut into tasks, for threads that are all there already, as ggml's are. For each phase they run its tasks,
 * each task once on any thread, and wait for each other; then one of them calls kv1_plan_finish. */
typedef struct kv1_plan kv1_plan;
/** kv1_slots_write as a plan. What it is given lives until the plan is finished. Errors: as there; *plan is then null. */
KV1_C_API kv1_code kv1_slots_plan_write(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                        size_t count, kv1_tensor keys, kv1_tensor values, kv1_plan** plan,
                                        kv1_error* error);
/** kv1_slots_write_at as a plan. Errors: as there; *plan is then null. */
KV1_C_API kv1_code kv1_slots_plan_write_at(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                           const int32_t* positions, size_t count, kv1_tensor keys,
                                           kv1_tensor values, kv1_plan** plan, kv1_error* error);
/** kv1_slots_attend as a plan. The options are copied, what they point to is not. Errors: as there; *plan is then null. */
KV1_C_API kv1_code kv1_slots_plan_attend(const kv1_slot_store* store, size_t layer,
                                         const kv1_slot_stream* streams, size_t count, kv1_tensor queries,
                                         kv1_output outputs, const kv1_slot_attention* options,
                                         kv1_plan** plan, kv1_error* error);
/** The number of phases; 0 for null. */
KV1_C_API size_t kv1_plan_phases(const kv1_plan* plan);
/** The number of tasks of a phase; 0 for null. */
KV1_C_API size_t kv1_plan_tasks(const kv1_plan* plan, size_t phase);
/** Does a task. Null is ignored. */
KV1_C_API void kv1_plan_run(const kv1_plan* plan, size_t phase, size_t task);
/** Ends the call after all of its phases, frees the plan, and gives the call's code. Null is KV1_OK. */
KV1_C_API kv1_code kv1_plan_finish(kv1_plan* plan, kv1_error* error);
/** Frees a plan that is not to be finished; null is ignored. Slots that were to be written to then hold what they held
 * or what they were to hold, and outputs are unspecified. */
KV1_C_API void kv1_plan_destroy(kv1_plan* plan);

/** Ends a step for these sequences. Sequence i has the slots sequences[i] and, if positions and positions[i] are not
 * null, their positions; else column c stands at c. Its slots lose their fp16 copies in all layers, but for positions
 * below fp16_sinks and the newest fp16_window - 1. Errors: KV1_OUT_OF_RANGE, KV1_INVALID_ARGUMENT, the token being the
 * sequence; KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_settle(kv1_slot_store* store, const kv1_slot_view* sequences,
                                    const int32_t* const* positions, size_t count, kv1_error* error);
/** Takes the fp16 copies of these slots away, in all layers. Errors: KV1_OUT_OF_RANGE. */
KV1_C_API kv1_code kv1_slots_release_fp16(kv1_slot_store* store, const uint32_t* slots, size_t count,
                                          kv1_error* error);
/** Takes all fp16 copies away. Errors: KV1_INVALID_ARGUMENT for null. */
KV1_C_API kv1_code kv1_slots_flush(kv1_slot_store* store, kv1_error* error);
/** 1 if the slot of the layer has an fp16 copy, else 0, for null too. */
KV1_C_API int32_t kv1_slots_has_fp16(const kv1_slot_store* store, size_t layer, uint32_t slot);
/** How many slots of a layer have an fp16 copy; 0 for null. */
KV1_C_API size_t kv1_slots_fp16_in_use(const kv1_slot_store* store, size_t layer);

/** Decodes keys or values of one KV head to out [count][channels]: fp16 copies where there are. Errors:
 * KV1_OUT_OF_RANGE, KV1_INVALID_ARGUMENT. */
KV1_C_API kv1_code kv1_slots_read(const kv1_slot_store* store, size_t layer, kv1_side side, size_t kv_head,
                                  const uint32_t* slots, size_t count, float* out, kv1_error* error);
/** Bytes of a slot in kv1_slots_export; 0 for null and where there is no such layer. */
KV1_C_API size_t kv1_slots_raw_bytes(const kv1_slot_store* store, size_t layer);
/** Copies the codes of slots out, [count][kv1_slots_raw_bytes()]. Errors: KV1_OUT_OF_RANGE. */
KV1_C_API kv1_code kv1_slots_export(const kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                    size_t count, void* bytes, kv1_error* error);
/** Stores what kv1_slots_export gave; the slots lose their fp16 copies. Errors: KV1_OUT_OF_RANGE, KV1_INVALID_ARGUMENT
 * for a slot that comes twice, KV1_NON_FINITE, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_import(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                                    const void* bytes, kv1_error* error);
/** Numbers of a slot in kv1_slots_export_fp16; 0 for null and where there is no such layer. */
KV1_C_API size_t kv1_slots_fp16_numbers(const kv1_slot_store* store, size_t layer);
/** Copies fp16 copies out, [count][kv1_slots_fp16_numbers()] fp16 numbers. Errors: KV1_OUT_OF_RANGE, also for a slot
 * without one; KV1_INVALID_ARGUMENT for a layer that has none. */
KV1_C_API kv1_code kv1_slots_export_fp16(const kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                         size_t count, uint16_t* numbers, kv1_error* error);
/** Gives slots these fp16 copies. Errors: as kv1_slots_export_fp16; KV1_CAPACITY_EXCEEDED, KV1_NON_FINITE,
 * KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_import_fp16(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                         size_t count, const uint16_t* numbers, kv1_error* error);

/** Copies slots of a layer onto others with their fp16 copies, as if all were read before any is written. Errors:
 * KV1_OUT_OF_RANGE, KV1_INVALID_ARGUMENT, KV1_CAPACITY_EXCEEDED, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_slots_copy(kv1_slot_store* store, size_t layer, const uint32_t* from,
                                  const uint32_t* to, size_t count, kv1_error* error);
/** The same, but the sources lose their fp16 copies. Errors: as kv1_slots_copy. */
KV1_C_API kv1_code kv1_slots_move(kv1_slot_store* store, size_t layer, const uint32_t* from,
                                  const uint32_t* to, size_t count, kv1_error* error);
/** Makes slots of a layer those that were never written to. Errors: KV1_OUT_OF_RANGE. */
KV1_C_API kv1_code kv1_slots_clear(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                                   kv1_error* error);
/** Makes all slots of all layers those that were never written to. Errors: KV1_INVALID_ARGUMENT for null. */
KV1_C_API kv1_code kv1_slots_clear_all(kv1_slot_store* store, kv1_error* error);

#ifdef __cplusplus
}
#endif

#endif
