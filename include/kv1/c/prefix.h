/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages of prompts, kept for sequences that begin alike. Part of kv1.h.
 */
#ifndef KV1_C_PREFIX_H
#define KV1_C_PREFIX_H

#include <kv1/c/cache.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Tells apart prompts of equal tokens whose pages differ; zeros where nothing does. */
typedef struct kv1_prefix_salt {
    uint64_t high; /**< any bits: an adapter, a tenant */
    uint64_t low;  /**< any bits: an image's hash */
} kv1_prefix_salt;

/** Keeps a prefix from being evicted until it is given back. */
typedef struct kv1_prefix_pin {
    uint32_t node;  /**< the index's own */
    uint32_t stamp; /**< the index's own */
    size_t tokens;  /**< that are pinned */
} kv1_prefix_pin;

/** What happened to a node, the tokens of one page: one of kv1_prefix_event_values. */
typedef int32_t kv1_prefix_event_kind;
/** Values of kv1_prefix_event_kind, which are kv1::prefix_event_kind's. */
enum kv1_prefix_event_values { KV1_PREFIX_STORED, KV1_PREFIX_EVICTED };

/** A node came into the index or left it. */
typedef struct kv1_prefix_event {
    kv1_prefix_event_kind kind; /**< which */
    uint32_t tokens;            /**< of this node */
    uint64_t hash;              /**< of all tokens up to the node's end, salt included */
    uint64_t previous;          /**< the hash before the node */
} kv1_prefix_event;

/** Keeps the pages of a prompt, which the sequence holds from position 0 on, for others that begin alike.
 * Only whole pages, unless `partial` is not 0. *known, unless it is null, becomes the tokens that are known
 * now. Errors: KV1_INVALID_SEQUENCE, KV1_LAYERS_DISAGREE, KV1_OUT_OF_RANGE for more tokens than the sequence
 * holds, KV1_OUT_OF_MEMORY. */
KV1_C_API kv1_code kv1_prefix_store(kv1_cache* cache, kv1_sequence sequence, const int32_t* tokens,
                                    size_t count, kv1_prefix_salt salt, int32_t partial, size_t* known,
                                    kv1_error* error);
/** A new sequence with the longest known beginning of these tokens, of which it holds *matched. Leave out the
 * tokens whose queries are needed, at least the last one. Errors: KV1_OUT_OF_MEMORY, KV1_CAPACITY_EXCEEDED.
 * */
KV1_C_API kv1_code kv1_prefix_create(kv1_cache* cache, const int32_t* tokens, size_t count,
                                     kv1_prefix_salt salt, kv1_sequence* sequence, size_t* matched,
                                     kv1_error* error);
/** Pins the longest beginning whose nodes are known in full. Errors: KV1_OUT_OF_RANGE where none is. */
KV1_C_API kv1_code kv1_prefix_pin_tokens(kv1_cache* cache, const int32_t* tokens, size_t count,
                                         kv1_prefix_salt salt, kv1_prefix_pin* pin, kv1_error* error);
/** Gives a pin back. Errors: KV1_OUT_OF_RANGE for one that was given back before. */
KV1_C_API kv1_code kv1_prefix_unpin(kv1_cache* cache, kv1_prefix_pin pin, kv1_error* error);
/** Evicts the least recently used pages that nothing needs, `pages` at most; how many went. 0 for null. */
KV1_C_API size_t kv1_prefix_evict(kv1_cache* cache, size_t pages);
/** Evicts all but what is pinned; null is ignored. */
KV1_C_API void kv1_prefix_clear(kv1_cache* cache);
/** Pages that the index holds; 0 for null. */
KV1_C_API size_t kv1_prefix_pages(const kv1_cache* cache);
/** Moves the oldest events to the array; how many. 0 for null. */
KV1_C_API size_t kv1_prefix_take_events(kv1_cache* cache, kv1_prefix_event* events, size_t capacity);
/** Events that found no room; 0 for null. */
KV1_C_API size_t kv1_prefix_lost_events(const kv1_cache* cache);

#ifdef __cplusplus
}
#endif

#endif
