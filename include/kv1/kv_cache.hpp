// SPDX-License-Identifier: Apache-2.0
//
// A paged KV cache that computes attention straight from its packed bits.
//
//   kv1::kv2_cache cache(kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, capacity_tokens));
//   auto sequence = cache.create_sequence();
//   for each step:
//       for each layer:
//           cache.append(sequence, layer, {k, tokens, kv_heads, head_dim}, {v, tokens, kv_heads, head_dim});
//           cache.attend(sequence, layer, {q, tokens, query_heads, head_dim},
//                        {out, tokens, query_heads, head_dim});
//       cache.commit(sequence); // where windows are to free pages, or steps to be rolled back
//
// Keys are cached as they are given, that is after RoPE where a model uses it; every vector is quantized
// before anything attends to it, the newest included. A cached key cannot be moved to another position:
// shifting already rotated keys (context shift) is out of scope, since a rotation of 2-bit codes cannot be
// undone without loss.
//
// Sequences. A sequence is a row of pages of page_tokens tokens, shared with other sequences where it can be:
//   fork       shares every page; whoever writes to a shared page first copies it (beams, n-best, prompts)
//   truncate   cuts to n tokens, at any token (speculative decoding)
//   drop       frees whole pages amid the sequence; the others keep their positions (StreamingLLM)
//   prefixes   store_prefix() keeps the pages of a prompt under its tokens, create_from_prefix() begins a new
//              sequence with the longest prefix that is known (prefix_index.hpp)
//
// Commit points. Within a step layers are appended to in any order and may differ in length. A sequence is at
// a commit point when all its layers hold the same number of tokens; commit(), fork(), store_prefix(), saving
// and swapping ask for one, and fail with layers_disagree (naming the first layer that lags) where there is
// none. commit() also marks the length that rollback() returns to, and is the only call that lets windows
// free pages: what it frees can no longer be returned to.
//
// Sliding windows. A layer with a sliding_window of w lets a query see the last w of the tokens that its mask
// shows it. Layers with the same window share block numbers; others' pages do not wait for them.
//
// fp16 sinks and window. With fp16_sinks = s and fp16_window = r a query that sees tokens 0 ... t sees the
// first s of them and the last r (its own included) as they were rounded to fp16, and those between as they
// were quantized from that fp16; in prefill as in decode. Every token is quantized once, when it is appended,
// and its fp16 copy is freed when a commit() leaves the window behind. Truncating does not bring precision
// back: a token that once left the window stays quantized, until it is appended anew. Keys and values must
// then fit fp16. read() and export_rows() give the quantized rows.
//
// Keys per channel. In a layer whose key_axis is per_channel a query sees the keys of pages that are full
// when it attends as codes, and those of the open page in fp16. What a page becomes depends on its tokens
// alone, however they were appended. Keys, less their means and rotated, must fit fp16. There is no way back
// from codes: a cut within a full page is refused, unless the last commit lies in that page (its fp16 keys
// are kept for rollback()), and prefixes are shared by whole pages, or by an open page that was stored as
// such. Rows of such keys can not be exported or appended.
//
// Errors: each call has a noexcept `try_` form that returns status or result, and a form that throws
// kv1::error. A failed call leaves the cache as it was; out_of_memory and capacity_exceeded may have cost
// unpinned pages of the prefix index. K and V must be finite: NaN, infinity and values that the format's fp16
// metadata (or fp16 itself) cannot hold are refused, naming layer, KV head, token and channel. Queries are
// not checked: a NaN or infinity in one makes that row's output NaN or meaningless, and no other row's.
//
// Threads. Const calls may run at once from any threads, and beside calls that change other sequences.
// Calls that change a sequence (append, truncate, drop, commit, rollback, destroy) need that sequence for
// themselves; fork and store_prefix read theirs. create, fork, destroy and the prefix calls may run at once
// from any threads, and so may loading. statistics() of the whole cache, then, need not be of one instant.
// try_grow(), validate(), moving and destroying the cache need it for themselves.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/block_table.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/page_pool.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/codebook.hpp>
#include <kv1/quantizers/compact.hpp>
#include <kv1/quantizers/clip_search.hpp>
#include <kv1/quantizers/least_squares.hpp>
#include <kv1/quantizers/scaled_binary.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <kv1/detail/cache_append.hpp>
#include <kv1/detail/cache_attention.hpp>
#include <kv1/detail/cache_inspection.hpp>
#include <kv1/detail/cache_rows.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/detail/try_copy.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI {

namespace detail {
struct cache_access;
}

