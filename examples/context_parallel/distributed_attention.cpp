// SPDX-License-Identifier: Apache-2.0
//
// Queries go to everyone, and what each rank found among its own tokens comes back joined.
#include "distributed_cache.hpp"

#include "local_parts.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace context_parallel {

namespace {

void store(std::span<const float> from, kv1::scalar_type type, void* to) {
    for (std::size_t c = 0; c < from.size(); ++c)
        switch (type) {
        case kv1::scalar_type::fp32:
            static_cast<float*>(to)[c] = from[c];
            break;
        case kv1::scalar_type::fp16:
            static_cast<kv1::float16*>(to)[c] = kv1::float16(from[c]);
            break;
        case kv1::scalar_type::bf16:
            static_cast<kv1::bfloat16*>(to)[c] = kv1::bfloat16(from[c]);
            break;
        }
}

} // namespace

layer_rules distributed_cache::rules_of(const record& r, std::size_t layer) const noexcept {
    const bool windowed = recent_layer_[layer] != none;
    return {whole_.layers[layer].sliding_window, windowed ? whole_.fp16_sinks : 0,
            windowed ? whole_.fp16_window : 0, r.fp16_from};
}

struct distributed_cache::query_call {
    std::span<const sequence> batch;
    std::size_t layer;
    std::span<const std::size_t> indptr;
    kv1::tensor_view queries; // where all ranks have them
    const kv1::attention_options& options;
    std::size_t channels;
    std::vector<float> rows, part; // [rows][channels + 1]
    std::vector<float> log_sum_exp;
    std::vector<std::byte> received;
};

void distributed_cache::attend(sequence s, std::size_t layer, kv1::tensor_view queries,
                               kv1::mutable_tensor_view outputs, const kv1::attention_options& options) {
    const std::size_t indptr[] = {0, queries.tokens()};
    attend({&s, 1}, layer, indptr, queries, outputs, options);
}

void distributed_cache::attend(std::span<const sequence> batch, std::size_t layer,
                               std::span<const std::size_t> indptr, kv1::tensor_view queries,
                               kv1::mutable_tensor_view outputs, const kv1::attention_options& options) {
    query_call c{batch, layer, indptr, queries, options, outputs.channels(), {}, {}, {}, {}};
    const std::size_t heads = queries.heads(), width = c.channels + 1;
    const kv1::status ready = guarded([&]() -> kv1::status {
        if (const kv1::status s = check_queries(c, outputs); !s)
            return s;
        c.rows.assign(queries.tokens() * heads * width, 0.0f);
        c.part.resize(recent_layer_[layer] != none ? c.rows.size() : 0);
        c.log_sum_exp.resize(queries.tokens() * heads);
        c.received.resize(
            from_root_ ? queries.tokens() * heads * queries.channels() * bytes_of(queries.type()) : 0);
        reduce_.prepare(ranks_, c.rows.size(), join_, from_root_);
        return {};
    });
    ranks_.agree(told_of_queries(c), ready);
    for (std::size_t at = c.channels; at < c.rows.size(); at += width)
        c.rows[at] = -std::numeric_limits<float>::infinity();
    if (from_root_)
        broadcast_queries(c);

    const kv1::status here = attend_local(c);
    if (!here)
        std::ranges::fill(c.rows, std::numeric_limits<float>::quiet_NaN());
    reduce_(ranks_, c.rows, c.channels, join_, from_root_);
    // Only where a row became NaN may a rank have failed, or a query was NaN; rank 0 alone sees the rows that
    // it alone receives.
    bool doubtful = from_root_;
    for (std::size_t at = c.channels; at < c.rows.size(); at += width)
        doubtful = doubtful || std::isnan(c.rows[at]);
    if (doubtful)
        ranks_.agree(told_of(collective::attended, batch, layer, indptr), here);
    if (receives())
        return;
    for (std::size_t r = 0; r < c.log_sum_exp.size(); ++r) {
        store(std::span(c.rows).subspan(r * width, c.channels), outputs.type(),
              outputs.at(r / heads, r % heads));
        if (!options.log_sum_exp.empty())
            options.log_sum_exp[r] = c.rows[r * width + c.channels];
    }
}

