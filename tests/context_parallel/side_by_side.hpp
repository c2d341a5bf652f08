// SPDX-License-Identifier: Apache-2.0
//
// A distributed cache beside one cache that holds everything, and the naive model of both (cache_model.hpp),
// which says how far each may be from the truth: the bounds of a rank's share are those of attention over its
// tokens alone, the joins of ranks are those of parts. All ranks make the same random choices.
#pragma once

#include "cache_model.hpp"
#include "compare.hpp"
#include "distributed_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace kv1_test {

inline int rank_of_world() {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}
inline int ranks_of_world() {
    int size = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return size;
}

struct side_by_side {
    static constexpr std::size_t query_heads = 4;

    struct pair {
        model_sequence model;
        kv1::sequence_id id;
        context_parallel::sequence s;
    };

    side_by_side(const kv1::cache_description& d, context_parallel::cache_options options)
        : rules(d), single(d), from_root(options.from == context_parallel::inputs::of_root),
          distributed(MPI_COMM_WORLD, d, std::move(options)) {}

    pair create(std::uint64_t salt) {
        return {rules.empty(salt), single.create_sequence(), distributed.create_sequence()};
    }
    pair fork(const pair& p) { return {p.model, single.fork(p.id), distributed.fork(p.s)}; }
    void destroy(const pair& p) {
        single.destroy_sequence(p.id);
        distributed.destroy_sequence(p.s);
    }
    void commit(pair& p) {
        rules.commit(p.model);
        single.commit(p.id);
        REQUIRE(distributed.commit(p.s) == p.model.layers[0].size());
    }

    // The next tokens of all sequences, counts[i] of the i-th, in one call.
    void append(std::span<pair* const> batch, std::size_t layer, std::span<const std::size_t> counts,
                std::int32_t token) {
        const kv1::layer_description& l = rules.description().layers[layer];
        std::vector<float> k, v;
        std::vector<std::size_t> indptr{0};
        std::vector<kv1::sequence_id> ids;
        std::vector<context_parallel::sequence> names;
        for (std::size_t i = 0; i < batch.size(); ++i) {
            model_sequence& m = batch[i]->model;
            for (std::size_t t = 0; t < counts[i]; ++t) {
                const std::uint64_t history = cache_model::history(m, m.layers[layer].size(), token);
                for (const auto& [to, side, dim] : {std::tuple(&k, kv1::kv_side::key, l.key_dim),
                                                    std::tuple(&v, kv1::kv_side::value, l.value_dim)}) {
                    const std::vector<float> x = token_values(history, layer, side, l.kv_heads * dim);
                    to->insert(to->end(), x.begin(), x.end());
                }
                const model_token one = rules.token(history, layer);
                rules.push(m, layer, {&one, 1});
            }
            indptr.push_back(indptr.back() + counts[i]);
            ids.push_back(batch[i]->id);
            names.push_back(batch[i]->s);
        }
        const std::size_t n = indptr.back();
        single.append(ids, layer, indptr, {k.data(), n, l.kv_heads, l.key_dim},
                      {v.data(), n, l.kv_heads, l.value_dim});
        const float* const keys = elsewhere() ? nullptr : k.data();
        const float* const values = elsewhere() ? nullptr : v.data();
        distributed.append(names, layer, indptr, {keys, n, l.kv_heads, l.key_dim},
                           {values, n, l.kv_heads, l.value_dim});
    }
    void append(pair& p, std::size_t n, std::int32_t token = 0) {
        pair* const one = &p;
        for (std::size_t layer = 0; layer < rules.description().layers.size(); ++layer)
            append({&one, 1}, layer, {&n, 1}, token);
    }