/// The cache. Formats lists the storage formats it carries kernels for; Allocator provides the arenas.
/// Memory: one arena per layer (two with fp16 copies or keys per channel, three with both), reserved at
/// construction and touched page by page as sequences grow.
template <class Formats = all_formats, class Allocator = std::allocator<std::byte>>
class basic_kv_cache {
public:
    /// The template's arguments.
    /// @{
    using formats_type = Formats;
    using allocator_type = Allocator;
    /// @}

    /// Reserves the arenas: O(layers) plus 8 bytes a page. Errors: invalid_argument and shape_mismatch for a
    /// description that no cache can have, unsupported_format, unsupported_target (KV1_TARGET),
    /// out_of_memory. A description that is moved here is not copied, and used up also where the call fails.
    /// Without exceptions the memory for a copy is sought beforehand; another thread may take it meanwhile,
    /// which ends the program (status.hpp).
    /// @{
    [[nodiscard]] static result<basic_kv_cache> create(cache_description&& description,
                                                       const Allocator& allocator = {}) noexcept {
        basic_kv_cache cache;
        if (const status s = cache.initialize(std::move(description), allocator); !s)
            return s;
        return cache;
    }
    [[nodiscard]] static result<basic_kv_cache> create(const cache_description& description,
                                                       const Allocator& allocator = {}) noexcept {
        cache_description copy;
        if (const status s = detail::try_copy(description, copy); !s)
            return s;
        return create(std::move(copy), allocator);
    }
    /// @}

#if KV1_EXCEPTIONS
    /// As create; throw kv1::error.
    /// @{
    explicit basic_kv_cache(cache_description&& description, const Allocator& allocator = {}) {
        detail::throw_if_error(initialize(std::move(description), allocator));
    }
    explicit basic_kv_cache(const cache_description& description, const Allocator& allocator = {}) {
        cache_description copy;
        detail::throw_if_error(detail::try_copy(description, copy));
        detail::throw_if_error(initialize(std::move(copy), allocator));
    }
    /// @}
#endif

    /// Caches are moved, not copied: handles stay valid, the source holds nothing and may only be destroyed
    /// or assigned to.
    /// @{
    basic_kv_cache(basic_kv_cache&&) noexcept = default;
    basic_kv_cache& operator=(basic_kv_cache&&) noexcept = default;
    /// @}

    /// What the cache was made from.
    [[nodiscard]] const cache_description& description() const noexcept {
        return state_->storage.description();
    }
    /// How many there are.
    [[nodiscard]] std::size_t layers() const noexcept { return state_->storage.layers().size(); }
    /// Geometry of one KV head's page of a layer. Precondition: layer < layers().
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept {
        return state_->body_of(layer).layout;
    }

    /// Raises the capacity; pages keep their numbers and move. O(bytes in use). Errors: invalid_argument,
    /// out_of_memory.
    status try_grow(std::size_t capacity_tokens) noexcept {
        return state_->storage.grow(capacity_tokens, *state_->memory);
    }

    // ---- sequences

    /// An empty sequence. O(layers). Errors: out_of_memory.
    [[nodiscard]] result<sequence_id> try_create_sequence() noexcept {
        const result<std::uint32_t> slot = state_->new_slot();
        if (!slot)
            return slot.reason();
        return state_->sequences.publish(*slot);
    }

    /// Gives the sequence's pages back. O(pages). Errors: invalid_sequence.
    status try_destroy_sequence(sequence_id id) noexcept {
        detail::sequence_state* q = state_->sequences.retire(id);
        if (q == nullptr)
            return detail::stale();
        for (std::size_t g = 0; g < state_->groups().size(); ++g)
            state_->cut(*q, g, 0);
        state_->sequences.recycle(id.slot);
        return {};
    }

    /// Whether the handle names a living sequence. O(1).
    [[nodiscard]] bool contains(sequence_id id) const noexcept { return state_->find(id) != nullptr; }

