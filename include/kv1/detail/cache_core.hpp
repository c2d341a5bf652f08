// SPDX-License-Identifier: Apache-2.0
//
// The cache without its template arguments: every call of basic_kv_cache, with formats, allocator and
// executor known at run time only. It checks arguments, finds sequences by their handles, and leaves the work
// to the headers that it includes.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/cache_statistics.hpp>
#include <kv1/detail/block_table.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/append_pages.hpp>
#include <kv1/detail/cache_append.hpp>
#include <kv1/detail/cache_attention.hpp>
#include <kv1/detail/cache_inspection.hpp>
#include <kv1/detail/cache_rows.hpp>
#include <kv1/detail/cache_state.hpp>
#if defined(KV1_EXTERNAL_KERNELS)
#include <kv1/detail/any_cache.hpp>
#endif
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/detail/sequence_edits.hpp>
#include <kv1/detail/stored_prefixes.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>
#include <kv1/target.hpp>
#include <kv1/tensor.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// A cache. basic_kv_cache documents the calls, which have the same names there.
class cache_core final
#if defined(KV1_EXTERNAL_KERNELS)
    : public any_cache // whose functions these are
#endif
{
public:
    [[nodiscard]] static result<std::unique_ptr<cache_core>>
    create(cache_description&& d, std::unique_ptr<memory_source> memory, const kernel_set& kernels) noexcept {
        if (environment_target().refused)
            return status{errc::unsupported_target,
                          "KV1_TARGET names no target that this processor supports"};
        std::unique_ptr<cache_core> made(new (std::nothrow) cache_core(std::move(memory), kernels));
        if (made == nullptr)
            return no_memory();
        if (const status s = made->state_.initialize(std::move(d)); !s)
            return s;
        return made;
    }

    [[nodiscard]] const cache_description& description() const noexcept {
        return state_.storage.description();
    }
    [[nodiscard]] std::size_t layers() const noexcept { return state_.storage.layers().size(); }
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept {
        return state_.body_of(layer).layout;
    }

    status grow(std::size_t capacity_tokens) noexcept {
        return state_.storage.grow(capacity_tokens, *state_.memory);
    }

    // ---- sequences

    [[nodiscard]] result<sequence_id> create_sequence() noexcept {
        const result<std::uint32_t> slot = state_.new_slot();
        if (!slot)
            return slot.reason();
        return state_.sequences.publish(*slot);
    }

    status destroy_sequence(sequence_id id) noexcept {
        sequence_state* q = state_.sequences.retire(id);
        if (q == nullptr)
            return stale();
        for (std::size_t g = 0; g < state_.groups().size(); ++g)
            state_.cut(*q, g, 0);
        state_.sequences.recycle(id.slot);
        return {};
    }

    [[nodiscard]] bool contains(sequence_id id) const noexcept { return state_.find(id) != nullptr; }

    [[nodiscard]] result<std::size_t> length(sequence_id id, std::size_t layer) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        return q->length(layer);
    }
    [[nodiscard]] result<std::size_t> length(sequence_id id) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        return q->shortest(layers());
    }

    [[nodiscard]] result<sequence_id> fork(sequence_id id) noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (const status s = state_.agreed(*q); !s)
            return s;
        return sequence_edits(state_).fork(*q);
    }

    status truncate(sequence_id id, std::size_t tokens) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        return sequence_edits(state_).truncate(*q, tokens);
    }

    status drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        return sequence_edits(state_).drop_pages(*q, first_page, pages);
    }

    result<std::size_t> commit(sequence_id id) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (const status s = state_.agreed(*q); !s)
            return s;
        return sequence_edits(state_).commit(*q);
    }

    status rollback(sequence_id id) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (!q->committed)
            return {errc::nothing_committed, "the sequence has no commit to return to"};
        return sequence_edits(state_).truncate(*q, (std::min)(*q->committed, q->shortest(layers())));
    }

    // ---- append

    status append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values,
                  executor_view run) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (keys.tokens() == 0)
            return {};
        if (const status s = append_pages(state_).begin_append(*q, layer, keys.tokens()); !s)
            return s;
        const status s = append_of(id, layer, keys, values)(run);
        append_pages(state_).end_append(*q, layer, keys.tokens(), static_cast<bool>(s));
        // on failure what was written lies past the sequence's length, where nobody reads it
        return s ? s : placed(s, layer);
    }

    status append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                  tensor_view keys, tensor_view values, executor_view run) noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (const status s = check_batch(ids, indptr, keys.tokens()); !s)
            return placed(s, layer);
        const auto tokens_of = [&](std::size_t i) { return indptr[i + 1] - indptr[i]; };
        std::size_t opened = 0;
        status s;
        for (; s && opened < ids.size(); opened += s ? 1 : 0)
            if (tokens_of(opened) != 0)
                s = append_pages(state_).begin_append(*state_.find(ids[opened]), layer, tokens_of(opened));
        if (!s)
            s = at_row(s, indptr[opened]);
        const plane& body = state_.body_of(layer);
        if (s) {
            std::atomic<std::size_t> first_failed{ids.size()};
            auto task = [&](std::size_t i) {
                const std::size_t b = i / body.kv_heads;
                if (tokens_of(b) == 0 ||
                    append_of(ids[b], layer, batch_rows(keys, indptr, b), batch_rows(values, indptr, b))
                        .head(i % body.kv_heads))
                    return;
                std::size_t seen = first_failed.load(std::memory_order_relaxed);
                while (b < seen && !first_failed.compare_exchange_weak(seen, b, std::memory_order_relaxed)) {
                }
            };
            run(ids.size() * body.kv_heads, task_view(task));
            // once more, for its reason; where memory was short and is there now, the others follow
            for (std::size_t b = first_failed.load(std::memory_order_relaxed); s && b < ids.size(); ++b) {
                if (tokens_of(b) == 0)
                    continue;
                inline_executor again;
                if (s = append_of(ids[b], layer, batch_rows(keys, indptr, b),
                                  batch_rows(values, indptr, b))(again);
                    !s)
                    s = at_row(s, indptr[b]);
            }
        }
        for (std::size_t i = 0; i < opened; ++i)
            if (tokens_of(i) != 0)
                append_pages(state_).end_append(*state_.find(ids[i]), layer, tokens_of(i),
                                                static_cast<bool>(s));
        return s ? s : placed(s, layer);
    }

    status append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                       const_row_buffers values) noexcept {
        sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (state_.planes_of(layer).copy != no_plane)
            return placed({errc::invalid_argument, "rows have no fp16 copies"}, layer);
        if (state_.planes_of(layer).open != no_plane)
            return placed({errc::invalid_argument, rule_channel_rows}, layer);
        const plane& body = state_.body_of(layer);
        const bool keys_alone = body.layout.values_in_keys();
        const std::size_t rows = tokens * body.kv_heads;
        if (tokens > (std::numeric_limits<std::uint32_t>::max)() ||
            !fits(body.layout.keys(), rows, keys.packed.size(), keys.scales.size(), keys.minima.size()) ||
            !(keys_alone ? values.packed.empty() && values.scales.empty() && values.minima.empty()
                         : fits(body.layout.values(), rows, values.packed.size(), values.scales.size(),
                                values.minima.size())))
            return placed({errc::shape_mismatch, "the buffers do not fit the rows"}, layer);
        if (const status s = check_rows_finite(body.layout.keys(), rows, keys); !s)
            return placed(s, layer);
        if (!keys_alone)
            if (const status s = check_rows_finite(body.layout.values(), rows, values); !s)
                return placed(s, layer);
        if (tokens == 0)
            return {};
        if (const status s = append_pages(state_).begin_append(*q, layer, tokens); !s)
            return s;
        const layer_store store = state_.store_of(layer);
        for (std::size_t i = 0; i < rows; ++i) {
            const std::size_t token = q->length(layer) + i / body.kv_heads;
            const slot_place to = place_of(*q, layer, token);
            store.write_row(kv_side::key, to, i % body.kv_heads, keys, i);
            if (!keys_alone)
                store.write_row(kv_side::value, to, i % body.kv_heads, values, i);
        }
        append_pages(state_).end_append(*q, layer, tokens, true);
        return {};
    }

    // ---- attend

    status attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                  const attention_options& options, executor_view run) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (!options.masks.empty())
            return placed({errc::invalid_argument, "masks are for several sequences"}, layer);
        return sequence_attention(state_, *q, layer, options)(queries, outputs, run);
    }

    status attend(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                  tensor_view queries, mutable_tensor_view outputs, const attention_options& options,
                  executor_view run) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_batch(ids, indptr, queries.tokens()); !s)
            return placed(s, layer);
        if (outputs.tokens() != queries.tokens())
            return placed({errc::shape_mismatch, "one output row per query row"}, layer);
        if (!options.masks.empty() && options.masks.size() != ids.size())
            return placed({errc::shape_mismatch, "one mask per sequence"}, layer);
        if (!options.mask.visible().empty() || options.mask.first_position())
            return placed({errc::invalid_argument,
                           "one such mask does not fit several sequences: masks has one for each"},
                          layer);
        if (!options.log_sum_exp.empty() && options.log_sum_exp.size() != queries.tokens() * queries.heads())
            return placed({errc::shape_mismatch, "one log-sum-exp per query row"}, layer);
        const auto attend_one = [&](std::size_t i, auto& with) -> status {
            attention_options own = options;
            const std::size_t first = indptr[i], count = indptr[i + 1] - first;
            if (!own.masks.empty())
                own.mask = own.masks[i];
            own.masks = {};
            if (!own.log_sum_exp.empty())
                own.log_sum_exp = own.log_sum_exp.subspan(first * queries.heads(), count * queries.heads());
            const status s = sequence_attention(state_, *state_.find(ids[i]), layer, own)(
                queries.slice(first, count), outputs.slice(first, count), with);
            return s ? s : at_row(s, first);
        };
        const auto is_long = [&](std::size_t i) { // worth splitting further
            return state_.find(ids[i])->length(layer) * (indptr[i + 1] - indptr[i]) >= long_sequence;
        };
        std::atomic<bool> failed{false};
        auto task = [&](std::size_t i) {
            inline_executor alone;
            if (!is_long(i) && !attend_one(i, alone))
                failed.store(true, std::memory_order_relaxed);
        };
        run(ids.size(), task_view(task));
        for (std::size_t i = 0; i < ids.size(); ++i)
            if (is_long(i) || failed.load(std::memory_order_relaxed))
                if (const status s = attend_one(i, run); !s)
                    return s;
        return {};
    }

    // ---- rows and pages

    status export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                       std::size_t first, std::size_t count, row_buffers out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const layer_store store = state_.store_of(layer);
        const section_layout& section = store.section(side);
        if (section.axis == quantization_axis::per_channel)
            return placed({errc::invalid_argument, rule_channel_rows}, layer);
        if (!fits(section, count, out.packed.size(), out.scales.size(), out.minima.size()))
            return {errc::shape_mismatch, "the buffers do not fit the rows"};
        for (std::size_t i = 0; i < count; ++i)
            store.read_row(side, place_of(*state_.find(id), layer, first + i), kv_head, out, i);
        return {};
    }

    status read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                std::size_t count, std::span<float> out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const layer_store store = state_.store_of(layer);
        const section_layout& section = store.section(side);
        if (out.size() != count * section.channels)
            return {errc::shape_mismatch, "the buffer does not fit the rows"};
        const sequence_state& q = *state_.find(id);
        const bool per_channel = section.axis == quantization_axis::per_channel;
        for (std::size_t i = 0; i < count; ++i) {
            const std::span<float> row = out.subspan(i * section.channels, section.channels);
            const std::size_t token = first + i;
            const std::size_t position = state_.storage.description().first_position + token;
            if (per_channel && token / state_.page_tokens() == q.length(layer) / state_.page_tokens())
                store.read_open_key({state_.open_block(q, layer), token % state_.page_tokens()}, kv_head,
                                    position, row);
            else
                store.read(side, place_of(q, layer, token), kv_head, position, row);
        }
        return {};
    }

    [[nodiscard]] result<std::size_t> count_blocks(std::span<const sequence_id> ids,
                                                   std::size_t layer) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        std::size_t total = 0;
        for (const sequence_id id : ids) {
            const sequence_state* q = state_.find(id);
            if (q == nullptr)
                return stale();
            total += q->pages[state_.body_of(layer).group].table.blocks().size();
        }
        return total;
    }

    result<std::size_t> export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                            block_tables out) const noexcept {
        const result<std::size_t> total = count_blocks(ids, layer);
        if (!total)
            return total;
        if (out.indptr.size() != ids.size() + 1 || out.last_page_tokens.size() != ids.size() ||
            out.indices.size() < *total)
            return placed({errc::shape_mismatch, "the spans do not fit the tables"}, layer);
        if (*total > (std::numeric_limits<std::int32_t>::max)())
            return placed({errc::not_representable, "more than 2^31 - 1 indices"}, layer);
        std::size_t at = 0;
        out.indptr[0] = 0;
        for (std::size_t i = 0; i < ids.size(); ++i) {
            const sequence_state& q = *state_.find(ids[i]);
            const block_table& table = q.pages[state_.body_of(layer).group].table;
            for (const std::uint32_t block : table.blocks())
                out.indices[at++] = static_cast<std::int32_t>(block);
            out.indptr[i + 1] = static_cast<std::int32_t>(at);
            const std::size_t kept = table.kept_before(q.length(layer), state_.page_tokens());
            // a layer that lags within a step may end before the last page
            const std::size_t before =
                table.blocks().empty() ? 0 : (table.blocks().size() - 1) * state_.page_tokens();
            out.last_page_tokens[i] = static_cast<std::int32_t>(
                kept > before ? (std::min)(kept - before, state_.page_tokens()) : 0);
        }
        return *total;
    }

    [[nodiscard]] result<std::span<const std::byte>> page(std::size_t layer, std::size_t kv_head,
                                                          std::uint32_t block) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        const plane& body = state_.body_of(layer);
        if (kv_head >= body.kv_heads)
            return no_such_head(kv_head);
        if (block >= state_.pool(body.group).capacity() || state_.pool(body.group).references(block) == 0)
            return status{errc::out_of_range, "the block is not in use"};
        return std::span<const std::byte>(body.block(block) + kv_head * body.layout.bytes(),
                                          body.layout.bytes());
    }

    [[nodiscard]] result<std::span<const std::byte>> open_keys(sequence_id id, std::size_t layer,
                                                               std::size_t kv_head) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        const layer_planes& planes = state_.planes_of(layer);
        if (kv_head >= planes.shape.kv_heads)
            return no_such_head(kv_head);
        if (planes.open == no_plane || q->length(layer) % state_.page_tokens() == 0)
            return placed({errc::out_of_range, "no page of keys per channel is open"}, layer);
        const plane& open = state_.open_keys_of(layer);
        return std::span<const std::byte>(
            open.block(state_.open_block(*q, layer)) + kv_head * open.layout.bytes(), open.layout.bytes());
    }

    // ---- prefixes

    result<std::size_t> store_prefix(sequence_id id, std::span<const token_id> tokens, prefix_salt salt,
                                     bool partial) noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (const status s = state_.agreed(*q); !s)
            return s;
        if (tokens.size() > q->length(0))
            return status{errc::out_of_range, "the sequence holds fewer tokens"};
        return stored_prefixes(state_).store_prefix(*q, tokens, salt, partial);
    }

    [[nodiscard]] result<prefix_match> create_from_prefix(std::span<const token_id> tokens,
                                                          prefix_salt salt) noexcept {
        return stored_prefixes(state_).create_from_prefix(tokens, salt);
    }

    [[nodiscard]] prefix_index& prefixes() noexcept { return state_.index; }
    [[nodiscard]] const prefix_index& prefixes() const noexcept { return state_.index; }

    // ---- statistics

    [[nodiscard]] cache_statistics statistics() const noexcept { return inspection().statistics(); }
    [[nodiscard]] result<cache_statistics> statistics(sequence_id id) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        return inspection().statistics(*q);
    }
    [[nodiscard]] std::size_t available_pages() const noexcept { return inspection().available_pages(); }

    [[nodiscard]] status validate() const noexcept { return inspection().validate(); }

    // ---- for those who save and load

    [[nodiscard]] cache_state& state() noexcept { return state_; }
    [[nodiscard]] const cache_state& state() const noexcept { return state_; }

