/* SPDX-License-Identifier: Apache-2.0
 *
 * kv1 for C, and for languages that call C. The library behind it is kv1_c (CMake: -DKV1_BUILD_C=ON, target
 * kv1::c), or one C++ file of yours that includes kv1/c_api.hpp. With -DBUILD_SHARED_LIBS=ON it is a shared
 * library, as Python's ctypes wants it (tests/c/flow.py).
 *
 *   kv1_layer layer = {.struct_size = sizeof layer, .kv_heads = 8, .key_dim = 128, .value_dim = 128};
 *   kv1_cache_options options = {.struct_size = sizeof options, .layers = &layer, .distinct_layers = 1,
 *                                .layer_count = 32, .capacity_tokens = 4096};
 *   kv1_cache* cache;
 *   kv1_error error;
 *   if (kv1_cache_create_with_policy("safe", &options, &cache, &error) != KV1_OK) ...
 *   kv1_sequence sequence;
 *   kv1_sequence_create(cache, &sequence, NULL);
 *   for each step:
 *       for each layer:
 *           kv1_append(cache, sequence, layer, kv1_contiguous(k, KV1_FP32, tokens, 8, 128),
 *                      kv1_contiguous(v, KV1_FP32, tokens, 8, 128), NULL, &error);
 *           kv1_attend(cache, sequence, layer, kv1_contiguous(q, KV1_FP32, tokens, 32, 128),
 *                      kv1_contiguous_output(out, KV1_FP32, tokens, 32, 128), NULL, NULL, &error);
 *       kv1_commit(cache, sequence, &error);
 *
 * The policy `safe` (kv1/cache_policy.hpp) is for models that nobody trained for their cache. kv1_cache_create takes
 * formats and encodings as they stand in the layers; KV1_AFFINE2 without an encoding is for models that were trained
 * with it.
 *
 * kv1/kv_cache.hpp says what formats, encodings, windows, commits and prefixes are: everything here does what
 * its namesake there does. cache.append(sequence, layer, keys, values, executor) is kv1_append(cache, sequence,
 * layer, keys, values, executor, &error), and kv1_append_batch for several sequences. These have other names:
 *
 *   create_sequence, destroy_sequence, contains   kv1_sequence_create, kv1_sequence_destroy, kv1_sequence_lives
 *   length of a layer, of a sequence              kv1_length, kv1_sequence_length
 *   store_prefix, create_from_prefix              kv1_prefix_store, kv1_prefix_create
 *   prefixes().pin, .unpin, .evict, ...           kv1_prefix_pin_tokens, kv1_prefix_unpin, kv1_prefix_evict, ...
 *   grow, validate, statistics                    kv1_cache_grow, kv1_cache_validate, kv1_cache_statistics;
 *                                                 of one sequence: kv1_sequence_statistics
 *   a cache's layers, layout, available_pages     kv1_cache_layers, kv1_cache_layout, kv1_cache_available_pages
 *
 * Errors. A call that can fail returns a code. Where `error` is not null, it also says there which rule was
 * broken and where; a call that succeeds leaves it alone. A failed call leaves the cache as it was, and sets
 * no handle, length or count; arrays that it was to fill may have changed. KV1_OUT_OF_MEMORY and
 * KV1_CAPACITY_EXCEEDED may have cost prefixes that nobody pinned. Every call refuses a null pointer with
 * KV1_INVALID_ARGUMENT, unless it says what null means; arrays of no elements may be null. No call throws or
 * aborts, or keeps a pointer of the caller's, but for the memory functions of kv1_cache_options.
 *
 * Structures. Those that begin with struct_size may get more fields at their end in later versions. Set
 * struct_size to the structure's size and all other fields to what you want, or to zero, which is the
 * default; the functions kv1_..._init() do the first part. A program may then run with a library of another
 * version: it takes fields that the program does not have as zero, and refuses those that it does not know
 * itself unless they are zero (KV1_INVALID_ARGUMENT). The other structures stay as they are.
 *
 * Threads. As in C++: calls that take a const cache may run at once from any threads, and beside calls that
 * change other sequences. Calls that change a sequence (append, truncate, drop, commit, rollback, destroy,
 * swapping out) need that sequence for themselves; kv1_fork and kv1_prefix_store read theirs. Creating,
 * forking, loading and destroying sequences, and all calls named kv1_prefix_..., may run at once from any
 * threads. kv1_cache_grow, kv1_cache_validate and kv1_cache_destroy need the cache for themselves. Calls
 * without a cache may run at any time, those on one estimator one after the other.
 *
 * Callbacks (executors, memory, sinks, sources) return normally: they neither throw nor jump.
 */
#ifndef KV1_KV1_H
#define KV1_KV1_H

#include <kv1/c/attention.h>
#include <kv1/c/cache.h>
#include <kv1/c/calibration.h>
#include <kv1/c/error.h>
#include <kv1/c/page.h>
#include <kv1/c/prefix.h>
#include <kv1/c/saving.h>
#include <kv1/c/sequence.h>
#include <kv1/c/slots.h>
#include <kv1/c/tensor.h>

#endif
