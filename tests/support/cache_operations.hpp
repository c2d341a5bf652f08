// SPDX-License-Identifier: Apache-2.0
//
// Reads bytes as operations, and applies each to a cache and to its model (cache_model.hpp). This is the body
// of fuzz_cache, and of its replay as a unit test. After each operation it calls validate(), and compares
// every sequence that the operation touched with its model, bit for bit. Throws std::logic_error at the first
// difference.
#pragma once

#include "cache_model.hpp"
#include "random_caches.hpp"
#include "random_masks.hpp"
#include "saved_bytes.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kv1_test {

class cache_operations {
public:
    /// How often each operation took effect; a replay checks that none is 0.
    struct tallies {
        std::size_t appended = 0, refused = 0, exhausted = 0, forked = 0, truncated = 0, dropped = 0,
                    committed = 0, destroyed = 0, attended = 0, stored = 0, matched = 0, imported = 0,
                    batches = 0, partly_matched = 0, loaded = 0, prefixes_loaded = 0, rolled_back = 0,
                    never_committed = 0, masked = 0, windows_gone = 0, twice = 0, retained = 0;
    };

    static void run(std::span<const std::uint8_t> bytes, tallies& t) {
        if (bytes.empty())
            return;
        cache_operations all(bytes, t);
        while (!all.bytes_.empty())
            all.step();
        all.finish();
    }

private:
    struct living {
        kv1::sequence_id id;
        model_sequence model;
    };

    cache_operations(std::span<const std::uint8_t> bytes, tallies& t)
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

    // one step

    void step() {
        switch (next() % 20) {
        case 0:
            create();
            break;
        case 1:
        case 2:
        case 3:
            append(1 + below(40), false);
            break;
        case 4:
            append(1 + below(5), true);
            break;
        case 5:
            fork();
            break;
        case 6:
            truncate();
            break;
        case 7:
            drop();
            break;
        case 8:
        case 9:
            commit();
            break;
        case 10:
            rollback();
            break;
        case 11:
            destroy();
            break;
        case 12:
        case 19:
            attend();
            break;
        case 13:
            store_prefix();
            break;
        case 14:
            match_prefix();
            break;
        case 15:
            refuse();
            break;
        case 16:
            import_rows();
            break;
        case 17:
            batch();
            break;
        case 18:
            save_and_load();
            break;
        }
        require(cache_.try_validate(), "validate");
    }

    void finish() {
        for (const living& l : living_)
            compare(l);
        for (const living& l : living_)
            require(cache_.try_destroy_sequence(l.id), "destroy");
        cache_.prefixes().clear();
        require(cache_.try_validate(), "validate at the end");
        require(cache_.statistics().pages_in_use == 0, "no page is lost");
    }

    void create() {
        if (living_.size() >= 12)
            return;
        const auto id = cache_.try_create_sequence();
        require(id.reason(), "create");
        living_.push_back({*id, model_.empty(below(2))});
    }

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

    void fork() {
        living* l = some();
        if (l == nullptr || living_.size() >= 12)
            return;
        const auto id = cache_.try_fork(l->id);
        require(id.code() == (l->model.agreed() ? kv1::errc::ok : kv1::errc::layers_disagree), "fork");
        if (!id)
            return;
        ++tallies_.forked;
        living twin{*id, l->model};
        compare(twin);
        living_.push_back(std::move(twin));
    }

    void truncate() {
        living* l = some();
        if (l == nullptr)
            return;
        cut(*l, below(l->model.shortest() + 2));
    }
    void cut(living& l, std::size_t n) {
        const kv1::status s = cache_.try_truncate(l.id, n);
        const kv1::errc expected = model_.can_truncate(l.model, n);
        if (s.code() == kv1::errc::capacity_exceeded) { // a page for tokens without their fp16 copies
            require(expected == kv1::errc::ok && description_.fp16_sinks + description_.fp16_window != 0,
                    "truncate needs no page");
            return;
        }
        require(s.code() == expected, "truncate");
        if (s) {
            model_.truncate(l.model, n);
            ++tallies_.truncated;
        }
        compare(l);
    }

    void drop() {
        living* l = some();
        if (l == nullptr)
            return;
        const std::size_t full = l->model.shortest() / description_.page_tokens;
        const std::size_t first = below(full + 2), n = below(3);
        const kv1::status s = cache_.try_drop_pages(l->id, first, n);
        const bool fits = first <= full && n <= full - first;
        require(s.code() == (fits ? kv1::errc::ok : kv1::errc::out_of_range), "drop");
        if (fits) {
            for (std::size_t p = first; p < first + n; ++p)
                l->model.dropped.insert(p);
            tallies_.dropped += n;
        }
        compare(*l);
    }

    void commit() {
        living* l = some();
        if (l == nullptr)
            return;
        const auto n = cache_.try_commit(l->id);
        require(n.code() == (l->model.agreed() ? kv1::errc::ok : kv1::errc::layers_disagree), "commit");
        if (n) {
            require(*n == l->model.shortest(), "the committed length");
            model_.commit(l->model);
            ++tallies_.committed;
            tallies_.retained += cache_.try_statistics(l->id)->bytes_retained != 0 ? 1u : 0u;
            for (std::size_t layer = 0; layer < l->model.given_up.size(); ++layer)
                if (const std::size_t gone = l->model.given_up[layer]; gone != 0)
                    attend_at(*l, layer, below(gone + 40));
        }
        compare(*l);
    }

