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
//       cache.commit(sequence); // windows free what they have passed; rollback() returns to here
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
//              sequence with the longest prefix that is known (prefix_index.hpp); cache_io.hpp saves them
//
// Commit points. Within a step layers are appended to in any order and may differ in length. A sequence is at
// a commit point when all its layers hold the same number of tokens; commit(), fork(), store_prefix(), saving
// and swapping ask for one, and fail with layers_disagree (naming the first layer that lags) where there is
// none. commit() also marks the length that rollback() returns to, and is the only call that lets windows
// free pages: what it frees can no longer be returned to.
//
// Sliding windows. A layer with a sliding_window of w lets a query see the last w of the tokens that its mask
// shows it up to its own position, and those that the mask shows after that (images that see all of
// themselves). In a token tree the last w are then of its own branch. Layers with the same window share block
// numbers; others' pages do not wait for them. window_retention keeps tokens behind the window for cuts
// behind a commit. A query that would see tokens which a commit has freed is refused with dropped_tokens, as
// reading them is.
//
// fp16 sinks and window. With fp16_sinks = s and fp16_window = r a query that sees tokens 0 ... t sees the
// first s of them and the last r (its own included) as they were rounded to fp16, and those between as they
// were quantized from that fp16; in prefill as in decode. Under a mask the last r are counted as a sliding
// window's are. Every token is quantized once, when it is appended, and its fp16 copy is freed when a
// commit() leaves the window behind: queries at earlier positions then see it quantized. Truncating does not
// bring precision back: a token that once left the window stays quantized, until it is appended anew. Keys
// and values must then fit fp16. read() and export_rows() give the quantized rows.
//
// Keys per channel. In a layer whose key_axis is per_channel a query sees the keys of pages that are full
// when it attends as codes, and those of the open page in fp16. What a page becomes depends on its tokens
// alone, however they were appended. Keys, less their means and rotated, must fit fp16. There is no way back
// from codes: a cut within a full page is refused, unless the last commit lies in that page (its fp16 keys
// are kept for rollback()), and prefixes are shared by whole pages, or by an open page that was stored as
// such. Rows of such keys can not be exported or appended.
//
// Values in keys. In a layer with values_in_keys (multi-head latent attention; latent_layer()) a key is given
// and stored once, and its first value_dim channels, as they are decoded, are the value:
//
//   kv1::kv2_cache cache(kv1::uniform_cache(layers, kv1::latent_layer(576, 512), capacity_tokens));
//   cache.append(sequence, layer, {latent, tokens, 1, 576}); // latent after its norm, rotary part after RoPE
//   cache.attend(sequence, layer, {q, tokens, 128, 576}, {out, tokens, 128, 512}, {.scale = model_scale});
//
// Errors: each call has a noexcept `try_` form that returns status or result, and a form that throws
// kv1::error. A failed call leaves the cache as it was; out_of_memory and capacity_exceeded may have cost
// unpinned pages of the prefix index. K and V must be finite: NaN, infinity and values that the format's fp16
// metadata (or fp16 itself) cannot hold are refused, naming layer, KV head, token and channel. Queries are
// not checked: a NaN or infinity in one makes that row's output NaN or meaningless, and no other row's.
//
// Memory. Beside arenas and what sequences need, a cache has blocks that tasks work in, 430 KiB each and by
// operator new, touched as far as they are used: one from the start, others where tasks run at once
// (executor.hpp). Where there is no memory for one, append and attend fail with out_of_memory.
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

