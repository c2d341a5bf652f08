// SPDX-License-Identifier: Apache-2.0
//
// Queries go to everyone, and what each rank found among its own tokens comes back joined.
#include "distributed_cache.hpp"

#include "calls.hpp"

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

// Eight bytes of a mask a word.
void add_mask(digest& d, const kv1::attention_mask& mask) {
    d.add(std::uint64_t{mask.is_causal()}).add(std::uint64_t{mask.first_position().value_or(none)});
    const std::span<const std::uint8_t> bytes = mask.visible();
    d.add(std::uint64_t{mask.explicit_keys()}).add(std::uint64_t{bytes.size()});
    for (std::size_t at = 0; at < bytes.size(); at += 8) {
        std::uint64_t word = 0;
        for (std::size_t i = at; i < std::min(at + 8, bytes.size()); ++i)
            word = word << 8 | bytes[i];
        d.add(word);
    }
}

} // namespace

// What the queries of a sequence see.
query_sight distributed_cache::sight_of(const query_call& c, std::size_t i) noexcept {
    const bool windowed = own_.has_window(c.layer);
    const layer_rules rules{whole_.layers[c.layer].sliding_window, windowed ? whole_.fp16_sinks : 0,
                            windowed ? whole_.fp16_window : 0, find(c.batch[i])->fp16_from};
    return {c.lengths[i], c.indptr[i + 1] - c.indptr[i], c.mask(i), c.options, rules};
}

void distributed_cache::attend(sequence s, std::size_t layer, kv1::tensor_view queries,
                               kv1::mutable_tensor_view outputs, const kv1::attention_options& options) {
    const std::size_t indptr[] = {0, queries.tokens()};
    attend({&s, 1}, layer, indptr, queries, outputs, options);
}

void distributed_cache::attend(std::span<const sequence> batch, std::size_t layer,
                               std::span<const std::size_t> indptr, kv1::tensor_view queries,
                               kv1::mutable_tensor_view outputs, const kv1::attention_options& options) {
    query_call call{batch, layer, indptr, queries, outputs, options};
    const kv1::status ready = guarded([&] { return prepare(call, false); });
    ranks_.agree(told(call), ready);
    receive(call);
    bool changed = false;
    join(call, carry_out(call), changed);
    finish(call);
}

void distributed_cache::append_and_attend(sequence s, std::size_t layer, kv1::tensor_view keys,
                                          kv1::tensor_view values, kv1::tensor_view queries,
                                          kv1::mutable_tensor_view outputs,
                                          const kv1::attention_options& options) {
    const std::size_t indptr[] = {0, keys.tokens()};
    append_and_attend({&s, 1}, layer, indptr, keys, values, queries, outputs, options);
}

// Whether the append succeeded everywhere is told by the rows: a rank that could not append has none to join.
void distributed_cache::append_and_attend(std::span<const sequence> batch, std::size_t layer,
                                          std::span<const std::size_t> indptr, kv1::tensor_view keys,
                                          kv1::tensor_view values, kv1::tensor_view queries,
                                          kv1::mutable_tensor_view outputs,
                                          const kv1::attention_options& options) {
    append_call tokens{batch, layer, indptr, dealt_rows(keys), dealt_rows(values)};
    query_call call{batch, layer, indptr, queries, outputs, options};
    const kv1::status ready = guarded([&]() -> kv1::status {
        const kv1::status s = prepare(tokens);
        return s ? prepare(call, true) : s;
    });
    ranks_.agree(told(tokens).add(told(call).value()), ready);
    receive(tokens);
    receive(call);
    bool changed = false;
    kv1::status here = carry_out(tokens, changed);
    if (here)
        here = carry_out(call);
    try {
        join(call, here, changed);
    } catch (const rank_error&) {
        if (changed)
            undo(tokens);
        throw;
    }
    finish(tokens);
    finish(call);
}

