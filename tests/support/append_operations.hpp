// SPDX-License-Identifier: Apache-2.0
//
// What brings tokens into a cache: append, rows that are packed already, batches, and what is refused. Cases of
// cache_operations.hpp.
#pragma once

#include "attend_operations.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace kv1_test {

class append_operations : public attend_operations {
protected:
    using attend_operations::attend_operations;

    void append(std::size_t n, bool one_layer) {
        living* l = some();
        if (l == nullptr)
            return;
        const std::size_t layers = description_.layers.size(), from = below(layers);
        for (std::size_t i = 0; i < (one_layer ? 1 : layers); ++i) {
            const std::size_t layer = (from + i) % layers;
            // cuts layers that hold more tokens than others, so that all agree
            const std::size_t ahead = l->model.layers[layer].size() - l->model.shortest();
            if (!one_layer && ahead >= n)
                continue;
            if (!append_layer(*l, layer, one_layer ? n : n - ahead))
                break;
        }
        compare(*l);
    }

    bool append_layer(living& l, std::size_t layer, std::size_t n) {
        rows r = rows_for(l.model, layer, n);
        const kv1::status s = cache_.try_append(l.id, layer, keys_of(r, layer), values_of(r, layer));
        if (s.code() == kv1::errc::capacity_exceeded) {
            trim(l.model);
            ++tallies_.exhausted;
            return false;
        }
        require(s, "append");
        model_.push(l.model, layer, r.tokens);
        ++tallies_.appended;
        return true;
    }

    // Appends values with a NaN among them, which must change nothing.
    void refuse() {
        living* l = some();
        if (l == nullptr)
            return;
        const std::size_t layer = below(description_.layers.size()), n = 1 + below(20);
        const std::size_t pages = cache_.statistics().pages_in_use;
        rows r = rows_for(l->model, layer, n);
        trim(l->model);
        std::vector<float>& spoiled = r.v.empty() ? r.k : r.v;
        spoiled[below(spoiled.size())] = std::numeric_limits<float>::quiet_NaN();
        const kv1::status s = cache_.try_append(l->id, layer, keys_of(r, layer), values_of(r, layer));
        if (s.code() == kv1::errc::capacity_exceeded)
            return;
        require(s.code() == kv1::errc::non_finite, "NaN");
        require(cache_.statistics().pages_in_use <= pages,
                "a refused append keeps no page"); // but may evict prefixes
        ++tallies_.refused;
        compare(*l);
    }

