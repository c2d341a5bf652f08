// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/sequence.h.
#pragma once

#include <kv1/c/sequence.h>
#include <kv1/detail/c_api/cache.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

extern "C" {

kv1_code kv1_sequence_create(kv1_cache* cache, kv1_sequence* sequence, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, sequence))
        return c_refuse_null(error);
    const auto made = cache->cache.try_create_sequence();
    if (made)
        *sequence = c_sequence(*made);
    return c_report(made.reason(), error);
}

kv1_code kv1_sequence_destroy(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_destroy_sequence(c_sequence(sequence)), error);
}

int32_t kv1_sequence_lives(const kv1_cache* cache, kv1_sequence sequence) {
    return cache != nullptr && cache->cache.contains(kv1::detail::c_sequence(sequence)) ? 1 : 0;
}

kv1_code kv1_length(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t* tokens,
                    kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, tokens))
        return c_refuse_null(error);
    const auto length = cache->cache.try_length(c_sequence(sequence), layer);
    if (length)
        *tokens = *length;
    return c_report(length.reason(), error);
}

kv1_code kv1_sequence_length(const kv1_cache* cache, kv1_sequence sequence, size_t* tokens,
                             kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, tokens))
        return c_refuse_null(error);
    const auto length = cache->cache.try_length(c_sequence(sequence));
    if (length)
        *tokens = *length;
    return c_report(length.reason(), error);
}

kv1_code kv1_fork(kv1_cache* cache, kv1_sequence sequence, kv1_sequence* forked, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, forked))
        return c_refuse_null(error);
    const auto made = cache->cache.try_fork(c_sequence(sequence));
    if (made)
        *forked = c_sequence(*made);
    return c_report(made.reason(), error);
}

kv1_code kv1_truncate(kv1_cache* cache, kv1_sequence sequence, size_t tokens, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_truncate(c_sequence(sequence), tokens), error);
}

kv1_code kv1_drop_pages(kv1_cache* cache, kv1_sequence sequence, size_t first_page, size_t pages,
                        kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_drop_pages(c_sequence(sequence), first_page, pages), error);
}

kv1_code kv1_commit(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_commit(c_sequence(sequence)).reason(), error);
}

kv1_code kv1_rollback(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_rollback(c_sequence(sequence)), error);
}

kv1_code kv1_append(kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor keys, kv1_tensor values,
                    const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    return c_report(cache->cache.try_append(c_sequence(sequence), layer, c_view(keys), c_view(values),
                                            c_executor{executor}),
                    error);
}

kv1_code kv1_append_batch(kv1_cache* cache, const kv1_sequence* sequences, const size_t* indptr, size_t count,
                          size_t layer, kv1_tensor keys, kv1_tensor values, const kv1_executor* executor,
                          kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, indptr))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    c_sequences ids;
    if (const kv1::status s = ids.assign(sequences, count); !s)
        return c_report(s, error);
    return c_report(cache->cache.try_append(ids.view(), layer, {indptr, count + 1}, c_view(keys),
                                            c_view(values), c_executor{executor}),
                    error);
}

} // extern "C"
