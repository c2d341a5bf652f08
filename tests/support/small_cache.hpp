// SPDX-License-Identifier: Apache-2.0
//
// A cache of two small layers, tokens for it, and all that can be read of it from outside.
#pragma once

#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kv1_test {

/// Two layers of two KV heads, K and V in different formats, pages of 16 tokens.
[[nodiscard]] inline kv1::cache_description small_cache(std::size_t capacity = 64) {
    kv1::cache_description d;
    d.layers = {{2, 20, 24, kv1::kv_format::affine2, kv1::kv_format::affine4},
                {2, 20, 24, kv1::kv_format::fp16, kv1::kv_format::scaled_binary}};
    d.capacity_tokens = capacity;
    d.page_tokens = 16;
    return d;
}

/// Random tokens for it.
struct batch {
    std::size_t tokens;
    std::vector<float> k, v;
    explicit batch(std::size_t n, std::uint64_t seed = 1) : tokens(n) {
        generator g(seed);
        k = normal_values(g, n * 2 * 20);
        v = normal_values(g, n * 2 * 24);
    }
    [[nodiscard]] kv1::tensor_view keys() const { return {k.data(), tokens, 2, 20}; }
    [[nodiscard]] kv1::tensor_view values() const { return {v.data(), tokens, 2, 24}; }
    float& key(std::size_t token, std::size_t head, std::size_t channel) {
        return k[(token * 2 + head) * 20 + channel];
    }
    float& value(std::size_t token, std::size_t head, std::size_t channel) {
        return v[(token * 2 + head) * 24 + channel];
    }
};

/// All that can be read of a sequence, to test whether it changed.
template <class Cache>
[[nodiscard]] std::vector<float> everything(const Cache& cache, kv1::sequence_id id) {
    std::vector<float> all;
    for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
        const std::size_t n = cache.length(id, layer);
        all.push_back(static_cast<float>(n));
        for (std::size_t head = 0; head < 2; ++head)
            for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
                std::vector<float> x(n * (side == kv1::kv_side::key ? 20 : 24));
                cache.read(id, layer, side, head, 0, n, x);
                all.insert(all.end(), x.begin(), x.end());
            }
    }
    return all;
}

/// Whether the status names this place; -1: the status must not name one.
inline void require_place(const kv1::status& s, std::int64_t layer, std::int64_t head, std::int64_t token,
                          std::int64_t channel) {
    INFO(s.message());
    REQUIRE(s.where().layer == layer);
    REQUIRE(s.where().kv_head == head);
    REQUIRE(s.where().token == token);
    REQUIRE(s.where().channel == channel);
}

} // namespace kv1_test