    /// Tokens of one layer, dropped ones included: the position of the next one. Errors: invalid_sequence,
    /// out_of_range.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id, std::size_t layer) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        return q->length(layer);
    }
    /// Tokens that every layer holds. O(layers).
    [[nodiscard]] result<std::size_t> try_length(sequence_id id) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        return q->shortest(layers());
    }

    /// A sequence that shares every page with this one, until one of them writes to it. O(pages). Errors:
    /// invalid_sequence, layers_disagree, out_of_memory.
    [[nodiscard]] result<sequence_id> try_fork(sequence_id id) noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (const status s = state_->agreed(*q); !s)
            return s;
        return state_->fork(*q);
    }

    /// Cuts every layer to its first `tokens`. O(pages freed). Errors: invalid_sequence; out_of_range where a
    /// layer holds fewer; dropped_tokens where the cut lies within a dropped page, where a sliding window has
    /// given up tokens that the next query would see, or within a full page of keys per channel that the last
    /// commit does not lie in; with fp16 windows capacity_exceeded, out_of_memory.
    status try_truncate(sequence_id id, std::size_t tokens) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        return state_->truncate(*q, tokens);
    }

    /// Frees whole pages: first_page ... first_page + pages - 1, each full in every layer. What is left keeps
    /// its positions, and attention goes on over it alone. O(pages of the sequence). Errors:
    /// invalid_sequence, out_of_range, out_of_memory.
    status try_drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        return state_->drop_pages(*q, first_page, pages);
    }

    /// Ends a step: all layers agree, rollback() returns here, and windows free the pages that no later query
    /// can see. The length. O(layers + pages freed). Errors: invalid_sequence, layers_disagree,
    /// out_of_memory.
    result<std::size_t> try_commit(sequence_id id) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (const status s = state_->agreed(*q); !s)
            return s;
        return state_->commit(*q);
    }

    /// Cuts back to the last commit, or to nothing: undoes a step that failed or was a guess. Errors as
    /// truncate.
    status try_rollback(sequence_id id) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        return state_->truncate(*q, (std::min)(q->committed, q->shortest(layers())));
    }

    // ---- append

    /// Quantizes and stores the next tokens of one layer: keys [tokens][kv_heads][key_dim], values
    /// [tokens][kv_heads][value_dim]. Many tokens at once give the same bytes as one by one. Layers may be
    /// appended to in any order. A full pool takes pages from the prefix index first. The executor gets one
    /// task per KV head. O(values), and a copy of the open page where it is shared. Errors: invalid_sequence,
    /// out_of_range, shape_mismatch, invalid_argument, capacity_exceeded, out_of_memory, non_finite,
    /// not_representable.
    template <executor E = inline_executor>
    status try_append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (keys.tokens() == 0)
            return {};
        if (const status s = state_->open_layer(*q, layer, keys.tokens()); !s)
            return s;
        const status s = append_of(id, layer, keys, values)(run);
        state_->close_layer(*q, layer, keys.tokens(), static_cast<bool>(s));
        // on failure what was written lies past the sequence's length: it is not data
        return s ? s : detail::placed(s, layer);
    }

    /// The next tokens of one layer for several sequences, all or none: sequence i takes rows indptr[i] ...
    /// indptr[i + 1] - 1 of keys and values. No sequence comes twice. The executor gets one task per sequence
    /// and KV head. Errors as append, where().token being a row; invalid_argument for an indptr that does not
    /// divide the rows and for a sequence that comes twice.
    template <executor E = inline_executor>
    status try_append(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        if (layer >= layers())
            return detail::no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (const status s = check_batch(ids, indptr, keys.tokens()); !s)
            return s;
        std::size_t opened = 0;
        status s;
        for (; opened < ids.size(); ++opened) {
            const std::size_t tokens = indptr[opened + 1] - indptr[opened];
            detail::sequence_state* q = state_->find(ids[opened]);
            if (q->appending)
                s = {errc::invalid_argument, "a sequence comes once in a batch"};
            else
                s = state_->open_layer(*q, layer, tokens);
            if (!s)
                break;
            q->appending = true;
        }
        const detail::plane& body = state_->body_of(layer);
        if (s) {
            std::atomic<std::size_t> first_failed{ids.size()};
            auto task = [&](std::size_t i) {
                const std::size_t b = i / body.kv_heads;
                if (append_of(ids[b], layer, batch_rows(keys, indptr, b), batch_rows(values, indptr, b))
                        .head(i % body.kv_heads))
                    return;
                std::size_t seen = first_failed.load(std::memory_order_relaxed);
                while (b < seen && !first_failed.compare_exchange_weak(seen, b, std::memory_order_relaxed)) {
                }
            };
            run(ids.size() * body.kv_heads, task_view(task));
            if (const std::size_t b = first_failed.load(std::memory_order_relaxed); b != ids.size()) {
                inline_executor again; // for its reason
                s = append_of(ids[b], layer, batch_rows(keys, indptr, b),
                              batch_rows(values, indptr, b))(again);
                error_location where = s.where();
                where.token += static_cast<std::int64_t>(indptr[b]);
                s = {s.code(), s.rule(), where};
            }
        }
        for (std::size_t i = 0; i < opened; ++i) {
            detail::sequence_state* q = state_->find(ids[i]);
            q->appending = false;
            state_->close_layer(*q, layer, indptr[i + 1] - indptr[i], static_cast<bool>(s));
        }
        return s ? s : detail::placed(s, layer);
    }

    /// Appends rows that are quantized already, bit for bit, as export_rows gives them: [tokens][kv_heads].
    /// O(values). Errors as append; shape_mismatch (a buffer's size); non_finite for metadata or plain values
    /// that are no numbers; invalid_argument for a layer with fp16 copies, which rows do not have, and for
    /// one with keys quantized per channel.
    status try_append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                           const_row_buffers values) noexcept {
        detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        if (state_->planes_of(layer).copy != detail::no_plane)
            return detail::placed({errc::invalid_argument, "rows have no fp16 copies"}, layer);
        if (state_->planes_of(layer).open != detail::no_plane)
            return detail::placed({errc::invalid_argument, rule_channel_rows}, layer);
        const detail::plane& body = state_->body_of(layer);
        const std::size_t rows = tokens * body.kv_heads;
        if (tokens > (std::numeric_limits<std::uint32_t>::max)() ||
            !detail::fits(body.layout.keys(), rows, keys.packed.size(), keys.scales.size(),
                          keys.minima.size()) ||
            !detail::fits(body.layout.values(), rows, values.packed.size(), values.scales.size(),
                          values.minima.size()))
            return detail::placed({errc::shape_mismatch, "the buffers do not fit the rows"}, layer);
        for (const auto& [section, from] :
             {std::pair(&body.layout.keys(), &keys), std::pair(&body.layout.values(), &values)})
            if (const status s = detail::check_rows_finite(*section, rows, *from); !s)
                return detail::placed(s, layer);
        if (tokens == 0)
            return {};
        if (const status s = state_->open_layer(*q, layer, tokens); !s)
            return s;
        for (std::size_t i = 0; i < rows; ++i) {
            const std::size_t token = q->length(layer) + i / body.kv_heads;
            std::byte* page = const_cast<std::byte*>(page_of(*q, layer, i % body.kv_heads, token));
            detail::store_row(body.layout.keys(), page, token % state_->page_tokens(), keys, i);
            detail::store_row(body.layout.values(), page, token % state_->page_tokens(), values, i);
        }
        state_->close_layer(*q, layer, tokens, true);
        return {};
    }

    // ---- attend

    /// Attention of query rows over the cached tokens of one layer, from the packed codes:
    ///   out[i][h] = sum_t softmax_t(scale * q[i][h] . k[t][h / group]) v[t][h / group]
    /// queries [tokens][query_heads][key_dim], outputs [tokens][query_heads][value_dim] in any scalar type;
    /// query_heads is a multiple of kv_heads (group = query_heads / kv_heads). A query that sees no token
    /// gets zeros, and -infinity as its log_sum_exp. O(tokens * query_heads * length * head_dim); no
    /// allocation unless few heads meet a long sequence, whose partial results then take 4 * (value_dim + 2)
    /// bytes per range and row, or a window or a page dropped amid the queries parts what they see. The
    /// result does not depend on the executor. Errors: invalid_sequence, out_of_range, shape_mismatch,
    /// invalid_argument (also: an explicit mask, or ALiBi's slopes, where windows or dropped pages part the
    /// tokens), out_of_memory.
    template <executor E = inline_executor>
    status try_attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        return detail::sequence_attention(*state_, *q, layer, options)(queries, outputs, run);
    }

    /// The same for several sequences, each with query rows indptr[i] ... indptr[i + 1] - 1 (continuous
    /// batching, ragged lengths). Bit for bit what one call for each gives. The mask applies to each sequence
    /// by itself and is causal, without a first position, or none. Short sequences are a task each. Errors as
    /// above; outputs are then unspecified.
    template <executor E = inline_executor>
    status try_attend(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        if (layer >= layers())
            return detail::no_such_layer(layer);
        if (const status s = check_batch(ids, indptr, queries.tokens()); !s)
            return s;
        if (outputs.tokens() != queries.tokens())
            return detail::placed({errc::shape_mismatch, "one output row per query row"}, layer);
        if (!options.mask.visible().empty() || options.mask.first_position())
            return detail::placed({errc::invalid_argument, "one mask does not fit several sequences"}, layer);
        if (!options.log_sum_exp.empty() && options.log_sum_exp.size() != queries.tokens() * queries.heads())
            return detail::placed({errc::shape_mismatch, "one log-sum-exp per query row"}, layer);
        const auto attend_one = [&](std::size_t i, auto& with) {
            attention_options own = options;
            const std::size_t first = indptr[i], count = indptr[i + 1] - first;
            if (!own.log_sum_exp.empty())
                own.log_sum_exp = own.log_sum_exp.subspan(first * queries.heads(), count * queries.heads());
            return detail::sequence_attention(*state_, *state_->find(ids[i]), layer, own)(
                queries.rows(first, count), outputs.rows(first, count), with);
        };
        const auto is_long = [&](std::size_t i) { // worth splitting further
            return state_->find(ids[i])->length(layer) * (indptr[i + 1] - indptr[i]) >= long_sequence;
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

    /// Copies cached vectors out in row format, bit for bit what the quantizer made of them: of encoded ones
    /// (encoding.hpp) as they were rotated and less their means. Compact metadata go as scales, 16 bits each.
    /// Errors: invalid_sequence, out_of_range, dropped_tokens, shape_mismatch (a buffer's size),
    /// invalid_argument for keys quantized per channel.
    status try_export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                           std::size_t first, std::size_t count, row_buffers out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        if (section.axis == quantization_axis::per_channel)
            return detail::placed({errc::invalid_argument, rule_channel_rows}, layer);
        if (!detail::fits(section, count, out.packed.size(), out.scales.size(), out.minima.size()))
            return {errc::shape_mismatch, "the buffers do not fit the rows"};
        for (std::size_t i = 0; i < count; ++i)
            detail::export_row(section, page_of(*state_->find(id), layer, kv_head, first + i),
                               (first + i) % state_->page_tokens(), out, i);
        return {};
    }

    /// Decodes cached vectors, rotated back and with their means: out is [count][channels]. Errors as
    /// try_export_rows.
    status try_read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                    std::size_t count, std::span<float> out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        if (out.size() != count * section.channels)
            return {errc::shape_mismatch, "the buffer does not fit the rows"};
        const detail::layer_planes& planes = state_->planes_of(layer);
        const detail::vector_codec& codec = side == kv_side::key ? planes.keys : planes.values;
        for (std::size_t i = 0; i < count; ++i) {
            const std::span<float> row = out.subspan(i * section.channels, section.channels);
            read_row(*state_->find(id), layer, side, kv_head, first + i, row);
            codec.restore(row, kv_head);
        }
        return {};
    }

    /// Indices that export_block_tables() needs. Errors: invalid_sequence, out_of_range.
    [[nodiscard]] result<std::size_t> try_count_blocks(std::span<const sequence_id> ids,
                                                       std::size_t layer) const noexcept {
        if (layer >= layers())
            return detail::no_such_layer(layer);
        std::size_t total = 0;
        for (const sequence_id id : ids) {
            const detail::sequence_state* q = state_->find(id);
            if (q == nullptr)
                return detail::stale();
            total += q->pages[state_->body_of(layer).group].table.blocks().size();
        }
        return total;
    }

    /// Block tables of a layer for engines that bring their own kernels: pages that are not dropped, in order
    /// of position. Layers with the same sliding window share them. The number of indices. Errors:
    /// invalid_sequence, out_of_range, shape_mismatch (a span's size).
    result<std::size_t> try_export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                                block_tables out) const noexcept {
        const result<std::size_t> total = try_count_blocks(ids, layer);
        if (!total)
            return total;
        if (out.indptr.size() != ids.size() + 1 || out.last_page_tokens.size() != ids.size() ||
            out.indices.size() < *total)
            return detail::placed({errc::shape_mismatch, "the spans do not fit the tables"}, layer);
        if (*total > (std::numeric_limits<std::int32_t>::max)())
            return detail::placed({errc::not_representable, "more than 2^31 - 1 indices"}, layer);
        std::size_t at = 0;
        out.indptr[0] = 0;
        for (std::size_t i = 0; i < ids.size(); ++i) {
            const detail::sequence_state& q = *state_->find(ids[i]);
            const block_table& table = q.pages[state_->body_of(layer).group].table;
            for (const std::uint32_t block : table.blocks())
                out.indices[at++] = static_cast<std::int32_t>(block);
            out.indptr[i + 1] = static_cast<std::int32_t>(at);
            const std::size_t kept = table.kept_before(q.length(layer), state_->page_tokens());
            // a layer that lags within a step may end before the last page
            const std::size_t before =
                table.blocks().empty() ? 0 : (table.blocks().size() - 1) * state_->page_tokens();
            out.last_page_tokens[i] = static_cast<std::int32_t>(
                kept > before ? (std::min)(kept - before, state_->page_tokens()) : 0);
        }
        return *total;
    }

    /// The bytes of one KV head's page in layout(layer). Keys quantized per channel are there once the page
    /// is full; before that, try_open_keys(). Errors: out_of_range for a block that is not in use.
    [[nodiscard]] result<std::span<const std::byte>> try_page(std::size_t layer, std::size_t kv_head,
                                                              std::uint32_t block) const noexcept {
        if (layer >= layers())
            return detail::no_such_layer(layer);
        const detail::plane& body = state_->body_of(layer);
        if (kv_head >= body.kv_heads)
            return detail::no_such_head(kv_head);
        if (block >= state_->pool(body.group).capacity() || state_->pool(body.group).references(block) == 0)
            return status{errc::out_of_range, "the block is not in use"};
        return std::span<const std::byte>(body.block(block) + kv_head * body.layout.bytes(),
                                          body.layout.bytes());
    }

    /// Keys quantized per channel, of the open page: fp16, rotated and less their means, in the keys' half of
    /// a page_layout(fp16, key_dim, fp16, 0, page_tokens). Errors: invalid_sequence; out_of_range where the
    /// layer has no such keys, or no open page.
    [[nodiscard]] result<std::span<const std::byte>> try_open_keys(sequence_id id, std::size_t layer,
                                                                   std::size_t kv_head) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        const detail::layer_planes& planes = state_->planes_of(layer);
        if (kv_head >= planes.shape.kv_heads)
            return detail::no_such_head(kv_head);
        if (planes.open == detail::no_plane || q->length(layer) % state_->page_tokens() == 0)
            return detail::placed({errc::out_of_range, "no page of keys per channel is open"}, layer);
        const detail::plane& open = state_->open_keys_of(layer);
        return std::span<const std::byte>(
            open.block(state_->open_block(*q, layer)) + kv_head * open.layout.bytes(), open.layout.bytes());
    }

    // ---- prefixes

    /// Keeps the pages of a prompt, which the sequence holds from position 0 on, for others that begin alike.
    /// Only whole pages, unless `partial` is set: the open page is then kept too, and copied when the
    /// sequence appends to it. Dropped pages end what can be kept. The tokens that are known now. Errors:
    /// invalid_sequence, layers_disagree, out_of_range for more tokens than the sequence holds,
    /// out_of_memory.
    result<std::size_t> try_store_prefix(sequence_id id, std::span<const token_id> tokens,
                                         prefix_salt salt = {}, bool partial = false) noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (const status s = state_->agreed(*q); !s)
            return s;
        if (tokens.size() > q->length(0))
            return status{errc::out_of_range, "the sequence holds fewer tokens"};
        return state_->store_prefix(*q, tokens, salt, partial);
    }

    /// A new sequence that shares the pages of the longest known beginning of these tokens; leave out the
    /// tokens whose queries are needed, at least the last one. Its fp16 sinks are those that were stored; the
    /// rest is as quantized. O(tokens). Errors: out_of_memory, capacity_exceeded (with fp16 windows).
    [[nodiscard]] result<prefix_match> try_create_from_prefix(std::span<const token_id> tokens,
                                                              prefix_salt salt = {}) noexcept {
        return state_->create_from_prefix(tokens, salt);
    }

    /// The index itself: pins, events, eviction.
    /// @{
    [[nodiscard]] prefix_index& prefixes() noexcept { return state_->index; }
    [[nodiscard]] const prefix_index& prefixes() const noexcept { return state_->index; }
    /// @}

    // ---- statistics

    /// Over all sequences. O(pages + sequences * layers).
    [[nodiscard]] cache_statistics statistics() const noexcept { return inspection().statistics(); }
    /// Of one sequence. O(pages + layers). Errors: invalid_sequence.
    [[nodiscard]] result<cache_statistics> try_statistics(sequence_id id) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        return inspection().statistics(*q);
    }
    /// Free pages, of the page group that has fewest.
    [[nodiscard]] std::size_t available_pages() const noexcept { return inspection().available_pages(); }

    /// Checks every invariant: reference counts against all tables and the prefix index, lengths against
    /// pages. For tests and debugging. O(pages + sequences * layers). Errors: broken_invariant,
    /// out_of_memory.
    [[nodiscard]] status try_validate() const noexcept { return inspection().validate(); }