kv1::status distributed_cache::check_queries(const query_call& c,
                                             const kv1::mutable_tensor_view& outputs) noexcept {
    const kv1::tensor_view& q = c.queries;
    const kv1::attention_options& o = c.options;
    const kv1::error_location where{.layer = static_cast<std::int64_t>(c.layer)};
    if (const kv1::status s = check_batch(c.batch, c.layer, c.indptr, q.tokens()); !s)
        return s;
    const kv1::layer_description& l = whole_.layers[c.layer];
    if (q.has_negative_extent() || outputs.has_negative_extent() || q.heads() == 0 ||
        q.heads() % l.kv_heads != 0 || q.channels() != l.key_dim || outputs.channels() != l.value_dim ||
        outputs.tokens() != q.tokens() || outputs.heads() != q.heads() || q.tokens() > most_rows / q.heads())
        return {kv1::errc::shape_mismatch, "queries and outputs have the layer's shape", where};
    if (!receives() && q.tokens() != 0 && (q.data() == nullptr || outputs.data() == nullptr))
        return {kv1::errc::invalid_argument, "queries and outputs are not null", where};
    if (!o.masks.empty() || !o.mask.visible().empty() || o.mask.explicit_keys() != 0 ||
        !o.alibi_slopes.empty())
        return {kv1::errc::invalid_argument,
                "masks of single sequences, explicit masks and ALiBi's slopes are not for ranks", where};
    if (!o.mask.is_causal() && l.sliding_window != 0)
        return {kv1::errc::invalid_argument, "with a sliding window masks over ranks are causal", where};
    if ((!o.sink_logits.empty() && o.sink_logits.size() != q.heads()) ||
        (!receives() && !o.log_sum_exp.empty() && o.log_sum_exp.size() != q.tokens() * q.heads()))
        return {kv1::errc::shape_mismatch, "one log-sum-exp a row, one sink logit a query head", where};
    if (!(o.soft_cap >= 0.0f) || !std::isfinite(o.soft_cap) || !std::isfinite(o.scale.value_or(1.0f)) ||
        !std::ranges::all_of(o.sink_logits, [](float x) { return std::isfinite(x); }))
        return {kv1::errc::invalid_argument, "scale, soft cap and sink logits are finite", where};
    if (o.mask.first_position().value_or(0) > std::numeric_limits<std::size_t>::max() / 4)
        return {kv1::errc::out_of_range, "the first position overflows", where};
    for (std::size_t i = 0; i < c.batch.size(); ++i) {
        const record& r = *find(c.batch[i]);
        const std::size_t queries = c.indptr[i + 1] - c.indptr[i];
        if (o.mask.is_causal() && !o.mask.first_position() && queries > r.lengths[c.layer])
            return {kv1::errc::shape_mismatch, "causal queries are among the cached tokens", where};
        const query_sight sight(r.lengths[c.layer], queries, o, rules_of(r, c.layer));
        for (std::size_t query = 0; query < queries; ++query)
            if (sight.lower(query) < std::min(sight.upper(query), r.given_up[c.layer]))
                return {kv1::errc::dropped_tokens,
                        "the sliding window has given up tokens that the query would see",
                        {.layer = where.layer, .token = static_cast<std::int64_t>(c.indptr[i] + query)}};
    }
    return {};
}

digest distributed_cache::told_of_queries(const query_call& c) {
    const kv1::attention_options& o = c.options;
    digest d = told_of(collective::attending, c.batch, c.layer, c.indptr);
    add_shape(d, c.queries);
    d.add(o.scale.value_or(-1.0f)).add(o.soft_cap).add(static_cast<std::uint64_t>(o.mode));
    for (const std::size_t n : {o.range.first, o.range.last, o.window, std::size_t{o.mask.is_causal()},
                                o.mask.first_position().value_or(none)})
        d.add(std::uint64_t{n});
    d.add_all(o.sink_logits);
    for (const sequence s : c.batch)
        if (const record* const r = find(s); r != nullptr && c.layer < r->lengths.size())
            d.add(std::uint64_t{r->lengths[c.layer]}).add(std::uint64_t{r->fp16_from});
    return d;
}

