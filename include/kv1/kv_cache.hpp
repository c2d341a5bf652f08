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
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/page_pool.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/compact.hpp>
#include <kv1/quantizers/least_squares.hpp>
#include <kv1/quantizers/scaled_binary.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <kv1/detail/append.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/cache_storage.hpp>
#include <kv1/detail/schedule.hpp>
#include <kv1/detail/sequence_state.hpp>
#include <kv1/detail/slot_table.hpp>
#include <kv1/detail/visible_parts.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Which of the two tensors of a layer.
enum class kv_side : std::uint8_t { key, value };

/// Destination of exported rows: packed values, and metadata where the format has it (else the spans stay
/// empty). Row i takes bytes [i * packed_bytes, (i + 1) * packed_bytes); plain formats export their values,
/// little-endian.
struct row_buffers {
    std::span<std::byte> packed;    ///< rows * packed_bytes(format, head_dim)
    std::span<float16> scales = {}; ///< one a row, where the format has scales
    std::span<float16> minima = {}; ///< one a row, where the format has minima
};

/// The same to read from.
struct const_row_buffers {
    std::span<const std::byte> packed;
    std::span<const float16> scales = {};
    std::span<const float16> minima = {};
};

/// Block tables as FlashInfer and vLLM have them. Sequence i owns indices indptr[i] ... indptr[i + 1] - 1;
/// its last page holds last_page_tokens[i] tokens (0 where there is none).
struct block_tables {
    std::span<std::int32_t> indptr;           ///< sequences + 1
    std::span<std::int32_t> indices;          ///< as many as needed, or more
    std::span<std::int32_t> last_page_tokens; ///< sequences
};

/// A sequence that begins with known tokens.
struct prefix_match {
    sequence_id sequence;
    std::size_t tokens = 0; ///< that it already holds
};

namespace detail {
struct cache_access;
}

/// The cache. Formats lists the storage formats it carries kernels for; Allocator provides the arenas.
/// Memory: one arena per layer (two with fp16 copies), reserved at construction and touched page by page as
/// sequences grow.
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
    /// out_of_memory.
    [[nodiscard]] static result<basic_kv_cache> create(const cache_description& description,
                                                       const Allocator& allocator = {}) noexcept {
        basic_kv_cache cache;
        if (const status s = cache.initialize(description, allocator); !s)
            return s;
        return cache;
    }

