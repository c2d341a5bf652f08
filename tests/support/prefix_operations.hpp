// SPDX-License-Identifier: Apache-2.0
//
// Prefixes, and what is saved and loaded. Cases of cache_operations.hpp.
#pragma once

#include "saved_bytes.hpp"
#include "sequence_operations.hpp"

#include <kv1/cache_io.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace kv1_test {

class prefix_operations : public sequence_operations {
protected:
    using sequence_operations::sequence_operations;

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
};

} // namespace kv1_test