#if KV1_EXCEPTIONS
    /// As the try_ forms; throw kv1::error.
    /// @{
    void grow(std::size_t capacity_tokens) { detail::throw_if_error(try_grow(capacity_tokens)); }
    [[nodiscard]] sequence_id create_sequence() { return try_create_sequence().value(); }
    void destroy_sequence(sequence_id id) { detail::throw_if_error(try_destroy_sequence(id)); }
    [[nodiscard]] std::size_t length(sequence_id id, std::size_t layer) const {
        return try_length(id, layer).value();
    }
    [[nodiscard]] std::size_t length(sequence_id id) const { return try_length(id).value(); }
    [[nodiscard]] sequence_id fork(sequence_id id) { return try_fork(id).value(); }
    void truncate(sequence_id id, std::size_t tokens) { detail::throw_if_error(try_truncate(id, tokens)); }
    void drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) {
        detail::throw_if_error(try_drop_pages(id, first_page, pages));
    }
    std::size_t commit(sequence_id id) { return try_commit(id).value(); }
    void rollback(sequence_id id) { detail::throw_if_error(try_rollback(id)); }
    template <executor E = inline_executor>
    void append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(id, layer, keys, values, run));
    }
    template <executor E = inline_executor>
    void append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(ids, layer, indptr, keys, values, run));
    }
    void append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                     const_row_buffers values) {
        detail::throw_if_error(try_append_rows(id, layer, tokens, keys, values));
    }
    template <executor E = inline_executor>
    void attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                const attention_options& options = {}, E&& run = {}) const {
        detail::throw_if_error(try_attend(id, layer, queries, outputs, options, run));
    }
    template <executor E = inline_executor>
    void attend(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view queries, mutable_tensor_view outputs, const attention_options& options = {},
                E&& run = {}) const {
        detail::throw_if_error(try_attend(ids, layer, indptr, queries, outputs, options, run));
    }
    void export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                     std::size_t count, row_buffers out) const {
        detail::throw_if_error(try_export_rows(id, layer, side, kv_head, first, count, out));
    }
    void read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
              std::size_t count, std::span<float> out) const {
        detail::throw_if_error(try_read(id, layer, side, kv_head, first, count, out));
    }
    [[nodiscard]] std::size_t count_blocks(std::span<const sequence_id> ids, std::size_t layer) const {
        return try_count_blocks(ids, layer).value();
    }
    std::size_t export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                    block_tables out) const {
        return try_export_block_tables(ids, layer, out).value();
    }
    [[nodiscard]] std::span<const std::byte> page(std::size_t layer, std::size_t kv_head,
                                                  std::uint32_t block) const {
        return try_page(layer, kv_head, block).value();
    }
    [[nodiscard]] std::span<const std::byte> open_keys(sequence_id id, std::size_t layer,
                                                       std::size_t kv_head) const {
        return try_open_keys(id, layer, kv_head).value();
    }
    std::size_t store_prefix(sequence_id id, std::span<const token_id> tokens, prefix_salt salt = {},
                             bool partial = false) {
        return try_store_prefix(id, tokens, salt, partial).value();
    }
    [[nodiscard]] prefix_match create_from_prefix(std::span<const token_id> tokens, prefix_salt salt = {}) {
        return try_create_from_prefix(tokens, salt).value();
    }
    [[nodiscard]] cache_statistics statistics(sequence_id id) const { return try_statistics(id).value(); }
    void validate() const { detail::throw_if_error(try_validate()); }
    /// @}