void distributed_cache::broadcast_queries(query_call& c) {
    const kv1::tensor_view given = c.queries;
    const std::size_t heads = given.heads(), vector_bytes = given.channels() * bytes_of(given.type());
    if (c.received.empty())
        return;
    for (std::size_t i = 0; i < given.tokens() * heads && ranks_.rank() == 0; ++i)
        copy_vector(given.at(i / heads, i % heads), given.type(), given.channels(), false,
                    c.received.data() + i * vector_bytes);
    const bytes_type row(heads * vector_bytes);
    ranks_.timed(c.received.size(), [&] {
        require_mpi(
            MPI_Bcast(c.received.data(), static_cast<int>(given.tokens()), row.get(), 0, ranks_.comm()));
    });
    c.queries = view_of(c.received.data(), given.type(), given.tokens(), heads, given.channels());
}

// Over this rank's tokens, those of the fp16 window apart.
kv1::status distributed_cache::attend_local(query_call& c) {
    const std::size_t heads = c.queries.heads(), width = c.channels + 1;
    const auto over = [&](const kv1::kv_cache& cache, kv1::sequence_id id, std::size_t layer,
                          std::size_t first_row, std::size_t queries, std::size_t longest,
                          std::vector<float>& to, auto&& places, auto&& done) -> kv1::status {
        kv1::status s;
        for_each_local_call(queries, longest, places, [&](const local_call& call) {
            if (!s)
                return;
            const std::size_t row = first_row + call.first, rows = call.count * heads;
            kv1::attention_options own{.scale = c.options.scale,
                                       .mask = call.mask,
                                       .mode = c.options.mode,
                                       .log_sum_exp = std::span(c.log_sum_exp).first(rows),
                                       .range = call.range,
                                       .window = call.window,
                                       .soft_cap = c.options.soft_cap};
            s = cache.try_attend(id, layer, c.queries.slice(row, call.count),
                                 {to.data() + row * heads * width, call.count, heads, c.channels,
                                  static_cast<std::ptrdiff_t>(heads * width),
                                  static_cast<std::ptrdiff_t>(width)},
                                 own, run_);
            for (std::size_t r = 0; r < rows && s; ++r) {
                to[(row * heads + r) * width + c.channels] = c.log_sum_exp[r];
                done(row * heads + r);
            }
        });
        return s;
    };
    for (std::size_t i = 0; i < c.batch.size(); ++i) {
        const record& r = *find(c.batch[i]);
        const std::size_t queries = c.indptr[i + 1] - c.indptr[i];
        const layer_rules rules = rules_of(r, c.layer);
        const query_sight sight(r.lengths[c.layer], queries, c.options, rules);
        const std::size_t longest =
            rules.sliding_window != 0 ? whole_.page_tokens : std::numeric_limits<std::size_t>::max();
        const auto share = [&](token_span seen, std::size_t base) -> token_span {
            const token_span places{owned(seen.first), owned(seen.last)};
            return places.empty() ? token_span{} : token_span{places.first - base, places.last - base};
        };
        if (const kv1::status s = over(
                *body_, r.here.body, c.layer, c.indptr[i], queries, longest, c.rows,
                [&](std::size_t q) { return share(sight.quantized(q), 0); }, [](std::size_t) {});
            !s)
            return s;
        if (recent_layer_[c.layer] == none)
            continue;
        if (const kv1::status s = over(
                *recent_, r.here.recent, recent_layer_[c.layer], c.indptr[i], queries, longest, c.part,
                [&](std::size_t q) { return share(sight.recent(q), r.here.recent_base); },
                [&](std::size_t row) {
                    join_row(std::span(c.part).subspan(row * width, width),
                             std::span(c.rows).subspan(row * width, width));
                });
            !s)
            return s;
    }
    if (ranks_.rank() != 0 || c.options.sink_logits.empty())
        return {};
    return guarded([&]() -> kv1::status { // a logit without a value joins each row once
        std::vector<float> sink(width, 0.0f);
        for (std::size_t row = 0; row < c.log_sum_exp.size(); ++row) {
            sink.back() = c.options.sink_logits[row % heads];
            join_row(sink, std::span(c.rows).subspan(row * width, width));
        }
        return {};
    });
}

} // namespace context_parallel