kv1::status distributed_cache::prepare(query_call& c, bool appended) {
    const kv1::tensor_view& q = c.queries;
    if (const kv1::status s = check_batch(c.batch, c.layer, c.indptr, q.tokens()); !s)
        return s;
    for (std::size_t i = 0; i < c.batch.size(); ++i)
        c.lengths.push_back(find(c.batch[i])->lengths[c.layer] +
                            (appended ? c.indptr[i + 1] - c.indptr[i] : 0));
    if (const kv1::status s = check(c); !s)
        return s;
    bool needs_part = false;
    for (std::size_t i = 0; i < c.batch.size(); ++i)
        needs_part = needs_part || own_.needs_part(c.layer, sight_of(c, i));
    const std::size_t rows = q.tokens() * q.heads(), width = c.width();
    c.rows.assign(rows * width, 0.0f);
    for (std::size_t at = width - 1; at < c.rows.size(); at += width)
        c.rows[at] = -std::numeric_limits<float>::infinity();
    c.scratch.part.resize(needs_part ? c.rows.size() : 0);
    c.scratch.log_sum_exp.resize(rows);
    c.received.resize(from_root_ ? rows * q.channels() * bytes_of(q.type()) : 0);
    reduce_.prepare(ranks_, c.rows.size(), join_, from_root_);
    return {};
}

kv1::status distributed_cache::check(const query_call& c) noexcept {
    const kv1::tensor_view& q = c.queries;
    const kv1::attention_options& o = c.options;
    const kv1::error_location where{.layer = static_cast<std::int64_t>(c.layer)};
    const kv1::layer_description& l = whole_.layers[c.layer];
    if (q.has_negative_extent() || c.outputs.has_negative_extent() || q.heads() == 0 ||
        q.heads() % l.kv_heads != 0 || q.channels() != l.key_dim || c.outputs.channels() != l.value_dim ||
        c.outputs.tokens() != q.tokens() || c.outputs.heads() != q.heads() ||
        q.tokens() > most_rows / q.heads())
        return {kv1::errc::shape_mismatch, "queries and outputs have the layer's shape", where};
    if (!receives() && q.tokens() != 0 && (q.data() == nullptr || c.outputs.data() == nullptr))
        return {kv1::errc::invalid_argument, "queries and outputs are not null", where};
    if (!o.alibi_slopes.empty())
        return {kv1::errc::invalid_argument, "ALiBi's slopes are not for ranks", where};
    if ((!o.sink_logits.empty() && o.sink_logits.size() != q.heads()) ||
        (!receives() && !o.log_sum_exp.empty() && o.log_sum_exp.size() != q.tokens() * q.heads()))
        return {kv1::errc::shape_mismatch, "one log-sum-exp a row, one sink_logit logit a query head", where};
    if (!(o.soft_cap >= 0.0f) || !std::isfinite(o.soft_cap) || !std::isfinite(o.scale.value_or(1.0f)) ||
        !std::ranges::all_of(o.sink_logits, [](float x) { return std::isfinite(x); }))
        return {kv1::errc::invalid_argument, "scale, soft cap and sink logits are finite", where};
    if (!o.masks.empty() && o.masks.size() != c.batch.size())
        return {kv1::errc::shape_mismatch, "one mask for each sequence", where};
    for (std::size_t i = 0; i < c.batch.size(); ++i) {
        const record& r = *find(c.batch[i]);
        const kv1::attention_mask& mask = c.mask(i);
        const std::size_t queries = c.indptr[i + 1] - c.indptr[i];
        if (mask.first_position().value_or(0) > std::numeric_limits<std::size_t>::max() / 4)
            return {kv1::errc::out_of_range, "the first position overflows", where};
        if (mask.is_causal() && !mask.first_position() && queries > c.lengths[i])
            return {kv1::errc::shape_mismatch, "causal queries are among the cached tokens", where};
        if (!mask.is_causal() &&
            (mask.explicit_keys() > c.lengths[i] || mask.visible().size() != mask.explicit_keys() * queries))
            return {kv1::errc::shape_mismatch, "the mask covers queries times its keys, all of them cached",
                    where};
        const query_sight sight = sight_of(c, i);
        for (std::size_t query = 0; query < queries; ++query)
            for (std::size_t t = sight.lower(query), last = std::min(sight.upper(query), r.given_up[c.layer]);
                 t < last; ++t)
                if (sight.shows(query, t))
                    return {kv1::errc::dropped_tokens,
                            "the sliding window has given up tokens that the query would see",
                            {.layer = where.layer, .token = static_cast<std::int64_t>(c.indptr[i] + query)}};
    }
    return {};
}