    void rollback() {
        living* l = some();
        if (l == nullptr)
            return;
        const kv1::status s = cache_.try_rollback(l->id);
        if (!l->model.committed) {
            require(s.code() == kv1::errc::nothing_committed, "a rollback needs a commit");
            ++tallies_.never_committed;
            compare(*l);
            return;
        }
        const std::size_t n = std::min(*l->model.committed, l->model.shortest());
        const kv1::errc expected = model_.can_truncate(l->model, n);
        if (s.code() == kv1::errc::capacity_exceeded)
            return;
        require(s.code() == expected, "rollback");
        if (s) {
            model_.truncate(l->model, n);
            ++tallies_.rolled_back;
        }
        compare(*l);
    }

    void destroy() {
        if (living_.empty())
            return;
        const std::size_t i = below(living_.size());
        require(cache_.try_destroy_sequence(living_[i].id), "destroy");
        require(cache_.try_length(living_[i].id).code() == kv1::errc::invalid_sequence, "a stale handle");
        living_.erase(living_.begin() + static_cast<std::ptrdiff_t>(i));
        ++tallies_.destroyed;
    }

    static kv1::prefix_salt salt_of(const model_sequence& m) { return {.high = 7, .low = m.salt}; }

    void store_prefix() {
        living* l = some();
        if (l == nullptr)
            return;
        const std::size_t n = below(l->model.shortest() + 1);
        const bool partial = (next() & 1) != 0;
        const auto known =
            cache_.try_store_prefix(l->id, std::span(l->model.ids).first(n), salt_of(l->model), partial);
        if (!l->model.agreed()) {
            require(known.code() == kv1::errc::layers_disagree, "store of layers that disagree");
            return;
        }
        require(known.reason(), "store");
        require(*known <= n && (partial || *known % description_.page_tokens == 0), "what is known");
        tallies_.stored += *known;
        compare(*l);
    }

    // A new sequence from another one's ids, some of them changed.
    void match_prefix() {
        living* l = some();
        if (l == nullptr || living_.size() >= 12)
            return;
        std::vector<std::int32_t> ids = l->model.ids;
        ids.resize(below(ids.size() + 4), 0);
        if (!ids.empty() && (next() & 1) != 0)
            ids[below(ids.size())] ^= 1;
        const std::uint64_t salt = next() % 4 == 0 ? 1 - l->model.salt : l->model.salt;
        living fresh{{}, model_.empty(salt)};
        const auto match = cache_.try_create_from_prefix(ids, salt_of(fresh.model));
        if (match.code() == kv1::errc::capacity_exceeded)
            return;
        require(match.reason(), "match");
        require(match->tokens <= ids.size(), "a match is no longer than the prompt");
        fresh.id = match->sequence;
        for (std::size_t t = 0; t < match->tokens; ++t) {
            const std::uint64_t history = cache_model::history(fresh.model, t, ids[t]);
            for (std::size_t layer = 0; layer < fresh.model.layers.size(); ++layer)
                fresh.model.layers[layer].push_back(model_.token(history, layer));
        }
        for (std::size_t layer = 0; layer < fresh.model.layers.size(); ++layer)
            model_.settle(fresh.model, layer, 0);
        fresh.model.fp16_from = match->tokens;
        if (match->tokens != 0)
            fresh.model.committed = match->tokens;
        tallies_.matched += match->tokens;
        tallies_.partly_matched += match->tokens % description_.page_tokens != 0 ? 1 : 0;
        compare(fresh);
        living_.push_back(std::move(fresh));
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

    // Saves a sequence and loads it: the copy is equal. With one byte changed the load is refused.
    void save_and_load() {
        living* l = some();
        if (l == nullptr || living_.size() >= 12)
            return;
        std::vector<std::byte> memory;
        const kv1::status s = kv1::try_save(cache_, {&l->id, 1}, [&](std::span<const std::byte> some_bytes) {
            memory.insert(memory.end(), some_bytes.begin(), some_bytes.end());
            return true;
        });
        require(s.code() == (l->model.agreed() ? kv1::errc::ok : kv1::errc::layers_disagree), "save");
        if (!s)
            return;
        const std::size_t chosen = next() * std::size_t{257} + next(), at = chosen % memory.size();
        memory[at] ^= std::byte{4};
        require(!kv1::try_swap_in(cache_, memory), "changed bytes are refused");
        memory[at] ^= std::byte{4};
        const auto id = kv1::try_swap_in(cache_, memory);
        if (id.code() == kv1::errc::capacity_exceeded)
            return;
        require(id.reason(), "load");
        living twin{*id, l->model};
        compare(twin);
        living_.push_back(std::move(twin));
        ++tallies_.loaded;
        if (chosen % 2 == 0)
            save_prefixes(living_.back().model);
    }

    // Loads all prefixes into another cache, which must then know the same pages in the same order of use.
    void save_prefixes(const model_sequence& prompt) {
        const auto memory = try_saved(cache_, {}, {.prefixes = true});
        require(memory.reason(), "save of prefixes");
        kv1::kv_cache other(description_);
        require(kv1::try_load(other, kv1::memory_source(*memory), {}).reason(), "load of prefixes");
        require(other.try_validate(), "the invariants, with loaded prefixes");
        require(try_saved(other, {}, {.prefixes = true}).value() == *memory, "the same prefixes");
        const auto here = cache_.try_create_from_prefix(prompt.ids, salt_of(prompt));
        if (here.code() == kv1::errc::capacity_exceeded)
            return;
        require(here.reason(), "match");
        const auto there = other.try_create_from_prefix(prompt.ids, salt_of(prompt));
        require(there.reason(), "match of loaded prefixes");
        require(here->tokens == there->tokens, "as much is known");
        require(try_saved(cache_, {&here->sequence, 1}).value() ==
                    try_saved(other, {&there->sequence, 1}).value(),
                "the same pages");
        require(cache_.try_destroy_sequence(here->sequence), "destroy");
        tallies_.prefixes_loaded += there->tokens;
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