    // The last counts[i] tokens of each sequence attend.
    void check(std::span<pair* const> batch, std::size_t layer, std::span<const std::size_t> counts,
               std::size_t window = 0, bool with_sinks = false) {
        const kv1::layer_description& l = rules.description().layers[layer];
        const std::size_t n = std::accumulate(counts.begin(), counts.end(), std::size_t{0});
        std::vector<std::size_t> indptr{0};
        std::vector<kv1::sequence_id> ids;
        std::vector<context_parallel::sequence> names;
        for (std::size_t i = 0; i < batch.size(); ++i) {
            indptr.push_back(indptr.back() + counts[i]);
            ids.push_back(batch[i]->id);
            names.push_back(batch[i]->s);
        }
        generator g(n + 7 * layer);
        const std::vector<float> q = normal_values(g, n * query_heads * l.key_dim),
                                 sinks = normal_values(g, query_heads);
        std::vector<float> one(n * query_heads * l.value_dim), one_lse(n * query_heads), all(one),
            lse(one_lse);
        kv1::attention_options options{.mode = kv1::precision::exact, .window = window};
        if (with_sinks)
            options.sink_logits = sinks;
        // queries at positions before a commit may see what it has freed: refused here as there
        bool lacks = false;
        for (std::size_t i = 0; i < batch.size(); ++i)
            for (std::size_t last = batch[i]->model.layers[layer].size() - counts[i];
                 last++ < batch[i]->model.layers[layer].size();) {
                row_request asked;
                asked.first = window != 0 && last > window ? last - window : 0;
                lacks = lacks || rules.lacks(batch[i]->model, layer, last, asked);
            }
        if (lacks) {
            REQUIRE(single
                        .try_attend(ids, layer, indptr, {q.data(), n, query_heads, l.key_dim},
                                    {one.data(), n, query_heads, l.value_dim}, options)
                        .code() == kv1::errc::dropped_tokens);
            kv1::errc code = kv1::errc::ok;
            try {
                distributed.attend(names, layer, indptr,
                                   {elsewhere() ? nullptr : q.data(), n, query_heads, l.key_dim},
                                   {all.data(), n, query_heads, l.value_dim}, options);
            } catch (const context_parallel::rank_error& e) {
                code = e.code();
            }
            REQUIRE(code == kv1::errc::dropped_tokens);
            return;
        }
        options.log_sum_exp = one_lse;
        single.attend(ids, layer, indptr, {q.data(), n, query_heads, l.key_dim},
                      {one.data(), n, query_heads, l.value_dim}, options);
        options.log_sum_exp = lse;
        distributed.attend(names, layer, indptr,
                           {elsewhere() ? nullptr : q.data(), n, query_heads, l.key_dim},
                           {all.data(), n, query_heads, l.value_dim}, options);
        if (elsewhere())
            return;
        tally t;
        for (std::size_t i = 0; i < batch.size(); ++i)
            for (std::size_t r = indptr[i] * query_heads; r < indptr[i + 1] * query_heads; ++r) {
                const std::size_t h = r % query_heads, last = batch[i]->model.layers[layer].size() -
                                                              indptr[i + 1] + r / query_heads + 1;
                const auto query = std::span(q).subspan(r * l.key_dim, l.key_dim);
                row_request asked;
                asked.first = window != 0 && last > window ? last - window : 0;
                asked.options.position = static_cast<double>(last - 1);
                if (with_sinks)
                    asked.options.sink_logit = sinks[h];
                const std::size_t kv_head = h / (query_heads / l.kv_heads);
                const bounded_row whole = rules.attend(batch[i]->model, layer, kv_head, query, last, asked);
                const bounded_row joined = by_rank(batch[i]->model, layer, kv_head, query, last, asked);
                for (std::size_t c = 0; c < l.value_dim; ++c) {
                    const double x = all[r * l.value_dim + c], y = one[r * l.value_dim + c];
                    t.expect(std::fabs(x - joined.out[c]) <= joined.out_bound[c], "row", r, "channel", c,
                             "is", x, "and not", joined.out[c], "within", joined.out_bound[c], "of", n,
                             "queries in layer", layer);
                    t.expect(std::fabs(x - y) <= joined.out_bound[c] + whole.out_bound[c], "row", r,
                             "channel", c, "is", x, "and in one cache", y, "in layer", layer);
                }
                t.expect(std::fabs(lse[r] - joined.lse) <= joined.lse_bound, "log-sum-exp of row", r);
                t.expect(std::fabs(lse[r] - one_lse[r]) <= joined.lse_bound + whole.lse_bound,
                         "log-sum-exp of one cache: row", r);
            }
        KV1_REQUIRE_CLEAN(t);
    }
    void check(pair& p, std::size_t n) {
        pair* const one = &p;
        for (std::size_t layer = 0; layer < rules.description().layers.size(); ++layer)
            check({&one, 1}, layer, {&n, 1});
    }

    // What a rank's queries give over its own tokens, joined.
    bounded_row by_rank(const model_sequence& m, std::size_t layer, std::size_t kv_head,
                        std::span<const float> query, std::size_t last, row_request asked) const {
        std::vector<bounded_row> parts;
        const context_parallel::distribution& d = distributed.positions();
        for (std::size_t r = 0; r < d.ranks(); ++r) {
            asked.only = [&d, r](std::size_t t) { return d.owner(t) == r; };
            const bounded_row part = rules.attend(m, layer, kv_head, query, last, asked);
            if (std::isfinite(part.lse))
                parts.push_back(part);
            asked.options.sink_logit.reset(); // a logit without a value joins once
        }
        return cache_model::merged(parts, rules.description().layers[layer].value_dim);
    }

    [[nodiscard]] bool elsewhere() const { return from_root && rank_of_world() != 0; }

    cache_model rules;
    kv1::kv_cache single;
    bool from_root;
    context_parallel::distributed_cache distributed;
};

} // namespace kv1_test