#endif

private:
    friend struct detail::cache_access;

    static constexpr std::size_t long_sequence = 16384; // query rows * tokens
    static constexpr const char* rule_channel_rows = "keys per channel have no rows of their own";

    basic_kv_cache() = default;

    status initialize(cache_description&& d, const Allocator& allocator) noexcept {
        if (detail::environment_target().refused)
            return {errc::unsupported_target, "KV1_TARGET names no target that this processor supports"};
        std::unique_ptr<detail::memory_source> memory(new (std::nothrow)
                                                          detail::allocator_memory<Allocator>(allocator));
        if (memory == nullptr)
            return detail::no_memory();
        std::unique_ptr<detail::cache_state> fresh(
            new (std::nothrow) detail::cache_state(std::move(memory), detail::kernel_set::of<Formats>()));
        if (fresh == nullptr)
            return detail::no_memory();
        if (const status s = fresh->initialize(std::move(d)); !s)
            return s;
        state_ = std::move(fresh);
        return {};
    }

    [[nodiscard]] detail::cache_inspection inspection() const noexcept {
        return detail::cache_inspection(*state_);
    }

    // The new tokens of a living sequence, whose pages are open.
    [[nodiscard]] detail::sequence_append append_of(sequence_id id, std::size_t layer,
                                                    const tensor_view& keys,
                                                    const tensor_view& values) const noexcept {
        return {*state_, *state_->find(id), layer, keys, values};
    }

    // ---- checks

    [[nodiscard]] status check_append(std::size_t layer, const tensor_view& keys,
                                      const tensor_view& values) const noexcept {
        const layer_description& l = state_->planes_of(layer).shape;
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
        if (keys.has_negative_extent() || values.has_negative_extent())
            return {errc::invalid_argument, detail::rule_extents, where};
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

    [[nodiscard]] status check_batch(std::span<const sequence_id> ids, std::span<const std::size_t> indptr,
                                     std::size_t rows) const noexcept {
        if (rows == detail::extent::negative)
            return {errc::invalid_argument, detail::rule_extents};
        if (indptr.size() != ids.size() + 1 || indptr.front() != 0 || indptr.back() != rows)
            return {errc::invalid_argument, "indptr divides the rows among the sequences"};
        for (std::size_t i = 0; i < ids.size(); ++i) {
            if (indptr[i] > indptr[i + 1])
                return {errc::invalid_argument, "indptr ascends"};
            if (state_->find(ids[i]) == nullptr)
                return detail::stale();
        }
        return {};
    }
    static tensor_view batch_rows(const tensor_view& all, std::span<const std::size_t> indptr,
                                  std::size_t i) noexcept {
        return all.rows(indptr[i], indptr[i + 1] - indptr[i]);
    }

    [[nodiscard]] status check_rows(sequence_id id, std::size_t layer, std::size_t kv_head, std::size_t first,
                                    std::size_t count) const noexcept {
        const detail::sequence_state* q = state_->find(id);
        if (q == nullptr)
            return detail::stale();
        if (layer >= layers())
            return detail::no_such_layer(layer);
        if (kv_head >= state_->planes_of(layer).shape.kv_heads)
            return detail::no_such_head(kv_head);
        if (first > q->length(layer) || count > q->length(layer) - first)
            return {errc::out_of_range, "the tokens are not all cached"};
        for (const page_hole& h : q->pages[state_->body_of(layer).group].table.holes())
            if (count != 0 && first < h.last * state_->page_tokens() &&
                first + count > h.first * state_->page_tokens())
                return {errc::dropped_tokens, "the tokens are not all there any more"};
        return {};
    }

    // ---- rows

    [[nodiscard]] const section_layout& section_of(std::size_t layer, kv_side side) const noexcept {
        const page_layout& p = state_->body_of(layer).layout;
        return side == kv_side::key ? p.keys() : p.values();
    }
    // The page of a token that is there.
    [[nodiscard]] const std::byte* page_of(const detail::sequence_state& q, std::size_t layer,
                                           std::size_t kv_head, std::size_t token) const noexcept {
        const detail::plane& body = state_->body_of(layer);
        const block_table& table = q.pages[body.group].table;
        return body.block(table.blocks()[*table.find(token / state_->page_tokens())]) +
               kv_head * body.layout.bytes();
    }

    void read_row(const detail::sequence_state& q, std::size_t layer, kv_side side, std::size_t kv_head,
                  std::size_t token, std::span<float> out) const noexcept {
        const section_layout& section = section_of(layer, side);
        const std::size_t page = token / state_->page_tokens(), slot = token % state_->page_tokens();
        if (section.axis == quantization_axis::per_channel &&
            page == q.length(layer) / state_->page_tokens()) {
            const detail::plane& open = state_->open_keys_of(layer);
            const std::byte* keys = open.block(state_->open_block(q, layer)) + kv_head * open.layout.bytes();
            detail::decode_row(open.layout.keys(), keys, slot, out);
        } else {
            detail::decode_row(section, page_of(q, layer, kv_head, token), slot, out);
        }
    }

    std::unique_ptr<detail::cache_state> state_;
};

/// A cache for any mix of formats.
using kv_cache = basic_kv_cache<>;
/// The cache of models that were trained with it: K and V in affine<2>, 12 bytes per vector at head_dim 32, 36 at
/// 128; levels from a vector's minimum to its maximum unless encodings say otherwise. With these levels it turns the
/// text of a model that was not trained for it to garbage: the perplexity of SmolLM2-135M-Instruct on WikiText-2 goes
/// from 28.8 to 961. For such a model take kv_cache with fitted, rotated formats, fp16 sinks and a window, as
/// examples/quickstart.cpp does.
using kv2_cache = basic_kv_cache<formats<affine<2>>>;

} // namespace kv1::inline KV1_ABI