digest distributed_cache::told(const query_call& c) {
    const kv1::attention_options& o = c.options;
    digest d = told_of(collective::attending, c.batch, c.layer, c.indptr);
    add_shape(d, c.queries);
    d.add(std::uint64_t{o.scale.has_value()})
        .add(o.scale.value_or(0.0f))
        .add(o.soft_cap)
        .add(static_cast<std::uint64_t>(o.mode));
    for (const std::size_t n : {o.range.first, o.range.last, o.window, o.masks.size()})
        d.add(std::uint64_t{n});
    add_mask(d, o.mask);
    for (const kv1::attention_mask& mask : o.masks)
        add_mask(d, mask);
    d.add_all(o.sink_logits);
    d.add_all(std::span<const std::size_t>(c.lengths));
    return d;
}

void distributed_cache::receive(query_call& c) {
    if (!from_root_ || c.received.empty())
        return;
    const kv1::tensor_view given = c.queries;
    const std::size_t row_bytes = c.received.size() / given.tokens();
    for (std::size_t i = 0; i < given.tokens() && ranks_.rank() == 0; ++i)
        copy_row(given, i, c.received.data() + i * row_bytes);
    const contiguous_type row(row_bytes, MPI_BYTE);
    const int count = static_cast<int>(given.tokens());
    ranks_.run(
        c.received.size(),
        [&](MPI_Request* pending) {
            return pending == nullptr
                       ? MPI_Bcast(c.received.data(), count, row.get(), 0, ranks_.comm())
                       : MPI_Ibcast(c.received.data(), count, row.get(), 0, ranks_.comm(), pending);
        },
        c.received);
    c.queries = view_of(c.received.data(), given.type(), given.tokens(), given.heads(), given.channels());
}

// Over this rank's tokens; rank 0 adds sink logits, which join each row once.
kv1::status distributed_cache::carry_out(query_call& c) {
    const std::size_t heads = c.queries.heads(), width = c.width();
    return guarded([&]() -> kv1::status {
        for (std::size_t i = 0; i < c.batch.size(); ++i) {
            const std::size_t first = c.indptr[i], queries = c.indptr[i + 1] - first;
            const kv1::status s = own_.attend(
                find(c.batch[i])->here, c.layer, c.lengths[i], c.queries.slice(first, queries),
                sight_of(c, i), c.options,
                std::span(c.rows).subspan(first * heads * width, queries * heads * width), c.scratch, run_);
            if (!s)
                return s;
        }
        if (ranks_.rank() != 0 || c.options.sink_logits.empty())
            return {};
        std::vector<float> sink_logit(width, 0.0f); // a logit without a value
        for (std::size_t row = 0; row * width < c.rows.size(); ++row) {
            sink_logit.back() = c.options.sink_logits[row % heads];
            join_row(sink_logit, std::span(c.rows).subspan(row * width, width));
        }
        return {};
    });
}

// Joins the ranks' rows; those of a rank that failed are NaN. Only where a row became NaN may a rank have
// failed, or a query was NaN; rank 0 alone sees the rows that it alone receives.
void distributed_cache::join(query_call& c, const kv1::status& here, bool& changed) {
    if (!here)
        std::ranges::fill(c.rows, std::numeric_limits<float>::quiet_NaN());
    reduce_(ranks_, c.rows, c.width() - 1, join_, from_root_);
    bool doubtful = from_root_;
    for (std::size_t at = c.width() - 1; at < c.rows.size(); at += c.width())
        doubtful = doubtful || std::isnan(c.rows[at]);
    if (doubtful)
        ranks_.agree(told_of(collective::attended, c.batch, c.layer, c.indptr), here, changed);
}

void distributed_cache::finish(const query_call& c) {
    if (receives())
        return;
    const std::size_t heads = c.outputs.heads(), width = c.width();
    for (std::size_t row = 0; row * width < c.rows.size(); ++row) {
        store(std::span(c.rows).subspan(row * width, width - 1), c.outputs.type(),
              c.outputs.at(row / heads, row % heads));
        if (!c.options.log_sum_exp.empty())
            c.options.log_sum_exp[row] = c.rows[row * width + width - 1];
    }
}

} // namespace context_parallel
