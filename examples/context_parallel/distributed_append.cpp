// SPDX-License-Identifier: Apache-2.0
//
// Keys and values go to the ranks that own their positions.
#include "distributed_cache.hpp"

#include "calls.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace context_parallel {

namespace {

float number_at(const void* data, kv1::scalar_type type, std::size_t channel) {
    return type == kv1::scalar_type::fp32
               ? static_cast<const float*>(data)[channel]
               : static_cast<float>(static_cast<const kv1::bfloat16*>(data)[channel]);
}

// Rounds rows to fp16, as the layer's fp16 tokens ask for. Gives the place of a number that does not fit.
std::optional<kv1::error_location> round_to_fp16(dealt_rows& d, std::size_t count) {
    const kv1::tensor_view x = d.received(count);
    for (std::size_t i = 0; i < count * x.heads() && !d.halves.empty(); ++i) {
        const void* const from = x.at(i / x.heads(), i % x.heads());
        std::byte* const to = d.halves.data() + i * x.channels() * 2;
        for (std::size_t c = 0; c < x.channels(); ++c) {
            const float number = number_at(from, x.type(), c);
            const kv1::float16 half(number);
            if (std::isfinite(number) && std::isinf(static_cast<float>(half)))
                return kv1::error_location{.kv_head = static_cast<std::int64_t>(i % x.heads()),
                                           .token = static_cast<std::int64_t>(i / x.heads()),
                                           .channel = static_cast<std::int64_t>(c)};
            const std::uint16_t bits = half.bits();
            std::memcpy(to + 2 * c, &bits, 2);
        }
    }
    return std::nullopt;
}

} // namespace

kv1::status distributed_cache::check_batch(std::span<const sequence> batch, std::size_t layer,
                                           std::span<const std::size_t> indptr, std::size_t rows) noexcept {
    if (layer >= whole_.layers.size())
        return {kv1::errc::out_of_range, "no such layer"};
    if (indptr.size() != batch.size() + 1 || indptr.front() != 0 || indptr.back() != rows ||
        !std::ranges::is_sorted(indptr))
        return {kv1::errc::invalid_argument, "indptr divides the rows among the sequences"};
    for (std::size_t i = 0; i < batch.size(); ++i) {
        const record* const r = find(batch[i]);
        if (const kv1::status s = usable(r); !s)
            return s;
        if (std::ranges::find(batch.subspan(i + 1), batch[i]) != batch.end())
            return {kv1::errc::invalid_argument, "a sequence comes twice"};
        if (const kv1::status s = holds_all(*r, layer); !s)
            return s;
    }
    return {};
}

void distributed_cache::append(sequence s, std::size_t layer, kv1::tensor_view keys,
                               kv1::tensor_view values) {
    const std::size_t indptr[] = {0, keys.tokens()};
    append({&s, 1}, layer, indptr, keys, values);
}

void distributed_cache::append(std::span<const sequence> batch, std::size_t layer,
                               std::span<const std::size_t> indptr, kv1::tensor_view keys,
                               kv1::tensor_view values) {
    append_call call{batch, layer, indptr, dealt_rows(keys), dealt_rows(values)};
    const kv1::status ready = guarded([&] { return prepare(call); });
    ranks_.agree(told(call), ready);
    receive(call);
    bool changed = false;
    const kv1::status here = carry_out(call, changed);
    try {
        ranks_.agree(told_of(collective::appended, batch, layer, indptr), here, changed);
    } catch (const rank_error&) {
        if (changed)
            undo(call);
        throw;
    }
    finish(call);
}

kv1::status distributed_cache::prepare(append_call& c) {
    const kv1::tensor_view keys = c.keys.source, values = c.values.source;
    if (const kv1::status s = check_batch(c.batch, c.layer, c.indptr, keys.tokens()); !s)
        return s;
    const kv1::error_location where{.layer = static_cast<std::int64_t>(c.layer)};
    const kv1::layer_description& l = whole_.layers[c.layer];
    const bool in_keys = l.values_in_keys;
    if (keys.has_negative_extent() || values.has_negative_extent() || keys.heads() != l.kv_heads ||
        keys.channels() != l.key_dim || keys.tokens() > most_rows ||
        values.tokens() != (in_keys ? 0 : keys.tokens()) ||
        (!in_keys && (values.heads() != l.kv_heads || values.channels() != l.value_dim)))
        return {kv1::errc::shape_mismatch, "keys and values have the layer's shape", where};
    if (!receives() && keys.tokens() != 0 &&
        (keys.data() == nullptr || (!in_keys && values.data() == nullptr)))
        return {kv1::errc::invalid_argument, "keys and values are not null", where};

    c.rows.resize(positions_.ranks());
    c.own_indptr.push_back(0);
    for (std::size_t i = 0; i < c.batch.size(); ++i) {
        const std::size_t first = find(c.batch[i])->lengths[c.layer];
        if (c.indptr[i + 1] - c.indptr[i] > own_.position_limit() - first)
            return {kv1::errc::capacity_exceeded,
                    "the last rank's range is full, and means that turn allow no second round", where};
        c.lengths.push_back(first);
        for (std::size_t row = c.indptr[i]; row < c.indptr[i + 1]; ++row)
            c.rows[positions_.owner(first + row - c.indptr[i])].push_back(row);
        c.own_indptr.push_back(c.rows[static_cast<std::size_t>(ranks_.rank())].size());
    }
    deal(c, c.keys);
    if (!in_keys)
        deal(c, c.values);
    return {};
}

