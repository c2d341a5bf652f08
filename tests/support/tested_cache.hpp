// SPDX-License-Identifier: Apache-2.0
//
// A cache, its model (cache_model.hpp), and the bytes that say what is done to both. The operations of
// cache_operations.hpp build on it.
#pragma once

#include "cache_model.hpp"
#include "random_caches.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace kv1_test {

class tested_cache {
public:
    /// How often each operation took effect; a replay checks that none is 0.
    struct tallies {
        std::size_t appended = 0, refused = 0, exhausted = 0, forked = 0, truncated = 0, dropped = 0,
                    committed = 0, destroyed = 0, attended = 0, stored = 0, matched = 0, imported = 0,
                    batches = 0, partly_matched = 0, loaded = 0, prefixes_loaded = 0, rolled_back = 0,
                    never_committed = 0, masked = 0, windows_gone = 0, twice = 0, retained = 0;
    };

protected:
    struct living {
        kv1::sequence_id id;
        model_sequence model;
    };

    tested_cache(std::span<const std::uint8_t> bytes, tallies& t)
        : bytes_(bytes), tallies_(t), description_(random_cache(next())), model_(description_),
          cache_(description_) {}

    std::uint8_t next() {
        if (bytes_.empty())
            return 0;
        const std::uint8_t b = bytes_.front();
        bytes_ = bytes_.subspan(1);
        return b;
    }
    std::size_t below(std::size_t n) { return next() % n; }

    static void require(bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    }
    static void require(const kv1::status& s, const char* what) {
        if (!s)
            throw std::logic_error(std::string(what) + ": " + s.message());
    }

    living* some() { return living_.empty() ? nullptr : &living_[below(living_.size())]; }

    // rows of one layer for tokens first ... first + n - 1 of a model
    struct rows {
        std::vector<float> k, v;
        std::vector<model_token> tokens;
    };
    rows rows_for(model_sequence& m, std::size_t layer, std::size_t n) {
        const kv1::layer_description& l = description_.layers[layer];
        rows r;
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t position = m.layers[layer].size() + i;
            const auto id = position < m.ids.size() ? m.ids[position]
                                                    : static_cast<std::int32_t>(i % 7 == 0 ? below(2) : 0);
            const std::uint64_t history = cache_model::history(m, position, id);
            for (const auto& [to, side, dim] : {std::tuple(&r.k, kv1::kv_side::key, l.key_dim),
                                                std::tuple(&r.v, kv1::kv_side::value, l.value_dim)}) {
                if (l.values_in_keys && side == kv1::kv_side::value)
                    continue;
                const std::vector<float> x = token_values(history, layer, side, l.kv_heads * dim);
                to->insert(to->end(), x.begin(), x.end());
            }
            r.tokens.push_back(model_.token(history, layer));
        }
        return r;
    }
    kv1::tensor_view keys_of(const rows& r, std::size_t layer) const {
        const kv1::layer_description& l = description_.layers[layer];
        return {r.k.data(), r.tokens.size(), l.kv_heads, l.key_dim};
    }
    kv1::tensor_view values_of(const rows& r, std::size_t layer) const {
        const kv1::layer_description& l = description_.layers[layer];
        if (l.values_in_keys)
            return no_values();
        return {r.v.data(), r.tokens.size(), l.kv_heads, l.value_dim};
    }
    static kv1::tensor_view no_values() { return {static_cast<const float*>(nullptr), 0, 0, 0}; }
    static void trim(model_sequence& m) { // removes ids of tokens that no layer holds
        std::size_t n = 0;
        for (const auto& l : m.layers)
            n = std::max(n, l.size());
        m.ids.resize(n);
        m.histories.resize(n);
    }

    // every length, every stored vector, to the bit
    void compare(const living& l) {
        require(cache_.contains(l.id), "the sequence lives");
        const std::size_t page = description_.page_tokens;
        std::vector<float> x;
        for (std::size_t layer = 0; layer < description_.layers.size(); ++layer) {
            const kv1::layer_description& d = description_.layers[layer];
            const auto& tokens = l.model.layers[layer];
            const auto length = cache_.try_length(l.id, layer);
            require(length && *length == tokens.size(), "the length");
            for (std::size_t t = 0; t < tokens.size(); ++t) {
                const bool gone = l.model.dropped.contains(t / page) || t < l.model.given_up[layer];
                for (std::size_t h = 0; h < d.kv_heads; ++h)
                    for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
                        const std::size_t dim = side == kv1::kv_side::key ? d.key_dim : d.value_dim;
                        x.resize(dim);
                        const kv1::status s = cache_.try_read(l.id, layer, side, h, t, 1, x);
                        require(s.code() == (gone ? kv1::errc::dropped_tokens : kv1::errc::ok), "read");
                        const auto& all = side == kv1::kv_side::key ? tokens[t].keys : tokens[t].values;
                        if (!gone)
                            require(same_bits(x, std::span(all).subspan(h * dim, dim)), "what is stored");
                    }
            }
        }
    }

    std::span<const std::uint8_t> bytes_;
    tallies& tallies_;
    kv1::cache_description description_;
    cache_model model_;
    kv1::kv_cache cache_;
    std::vector<living> living_;
};

} // namespace kv1_test