#if KV1_EXCEPTIONS
    /// As create; throws kv1::error.
    explicit basic_kv_cache(const cache_description& description, const Allocator& allocator = {}) {
        detail::throw_if_error(initialize(description, allocator));
    }
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
        return body_of(layer).layout;
    }

    /// Raises the capacity; pages keep their numbers and move. O(bytes in use). Errors: invalid_argument,
    /// out_of_memory.
    status try_grow(std::size_t capacity_tokens) noexcept {
        return state_->storage.grow(capacity_tokens, state_->allocator);
    }

    // ---- sequences

    /// An empty sequence. O(layers). Errors: out_of_memory.
    [[nodiscard]] result<sequence_id> try_create_sequence() noexcept {
        const result<std::uint32_t> slot = new_slot();
        if (!slot)
            return slot.reason();
        return state_->sequences.publish(*slot);
    }

    /// Gives the sequence's pages back. O(pages). Errors: invalid_sequence.
    status try_destroy_sequence(sequence_id id) noexcept {
        sequence* q = state_->sequences.retire(id);
        if (q == nullptr)
            return stale();
        for (std::size_t g = 0; g < groups().size(); ++g)
            cut(*q, g, 0);
        state_->sequences.recycle(id.slot);
        return {};
    }

    /// Whether the handle names a living sequence. O(1).
    [[nodiscard]] bool contains(sequence_id id) const noexcept { return find(id) != nullptr; }

    /// Tokens of one layer, dropped ones included: the position of the next one. Errors: invalid_sequence,
    /// out_of_range.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id, std::size_t layer) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        return q->length(layer);
    }
    /// Tokens that every layer holds. O(layers).
    [[nodiscard]] result<std::size_t> try_length(sequence_id id) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        return q->shortest(layers());
    }

    /// A sequence that shares every page with this one, until one of them writes to it. O(pages). Errors:
    /// invalid_sequence, layers_disagree, out_of_memory.
    [[nodiscard]] result<sequence_id> try_fork(sequence_id id) noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (const status s = agreed(*q); !s)
            return s;
        const result<std::uint32_t> slot = new_slot();
        if (!slot)
            return slot.reason();
        sequence& twin = state_->sequences.object(*slot);
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!twin.pages[g].table.assign(q->pages[g].table)) {
                for (std::size_t other = 0; other < g; ++other)
                    twin.pages[other].table.clear();
                state_->sequences.cancel(*slot);
                return no_memory();
            }
        for (std::size_t g = 0; g < groups().size(); ++g) {
            for (const std::uint32_t block : twin.pages[g].table.blocks())
                pool(g).retain(block);
            twin.pages[g].window_from = q->pages[g].window_from;
            note_dropped(twin, g);
        }
        for (std::size_t i = 0; i < layers(); ++i)
            twin.set_length(i, q->length(i));
        twin.committed = q->committed;
        twin.fp16_from = q->fp16_from;
        return state_->sequences.publish(*slot);
    }

    /// Cuts every layer to its first `tokens`. O(pages freed). Errors: invalid_sequence; out_of_range where a
    /// layer holds fewer; dropped_tokens where the cut lies within a dropped page, or where a sliding window
    /// has given up tokens that the next query would see; with fp16 windows capacity_exceeded, out_of_memory.
    status try_truncate(sequence_id id, std::size_t tokens) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        return truncate_sequence(*q, tokens);
    }

    /// Frees whole pages: first_page ... first_page + pages - 1, each full in every layer. What is left keeps
    /// its positions, and attention goes on over it alone. O(pages of the sequence). Errors:
    /// invalid_sequence, out_of_range, out_of_memory.
    status try_drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        const std::size_t full = q->shortest(layers()) / page_tokens();
        if (first_page > full || pages > full - first_page)
            return {errc::out_of_range, "only pages that are full in every layer can be dropped"};
        if (pages == 0)
            return {};
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q->pages[g].table.reserve_hole())
                return no_memory();
        for (std::size_t g = 0; g < groups().size(); ++g)
            drop(*q, g, first_page, first_page + pages);
        return {};
    }

    /// Ends a step: all layers agree, rollback() returns here, and windows free the pages that no later query
    /// can see. The length. O(layers + pages freed). Errors: invalid_sequence, layers_disagree,
    /// out_of_memory.
    result<std::size_t> try_commit(sequence_id id) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (const status s = agreed(*q); !s)
            return s;
        const std::size_t n = q->length(0);
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q->pages[g].table.reserve_hole())
                return no_memory();
        q->committed = n;
        for (std::size_t g = 0; g < groups().size(); ++g) {
            const std::size_t window =
                groups()[g].fp16_copies ? description().fp16_window : groups()[g].window;
            const std::size_t from = window == 0      ? n
                                     : n + 1 > window ? n + 1 - window
                                                      : 0; // of the next query
            if (groups()[g].fp16_copies) {
                const std::size_t sinks = (description().fp16_sinks + page_tokens() - 1) / page_tokens();
                drop(*q, g, sinks, from / page_tokens());
                q->fp16_from = std::max(q->fp16_from, from);
            } else if (window != 0) {
                drop(*q, g, 0, from / page_tokens());
                q->pages[g].window_from =
                    std::max(q->pages[g].window_from, from / page_tokens() * page_tokens());
            }
        }
        return n;
    }

    /// Cuts back to the last commit, or to nothing: undoes a step that failed or was a guess. Errors as
    /// truncate.
    status try_rollback(sequence_id id) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        return truncate_sequence(*q, std::min(q->committed, q->shortest(layers())));
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
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (keys.tokens() == 0)
            return {};
        if (const status s = open_layer(*q, layer, keys.tokens()); !s)
            return s;
        const status s = store(*q, layer, keys, values, run);
        close_layer(*q, layer, static_cast<bool>(s));
        if (!s)
            return placed(s, layer); // what was written lies past the sequence's length: it is not data
        q->set_length(layer, q->length(layer) + keys.tokens());
        return {};
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
            return no_such_layer(layer);
        if (const status s = check_append(layer, keys, values); !s)
            return s;
        if (const status s = check_batch(ids, indptr, keys.tokens()); !s)
            return s;
        std::size_t opened = 0;
        status s;
        for (; opened < ids.size(); ++opened) {
            const std::size_t tokens = indptr[opened + 1] - indptr[opened];
            sequence* q = find(ids[opened]);
            if (q->appending)
                s = {errc::invalid_argument, "a sequence comes once in a batch"};
            else
                s = open_layer(*q, layer, tokens);
            if (!s)
                break;
            q->appending = true;
        }
        const plane& body = body_of(layer);
        if (s) {
            std::atomic<std::size_t> first_failed{ids.size()};
            auto task = [&](std::size_t i) {
                const std::size_t b = i / body.kv_heads;
                if (store_head(*find(ids[b]), layer, i % body.kv_heads, batch_rows(keys, indptr, b),
                               batch_rows(values, indptr, b)))
                    return;
                std::size_t seen = first_failed.load(std::memory_order_relaxed);
                while (b < seen && !first_failed.compare_exchange_weak(seen, b, std::memory_order_relaxed)) {
                }
            };
            run(ids.size() * body.kv_heads, task_view(task));
            if (const std::size_t b = first_failed.load(std::memory_order_relaxed); b != ids.size()) {
                inline_executor again; // for its reason
                s = store(*find(ids[b]), layer, batch_rows(keys, indptr, b), batch_rows(values, indptr, b),
                          again);
                error_location where = s.where();
                where.token += static_cast<std::int64_t>(indptr[b]);
                s = {s.code(), s.rule(), where};
            }
        }
        for (std::size_t i = 0; i < opened; ++i) {
            sequence* q = find(ids[i]);
            q->appending = false;
            close_layer(*q, layer, static_cast<bool>(s));
            if (s)
                q->set_length(layer, q->length(layer) + indptr[i + 1] - indptr[i]);
        }
        return s ? s : placed(s, layer);
    }

    /// Appends rows that are quantized already, bit for bit, as export_rows gives them: [tokens][kv_heads].
    /// O(values). Errors as append; shape_mismatch (a buffer's size); non_finite for metadata or plain values
    /// that are no numbers; invalid_argument for a layer with fp16 copies, which rows do not have.
    status try_append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                           const_row_buffers values) noexcept {
        sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (planes_of(layer).copy != detail::no_plane)
            return placed({errc::invalid_argument, "rows have no fp16 copies"}, layer);
        const plane& body = body_of(layer);
        const std::size_t rows = tokens * body.kv_heads;
        if (tokens > std::numeric_limits<std::uint32_t>::max() ||
            !fits(body.layout.keys(), rows, keys.packed.size(), keys.scales.size(), keys.minima.size()) ||
            !fits(body.layout.values(), rows, values.packed.size(), values.scales.size(),
                  values.minima.size()))
            return placed({errc::shape_mismatch, "the buffers do not fit the rows"}, layer);
        for (const auto& [section, from] :
             {std::pair(&body.layout.keys(), &keys), std::pair(&body.layout.values(), &values)})
            if (const status s = check_rows_finite(*section, rows, *from); !s)
                return placed(s, layer);
        if (tokens == 0)
            return {};
        if (const status s = open_layer(*q, layer, tokens); !s)
            return s;
        for (std::size_t i = 0; i < rows; ++i) {
            const std::size_t token = q->length(layer) + i / body.kv_heads;
            std::byte* page = const_cast<std::byte*>(page_of(*q, layer, i % body.kv_heads, token));
            store_row(body.layout.keys(), page, token % page_tokens(), keys, i);
            store_row(body.layout.values(), page, token % page_tokens(), values, i);
        }
        close_layer(*q, layer, true);
        q->set_length(layer, q->length(layer) + tokens);
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
    /// invalid_argument (an explicit mask where windows or dropped pages part its tokens), out_of_memory.
    template <executor E = inline_executor>
    status try_attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        return attend_sequence(*q, layer, queries, outputs, options, run);
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
            return no_such_layer(layer);
        if (const status s = check_batch(ids, indptr, queries.tokens()); !s)
            return s;
        if (outputs.tokens() != queries.tokens())
            return placed({errc::shape_mismatch, "one output row per query row"}, layer);
        if (!options.mask.visible().empty() || options.mask.first_position())
            return placed({errc::invalid_argument, "one mask does not fit several sequences"}, layer);
        if (!options.log_sum_exp.empty() && options.log_sum_exp.size() != queries.tokens() * queries.heads())
            return placed({errc::shape_mismatch, "one log-sum-exp per query row"}, layer);
        const auto attend_one = [&](std::size_t i, auto& with) {
            attention_options own = options;
            const std::size_t first = indptr[i], count = indptr[i + 1] - first;
            if (!own.log_sum_exp.empty())
                own.log_sum_exp = own.log_sum_exp.subspan(first * queries.heads(), count * queries.heads());
            return attend_sequence(*find(ids[i]), layer, queries.rows(first, count),
                                   outputs.rows(first, count), own, with);
        };
        const auto is_long = [&](std::size_t i) { // worth splitting further
            return find(ids[i])->length(layer) * (indptr[i + 1] - indptr[i]) >= long_sequence;
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
    /// Errors: invalid_sequence, out_of_range, dropped_tokens, shape_mismatch (a buffer's size).
    status try_export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                           std::size_t first, std::size_t count, row_buffers out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        if (!fits(section, count, out.packed.size(), out.scales.size(), out.minima.size()))
            return {errc::shape_mismatch, "the buffers do not fit the rows"};
        const std::size_t row = packed_bytes(section.format, section.channels);
        const std::size_t bits = bits_of(section);
        std::fill(out.packed.begin(), out.packed.end(), std::byte{0});
        for (std::size_t i = 0; i < count; ++i) {
            const std::byte* page = page_of(*find(id), layer, kv_head, first + i);
            const std::size_t token = (first + i) % page_tokens();
            std::byte* bytes = out.packed.data() + i * row;
            for (std::size_t c = 0; c < section.channels; ++c) {
                const std::uint64_t code = detail::load_code(section, page, token, c);
                const std::uint64_t shifted = code << (c * bits % 8);
                for (std::size_t k = 0; k < (c * bits % 8 + bits + 7) / 8; ++k)
                    bytes[c * bits / 8 + k] |= static_cast<std::byte>(shifted >> (8 * k) & 0xffu);
            }
            const detail::row_metadata m = detail::load_metadata(section, page, token);
            if (!out.scales.empty())
                out.scales[i] = float16::from_bits(m.scale);
            if (!out.minima.empty())
                out.minima[i] = float16::from_bits(m.minimum);
        }
        return {};
    }

    /// Decodes cached vectors, rotated back and with their means: out is [count][channels]. Errors as
    /// try_export_rows.
    status try_read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                    std::size_t count, std::span<float> out) const noexcept {
        if (const status s = check_rows(id, layer, kv_head, first, count); !s)
            return s;
        const section_layout& section = section_of(layer, side);
        const detail::vector_codec& codec =
            side == kv_side::key ? planes_of(layer).keys : planes_of(layer).values;
        if (out.size() != count * section.channels)
            return {errc::shape_mismatch, "the buffer does not fit the rows"};
        for (std::size_t i = 0; i < count; ++i) {
            const std::byte* page = page_of(*find(id), layer, kv_head, first + i);
            const std::size_t token = (first + i) % page_tokens();
            const detail::row_metadata m = detail::load_metadata(section, page, token);
            for (std::size_t c = 0; c < section.channels; ++c)
                out[i * section.channels + c] =
                    detail::decode_value(section.format, detail::load_code(section, page, token, c), m);
            const std::span<float> row = out.subspan(i * section.channels, section.channels);
            if (codec.recipe.hadamard != 0)
                hadamard_transform(row, codec.recipe.hadamard);
            if (const float* mean = codec.mean(kv_head))
                for (std::size_t c = 0; c < section.channels; ++c)
                    row[c] += mean[c];
        }
        return {};
    }

    /// Indices that export_block_tables() needs. Errors: invalid_sequence, out_of_range.
    [[nodiscard]] result<std::size_t> try_count_blocks(std::span<const sequence_id> ids,
                                                       std::size_t layer) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        std::size_t total = 0;
        for (const sequence_id id : ids) {
            const sequence* q = find(id);
            if (q == nullptr)
                return stale();
            total += q->pages[body_of(layer).group].table.blocks().size();
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
            return placed({errc::shape_mismatch, "the spans do not fit the tables"}, layer);
        if (*total > std::numeric_limits<std::int32_t>::max())
            return placed({errc::not_representable, "more than 2^31 - 1 indices"}, layer);
        std::size_t at = 0;
        out.indptr[0] = 0;
        for (std::size_t i = 0; i < ids.size(); ++i) {
            const sequence& q = *find(ids[i]);
            const block_table& table = q.pages[body_of(layer).group].table;
            for (const std::uint32_t block : table.blocks())
                out.indices[at++] = static_cast<std::int32_t>(block);
            out.indptr[i + 1] = static_cast<std::int32_t>(at);
            const std::size_t kept = table.kept_before(q.length(layer), page_tokens());
            // a layer that lags within a step may end before the last page
            const std::size_t before =
                table.blocks().empty() ? 0 : (table.blocks().size() - 1) * page_tokens();
            out.last_page_tokens[i] =
                static_cast<std::int32_t>(kept > before ? std::min(kept - before, page_tokens()) : 0);
        }
        return *total;
    }

    /// The bytes of one KV head's page in layout(layer). Errors: out_of_range for a block that is not in use.
    [[nodiscard]] result<std::span<const std::byte>> try_page(std::size_t layer, std::size_t kv_head,
                                                              std::uint32_t block) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        const plane& body = body_of(layer);
        if (kv_head >= body.kv_heads)
            return no_such_head(kv_head);
        if (block >= pool(body.group).capacity() || pool(body.group).references(block) == 0)
            return status{errc::out_of_range, "the block is not in use"};
        return std::span<const std::byte>(body.block(block) + kv_head * body.layout.bytes(),
                                          body.layout.bytes());
    }

    // ---- prefixes

    /// Keeps the pages of a prompt, which the sequence holds from position 0 on, for others that begin alike.
    /// Only whole pages, unless `partial` is set: the open page is then kept too, and copied when the
    /// sequence appends to it. Dropped pages end what can be kept. The tokens that are known now. Errors:
    /// invalid_sequence, layers_disagree, out_of_range for more tokens than the sequence holds,
    /// out_of_memory.
    result<std::size_t> try_store_prefix(sequence_id id, std::span<const token_id> tokens,
                                         prefix_salt salt = {}, bool partial = false) noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (const status s = agreed(*q); !s)
            return s;
        if (tokens.size() > q->length(0))
            return status{errc::out_of_range, "the sequence holds fewer tokens"};
        std::size_t usable = tokens.size();
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!groups()[g].fp16_copies)
                if (const auto holes = q->pages[g].table.holes(); !holes.empty())
                    usable = std::min(usable, holes[0].first * page_tokens());
        const std::size_t sinks = description().fp16_sinks;
        return state_->index.insert(salt, tokens.first(usable), partial,
                                    [&](std::size_t page, std::size_t g) -> std::uint32_t {
                                        const block_table& table = q->pages[g].table;
                                        if (groups()[g].fp16_copies && page * page_tokens() >= sinks)
                                            return prefix_index::no_block;
                                        return table.blocks()[*table.find(page)];
                                    });
    }

    /// A new sequence that shares the pages of the longest known beginning of these tokens; leave out the
    /// tokens whose queries are needed, at least the last one. Its fp16 sinks are those that were stored; the
    /// rest is as quantized. O(tokens). Errors: out_of_memory, capacity_exceeded (with fp16 windows).
    [[nodiscard]] result<prefix_match> try_create_from_prefix(std::span<const token_id> tokens,
                                                              prefix_salt salt = {}) noexcept {
        const result<std::uint32_t> slot = new_slot();
        if (!slot)
            return slot.reason();
        sequence& q = state_->sequences.object(*slot);
        const std::size_t pages = (tokens.size() + page_tokens() - 1) / page_tokens();
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (!q.pages[g].table.reserve(pages + 1) || !q.pages[g].table.reserve_hole()) {
                state_->sequences.cancel(*slot);
                return no_memory();
            }
        const std::size_t matched =
            state_->index.match(salt, tokens, [&](std::size_t, std::span<const std::uint32_t> blocks) {
                for (std::size_t g = 0; g < blocks.size(); ++g)
                    if (blocks[g] != prefix_index::no_block)
                        q.pages[g].table.push_back(blocks[g]);
            });
        for (std::size_t i = 0; i < layers(); ++i)
            q.set_length(i, matched);
        q.committed = q.fp16_from = matched;
        for (std::size_t g = 0; g < groups().size(); ++g)
            if (groups()[g].fp16_copies)
                if (const status s = pad_copies(q, g, matched); !s) {
                    for (std::size_t other = 0; other < groups().size(); ++other)
                        cut(q, other, 0);
                    state_->sequences.cancel(*slot);
                    return s;
                }
        return prefix_match{state_->sequences.publish(*slot), matched};
    }

    /// The index itself: pins, events, eviction.
    [[nodiscard]] prefix_index& prefixes() noexcept { return state_->index; }
    [[nodiscard]] const prefix_index& prefixes() const noexcept { return state_->index; }

    // ---- statistics

    /// Over all sequences. O(pages + sequences * layers).
    [[nodiscard]] cache_statistics statistics() const noexcept {
        cache_statistics s = empty_statistics();
        state_->sequences.for_each([&](sequence_id, const sequence& q) { add_tokens(s, q); });
        for (const detail::page_group& g : groups()) {
            s.pages_in_use += g.pool.in_use();
            s.bytes_in_use += g.pool.in_use() * g.block_bytes;
            s.bytes_shared += g.pool.shared() * g.block_bytes;
            if (g.fp16_copies)
                s.bytes_fp16_copies += g.pool.in_use() * g.block_bytes;
        }
        s.pages_indexed = state_->index.pages();
        return s;
    }
    /// Of one sequence. O(pages + layers). Errors: invalid_sequence.
    [[nodiscard]] result<cache_statistics> try_statistics(sequence_id id) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        cache_statistics s = empty_statistics();
        add_tokens(s, *q);
        for (std::size_t i = 0; i < groups().size(); ++i) {
            const detail::page_group& g = groups()[i];
            const auto blocks = q->pages[i].table.blocks();
            s.pages_in_use += blocks.size();
            s.bytes_in_use += blocks.size() * g.block_bytes;
            if (g.fp16_copies)
                s.bytes_fp16_copies += blocks.size() * g.block_bytes;
            for (const std::uint32_t block : blocks)
                s.bytes_shared += g.pool.references(block) > 1 ? g.block_bytes : 0;
        }
        return s;
    }
    /// Free pages, of the page group that has fewest.
    [[nodiscard]] std::size_t available_pages() const noexcept {
        std::size_t least = std::numeric_limits<std::size_t>::max();
        for (const detail::page_group& g : groups())
            least = std::min(least, g.pool.available());
        return least;
    }

    /// Checks every invariant: reference counts against all tables and the prefix index, lengths against
    /// pages. For tests and debugging. O(pages + sequences * layers). Errors: broken_invariant,
    /// out_of_memory.
    [[nodiscard]] status try_validate() const noexcept {
        const auto broken = [](const char* rule) { return status{errc::broken_invariant, rule}; };
        if (!state_->index.valid())
            return broken("the prefix index contradicts itself");
        for (std::size_t g = 0; g < groups().size(); ++g) {
            if (!pool(g).valid())
                return broken("a page pool contradicts itself");
            detail::buffer<std::uint32_t> counts;
            if (!counts.resize(pool(g).capacity()))
                return no_memory();
            status s;
            state_->sequences.for_each([&](sequence_id, const sequence& q) {
                const detail::sequence_pages& p = q.pages[g];
                for (const std::uint32_t block : p.table.blocks())
                    if (block < counts.size())
                        ++counts[block];
                std::size_t longest = 0;
                for (const plane& each : state_->storage.planes())
                    if (each.group == g)
                        longest = std::max(longest, q.length(each.layer));
                if (!p.table.valid() || p.dropped.load(std::memory_order_relaxed) != p.table.dropped())
                    s = broken("a block table contradicts itself");
                if (p.table.pages() != (longest + page_tokens() - 1) / page_tokens())
                    s = broken("a sequence has another number of pages than its tokens need");
                if (longest % page_tokens() != 0 && !p.table.find(longest / page_tokens()))
                    s = broken("an open page is dropped");
                if (q.committed > q.shortest(layers()) || q.appending)
                    s = broken("a sequence is shorter than what is committed");
            });
            if (!s)
                return s;
            state_->index.for_each_block([&](std::size_t group, std::uint32_t block) {
                if (group == g && block < counts.size())
                    ++counts[block];
            });
            for (std::uint32_t block = 0; block < counts.size(); ++block)
                if (counts[block] != pool(g).references(block))
                    return broken("a page's reference count is not the number of its users");
        }
        return {};
    }

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

    using sequence = detail::sequence_state;
    using plane = detail::plane<Allocator>;

    static constexpr std::size_t long_sequence = 16384; // query rows * tokens

    // Behind a pointer: locks do not move, a cache does.
    struct state {
        explicit state(const Allocator& a) : allocator(a) {}
        Allocator allocator;
        detail::cache_storage<Allocator> storage;
        detail::slot_table<sequence> sequences;
        prefix_index index;
    };

    basic_kv_cache() = default;

    static status stale() noexcept { return {errc::invalid_sequence, "the handle names no living sequence"}; }
    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }
    static status exhausted() noexcept { return {errc::capacity_exceeded, "no free page is left"}; }
    static status no_such_layer(std::size_t layer) noexcept {
        return {errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}};
    }
    static status no_such_head(std::size_t kv_head) noexcept {
        return {errc::out_of_range, "no such KV head", {.kv_head = static_cast<std::int64_t>(kv_head)}};
    }
    static status placed(const status& s, std::size_t layer) noexcept {
        error_location where = s.where();
        where.layer = static_cast<std::int64_t>(layer);
        return {s.code(), s.rule(), where};
    }

    [[nodiscard]] const sequence* find(sequence_id id) const noexcept { return state_->sequences.find(id); }
    [[nodiscard]] sequence* find(sequence_id id) noexcept { return state_->sequences.find(id); }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return state_->storage.page_tokens(); }
    [[nodiscard]] const std::vector<detail::page_group>& groups() const noexcept {
        return state_->storage.groups();
    }
    [[nodiscard]] page_pool& pool(std::size_t group) const noexcept {
        return state_->storage.groups()[group].pool;
    }
    [[nodiscard]] const detail::layer_planes& planes_of(std::size_t layer) const noexcept {
        return state_->storage.layers()[layer];
    }
    [[nodiscard]] const plane& body_of(std::size_t layer) const noexcept {
        return std::as_const(state_->storage).planes()[planes_of(layer).body];
    }
    [[nodiscard]] const plane& copy_of(std::size_t layer) const noexcept {
        return std::as_const(state_->storage).planes()[planes_of(layer).copy];
    }

    status initialize(const cache_description& d, const Allocator& allocator) noexcept {
        if (detail::environment_target().refused)
            return {errc::unsupported_target, "KV1_TARGET names no target that this processor supports"};
        std::unique_ptr<state> fresh(new (std::nothrow) state(allocator));
        if (fresh == nullptr)
            return no_memory();
        cache_description copy;
        if (const status s = detail::guarded([&] { copy = d; }); !s)
            return s;
        if (const status s = fresh->storage.template initialize<Formats>(std::move(copy), allocator); !s)
            return s;
        detail::buffer<page_pool*> pools;
        for (detail::page_group& g : fresh->storage.groups())
            if (!pools.try_push_back(&g.pool))
                return no_memory();
        if (const status s = fresh->index.initialize(d.page_tokens, pools.view(), d.prefix_events); !s)
            return s;
        state_ = std::move(fresh);
        return {};
    }

    // ---- sequences

    result<std::uint32_t> new_slot() noexcept {
        const std::optional<std::uint32_t> slot = state_->sequences.reserve();
        if (!slot)
            return no_memory();
        if (!state_->sequences.object(*slot).prepare(groups().size(), layers())) {
            state_->sequences.cancel(*slot);
            return no_memory();
        }
        return *slot;
    }

    [[nodiscard]] status agreed(const sequence& q) const noexcept {
        const std::size_t longest = q.longest(layers());
        for (std::size_t i = 0; i < layers(); ++i)
            if (q.length(i) != longest)
                return placed({errc::layers_disagree, "the layer holds fewer tokens than another"}, i);
        return {};
    }

    static void note_dropped(sequence& q, std::size_t group) noexcept {
        q.pages[group].dropped.store(q.pages[group].table.dropped(), std::memory_order_relaxed);
    }

    // Cuts a group's table to its first pages.
    void cut(sequence& q, std::size_t group, std::size_t pages) noexcept {
        q.pages[group].table.truncate(pages, [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
        q.pages[group].window_from = std::min(q.pages[group].window_from, pages * page_tokens());
    }

    // Frees pages first ... last - 1. Precondition: room for a hole.
    void drop(sequence& q, std::size_t group, std::size_t first, std::size_t last) noexcept {
        block_table& table = q.pages[group].table;
        if (first >= last || (table.find(first) == std::nullopt && table.hole_at(first)->last >= last))
            return;
        table.drop(static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last),
                   [&](std::uint32_t block) { pool(group).release(block); });
        note_dropped(q, group);
    }

    status truncate_sequence(sequence& q, std::size_t tokens) noexcept {
        for (std::size_t i = 0; i < layers(); ++i)
            if (q.length(i) < tokens)
                return placed({errc::out_of_range, "the layer holds fewer tokens"}, i);
        const std::size_t page = tokens / page_tokens();
        const std::size_t pages = page + (tokens % page_tokens() != 0 ? 1 : 0);
        for (std::size_t i = 0; i < layers(); ++i) {
            const plane& body = body_of(i);
            const detail::sequence_pages& own = q.pages[body.group];
            if (tokens % page_tokens() != 0 && !own.table.find(page))
                return placed({errc::dropped_tokens, "the cut lies within a dropped page"}, i);
            const std::size_t window = groups()[body.group].window;
            const std::size_t first =
                tokens + 1 > window ? tokens + 1 - window : 0; // that the next query sees
            if (window != 0 && std::min(tokens, own.window_from) > first)
                return placed({errc::dropped_tokens, "the window has given up tokens before the cut"}, i);
        }
        std::size_t copies = groups().size() - 1;
        if (!groups()[copies].fp16_copies)
            copies = groups().size();
        std::uint32_t open = prefix_index::no_block; // a page for tokens whose copies are gone
        if (copies != groups().size() && tokens % page_tokens() != 0 && !q.pages[copies].table.find(page)) {
            if (!q.pages[copies].table.reserve(1))
                return no_memory();
            if (!take(copies, {&open, 1}))
                return exhausted();
        }
        for (std::size_t g = 0; g < groups().size(); ++g)
            cut(q, g, g == copies && open != prefix_index::no_block ? page : pages);
        if (open != prefix_index::no_block)
            q.pages[copies].table.push_back(open);
        for (std::size_t i = 0; i < layers(); ++i)
            q.set_length(i, tokens);
        q.committed = std::min(q.committed, tokens);
        q.fp16_from = std::min(q.fp16_from, tokens);
        return {};
    }

    // Gives the fp16 copies of a sequence that has only its sinks' the pages that its length asks for.
    // Preconditions: room for a block and a hole; pages beyond the sinks' are absent.
    status pad_copies(sequence& q, std::size_t group, std::size_t tokens) noexcept {
        block_table& table = q.pages[group].table;
        const std::size_t have = table.pages(), full = tokens / page_tokens();
        const bool open = tokens % page_tokens() != 0 && have <= full;
        std::uint32_t block = 0;
        if (open && !take(group, {&block, 1}))
            return exhausted();
        if (have < full)
            table.append_hole(static_cast<std::uint32_t>(full - have));
        if (open)
            table.push_back(block);
        note_dropped(q, group);
        return {};
    }

    // ---- pages of an append

    // Blocks, cleared; where the pool is empty the prefix index gives some up. All or none.
    [[nodiscard]] bool take(std::size_t group, std::span<std::uint32_t> blocks) noexcept {
        while (!pool(group).allocate(blocks)) {
            const std::size_t there = pool(group).available();
            if (blocks.size() > pool(group).capacity() ||
                state_->index.evict(blocks.size() > there ? blocks.size() - there : 1) == 0)
                return false;
        }
        for (const std::uint32_t block : blocks)
            state_->storage.clear_block(group, block);
        return true;
    }

    // Makes the pages of tokens length ... length + tokens - 1 the sequence's own; all or none. close_pages()
    // ends what this begins.
    status open_pages(sequence& q, std::size_t group, std::size_t length, std::size_t tokens) noexcept {
        detail::sequence_pages& own = q.pages[group];
        block_table& table = own.table;
        own.pages_before = table.pages();
        own.replaced.clear();
        own.fresh.clear();
        if (tokens > pool(group).capacity() * page_tokens() || length > most_tokens - tokens)
            return exhausted();
        const std::size_t first = length / page_tokens();
        const std::size_t end = (length + tokens + page_tokens() - 1) / page_tokens();
        const std::size_t more = end > own.pages_before ? end - own.pages_before : 0;
        std::size_t shared = 0;
        for (std::size_t p = first; p < std::min(end, own.pages_before); ++p)
            if (const auto place = table.find(p);
                place && pool(group).references(table.blocks()[*place]) != 1)
                ++shared;
        if (more + shared == 0)
            return {};
        if (!table.reserve(more) || !own.replaced.reserve(shared) || !own.fresh.resize(more + shared))
            return no_memory();
        if (!take(group, {own.fresh.data(), own.fresh.size()}))
            return exhausted();
        std::size_t used = 0; // of the fresh blocks, in order: consecutive pages lie side by side
        for (std::size_t p = first; p < std::min(end, own.pages_before); ++p) {
            const auto place = table.find(p);
            if (!place || used == shared)
                continue;
            const std::uint32_t before = table.blocks()[*place];
            if (pool(group).references(before) == 1) // others may have let go of it meanwhile
                continue;
            const std::uint32_t mine = own.fresh[used++];
            state_->storage.copy_block(group, before, mine);
            own.replaced.push_back({*place, before});
            table.replace(*place, mine);
        }
        for (std::size_t i = 0; i < more; ++i)
            table.push_back(own.fresh[used++]);
        for (; used < own.fresh.size(); ++used) // pages that were shared a moment ago
            pool(group).release(own.fresh[used]);
        return {};
    }

    void close_pages(sequence& q, std::size_t group, bool keep) noexcept {
        detail::sequence_pages& own = q.pages[group];
        for (const detail::replaced_block& r : own.replaced) {
            if (keep) {
                pool(group).release(r.before);
            } else {
                pool(group).release(own.table.blocks()[r.place]);
                own.table.replace(r.place, r.before);
            }
        }
        own.replaced.clear();
        if (!keep)
            cut(q, group, own.pages_before);
    }

    status open_layer(sequence& q, std::size_t layer, std::size_t tokens) noexcept {
        const std::size_t length = q.length(layer), body = body_of(layer).group;
        if (const status s = open_pages(q, body, length, tokens); !s)
            return s;
        if (planes_of(layer).copy == detail::no_plane)
            return {};
        const status s = open_pages(q, copy_of(layer).group, length, tokens);
        if (!s)
            close_pages(q, body, false);
        return s;
    }
    void close_layer(sequence& q, std::size_t layer, bool keep) noexcept {
        close_pages(q, body_of(layer).group, keep);
        if (planes_of(layer).copy != detail::no_plane)
            close_pages(q, copy_of(layer).group, keep);
    }

    [[nodiscard]] detail::append_job append_job_for(const sequence& q, const plane& p, std::size_t length,
                                                    const tensor_view& keys,
                                                    const tensor_view& values) const noexcept {
        const block_table& table = q.pages[p.group].table;
        return {&detail::common_kernels(),
                &p.layout,
                p.arena.data(),
                p.block_bytes,
                table.blocks().data(),
                table.kept_before(length, page_tokens()),
                keys,
                values,
                false,
                nullptr,
                nullptr};
    }

    // The new tokens of one layer, to pages that are open: the fp16 copies first, since what they refuse is
    // refused.
    template <executor E>
    status store(const sequence& q, std::size_t layer, const tensor_view& keys, const tensor_view& values,
                 E& run) const noexcept {
        const bool copied = planes_of(layer).copy != detail::no_plane;
        if (copied)
            if (const status s =
                    detail::append_heads(append_job_for(q, copy_of(layer), q.length(layer), keys, values),
                                         body_of(layer).kv_heads, run);
                !s)
                return s;
        detail::append_job job = append_job_for(q, body_of(layer), q.length(layer), keys, values);
        job.through_fp16 = copied;
        job.key_codec = &planes_of(layer).keys;
        job.value_codec = &planes_of(layer).values;
        return detail::append_heads(job, body_of(layer).kv_heads, run);
    }
    status store_head(const sequence& q, std::size_t layer, std::size_t head, const tensor_view& keys,
                      const tensor_view& values) const noexcept {
        const bool copied = planes_of(layer).copy != detail::no_plane;
        if (copied)
            if (const status s = detail::append_head(
                    append_job_for(q, copy_of(layer), q.length(layer), keys, values), head);
                !s)
                return s;
        detail::append_job job = append_job_for(q, body_of(layer), q.length(layer), keys, values);
        job.through_fp16 = copied;
        job.key_codec = &planes_of(layer).keys;
        job.value_codec = &planes_of(layer).values;
        return detail::append_head(job, head);
    }

    // ---- checks

    [[nodiscard]] status check_append(std::size_t layer, const tensor_view& keys,
                                      const tensor_view& values) const noexcept {
        const layer_description& l = planes_of(layer).shape;
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
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
        if (indptr.size() != ids.size() + 1 || indptr.front() != 0 || indptr.back() != rows)
            return {errc::invalid_argument, "indptr divides the rows among the sequences"};
        for (std::size_t i = 0; i < ids.size(); ++i) {
            if (indptr[i] > indptr[i + 1])
                return {errc::invalid_argument, "indptr ascends"};
            if (find(ids[i]) == nullptr)
                return stale();
        }
        return {};
    }
    static tensor_view batch_rows(const tensor_view& all, std::span<const std::size_t> indptr,
                                  std::size_t i) noexcept {
        return all.rows(indptr[i], indptr[i + 1] - indptr[i]);
    }

    static status check_attend(const layer_description& l, std::size_t layer, std::size_t length,
                               const tensor_view& queries, const mutable_tensor_view& outputs,
                               const attention_options& options) noexcept {
        const error_location where{.layer = static_cast<std::int64_t>(layer)};
        if (queries.heads() == 0 || queries.heads() % l.kv_heads != 0)
            return {errc::shape_mismatch, "query heads are a multiple of the KV heads", where};
        if (queries.channels() != l.key_dim || outputs.channels() != l.value_dim)
            return {errc::shape_mismatch, "queries and outputs have the layer's head dims", where};
        if (outputs.tokens() != queries.tokens() || outputs.heads() != queries.heads())
            return {errc::shape_mismatch, "one output row per query row", where};
        if (queries.tokens() != 0 && (queries.data() == nullptr || outputs.data() == nullptr))
            return {errc::invalid_argument, "queries and outputs are not null", where};
        if (!detail::is_finite(scale_of(options, l.key_dim)))
            return {errc::invalid_argument, "the softmax scale is finite", where};
        if (!options.log_sum_exp.empty() && options.log_sum_exp.size() != queries.tokens() * queries.heads())
            return {errc::shape_mismatch, "one log-sum-exp per query row", where};
        if (!(options.soft_cap >= 0.0f) || !detail::is_finite(options.soft_cap))
            return {errc::invalid_argument, "the soft cap is finite and not negative", where};
        for (const std::span<const float> per_head : {options.alibi_slopes, options.sinks}) {
            if (!per_head.empty() && per_head.size() != queries.heads())
                return {errc::shape_mismatch, "one slope, and one sink logit, per query head", where};
            if (!std::all_of(per_head.begin(), per_head.end(), [](float x) { return detail::is_finite(x); }))
                return {errc::invalid_argument, "slopes and sink logits are finite", where};
        }
        const attention_mask& mask = options.mask;
        if (mask.is_causal() && !mask.first_position() && queries.tokens() > length)
            return {errc::shape_mismatch, "causal queries are among the cached tokens", where};
        if (mask.is_causal() &&
            mask.first_position().value_or(0) > std::numeric_limits<std::size_t>::max() / 2)
            return {errc::out_of_range, "the first position overflows", where};
        if (!mask.is_causal() && (mask.explicit_keys() > length ||
                                  mask.visible().size() != mask.explicit_keys() * queries.tokens()))
            return {errc::shape_mismatch, "the mask covers queries times its keys, all of them cached",
                    where};
        return {};
    }

    [[nodiscard]] status check_rows(sequence_id id, std::size_t layer, std::size_t kv_head, std::size_t first,
                                    std::size_t count) const noexcept {
        const sequence* q = find(id);
        if (q == nullptr)
            return stale();
        if (layer >= layers())
            return no_such_layer(layer);
        if (kv_head >= planes_of(layer).shape.kv_heads)
            return no_such_head(kv_head);
        if (first > q->length(layer) || count > q->length(layer) - first)
            return {errc::out_of_range, "the tokens are not all cached"};
        for (const page_hole& h : q->pages[body_of(layer).group].table.holes())
            if (count != 0 && first < h.last * page_tokens() && first + count > h.first * page_tokens())
                return {errc::dropped_tokens, "the tokens are not all there any more"};
        return {};
    }

    // ---- attention

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push // at -O3 g++ 12 sees the payload of an empty optional and not the test before it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
    static float scale_of(const attention_options& options, std::size_t key_dim) noexcept {
        return options.scale ? *options.scale : 1.0f / std::sqrt(static_cast<float>(key_dim));
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

    [[nodiscard]] detail::attention_job job_for(const sequence& q, std::size_t layer, const plane& p,
                                                std::size_t query_heads,
                                                const attention_options& options) const noexcept {
        const layer_description& l = planes_of(layer).shape;
        const target t = current_target();
        detail::attention_job job{};
        job.target = &detail::common_registry<>::at(t);
        job.key_kernels = detail::format_registry<Formats>::find(t, p.layout.keys().format);
        job.value_kernels = detail::format_registry<Formats>::find(t, p.layout.values().format);
        job.mode = options.mode;
        job.layout = &p.layout;
        job.pages = p.arena.data();
        job.block_stride = p.block_bytes;
        job.block_table = q.pages[p.group].table.blocks().data();
        job.group = query_heads / l.kv_heads;
        job.scale = scale_of(options, l.key_dim);
        job.soft_cap = options.soft_cap;
        if (&p == &body_of(layer)) { // fp16 copies are as they were given
            job.key_hadamard = planes_of(layer).keys.recipe.hadamard;
            job.value_hadamard = planes_of(layer).values.recipe.hadamard;
            job.key_means = planes_of(layer).keys.mean(0);
            job.value_means = planes_of(layer).values.mean(0);
        }
        return job;
    }

    template <executor E>
    status attend_sequence(const sequence& q, std::size_t layer, const tensor_view& queries,
                           const mutable_tensor_view& outputs, const attention_options& options,
                           E& run) const noexcept {
        const layer_description& l = planes_of(layer).shape;
        const plane& body = body_of(layer);
        const block_table& table = q.pages[body.group].table;
        const std::size_t length = q.length(layer);
        if (const status s = check_attend(l, layer, length, queries, outputs, options); !s)
            return s;
        if (queries.tokens() == 0)
            return {};
        const attention_mask& mask = options.mask;
        // query i sees tokens 0 ... base + i * step - 1, as far as they are there
        const std::size_t base =
            mask.is_causal() ? mask.first_position().value_or(length - queries.tokens()) + 1 : length;
        const std::size_t step = mask.is_causal() ? 1 : 0;

        const std::size_t kept = table.kept_before(length, page_tokens()), dropped = length - kept;
        const std::size_t holes_end = table.holes().empty() ? 0 : table.holes().back().last * page_tokens();
        const bool parted = l.sliding_window != 0 || planes_of(layer).copy != detail::no_plane;
        if (!mask.visible().empty() && (parted || length - mask.explicit_keys() < holes_end))
            return placed({errc::invalid_argument, "windows or dropped pages part the mask's tokens"}, layer);
        if (!options.alibi_slopes.empty() && (parted || dropped != 0))
            return placed(
                {errc::invalid_argument, "windows or dropped pages part the tokens of ALiBi's slopes"},
                layer);
        if (parted || base < holes_end || (dropped != 0 && options.window != 0))
            return attend_in_parts(q, layer, base, step, queries, outputs, options, run);

        detail::attention_job job = job_for(q, layer, body, queries.heads(), options);
        job.last_token = table.kept_before(std::min(length, options.range.last), page_tokens());
        job.first_visible =
            std::min(table.kept_before(std::min(length, options.range.first), page_tokens()), job.last_token);
        job.visible_base = base - dropped;
        job.visible_step = step;
        job.first_position = mask.first_position() ? static_cast<std::ptrdiff_t>(*mask.first_position())
                                                   : static_cast<std::ptrdiff_t>(length) -
                                                         static_cast<std::ptrdiff_t>(queries.tokens());
        job.window = window_of(options);
        if (!mask.visible().empty()) {
            job.mask = mask.visible().data();
            job.mask_first = kept - mask.explicit_keys();
            job.mask_stride = mask.explicit_keys();
        }
        const auto optional = [](std::span<const float> x) { return x.empty() ? nullptr : x.data(); };
        return detail::attend_heads(job, l.kv_heads, queries, outputs,
                                    {optional(options.alibi_slopes), optional(options.sinks)},
                                    options.log_sum_exp, run);
    }

    // 0: none. A window that reaches past the first token of the first query's is none.
    static std::size_t window_of(const attention_options& options) noexcept {
        return options.window < std::numeric_limits<std::size_t>::max() / 4 ? options.window : 0;
    }

    // A logit without a value joins row r's softmax.
    static void add_sink(detail::row_results& results, std::size_t r, std::size_t channels,
                         float sink) noexcept {
        const float lse = results.log_sum_exp[r], top = std::max(lse, sink);
        const float own = std::exp(lse - top), sum = own + std::exp(sink - top);
        for (std::size_t c = 0; c < channels; ++c)
            results.outputs[r * channels + c] *= own / sum;
        results.log_sum_exp[r] = top + std::log(sum);
    }

    // Parts of what a query sees: fp16 sinks, the quantized body, the fp16 window.
    template <executor E>
    status attend_in_parts(const sequence& q, std::size_t layer, std::size_t base, std::size_t step,
                           const tensor_view& queries, const mutable_tensor_view& outputs,
                           const attention_options& options, E& run) const noexcept {
        enum part : std::size_t { sinks, quantized, window };
        const layer_description& l = planes_of(layer).shape;
        const plane& body = body_of(layer);
        const bool copied = planes_of(layer).copy != detail::no_plane;
        const std::size_t length = q.length(layer);
        std::array<detail::part_source, detail::max_parts> parts;
        parts[quantized] = {job_for(q, layer, body, queries.heads(), options), true};
        if (copied) {
            parts[sinks] = {job_for(q, layer, copy_of(layer), queries.heads(), options), true};
            parts[window] = parts[sinks];
        }
        const block_table& table = q.pages[body.group].table;
        const block_table& copies = copied ? q.pages[copy_of(layer).group].table : table;
        const auto placed_in = [&](const block_table& t, std::size_t first,
                                   std::size_t last) -> detail::visible_run {
            if (first >= last)
                return {};
            const detail::visible_run run_of{t.kept_before(first, page_tokens()),
                                             t.kept_before(last, page_tokens())};
            return run_of.empty() ? detail::visible_run{} : run_of;
        };
        const auto runs = [&](std::size_t i) -> detail::visible_runs {
            const std::size_t seen = std::min(base + i * step, length);
            // one past the query's position; without a causal mask it is among the last tokens
            const std::size_t next =
                step != 0 ? base + i : length - std::min(length, queries.tokens()) + i + 1;
            const std::size_t last = std::min(seen, options.range.last);
            std::size_t first = std::min(options.range.first, last);
            const auto skip_before = [&](std::size_t end, std::size_t tokens) {
                if (tokens != 0 && end > tokens)
                    first = std::min(std::max(first, end - tokens), last);
            };
            skip_before(seen, l.sliding_window);
            skip_before(next, window_of(options));
            if (!copied)
                return {detail::visible_run{}, placed_in(table, first, last), detail::visible_run{}};
            const std::size_t s = std::min(description().fp16_sinks, last), r = description().fp16_window;
            // tokens that the window or a truncation left behind are there in quantized form only
            const std::size_t from =
                r == 0 ? last : std::min(last, std::max({s, seen > r ? seen - r : 0, q.fp16_from}));
            return {placed_in(copies, first, s), placed_in(table, std::max(s, first), from),
                    placed_in(copies, std::max(from, first), last)};
        };

        detail::part_attention<E> attend(l.kv_heads, page_tokens(), run);
        detail::row_results total;
        for (std::size_t i = 0; i < queries.tokens();) {
            const detail::query_run some = detail::next_query_run(i, queries.tokens(), queries_in_step, runs);
            if (const status s = attend(parts, some, queries, total); !s)
                return s;
            const std::size_t heads = queries.heads();
            for (std::size_t r = 0; !options.sinks.empty() && r < some.count * heads; ++r)
                add_sink(total, r, l.value_dim, options.sinks[r % heads]);
            for (std::size_t r = 0; r < some.count * heads; ++r)
                parts[quantized].job.target->store_floats(outputs.type(),
                                                          total.outputs.data() + r * l.value_dim, l.value_dim,
                                                          outputs.at(i + r / heads, r % heads));
            if (!options.log_sum_exp.empty())
                std::copy(total.log_sum_exp.begin(), total.log_sum_exp.end(),
                          options.log_sum_exp.begin() + static_cast<std::ptrdiff_t>(i * heads));
            i += some.count;
        }
        return {};
    }

    // ---- rows

    [[nodiscard]] const section_layout& section_of(std::size_t layer, kv_side side) const noexcept {
        const page_layout& p = body_of(layer).layout;
        return side == kv_side::key ? p.keys() : p.values();
    }
    static std::size_t bits_of(const section_layout& section) noexcept {
        const detail::format_traits t = section.traits();
        return static_cast<std::size_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits);
    }
    static bool fits(const section_layout& section, std::size_t rows, std::size_t bytes, std::size_t scales,
                     std::size_t minima) noexcept {
        const detail::metadata_kind kind = section.traits().metadata;
        return bytes == rows * packed_bytes(section.format, section.channels) &&
               scales == (kind != detail::metadata_kind::none ? rows : 0) &&
               minima == (kind == detail::metadata_kind::scale_and_minimum ? rows : 0);
    }

    // The page of a token that is there.
    [[nodiscard]] const std::byte* page_of(const sequence& q, std::size_t layer, std::size_t kv_head,
                                           std::size_t token) const noexcept {
        const plane& body = body_of(layer);
        const block_table& table = q.pages[body.group].table;
        return body.block(table.blocks()[*table.find(token / page_tokens())]) + kv_head * body.layout.bytes();
    }

    // Code, or plain bits, c of a row.
    static std::uint32_t row_code(const section_layout& section, const const_row_buffers& from,
                                  std::size_t row, std::size_t c) noexcept {
        const std::size_t bits = bits_of(section);
        const std::byte* bytes =
            from.packed.data() + row * packed_bytes(section.format, section.channels) + c * bits / 8;
        std::uint64_t word = 0;
        for (std::size_t k = 0; k < (c * bits % 8 + bits + 7) / 8; ++k)
            word |= std::to_integer<std::uint64_t>(bytes[k]) << (8 * k);
        return static_cast<std::uint32_t>(word >> (c * bits % 8)) &
               detail::field_mask(static_cast<int>(bits));
    }
    static status check_rows_finite(const section_layout& section, std::size_t rows,
                                    const const_row_buffers& from) noexcept {
        for (std::size_t i = 0; i < rows; ++i) {
            bool fine = (from.scales.empty() || detail::is_finite(from.scales[i])) &&
                        (from.minima.empty() || detail::is_finite(from.minima[i]));
            if (section.traits().code_bits == 0)
                for (std::size_t c = 0; fine && c < section.channels; ++c)
                    fine = detail::is_finite(
                        detail::decode_value(section.format, row_code(section, from, i, c), {}));
            if (!fine)
                return {
                    errc::non_finite, "rows hold finite numbers", {.token = static_cast<std::int64_t>(i)}};
        }
        return {};
    }
    static void store_row(const section_layout& section, std::byte* page, std::size_t token,
                          const const_row_buffers& from, std::size_t row) noexcept {
        for (std::size_t c = 0; c < section.channels; ++c)
            detail::store_code(section, page, token, c, row_code(section, from, row, c));
        detail::row_metadata m;
        if (!from.scales.empty())
            m.scale = from.scales[row].bits();
        if (!from.minima.empty())
            m.minimum = from.minima[row].bits();
        detail::store_metadata(section, page, token, m);
    }

    // ---- statistics

    [[nodiscard]] cache_statistics empty_statistics() const noexcept {
        cache_statistics s;
        s.layers = layers();
        for (const detail::page_group& g : groups()) {
            s.pages_total += g.pool.capacity();
            s.bytes_reserved += g.pool.capacity() * g.block_bytes;
        }
        return s;
    }

    void add_tokens(cache_statistics& s, const sequence& q) const noexcept {
        ++s.sequences;
        s.tokens += q.longest(layers());
        for (std::size_t i = 0; i < layers(); ++i) {
            const layer_description& d = planes_of(i).shape;
            const plane& body = body_of(i);
            const std::size_t gone =
                q.pages[body.group].dropped.load(std::memory_order_relaxed) * page_tokens();
            const std::size_t length = q.length(i), held = length > gone ? length - gone : 0;
            s.bytes_stored += held * d.kv_heads *
                              (row_bytes(d.key_format, d.key_dim) + row_bytes(d.value_format, d.value_dim));
            s.bytes_as_fp16 += held * d.kv_heads * 2 * (d.key_dim + d.value_dim);
            const std::size_t open = length % page_tokens();
            s.bytes_unfilled += open == 0 ? 0 : (page_tokens() - open) * body.block_bytes / page_tokens();
        }
    }

    static constexpr std::size_t queries_in_step = 64; // attended to together where parts are needed
    static constexpr std::size_t most_tokens = std::size_t{1} << 35; // page numbers fit 32 bits

    std::unique_ptr<state> state_;
};

/// A cache for any mix of formats.
using kv_cache = basic_kv_cache<>;
/// The 2-bit cache: K and V in affine<2>, 12 bytes per vector at head_dim 32, 36 at 128.
using kv2_cache = basic_kv_cache<formats<affine<2>>>;

} // namespace kv1::inline KV1_ABI
