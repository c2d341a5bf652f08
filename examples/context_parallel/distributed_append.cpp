// SPDX-License-Identifier: Apache-2.0
//
// Keys and values go to the ranks that own their positions.
#include "distributed_cache.hpp"

#include "local_parts.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace context_parallel {

namespace {

// Whether rounding to fp16 lost a number.
bool became_infinite(const void* from, kv1::scalar_type type, const std::byte* half, std::size_t channel) {
    const float x = type == kv1::scalar_type::fp32
                        ? static_cast<const float*>(from)[channel]
                        : static_cast<float>(static_cast<const kv1::bfloat16*>(from)[channel]);
    std::uint16_t bits = 0;
    std::memcpy(&bits, half + 2 * channel, 2);
    return std::isfinite(x) && std::isinf(static_cast<float>(kv1::float16::from_bits(bits)));
}

} // namespace

// This rank's share of the keys, or values, of an append.
struct distributed_cache::dealt_rows {
    explicit dealt_rows(const kv1::tensor_view& tensor) : source(tensor) {}

    kv1::tensor_view source;                    // of all tokens
    bool to_fp16 = false;                       // as the layer asks for
    std::vector<std::vector<std::size_t>> rows; // by rank: which tokens of the source
    std::vector<std::size_t> indptr;            // of this rank's rows
    std::vector<std::byte> sent, bytes, halves; // the root's, by owner; this rank's; and in fp16

    [[nodiscard]] std::size_t row_bytes() const {
        return source.heads() * source.channels() * bytes_of(source.type());
    }
    // This rank's rows, ready to be appended.
    [[nodiscard]] kv1::tensor_view view(std::size_t count) const {
        return to_fp16 && source.type() != kv1::scalar_type::fp16
                   ? view_of(halves.data(), kv1::scalar_type::fp16, count, source.heads(), source.channels())
                   : view_of(bytes.data(), source.type(), count, source.heads(), source.channels());
    }
};

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
    const kv1::error_location where{.layer = static_cast<std::int64_t>(layer)};
    dealt_rows k{keys}, v{values};
    std::vector<std::size_t> lengths;
    const kv1::status ready = guarded([&]() -> kv1::status {
        if (const kv1::status s = check_batch(batch, layer, indptr, keys.tokens()); !s)
            return s;
        const kv1::layer_description& l = whole_.layers[layer];
        if (keys.has_negative_extent() || values.has_negative_extent() || values.tokens() != keys.tokens() ||
            keys.heads() != l.kv_heads || values.heads() != l.kv_heads || keys.channels() != l.key_dim ||
            values.channels() != l.value_dim || keys.tokens() > most_rows)
            return {kv1::errc::shape_mismatch, "keys and values have the layer's shape", where};
        if (!receives() && keys.tokens() != 0 && (keys.data() == nullptr || values.data() == nullptr))
            return {kv1::errc::invalid_argument, "keys and values are not null", where};
        for (const sequence s : batch)
            lengths.push_back(find(s)->lengths[layer]);
        k = deal(batch, layer, indptr, keys);
        v = deal(batch, layer, indptr, values);
        return {};
    });
    digest told = told_of(collective::appending, batch, layer, indptr);
    add_shape(told, keys);
    add_shape(told, values);
    told.add_all(std::span<const std::size_t>(lengths));
    ranks_.agree(told, ready);

    bool changed = false;
    if (from_root_) {
        receive(k);
        receive(v);
    }
    const kv1::status here = append_local(batch, layer, k, v, changed);
    try {
        ranks_.agree(told_of(collective::appended, batch, layer, indptr), here, changed);
    } catch (const rank_error&) {
        if (changed)
            undo_append(batch, lengths);
        throw;
    }
    for (std::size_t i = 0; i < batch.size(); ++i)
        find(batch[i])->lengths[layer] += indptr[i + 1] - indptr[i];
}

// Whose the rows are, and room for them; where nothing is to be received, also the rows.
distributed_cache::dealt_rows distributed_cache::deal(std::span<const sequence> batch, std::size_t layer,
                                                      std::span<const std::size_t> indptr,
                                                      const kv1::tensor_view& tensor) {
    dealt_rows d{tensor};
    const kv1::layer_description& l = whole_.layers[layer];
    d.to_fp16 = (whole_.fp16_sinks != 0 || whole_.fp16_window != 0) && has_copies(l);
    const auto mine = static_cast<std::size_t>(ranks_.rank());
    d.rows.resize(positions_.ranks());
    d.indptr.push_back(0);
    for (std::size_t i = 0; i < batch.size(); ++i) {
        const std::size_t first = find(batch[i])->lengths[layer];
        for (std::size_t row = indptr[i]; row < indptr[i + 1]; ++row)
            d.rows[positions_.owner(first + row - indptr[i])].push_back(row);
        d.indptr.push_back(d.rows[mine].size());
    }
    const std::size_t vector_bytes = tensor.channels() * bytes_of(tensor.type());
    const auto pack = [&](std::vector<std::byte>& to, std::size_t at, std::size_t row) {
        for (std::size_t h = 0; h < tensor.heads(); ++h)
            copy_vector(tensor.at(row, h), tensor.type(), tensor.channels(), false,
                        to.data() + at * d.row_bytes() + h * vector_bytes);
    };
    d.bytes.resize(d.rows[mine].size() * d.row_bytes());
    d.halves.resize(d.to_fp16 ? d.rows[mine].size() * tensor.heads() * tensor.channels() * 2 : 0);
    if (from_root_ && mine == 0) {
        d.sent.resize(tensor.tokens() * d.row_bytes());
        std::size_t at = 0;
        for (const auto& rows : d.rows)
            for (const std::size_t row : rows)
                pack(d.sent, at++, row);
    } else if (!from_root_) {
        for (std::size_t at = 0; at < d.rows[mine].size(); ++at)
            pack(d.bytes, at, d.rows[mine][at]);
    }
    return d;
}