private:
    cache_core(std::unique_ptr<memory_source> memory, const kernel_set& kernels) noexcept
        : state_(std::move(memory), kernels) {}

    static constexpr std::size_t long_sequence = 16384; // query rows * tokens
    static constexpr const char* rule_channel_rows = "keys per channel have no rows of their own";

    [[nodiscard]] cache_inspection inspection() const noexcept { return cache_inspection(state_); }

    // Precondition: the sequence lives, and begin_append() has made room for these tokens.
    [[nodiscard]] sequence_append append_of(sequence_id id, std::size_t layer, const tensor_view& keys,
                                            const tensor_view& values) const noexcept {
        return {state_, *state_.find(id), layer, keys, values};
    }

    // ---- checks

    [[nodiscard]] status check_append(std::size_t layer, const tensor_view& keys,
                                      const tensor_view& values) const noexcept {
        const layer_description& l = state_.planes_of(layer).shape;
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
        if (keys.has_negative_extent() || values.has_negative_extent())
            return {errc::invalid_argument, rule_extents, where};
        if (l.values_in_keys)
            return check_append_keys(l, keys, values, where);
        if (keys.tokens() != 0 && values.tokens() == 0 && values.data() == nullptr)
            return {errc::shape_mismatch, "the layer's values do not lie in its keys: append takes both",
                    where};
        if (keys.tokens() != values.tokens())
            return {errc::shape_mismatch, "keys and values have the same number of tokens", where};
        if (keys.heads() != l.kv_heads || values.heads() != l.kv_heads)
            return {errc::shape_mismatch, "keys and values have the layer's number of KV heads", where};
        if (keys.channels() != l.key_dim || values.channels() != l.value_dim)
            return {errc::shape_mismatch, "keys and values have the layer's head dims", where};
        if (keys.tokens() != 0 && (keys.data() == nullptr || values.data() == nullptr))
            return {errc::invalid_argument, "keys and values are not null", where};
        return {};
    }

    // Checks the tensors of a layer whose values lie in its keys. values are empty or a view of the keys.
    [[nodiscard]] static status check_append_keys(const layer_description& l, const tensor_view& keys,
                                                  const tensor_view& values,
                                                  const error_location& where) noexcept {
        if (keys.heads() != l.kv_heads)
            return {errc::shape_mismatch, "keys have the layer's number of KV heads", where};
        if (keys.channels() != l.key_dim)
            return {errc::shape_mismatch, "keys have the layer's head dim", where};
        if (keys.tokens() != 0 && keys.data() == nullptr)
            return {errc::invalid_argument, "keys are not null", where};
        const bool none = values.data() == nullptr && values.tokens() == 0;
        const bool same_keys = values.data() == keys.data() && values.type() == keys.type() &&
                               values.tokens() == keys.tokens() && values.heads() == keys.heads() &&
                               values.token_stride() == keys.token_stride() &&
                               values.head_stride() == keys.head_stride() &&
                               (values.channels() == l.key_dim || values.channels() == l.value_dim);
        if (!none && !same_keys)
            return {errc::invalid_argument, "values that lie in keys are none, or a view of these keys",
                    where};
        return {};
    }

    [[nodiscard]] status check_batch(std::span<const sequence_id> ids, std::span<const std::size_t> indptr,
                                     std::size_t rows) const noexcept {
        if (rows == extent::negative)
            return {errc::invalid_argument, rule_extents};
        if (indptr.size() != ids.size() + 1 || indptr.front() != 0 || indptr.back() != rows)
            return {errc::invalid_argument, "indptr divides the rows among the sequences"};
        // one bit a slot, modulo 4096: only sequences that meet a set bit are compared with those before
        std::array<std::uint64_t, 64> met{};
        for (std::size_t i = 0; i < ids.size(); ++i) {
            if (indptr[i] > indptr[i + 1])
                return {errc::invalid_argument, "indptr ascends"};
            if (state_.find(ids[i]) == nullptr)
                return at_row(stale(), indptr[i]);
            std::uint64_t& word = met[ids[i].slot / 64 % met.size()];
            const std::uint64_t bit = std::uint64_t{1} << ids[i].slot % 64;
            const auto before = ids.first(i);
            if ((word & bit) != 0 && std::find(before.begin(), before.end(), ids[i]) != before.end())
                return at_row({errc::invalid_argument, "a sequence comes once in a batch"}, indptr[i]);
            word |= bit;
        }
        return {};
    }
    // The status with its token counted in the batch: token 2 of a sequence whose first is 7 becomes 9. A
    // status without a token gets the sequence's first.
    static status at_row(const status& s, std::size_t first) noexcept {
        error_location where = s.where();
        where.token = static_cast<std::int64_t>(first) + (std::max<std::int64_t>)(where.token, 0);
        return {s.code(), s.rule(), where};
    }
    static tensor_view batch_rows(const tensor_view& all, std::span<const std::size_t> indptr,
                                  std::size_t i) noexcept {
        return all.slice(indptr[i], indptr[i + 1] - indptr[i]);
    }

    [[nodiscard]] status check_rows(sequence_id id, std::size_t layer, std::size_t kv_head, std::size_t first,
                                    std::size_t count) const noexcept {
        const sequence_state* q = state_.find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (kv_head >= state_.planes_of(layer).shape.kv_heads)
            return no_such_head(kv_head);
        if (first > q->length(layer) || count > q->length(layer) - first)
            return {errc::out_of_range, "the tokens are not all cached"};
        for (const page_hole& h : q->pages[state_.body_of(layer).group].table.holes())
            if (count != 0 && first < h.last * state_.page_tokens() &&
                first + count > h.first * state_.page_tokens())
                return {errc::dropped_tokens, "the tokens are not all there any more"};
        return {};
    }

    // ---- rows

    // Where a token lies. Precondition: it is not dropped.
    [[nodiscard]] slot_place place_of(const sequence_state& q, std::size_t layer,
                                      std::size_t token) const noexcept {
        const block_table& table = q.pages[state_.body_of(layer).group].table;
        return {table.blocks()[*table.find(token / state_.page_tokens())], token % state_.page_tokens()};
    }

    cache_state state_;
};

} // namespace kv1::inline KV1_ABI::detail