// Room for this rank's rows; where nothing is to be received, also the rows.
void distributed_cache::deal(append_call& c, dealt_rows& d) const {
    d.to_fp16 =
        (whole_.fp16_sinks != 0 || whole_.fp16_window != 0) && rank_cache::has_copies(whole_.layers[c.layer]);
    const std::vector<std::size_t>& mine = c.rows[static_cast<std::size_t>(ranks_.rank())];
    d.bytes.resize(mine.size() * d.row_bytes());
    if (d.to_fp16 && d.source.type() != kv1::scalar_type::fp16)
        d.halves.resize(mine.size() * d.source.heads() * d.source.channels() * 2);
    if (!from_root_) {
        for (std::size_t at = 0; at < mine.size(); ++at)
            copy_row(d.source, mine[at], d.bytes.data() + at * d.row_bytes());
    } else if (ranks_.rank() == 0) {
        d.sent.resize(d.source.tokens() * d.row_bytes());
        std::size_t at = 0;
        for (const auto& rows : c.rows)
            for (const std::size_t row : rows)
                copy_row(d.source, row, d.sent.data() + at++ * d.row_bytes());
    }
}

digest distributed_cache::told(const append_call& c) {
    digest d = told_of(collective::appending, c.batch, c.layer, c.indptr);
    add_shape(d, c.keys.source);
    add_shape(d, c.values.source);
    d.add_all(std::span<const std::size_t>(c.lengths));
    return d;
}

void distributed_cache::receive(append_call& c) {
    if (!from_root_)
        return;
    receive(c, c.keys);
    receive(c, c.values);
}

void distributed_cache::receive(const append_call& c, dealt_rows& d) {
    if (d.source.tokens() == 0 || d.row_bytes() == 0)
        return;
    std::vector<int> counts, begins;
    for (const auto& rows : c.rows) {
        begins.push_back(begins.empty() ? 0 : begins.back() + counts.back());
        counts.push_back(static_cast<int>(rows.size()));
    }
    const contiguous_type row(d.row_bytes(), MPI_BYTE);
    const int own = counts[static_cast<std::size_t>(ranks_.rank())];
    ranks_.run(
        ranks_.rank() == 0 ? d.sent.size() : d.bytes.size(),
        [&](MPI_Request* pending) {
            return pending == nullptr
                       ? MPI_Scatterv(d.sent.data(), counts.data(), begins.data(), row.get(), d.bytes.data(),
                                      own, row.get(), 0, ranks_.comm())
                       : MPI_Iscatterv(d.sent.data(), counts.data(), begins.data(), row.get(), d.bytes.data(),
                                       own, row.get(), 0, ranks_.comm(), pending);
        },
        d.sent, d.bytes, counts, begins);
}

kv1::status distributed_cache::carry_out(append_call& c, bool& changed) {
    const std::vector<std::size_t>& rows = c.rows[static_cast<std::size_t>(ranks_.rank())];
    if (rows.empty())
        return {};
    const auto placed = [&](const kv1::status& s) -> kv1::status { // rows as the caller counts them
        kv1::error_location where = s.where();
        if (where.token >= 0)
            where.token = static_cast<std::int64_t>(rows[static_cast<std::size_t>(where.token)]);
        return {s.code(), s.rule(), where};
    };
    for (dealt_rows* const d : {&c.keys, &c.values})
        if (std::optional<kv1::error_location> where = round_to_fp16(*d, rows.size())) {
            where->layer = static_cast<std::int64_t>(c.layer);
            return placed(
                {kv1::errc::not_representable, "fp16 sinks and windows take values that fit fp16", *where});
        }
    return guarded([&]() -> kv1::status {
        std::vector<rank_sequence> batch;
        for (const sequence s : c.batch)
            batch.push_back(find(s)->here);
        const kv1::tensor_view values =
            whole_.layers[c.layer].values_in_keys ? no_values() : c.values.view(rows.size());
        return placed(
            own_.append(batch, c.layer, c.own_indptr, c.keys.view(rows.size()), values, run_, changed));
    });
}

void distributed_cache::finish(const append_call& c) {
    for (std::size_t i = 0; i < c.batch.size(); ++i)
        find(c.batch[i])->lengths[c.layer] += c.indptr[i + 1] - c.indptr[i];
}

// Some ranks have appended, others have not. Where that was the first layer of a step, those that have can
// cut it off again; else the step is lost.
void distributed_cache::undo(const append_call& c) {
    kv1::status here;
    bool first_of_step = true;
    for (const sequence s : c.batch)
        first_of_step = first_of_step && find(s)->at_commit_point();
    for (std::size_t i = 0; first_of_step && here && i < c.batch.size(); ++i) {
        bool cut = false;
        here = own_.truncate(find(c.batch[i])->here, c.lengths[i], cut);
    }
    try {
        if (first_of_step) {
            ranks_.agree(digest().add(static_cast<std::uint64_t>(collective::undone)), here);
            return;
        }
    } catch (const rank_error&) { // the first error says more
    }
    for (const sequence s : c.batch)
        find(s)->is = condition::step_failed;
}

} // namespace context_parallel