void distributed_cache::receive(dealt_rows& d) {
    std::vector<int> counts, begins;
    for (const auto& rows : d.rows) {
        begins.push_back(begins.empty() ? 0 : begins.back() + counts.back());
        counts.push_back(static_cast<int>(rows.size()));
    }
    if (d.row_bytes() == 0)
        return;
    const bytes_type row(d.row_bytes());
    ranks_.timed(ranks_.rank() == 0 ? d.sent.size() : d.bytes.size(), [&] {
        require_mpi(MPI_Scatterv(d.sent.data(), counts.data(), begins.data(), row.get(), d.bytes.data(),
                                 counts[static_cast<std::size_t>(ranks_.rank())], row.get(), 0,
                                 ranks_.comm()));
    });
}

kv1::status distributed_cache::append_local(std::span<const sequence> batch, std::size_t layer,
                                            dealt_rows& keys, dealt_rows& values, bool& changed) {
    const std::vector<std::size_t>& rows = keys.rows[static_cast<std::size_t>(ranks_.rank())];
    if (rows.empty())
        return {};
    const auto placed = [&](const kv1::status& s) -> kv1::status { // rows as the caller counts them
        kv1::error_location where = s.where();
        if (where.token >= 0)
            where.token = static_cast<std::int64_t>(rows[static_cast<std::size_t>(where.token)]);
        return {s.code(), s.rule(), where};
    };
    for (dealt_rows* const d : {&keys, &values}) {
        const kv1::tensor_view x =
            view_of(d->bytes.data(), d->source.type(), rows.size(), d->source.heads(), d->source.channels());
        for (std::size_t i = 0; i < rows.size() * x.heads() && !d->halves.empty(); ++i) {
            const std::size_t row = i / x.heads(), head = i % x.heads();
            std::byte* const to = d->halves.data() + i * x.channels() * 2;
            copy_vector(x.at(row, head), x.type(), x.channels(), true, to);
            for (std::size_t c = 0; c < x.channels() && x.type() != kv1::scalar_type::fp16; ++c)
                if (became_infinite(x.at(row, head), x.type(), to, c))
                    return placed({kv1::errc::not_representable,
                                   "fp16 sinks and windows take values that fit fp16",
                                   {static_cast<std::int64_t>(layer), static_cast<std::int64_t>(head),
                                    static_cast<std::int64_t>(row), static_cast<std::int64_t>(c)}});
        }
    }
    return guarded([&]() -> kv1::status {
        std::vector<kv1::sequence_id> bodies, recents;
        for (const sequence s : batch) {
            bodies.push_back(find(s)->here.body);
            recents.push_back(find(s)->here.recent);
        }
        const kv1::tensor_view k = keys.view(rows.size()), v = values.view(rows.size());
        if (const kv1::status s = body_->try_append(bodies, layer, keys.indptr, k, v, run_); !s)
            return placed(s);
        changed = true;
        if (recent_layer_[layer] == none)
            return {};
        return placed(recent_->try_append(recents, recent_layer_[layer], keys.indptr, k, v, run_));
    });
}

// Some ranks have appended, others have not. Where that was the first layer of a step, those that have can
// cut it off again; else the step is lost.
void distributed_cache::undo_append(std::span<const sequence> batch, std::span<const std::size_t> lengths) {
    kv1::status here;
    bool first_of_step = true;
    for (const sequence s : batch)
        first_of_step = first_of_step && find(s)->at_commit_point();
    for (std::size_t i = 0; first_of_step && here && i < batch.size(); ++i) {
        bool cut = false;
        here = truncate_local(find(batch[i])->here, owned(lengths[i]), cut);
    }
    try {
        if (first_of_step) {
            ranks_.agree(digest().add(static_cast<std::uint64_t>(collective::undone)), here);
            return;
        }
    } catch (const rank_error&) { // the first error says more
    }
    for (const sequence s : batch)
        find(s)->is = condition::step_failed;
}

} // namespace context_parallel
