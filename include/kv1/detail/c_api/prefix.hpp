// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/prefix.h.
#pragma once

#include <kv1/c/prefix.h>
#include <kv1/detail/c_api/cache.hpp>

#include <kv1/prefix_index.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <type_traits>

namespace kv1::inline KV1_ABI::detail {

static_assert(std::is_same_v<token_id, std::int32_t>);
static_assert(static_cast<int>(prefix_event_kind::stored) == KV1_PREFIX_STORED &&
              static_cast<int>(prefix_event_kind::evicted) == KV1_PREFIX_EVICTED);

inline prefix_salt c_salt(kv1_prefix_salt s) noexcept { return {s.high, s.low}; }

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_prefix_store(kv1_cache* cache, kv1_sequence sequence, const int32_t* tokens, size_t count,
                          kv1_prefix_salt salt, int32_t partial, size_t* known, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr || (tokens == nullptr && count != 0))
        return c_refuse_null(error);
    const auto stored =
        cache->cache.try_store_prefix(c_sequence(sequence), {tokens, count}, c_salt(salt), partial != 0);
    if (stored && known != nullptr)
        *known = *stored;
    return c_report(stored.reason(), error);
}

kv1_code kv1_prefix_create(kv1_cache* cache, const int32_t* tokens, size_t count, kv1_prefix_salt salt,
                           kv1_sequence* sequence, size_t* matched, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, sequence, matched) || (tokens == nullptr && count != 0))
        return c_refuse_null(error);
    const auto made = cache->cache.try_create_from_prefix({tokens, count}, c_salt(salt));
    if (made) {
        *sequence = c_sequence(made->sequence);
        *matched = made->tokens;
    }
    return c_report(made.reason(), error);
}

kv1_code kv1_prefix_pin_tokens(kv1_cache* cache, const int32_t* tokens, size_t count, kv1_prefix_salt salt,
                               kv1_prefix_pin* pin, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, pin) || (tokens == nullptr && count != 0))
        return c_refuse_null(error);
    const auto pinned = cache->cache.prefixes().pin(c_salt(salt), {tokens, count});
    if (pinned)
        *pin = {pinned->node, pinned->stamp, pinned->tokens};
    return c_report(pinned.reason(), error);
}

kv1_code kv1_prefix_unpin(kv1_cache* cache, kv1_prefix_pin pin, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.prefixes().unpin({pin.node, pin.stamp, pin.tokens}), error);
}

size_t kv1_prefix_evict(kv1_cache* cache, size_t pages) {
    return cache != nullptr ? cache->cache.prefixes().evict(pages) : 0;
}

void kv1_prefix_clear(kv1_cache* cache) {
    if (cache != nullptr)
        cache->cache.prefixes().clear();
}

size_t kv1_prefix_pages(const kv1_cache* cache) {
    return cache != nullptr ? cache->cache.prefixes().pages() : 0;
}

size_t kv1_prefix_take_events(kv1_cache* cache, kv1_prefix_event* events, size_t capacity) {
    if (kv1::detail::c_any_null(cache, events))
        return 0;
    std::size_t taken = 0;
    while (taken < capacity) {
        kv1::prefix_event some[32];
        const std::size_t asked = (std::min)(std::size(some), capacity - taken);
        const std::size_t got = cache->cache.prefixes().take_events({some, asked});
        for (std::size_t i = 0; i < got; ++i)
            events[taken++] = {static_cast<kv1_prefix_event_kind>(some[i].kind), some[i].tokens, some[i].hash,
                               some[i].previous};
        if (got < asked)
            break;
    }
    return taken;
}

size_t kv1_prefix_lost_events(const kv1_cache* cache) {
    return cache != nullptr ? cache->cache.prefixes().lost_events() : 0;
}

} // extern "C"