    // Exports the rows of one sequence and appends them to an empty one, which must be equal to the bit.
    void import_rows() {
        living* l = some();
        if (l == nullptr || living_.size() >= 12 || !l->model.dropped.empty() || !l->model.agreed())
            return;
        for (const std::size_t gone : l->model.given_up)
            if (gone != 0)
                return;
        for (std::size_t layer = 0; layer < description_.layers.size(); ++layer)
            if (model_.per_channel(layer)) {
                require(cache_.try_export_rows(l->id, layer, kv1::kv_side::key, 0, 0, 0, {}).code() ==
                            kv1::errc::invalid_argument,
                        "keys per channel have no rows");
                return;
            }
        const auto id = cache_.try_create_sequence();
        require(id.reason(), "create");
        const std::size_t n = l->model.shortest();
        for (std::size_t layer = 0; layer < description_.layers.size(); ++layer) {
            const kv1::layer_description& d = description_.layers[layer];
            std::vector<std::byte> packed[2];
            std::vector<kv1::float16> scales[2], minima[2];
            for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
                const bool keys = side == kv1::kv_side::key;
                if (!keys && d.values_in_keys)
                    continue;
                const kv1::kv_format f = keys ? d.key_format : d.value_format;
                const std::size_t dim = keys ? d.key_dim : d.value_dim;
                const std::size_t width = kv1::packed_bytes(f, dim),
                                  metadata = kv1::row_bytes(f, dim) - width;
                const std::size_t at = keys ? 0 : 1, group = keys ? d.key_group : d.value_group;
                const std::size_t groups = group == 0 ? 1 : dim / group;
                packed[at].resize(n * d.kv_heads * width);
                scales[at].resize(metadata >= 2 ? n * d.kv_heads * groups : 0);
                minima[at].resize(metadata == 4 ? n * d.kv_heads * groups : 0);
                for (std::size_t t = 0; t < n; ++t)
                    for (std::size_t h = 0; h < d.kv_heads; ++h) {
                        const std::size_t row = t * d.kv_heads + h;
                        require(
                            cache_.try_export_rows(
                                l->id, layer, side, h, t, 1,
                                {std::span(packed[at]).subspan(row * width, width),
                                 scales[at].empty() ? std::span<kv1::float16>{}
                                                    : std::span(scales[at]).subspan(row * groups, groups),
                                 minima[at].empty() ? std::span<kv1::float16>{}
                                                    : std::span(minima[at]).subspan(row * groups, groups)}),
                            "export");
                    }
            }
            const kv1::status s = cache_.try_append_rows(*id, layer, n, {packed[0], scales[0], minima[0]},
                                                         {packed[1], scales[1], minima[1]});
            if (model_.has_copies(layer) || s.code() == kv1::errc::capacity_exceeded) {
                require(!s, "rows have no fp16 copies");
                require(cache_.try_destroy_sequence(*id), "destroy");
                return;
            }
            require(s, "import");
        }
        living twin{*id, l->model};
        twin.model.committed.reset();
        twin.model.fp16_from = 0;
        compare(twin);
        living_.push_back(std::move(twin));
        ++tallies_.imported;
    }

    // One step of several sequences in one call: append, then attend. It must equal single calls to the bit.
    void batch() {
        std::vector<living*> chosen;
        for (living& l : living_)
            if ((next() & 1) != 0)
                chosen.push_back(&l);
        const std::size_t layer = below(description_.layers.size());
        const kv1::layer_description& d = description_.layers[layer];
        std::vector<kv1::sequence_id> ids;
        std::vector<std::size_t> indptr{0};
        rows all;
        std::vector<rows> parts;
        for (living* l : chosen) {
            ids.push_back(l->id);
            parts.push_back(rows_for(l->model, layer, below(4)));
            all.k.insert(all.k.end(), parts.back().k.begin(), parts.back().k.end());
            all.v.insert(all.v.end(), parts.back().v.begin(), parts.back().v.end());
            indptr.push_back(indptr.back() + parts.back().tokens.size());
        }
        const std::size_t n = indptr.back();
        all.k.push_back(0.0f); // not null
        all.v.push_back(0.0f);
        const kv1::tensor_view keys(all.k.data(), n, d.kv_heads, d.key_dim);
        const auto append = [&](std::span<const kv1::sequence_id> to, std::span<const std::size_t> rows_of) {
            return d.values_in_keys ? cache_.try_append(to, layer, rows_of, keys)
                                    : cache_.try_append(to, layer, rows_of, keys,
                                                        {all.v.data(), n, d.kv_heads, d.value_dim});
        };
        if (!ids.empty() && next() % 4 == 0) { // names a sequence twice, the second time without tokens
            std::vector<kv1::sequence_id> twice = ids;
            std::vector<std::size_t> rows_of = indptr;
            twice.push_back(ids[below(ids.size())]);
            rows_of.push_back(n);
            require(append(twice, rows_of).code() == kv1::errc::invalid_argument,
                    "a sequence comes once in a batch");
            ++tallies_.twice;
        }
        const kv1::status s = append(ids, indptr);
        if (s.code() == kv1::errc::capacity_exceeded) {
            require(s.where().token >= 0 && s.where().token < static_cast<std::int64_t>(n),
                    "the row that found no room");
            for (living* l : chosen) {
                trim(l->model);
                compare(*l);
            }
            return;
        }
        require(s, "append of a batch");
        for (std::size_t i = 0; i < chosen.size(); ++i) {
            model_.push(chosen[i]->model, layer, parts[i].tokens);
            compare(*chosen[i]);
        }
        const std::size_t heads = 2 * d.kv_heads;
        generator g(next());
        const std::vector<float> q = normal_values(g, n * heads * d.key_dim + 1);
        std::vector<float> out(n * heads * d.value_dim + 1), lse(n * heads), alone(out.size()),
            lse_alone(lse.size());
        // what each sequence's queries see
        std::vector<std::vector<std::uint8_t>> visible(ids.size());
        std::vector<kv1::attention_mask> masks(ids.size());
        std::int64_t lacking = -1;
        for (std::size_t i = ids.size(); i-- > 0;) {
            const std::size_t length = chosen[i]->model.layers[layer].size(),
                              count = indptr[i + 1] - indptr[i];
            if (next() % 2 == 0)
                masks[i] = random_mask(g, count, length, visible[i]);
            for (std::size_t r = count; r-- > 0;)
                if (const auto [last, asked] = sight(masks[i], r, count, length);
                    model_.lacks(chosen[i]->model, layer, last, asked))
                    lacking = static_cast<std::int64_t>(indptr[i] + r);
        }
        const kv1::status attended =
            cache_.try_attend(ids, layer, indptr, {q.data(), n, heads, d.key_dim},
                              {out.data(), n, heads, d.value_dim}, {.masks = masks, .log_sum_exp = lse});
        if (lacking >= 0) {
            require(attended.code() == kv1::errc::dropped_tokens && attended.where().token == lacking,
                    "a row that would see tokens that are gone");
            ++tallies_.windows_gone;
            return;
        }
        require(attended, "attention of a batch");
        for (std::size_t i = 0; i < chosen.size(); ++i) {
            const std::size_t first = indptr[i], count = indptr[i + 1] - first;
            require(cache_.try_attend(
                        ids[i], layer, {q.data() + first * heads * d.key_dim, count, heads, d.key_dim},
                        {alone.data() + first * heads * d.value_dim, count, heads, d.value_dim},
                        {.mask = masks[i],
                         .log_sum_exp = std::span(lse_alone).subspan(first * heads, count * heads)}),
                    "attention of one");
        }
        require(same_bits(out, alone) && same_bits(lse, lse_alone), "a batch is what its sequences are");
        ++tallies_.batches;
    }
};

} // namespace kv1_test
