// SPDX-License-Identifier: Apache-2.0
//
// Attention of single sequences, beside the model. Cases of cache_operations.hpp.
#pragma once

#include "random_masks.hpp"
#include "tested_cache.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1_test {

class attend_operations : public tested_cache {
protected:
    using tested_cache::tested_cache;

    void attend() {
        living* l = some();
        if (l == nullptr)
            return;
        // queries at the end, all seeing all, under a mask, or anywhere: there most of all where a window may
        // be
        const unsigned kind = next() % 6;
        const std::size_t layers = description_.layers.size(), layer = kind > 3 ? layers - 1 : below(layers);
        const kv1::layer_description& d = description_.layers[layer];
        const std::size_t length = l->model.layers[layer].size();
        const std::size_t m =
            std::min<std::size_t>(length, 1 + below(length > 40 && (next() & 3) == 0 ? 40 : 3));
        if (m == 0)
            return;
        const std::size_t heads = 2 * d.kv_heads;
        kv1::attention_options options{.mode = kv1::precision::exact};
        generator g(next());
        std::vector<std::uint8_t> visible;
        if (kind == 1 || kind > 3)
            options.mask = kv1::attention_mask::causal_from(below(length));
        if (kind == 2)
            options.mask = kv1::attention_mask::none();
        if (kind == 3) {
            options.mask = random_mask(g, m, length, visible);
            ++tallies_.masked;
        }
        const std::vector<float> q = normal_values(g, m * heads * d.key_dim);
        std::vector<float> out(m * heads * d.value_dim), lse(m * heads);
        options.log_sum_exp = lse;
        const kv1::status s = cache_.try_attend(l->id, layer, {q.data(), m, heads, d.key_dim},
                                                {out.data(), m, heads, d.value_dim}, options);
        for (std::size_t i = 0; i < m; ++i)
            if (const auto [last, asked] = sight(options.mask, i, m, length);
                model_.lacks(l->model, layer, last, asked)) {
                require(s.code() == kv1::errc::dropped_tokens &&
                            s.where().token == static_cast<std::int64_t>(i),
                        "a query that would see tokens that are gone");
                ++tallies_.windows_gone;
                return;
            }
        require(s, "attend");
        for (std::size_t i = 0; i < m; ++i)
            for (std::size_t h = 0; h < heads; ++h) {
                const std::size_t row = i * heads + h;
                const auto [last, asked] = sight(options.mask, i, m, length);
                const bounded_row want = model_.attend(
                    l->model, layer, h / 2, std::span(q).subspan(row * d.key_dim, d.key_dim), last, asked);
                for (std::size_t c = 0; c < d.value_dim; ++c)
                    require(std::fabs(out[row * d.value_dim + c] - want.out[c]) <=
                                want.out_bound[c] + output_rounding<float>(want.out[c]),
                            "attention is within its bound");
                require(want.lse == lse[row] || std::fabs(lse[row] - want.lse) <= want.lse_bound,
                        "the log-sum-exp is within its bound");
            }
        ++tallies_.attended;
    }

    // Attends with one query at a position. It must be refused exactly if a commit has freed what it would
    // see.
    void attend_at(const living& l, std::size_t layer, std::size_t position) {
        const kv1::layer_description& d = description_.layers[layer];
        const std::vector<float> q(d.kv_heads * d.key_dim, 0.5f);
        std::vector<float> out(d.kv_heads * d.value_dim);
        const kv1::status s = cache_.try_attend(l.id, layer, {q.data(), 1, d.kv_heads, d.key_dim},
                                                {out.data(), 1, d.kv_heads, d.value_dim},
                                                {.mask = kv1::attention_mask::causal_from(position)});
        const std::size_t last = std::min(l.model.layers[layer].size(), position + 1);
        const bool gone = model_.lacks(l.model, layer, last);
        require(s.code() == (gone ? kv1::errc::dropped_tokens : kv1::errc::ok), "what a commit has freed");
        tallies_.windows_gone += gone ? 1u : 0u;
    }
};

} // namespace kv1_test