#include <kv1/detail/any_cache.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/detail/try_copy.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
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
    [[nodiscard]] const cache_description& description() const noexcept { return core_->description(); }
    /// How many there are.
    [[nodiscard]] std::size_t layers() const noexcept { return core_->layers(); }
    /// Geometry of one KV head's page of a layer. Precondition: layer < layers().
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept { return core_->layout(layer); }

    /// Raises the capacity; pages keep their numbers and move. O(bytes in use). Errors: invalid_argument,
    /// out_of_memory.
    status try_grow(std::size_t capacity_tokens) noexcept { return core_->grow(capacity_tokens); }

    // ---- sequences

    /// An empty sequence. O(layers). Errors: out_of_memory.
    [[nodiscard]] result<sequence_id> try_create_sequence() noexcept { return core_->create_sequence(); }

    /// Gives the sequence's pages back. O(pages). Errors: invalid_sequence.
    status try_destroy_sequence(sequence_id id) noexcept { return core_->destroy_sequence(id); }

    /// Whether the handle names a living sequence. O(1).
    [[nodiscard]] bool contains(sequence_id id) const noexcept { return core_->contains(id); }

    /// Tokens of one layer, dropped ones included: the position of the next one. Errors: invalid_sequence,
    /// out_of_range.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id, std::size_t layer) const noexcept {
        return core_->length(id, layer);
    }
    /// Tokens that every layer holds. O(layers).
    [[nodiscard]] result<std::size_t> try_length(sequence_id id) const noexcept { return core_->length(id); }

    /// A sequence that shares every page with this one, until one of them writes to it. O(pages). Errors:
    /// invalid_sequence, layers_disagree, out_of_memory.
    [[nodiscard]] result<sequence_id> try_fork(sequence_id id) noexcept { return core_->fork(id); }

    /// Cuts every layer to its first `tokens`. O(pages freed). Errors: invalid_sequence; out_of_range where a
    /// layer holds fewer; dropped_tokens where the cut lies within a dropped page, where a sliding window has
    /// given up tokens that the next query would see, or within a full page of keys per channel that the last
    /// commit does not lie in; with fp16 windows capacity_exceeded, out_of_memory.
    status try_truncate(sequence_id id, std::size_t tokens) noexcept { return core_->truncate(id, tokens); }

    /// Frees whole pages: first_page ... first_page + pages - 1, each full in every layer. What is left keeps
    /// its positions, and attention goes on over it alone. O(pages of the sequence). Errors:
    /// invalid_sequence, out_of_range, out_of_memory.
    status try_drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept {
        return core_->drop_pages(id, first_page, pages);
    }

    /// Ends a step: all layers agree, rollback() returns here, and windows free the pages that no later query
    /// can see. The length. O(layers + pages freed). Errors: invalid_sequence, layers_disagree,
    /// out_of_memory.
    result<std::size_t> try_commit(sequence_id id) noexcept { return core_->commit(id); }

    /// Cuts back to the last commit, or to what is left of it: undoes a step that failed or was a guess. A
    /// fork has its parent's commit, a loaded sequence the one it was saved with, and a sequence made from a
    /// prefix has that prefix committed. Errors as truncate; nothing_committed where there was no commit,
    /// since all that the sequence holds would go (truncate(0) says so).
    status try_rollback(sequence_id id) noexcept { return core_->rollback(id); }

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
        return core_->append(id, layer, keys, values, run);
    }

    /// The same for a layer whose values lie in its keys (layer_description::values_in_keys): keys
    /// [tokens][kv_heads][key_dim] alone. The calls with values take such a layer's too, if these are the
    /// keys' own view, as it is or cut to value_dim channels. Errors as above.
    template <executor E = inline_executor>
    status try_append(sequence_id id, std::size_t layer, tensor_view keys, E&& run = {}) noexcept {
        return try_append(id, layer, keys, no_values(), run);
    }

    /// The next tokens of one layer for several sequences, all or none: sequence i takes rows indptr[i] ...
    /// indptr[i + 1] - 1 of keys and values; one without rows is left as it is. No sequence comes twice. The
    /// executor gets one task per sequence and KV head. Errors as append, where().token being a row: of
    /// capacity_exceeded and out_of_memory the first of the sequence that found no room, of a sequence that
    /// comes twice (invalid_argument) or does not live, its first; invalid_argument for an indptr that does
    /// not divide the rows.
    template <executor E = inline_executor>
    status try_append(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        return core_->append(ids, layer, indptr, keys, values, run);
    }

    /// The same for a layer whose values lie in its keys.
    template <executor E = inline_executor>
    status try_append(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view keys, E&& run = {}) noexcept {
        return try_append(ids, layer, indptr, keys, no_values(), run);
    }

    /// Appends rows that are quantized already, bit for bit, as export_rows gives them: [tokens][kv_heads].
    /// O(values). Errors as append; shape_mismatch (a buffer's size); non_finite for metadata or plain values
    /// that are no numbers; invalid_argument for a layer with fp16 copies, which rows do not have, and for
    /// one with keys quantized per channel. Where values lie in keys, their buffers are empty.
    status try_append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                           const_row_buffers values) noexcept {
        return core_->append_rows(id, layer, tokens, keys, values);
    }

    // ---- attend

    /// Attention of query rows over the cached tokens of one layer, from the packed codes:
    ///   out[i][h] = sum_t softmax_t(scale * q[i][h] . k[t][h / group]) v[t][h / group]
    /// queries [tokens][query_heads][key_dim], outputs [tokens][query_heads][value_dim] in any scalar type;
    /// query_heads is a multiple of kv_heads (group = query_heads / kv_heads). A query that sees no token
    /// gets zeros, and -infinity as its log_sum_exp. O(tokens * query_heads * length * head_dim); no
    /// allocation unless few heads meet a long sequence, whose partial results then take 4 * (value_dim + 2)
    /// bytes per range and row, or a window, a mask or a page dropped amid the queries parts what they see.
    /// The result does not depend on the executor. Numbers that fp16 or bf16 outputs can not hold become the
    /// type's largest, never infinity: keys and values are finite, so is what is made of them. Errors:
    /// invalid_sequence, out_of_range, shape_mismatch, invalid_argument, out_of_memory; dropped_tokens, with
    /// the query as where().token, where a commit has freed tokens that the layer's sliding window would show
    /// it. (Pages that drop_pages() took are no error: attention goes on without them.)
    template <executor E = inline_executor>
    status try_attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        return core_->attend(id, layer, queries, outputs, options, run);
    }

    /// The same for several sequences, each with query rows indptr[i] ... indptr[i + 1] - 1 (continuous
    /// batching, ragged lengths). Bit for bit what one call for each gives. No sequence comes twice. The mask
    /// applies to each sequence by itself and is causal, without a first position, or none; options.masks has
    /// any mask for each. Short sequences are a task each. Errors as above, where().token being a row;
    /// outputs are then unspecified.
    template <executor E = inline_executor>
    status try_attend(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        return core_->attend(ids, layer, indptr, queries, outputs, options, run);
    }

    // ---- rows and pages

    /// Copies cached vectors out in row format, bit for bit what the quantizer made of them: of encoded ones
    /// (encoding.hpp) as they were rotated and less their means. Compact metadata go as scales, 16 bits each.
    /// Errors: invalid_sequence, out_of_range, dropped_tokens, shape_mismatch (a buffer's size),
    /// invalid_argument for keys quantized per channel.
    status try_export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                           std::size_t first, std::size_t count, row_buffers out) const noexcept {
        return core_->export_rows(id, layer, side, kv_head, first, count, out);
    }

    /// Decodes cached vectors, rotated back and with their means: out is [count][channels]. Errors as
    /// try_export_rows.
    status try_read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                    std::size_t count, std::span<float> out) const noexcept {
        return core_->read(id, layer, side, kv_head, first, count, out);
    }

    /// Indices that export_block_tables() needs. Errors: invalid_sequence, out_of_range.
    [[nodiscard]] result<std::size_t> try_count_blocks(std::span<const sequence_id> ids,
                                                       std::size_t layer) const noexcept {
        return core_->count_blocks(ids, layer);
    }

    /// Block tables of a layer for engines that bring their own kernels: pages that are not dropped, in order
    /// of position. Layers with the same sliding window share them. The number of indices. Errors:
    /// invalid_sequence, out_of_range, shape_mismatch (a span's size).
    result<std::size_t> try_export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                                block_tables out) const noexcept {
        return core_->export_block_tables(ids, layer, out);
    }

    /// The bytes of one KV head's page in layout(layer). Keys quantized per channel are there once the page
    /// is full; before that, try_open_keys(). Errors: out_of_range for a block that is not in use.
    [[nodiscard]] result<std::span<const std::byte>> try_page(std::size_t layer, std::size_t kv_head,
                                                              std::uint32_t block) const noexcept {
        return core_->page(layer, kv_head, block);
    }

    /// Keys quantized per channel, of the open page: fp16, rotated and less their means, in the keys' half of
    /// a page_layout(fp16, key_dim, fp16, 0, page_tokens). Errors: invalid_sequence; out_of_range where the
    /// layer has no such keys, or no open page.
    [[nodiscard]] result<std::span<const std::byte>> try_open_keys(sequence_id id, std::size_t layer,
                                                                   std::size_t kv_head) const noexcept {
        return core_->open_keys(id, layer, kv_head);
    }

    // ---- prefixes

    /// Keeps the pages of a prompt, which the sequence holds from position 0 on, for others that begin alike.
    /// Only whole pages, unless `partial` is set: the open page is then kept too, and copied when the
    /// sequence appends to it. Dropped pages end what can be kept. The tokens that are known now. Errors:
    /// invalid_sequence, layers_disagree, out_of_range for more tokens than the sequence holds,
    /// out_of_memory.
    result<std::size_t> try_store_prefix(sequence_id id, std::span<const token_id> tokens,
                                         prefix_salt salt = {}, bool partial = false) noexcept {
        return core_->store_prefix(id, tokens, salt, partial);
    }

    /// A new sequence that shares the pages of the longest known beginning of these tokens; leave out the
    /// tokens whose queries are needed, at least the last one. Its fp16 sinks are those that were stored; the
    /// rest is as quantized. O(tokens). Errors: out_of_memory, capacity_exceeded (with fp16 windows).
    [[nodiscard]] result<prefix_match> try_create_from_prefix(std::span<const token_id> tokens,
                                                              prefix_salt salt = {}) noexcept {
        return core_->create_from_prefix(tokens, salt);
    }

    /// The index itself: pins, events, eviction.
    /// @{
    [[nodiscard]] prefix_index& prefixes() noexcept { return core_->prefixes(); }
    [[nodiscard]] const prefix_index& prefixes() const noexcept { return core_->prefixes(); }
    /// @}

    // ---- statistics

    /// Over all sequences. O(pages + sequences * layers).
    [[nodiscard]] cache_statistics statistics() const noexcept { return core_->statistics(); }
    /// Of one sequence. O(pages + layers). Errors: invalid_sequence.
    [[nodiscard]] result<cache_statistics> try_statistics(sequence_id id) const noexcept {
        return core_->statistics(id);
    }
    /// Free pages, of the page group that has fewest.
    [[nodiscard]] std::size_t available_pages() const noexcept { return core_->available_pages(); }

    /// Checks every invariant: reference counts against all tables and the prefix index, lengths against
    /// pages. For tests and debugging. O(pages + sequences * layers). Errors: broken_invariant,
    /// out_of_memory.
    [[nodiscard]] status try_validate() const noexcept { return core_->validate(); }

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
    void append(sequence_id id, std::size_t layer, tensor_view keys, E&& run = {}) {
        detail::throw_if_error(try_append(id, layer, keys, run));
    }
    template <executor E = inline_executor>
    void append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(ids, layer, indptr, keys, values, run));
    }
    template <executor E = inline_executor>
    void append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view keys, E&& run = {}) {
        detail::throw_if_error(try_append(ids, layer, indptr, keys, run));
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

    basic_kv_cache() = default;

    static tensor_view no_values() noexcept { return {static_cast<const float*>(nullptr), 0, 0, 0}; }

    status initialize(cache_description&& d, const Allocator& allocator) noexcept {
        std::unique_ptr<detail::memory_source> memory(new (std::nothrow)
                                                          detail::allocator_memory<Allocator>(allocator));
        if (memory == nullptr)
            return {errc::out_of_memory, "an allocation failed"};
        result<std::unique_ptr<detail::any_cache>> made =
            detail::make_cache<Formats>(std::move(d), std::move(memory));
        if (!made)
            return made.reason();
        core_ = std::move(*made);
        return {};
    }

    std::unique_ptr<detail::any_cache> core_;
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
