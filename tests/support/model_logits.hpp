// SPDX-License-Identifier: Apache-2.0
//
// A model's logits for all of its tokens at once, and how far logits lie apart.
#pragma once

#include "model.hpp"
#include "thread_pool.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace kv1_test {

/// [tokens][words], through a cache of these formats, on one thread.
inline std::vector<float> logits_of(const kv1_lm::model& m, std::span<const std::int32_t> ids,
                                    const kv1_lm::kv_formats& formats) {
    kv1_lm::thread_pool pool(1);
    kv1::kv_cache cache(m.cache_shape(formats, ids.size()));
    const auto states = m.forward(ids, cache, cache.create_sequence(), kv1::precision::exact, pool);
    std::vector<float> logits(ids.size() * m.config().vocab_size);
    m.logits(states, logits, pool);
    return logits;
}

inline float largest_difference(std::span<const float> a, std::span<const float> b) {
    if (a.size() != b.size())
        throw std::logic_error("tensors of two sizes");
    float largest = 0.0f;
    for (std::size_t i = 0; i < a.size(); ++i)
        largest = std::max(largest, std::fabs(a[i] - b[i]));
    return largest;
}

} // namespace kv1_test
