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
    struct new_tokens {
        std::vector<float> k, v;
        std::vector<std::size_t> indptr{0};
        std::vector<kv1::sequence_id> ids;
        std::vector<context_parallel::sequence> names;
    };
    // In the model and in the one cache.
    new_tokens take(std::span<pair* const> batch, std::size_t layer, std::span<const std::size_t> counts,
                    std::int32_t token) {
        const kv1::layer_description& l = rules.description().layers[layer];
        new_tokens all;
        for (std::size_t i = 0; i < batch.size(); ++i) {
            model_sequence& m = batch[i]->model;
            for (std::size_t t = 0; t < counts[i]; ++t) {
                const std::uint64_t history = cache_model::history(m, m.layers[layer].size(), token);
                for (const auto& [to, side, dim] : {std::tuple(&all.k, kv1::kv_side::key, l.key_dim),
                                                    std::tuple(&all.v, kv1::kv_side::value, l.value_dim)}) {
                    const std::vector<float> x = token_values(history, layer, side, l.kv_heads * dim);
                    to->insert(to->end(), x.begin(), x.end());
                }
                const model_token one = rules.token(history, layer);
                rules.push(m, layer, {&one, 1});
            }
            all.indptr.push_back(all.indptr.back() + counts[i]);
            all.ids.push_back(batch[i]->id);
            all.names.push_back(batch[i]->s);
        }
        if (l.values_in_keys)
            all.v.clear();
        single.append(all.ids, layer, all.indptr, keys_of(all, layer, true), values_of(all, layer, true));
        return all;
    }
    kv1::tensor_view keys_of(const new_tokens& n, std::size_t layer, bool here) const {
        const kv1::layer_description& l = rules.description().layers[layer];
        return {here ? n.k.data() : nullptr, n.indptr.back(), l.kv_heads, l.key_dim};
    }
    kv1::tensor_view values_of(const new_tokens& n, std::size_t layer, bool here) const {
        const kv1::layer_description& l = rules.description().layers[layer];
        if (l.values_in_keys)
            return context_parallel::no_values();
        return {here ? n.v.data() : nullptr, n.indptr.back(), l.kv_heads, l.value_dim};
    }
    void append(std::span<pair* const> batch, std::size_t layer, std::span<const std::size_t> counts,
                std::int32_t token) {
        const new_tokens n = take(batch, layer, counts, token);
        distributed.append(n.names, layer, n.indptr, keys_of(n, layer, !elsewhere()),
                           values_of(n, layer, !elsewhere()));
    }
    void append(pair& p, std::size_t n, std::int32_t token = 0) {
        pair* const one = &p;
        for (std::size_t layer = 0; layer < rules.description().layers.size(); ++layer)
            append({&one, 1}, layer, {&n, 1}, token);
    }

    struct question {
        std::size_t window = 0;
        bool with_sinks = false;
        std::uint64_t masks = 0; // not 0: an explicit mask a sequence, drawn from this seed
    };

    // The last counts[i] tokens of each sequence attend. Those of `appended` are not in the distributed cache
    // yet: they come in the same call.
    void check(std::span<pair* const> batch, std::size_t layer, std::span<const std::size_t> counts,
               const question& ask, const new_tokens* appended = nullptr) {
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
        kv1::attention_options options{.mode = kv1::precision::exact, .window = ask.window};
        if (ask.with_sinks)
            options.sink_logits = sinks;
        const masks_of_batch masks =
            ask.masks != 0 ? random_masks(batch, layer, counts, ask.masks) : masks_of_batch{};
        options.masks = masks.views;
        const auto request = [&](std::size_t i, std::size_t query) {
            const std::size_t length = batch[i]->model.layers[layer].size(),
                              own = length - counts[i] + query + 1;
            row_request asked;
            asked.first = ask.window != 0 && own > ask.window ? own - ask.window : 0;
            asked.own = own;
            asked.options.position = static_cast<double>(own - 1);
            if (ask.masks != 0) {
                const std::size_t keys = masks.views[i].explicit_keys();
                asked.shows = [bytes = masks.views[i].visible(), query, keys, from = length - keys](
                                  std::size_t t) { return t < from || bytes[query * keys + t - from] != 0; };
            }
            return asked;
        };
        const auto last_of = [&](std::size_t i, const row_request& asked) { // one past what the mask allows
            return ask.masks != 0 ? batch[i]->model.layers[layer].size() : *asked.own;
        };
        const auto attend = [&](const kv1::attention_options& o) {
            const kv1::tensor_view queries(elsewhere() ? nullptr : q.data(), n, query_heads, l.key_dim);
            const kv1::mutable_tensor_view outputs(all.data(), n, query_heads, l.value_dim);
            if (appended != nullptr)
                distributed.append_and_attend(names, layer, indptr, keys_of(*appended, layer, !elsewhere()),
                                              values_of(*appended, layer, !elsewhere()), queries, outputs, o);
            else
                distributed.attend(names, layer, indptr, queries, outputs, o);
        };
        // queries at positions before a commit may see what it has freed: refused here as there
        bool lacks = false;
        for (std::size_t i = 0; i < batch.size(); ++i)
            for (std::size_t query = 0; query < counts[i]; ++query) {
                const row_request asked = request(i, query);
                lacks = lacks || rules.lacks(batch[i]->model, layer, last_of(i, asked), asked);
            }
        if (lacks) {
            REQUIRE(appended == nullptr);
            REQUIRE(single
                        .try_attend(ids, layer, indptr, {q.data(), n, query_heads, l.key_dim},
                                    {one.data(), n, query_heads, l.value_dim}, options)
                        .code() == kv1::errc::dropped_tokens);
            kv1::errc code = kv1::errc::ok;
            try {
                attend(options);
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
        attend(options);
        if (elsewhere())
            return;
        tally t;
        for (std::size_t i = 0; i < batch.size(); ++i)
            for (std::size_t r = indptr[i] * query_heads; r < indptr[i + 1] * query_heads; ++r) {
                const std::size_t h = r % query_heads;
                const auto query = std::span(q).subspan(r * l.key_dim, l.key_dim);
                row_request asked = request(i, r / query_heads - indptr[i]);
                const std::size_t last = last_of(i, asked);
                if (ask.with_sinks)
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
            check({&one, 1}, layer, {&n, 1}, {});
    }
    // Appends and attends in one call.
    void append_and_check(std::span<pair* const> batch, std::size_t layer,
                          std::span<const std::size_t> counts, std::int32_t token, const question& ask) {
        const new_tokens n = take(batch, layer, counts, token);
        check(batch, layer, counts, ask, &n);
    }

    // Explicit masks over the queries' tokens and a few before them; a query sees itself.
    struct masks_of_batch {
        std::vector<std::vector<std::uint8_t>> bytes;
        std::vector<kv1::attention_mask> views;
    };
    masks_of_batch random_masks(std::span<pair* const> batch, std::size_t layer,
                                std::span<const std::size_t> counts, std::uint64_t seed) const {
        generator g(seed);
        masks_of_batch m;
        for (std::size_t i = 0; i < batch.size(); ++i) {
            const std::size_t length = batch[i]->model.layers[layer].size(),
                              keys = std::min(length, counts[i] + g.below(20));
            auto& bytes = m.bytes.emplace_back(counts[i] * keys);
            const double share = g.chance(0.3) ? 1.0 : 0.6; // all: queries see beyond their own tokens
            for (std::size_t query = 0; query < counts[i]; ++query)
                for (std::size_t j = 0; j < keys; ++j)
                    bytes[query * keys + j] = g.chance(share) || j == keys - counts[i] + query ? 1 : 0;
        }
        for (std::size_t i = 0; i < batch.size(); ++i)
            m.views.push_back(kv1::attention_mask::explicit_for_last(
                counts[i] == 0 ? 0 : m.bytes[i].size() / counts[i], m.bytes[i]));
        return m;
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
