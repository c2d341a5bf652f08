// SPDX-License-Identifier: Apache-2.0
//
// A paged KV cache that computes attention straight from its packed bits.
//
//   kv1::cache_description shape = kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, capacity_tokens);
//   kv1::kv_cache cache(kv1::describe_cache(kv1::parse_policy("safe"), shape)); // cache_policy.hpp
//   auto sequence = cache.create_sequence();
//   for each step:
//       for each layer:
//           cache.append(sequence, layer, {k, tokens, kv_heads, head_dim}, {v, tokens, kv_heads, head_dim});
//           cache.attend(sequence, layer, {q, tokens, query_heads, head_dim},
//                        {out, tokens, query_heads, head_dim});
//       cache.commit(sequence); // windows free what they have passed; rollback() returns to here
//
// Keys are cached as they are given, that is after RoPE where a model uses it. Every vector is quantized
// before anything attends to it, the newest included; fp16 sinks and an fp16 window are the exception (below).
// A cached key cannot be moved to another position (context shift): that would rotate it, and 2-bit codes
// cannot be rotated without loss.
//
// Sequences. A sequence is a list of pages of page_tokens tokens: with 64 a page, token 130 lies in page 2.
// Sequences share pages where they can (ARCHITECTURE.md has a drawing):
//   fork       makes a sequence that shares every page; who writes to a shared page copies it first (beam
//              search, several answers to one prompt)
//   truncate   cuts a sequence to its first n tokens, for any n (speculative decoding)
//   drop       frees whole pages in the middle; later tokens keep their positions (StreamingLLM)
//   prefixes   store_prefix() keeps the pages of a prompt under its tokens. create_from_prefix() begins a new
//              sequence with the longest prefix that is known (prefix_index.hpp); cache_io.hpp saves them
//
// Commit points. A step appends the same new tokens to every layer: a token of each sequence that decodes, or
// a chunk of a prompt. Within a step, layers are appended to in any order, and their lengths may differ. A
// sequence is at a commit point when all its layers hold the same number of tokens. commit(), fork(),
// store_prefix(), saving and swapping need one; elsewhere they fail with layers_disagree and name the first
// layer that lags.
// commit() marks the length that rollback() returns to. It is also the only call that lets windows free
// pages, and nothing returns to a length that needs freed pages.
//
// Sliding windows. In a layer with sliding_window = w, a query sees the last w of the tokens that its mask
// shows it up to its own position. It also sees the tokens that the mask shows it after that position (an
// image whose tokens all see each other). In a token tree the last w are those of the query's own branch.
// Layers with the same window share block numbers; the pages of other layers do not wait for them.
// window_retention keeps tokens behind the window, so that a sequence can be cut to a length before the last
// commit. A query that would see tokens which a commit has freed is refused with dropped_tokens, and so is
// reading them.
//
// fp16 sinks and window. With fp16_sinks = s and fp16_window = r, a query that sees tokens 0 ... t sees the
// first s and the last r of them, its own included, rounded to fp16. It sees those between as they were
// quantized from that fp16. With s = 4, r = 32 and t = 99 that is fp16 for tokens 0-3 and 68-99, codes for
// 4-67. Prefill and decoding do the same. Under a mask the last r are counted as those of a sliding window.
// A token is quantized once, when it is appended. commit() frees the fp16 copy of a token that the window has
// passed: queries at earlier positions then see it quantized. So a prompt of 4,096 tokens that is appended in
// one step needs room for 4,096 copies (fp16_capacity_tokens) until its commit; in steps of 512 it needs room
// for 512 and the window. Truncating does not bring a copy back. Keys and values must fit fp16. read() and
// export_rows() give the quantized vectors.
//
// Keys per channel. In a layer whose key_axis is per_channel, a query sees the keys of full pages as codes
// and those of the open page in fp16. The codes of a page depend on its tokens alone, however they were
// appended. Keys, less their means and rotated, must fit fp16. Codes cannot be turned back into a page's fp16
// keys. So a cut within a full page is refused, unless the last commit lies in that page: its fp16 keys are
// kept for rollback(). Prefixes are shared by whole pages, or by an open page that was stored as such. Rows
// of such keys cannot be exported or appended.
//
// Values in keys. In a layer with values_in_keys (multi-head latent attention; latent_layer()) a key is given
// and stored once. Its first value_dim channels, as they are decoded, are the value:
//
//   kv1::kv2_cache cache(kv1::uniform_cache(layers, kv1::latent_layer(576, 512), capacity_tokens));
//   cache.append(sequence, layer, {latent, tokens, 1, 576}); // latent after its norm, rotary part after RoPE
//   cache.attend(sequence, layer, {q, tokens, 128, 576}, {out, tokens, 128, 512}, {.scale = model_scale});
//
// Errors. Each call has a noexcept `try_` form that returns a status or a result, and a form that throws
// kv1::error with that status. A failed call leaves the cache as it was, with one exception: a call that
// fails with out_of_memory or capacity_exceeded may have evicted unpinned pages of the prefix index. K and V
// must be finite. NaN, infinity and values that the format's fp16 metadata, or fp16 itself, cannot hold are
// refused, and the error names layer, KV head, token and channel. Queries are not checked: a NaN or infinity
// in a query makes its own output NaN or meaningless, and no other output.
//
// A failed step. An append to several sequences changes all of them or none. But the layers that came before
// it keep the step's tokens. Example: 8 sequences decode a token, and the append to layer 5 fails with
// capacity_exceeded. Layers 0 to 4 of each hold a token more than layer 5. Call rollback() for each of the 8;
// it takes the tokens off. A sequence that was never committed has nothing to roll back to: truncate(id, 0)
// empties it. Then make room (destroy or swap out a sequence, try_grow()) and run the step again.
//
// Memory. A cache holds its arenas, what sequences need, and scratch memory that tasks work in. Scratch comes
// from operator new, 512 KiB for each task that runs at the same time; pages that no task touches cost no
// memory. One piece is allocated with the cache, others where tasks run at once (executor.hpp). append and
// attend fail with out_of_memory where there is no memory for one.
//
// Threads. Const calls may run at once from any threads, and beside calls that change other sequences.
// A call that changes a sequence (append, truncate, drop, commit, rollback, destroy) needs that sequence for
// itself; fork and store_prefix read theirs. create, fork, destroy, the prefix calls and loading may run at
// once from any threads. So statistics() of the whole cache need not be of one instant. try_grow(),
// try_validate(), moving and destroying the cache need the whole cache for themselves.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/cache_statistics.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/encoding.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/quantizers/all.hpp>
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

/// A KV cache. Formats lists the storage formats that it carries kernels for. Allocator provides the arenas.
/// Memory: one arena per layer (two with fp16 copies or keys per channel, three with both). Arenas are
/// reserved at construction and touched page by page as sequences grow.
template <class Formats = all_formats, class Allocator = std::allocator<std::byte>>
class basic_kv_cache {
public:
    /// The template's arguments.
    /// @{
    using formats_type = Formats;
    using allocator_type = Allocator;
    /// @}

    /// Makes a cache of this description and reserves its arenas. Time O(layers); 8 bytes a page beside the
    /// arenas. A description that is moved here is not copied, and is used up even if the call fails. Copying
    /// a description allocates; without exceptions the call first tests whether the memory is there, and if
    /// another thread takes it in between, the program ends (status.hpp). Errors: invalid_argument and
    /// shape_mismatch for a description that no cache can have, unsupported_format, unsupported_target
    /// (KV1_TARGET), out_of_memory.
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
    /// Makes a cache of this description and reserves its arenas, O(layers). Throws kv1::error:
    /// invalid_argument and shape_mismatch for a description that no cache can have, unsupported_format,
    /// unsupported_target (KV1_TARGET), out_of_memory.
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

    /// Caches are moved, not copied. Sequence handles stay valid for the new cache. The source may only be
    /// destroyed or assigned to.
    /// @{
    basic_kv_cache(basic_kv_cache&&) noexcept = default;
    basic_kv_cache& operator=(basic_kv_cache&&) noexcept = default;
    /// @}

    /// The description that the cache was made from; capacity_tokens is what try_grow() last raised it to.
    [[nodiscard]] const cache_description& description() const noexcept { return core_->description(); }
    /// The number of layers.
    [[nodiscard]] std::size_t layers() const noexcept { return core_->layers(); }
    /// Geometry of one KV head's page of a layer. Precondition: layer < layers().
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept { return core_->layout(layer); }

    /// Raises the capacity of the cache to so many tokens; a smaller number changes nothing. Blocks keep
    /// their numbers, their bytes move: spans that try_page() gave are invalid. O(bytes in use). Errors:
    /// invalid_argument, out_of_memory.
    status try_grow(std::size_t capacity_tokens) noexcept { return core_->grow(capacity_tokens); }

    // ---- sequences

    /// Makes an empty sequence. O(layers). Errors: out_of_memory.
    [[nodiscard]] result<sequence_id> try_create_sequence() noexcept { return core_->create_sequence(); }

    /// Ends a sequence and gives its pages back; the handle is stale from then on. O(pages). Errors:
    /// invalid_sequence.
    status try_destroy_sequence(sequence_id id) noexcept { return core_->destroy_sequence(id); }

    /// Whether the handle names a living sequence. O(1).
    [[nodiscard]] bool contains(sequence_id id) const noexcept { return core_->contains(id); }

    /// The number of tokens that one layer holds, dropped ones included: the position of its next token.
    /// O(1). Errors: invalid_sequence, out_of_range.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id, std::size_t layer) const noexcept {
        return core_->length(id, layer);
    }
    /// The number of tokens that every layer holds: the length of the shortest. O(layers). Errors:
    /// invalid_sequence.
    [[nodiscard]] result<std::size_t> try_length(sequence_id id) const noexcept { return core_->length(id); }

    /// Makes a sequence with the same tokens. Both share every page until one of them writes to it, and then
    /// that page is copied. O(pages). Errors: invalid_sequence, layers_disagree, out_of_memory.
    [[nodiscard]] result<sequence_id> try_fork(sequence_id id) noexcept { return core_->fork(id); }

    /// Cuts every layer to its first `tokens` tokens. O(pages freed). Errors: invalid_sequence; out_of_range
    /// if a layer holds fewer; dropped_tokens if the cut lies within a dropped page, if a sliding window has
    /// freed tokens that the next query would see, or if the cut lies within a full page of keys per channel
    /// that does not hold the last commit; with fp16 windows capacity_exceeded, out_of_memory.
    status try_truncate(sequence_id id, std::size_t tokens) noexcept { return core_->truncate(id, tokens); }

    /// Frees pages first_page ... first_page + pages - 1, which must be full in every layer. The other tokens
    /// keep their positions, and queries see them alone: after try_drop_pages(id, 1, 2) with 64 tokens a
    /// page, tokens 64 ... 191 are gone. O(pages of the sequence). Errors: invalid_sequence; out_of_range for
    /// pages that are not full; out_of_memory.
    status try_drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept {
        return core_->drop_pages(id, first_page, pages);
    }

    /// Ends a step. All layers must hold the same number of tokens. rollback() returns to this length, and
    /// windows free the pages that no later query can see. Gives the length. O(layers + pages freed). Errors:
    /// invalid_sequence, layers_disagree, out_of_memory.
    result<std::size_t> try_commit(sequence_id id) noexcept { return core_->commit(id); }

    /// Cuts the sequence back to the length of its last commit, or to its shortest layer if that is shorter.
    /// It undoes a step that failed or was a guess. A fork has its parent's commit, a loaded sequence the one
    /// that it was saved with, and in a sequence made from a prefix that prefix is committed. Errors: those
    /// of try_truncate; nothing_committed if the sequence was never committed (truncate(id, 0) empties it).
    status try_rollback(sequence_id id) noexcept { return core_->rollback(id); }

    // ---- append

    /// Quantizes and stores the next tokens of one layer. keys are [tokens][kv_heads][key_dim], values
    /// [tokens][kv_heads][value_dim]. Many tokens at once give the same bytes as one by one. Layers may be
    /// appended to in any order. Where the pool is full, the prefix index gives pages up. The executor gets
    /// one task per KV head. O(values), and a copy of the open page if it is shared. Errors:
    /// invalid_sequence; out_of_range for the layer; shape_mismatch, invalid_argument for the tensors;
    /// capacity_exceeded; out_of_memory; non_finite, not_representable for a value.
    template <executor E = inline_executor>
    status try_append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        return core_->append(id, layer, keys, values, run);
    }

    /// Quantizes and stores the next tokens of a layer whose values lie in its keys
    /// (layer_description::values_in_keys). keys are [tokens][kv_heads][key_dim]. The calls that take values
    /// serve such a layer too, if the values are the keys' own view, whole or cut to value_dim channels.
    /// Errors: those of the call with values.
    template <executor E = inline_executor>
    status try_append(sequence_id id, std::size_t layer, tensor_view keys, E&& run = {}) noexcept {
        return try_append(id, layer, keys, no_values(), run);
    }

    /// Appends to one layer of several sequences; if one fails, none is changed. Sequence i takes tokens
    /// indptr[i] ... indptr[i + 1] - 1 of keys and values: with indptr {0, 1, 4} the first sequence takes one
    /// token, the second three. A sequence may take none, and may not be named twice. The executor gets one
    /// task per sequence and KV head. Errors: those of the call for one sequence; invalid_argument for a
    /// sequence that is named twice and for an indptr that does not divide the tokens. where().token counts
    /// tokens of the tensors; for an error of a whole sequence (no room, a stale handle, named twice) it is
    /// the sequence's first.
    template <executor E = inline_executor>
    status try_append(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view keys, tensor_view values,
                      E&& run = {}) noexcept {
        return core_->append(ids, layer, indptr, keys, values, run);
    }

    /// Appends to several sequences, in a layer whose values lie in its keys. Errors: those of the call with
    /// values.
    template <executor E = inline_executor>
    status try_append(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view keys, E&& run = {}) noexcept {
        return try_append(ids, layer, indptr, keys, no_values(), run);
    }

    /// Stores tokens that are quantized already, bit for bit. The buffers hold rows in the order
    /// [tokens][kv_heads], each as export_rows gives it. Where values lie in keys, their buffers are empty.
    /// Rows of keys whose means turn (layer_description::rotary) hold for the positions that they came from.
    /// O(values). Errors: those of try_append; shape_mismatch for a buffer's size; non_finite for metadata or
    /// plain values that are no numbers; invalid_argument for a layer with fp16 copies, which rows do not
    /// have, and for one with keys quantized per channel.
    status try_append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                           const_row_buffers values) noexcept {
        return core_->append_rows(id, layer, tokens, keys, values);
    }

    // ---- attend

    /// Attention of queries to the cached tokens of one layer of a sequence, from the packed codes:
    ///   out[i][h] = sum_t softmax_t(scale * q[i][h] . k[t][h / group]) v[t][h / group]
    /// with group = query_heads / kv_heads, the query heads that share a KV head (32 over 8: h = 5 reads KV
    /// head 1). queries are [tokens][query_heads][key_dim], outputs [tokens][query_heads][value_dim], each in
    /// any scalar type; query_heads is a multiple of kv_heads. A query that sees no token gets zeros, and
    /// -infinity as its log_sum_exp. A number that an fp16 or bf16 output cannot hold becomes the type's
    /// largest, never infinity. The result does not depend on the executor. O(tokens * query_heads * length *
    /// head_dim). Memory: 4 * (value_dim + 2) bytes per query head, token and range of tokens where few heads
    /// meet a long sequence; partial results where a window, a mask or a page dropped among the queries
    /// splits what they see; else none. Errors: invalid_sequence, out_of_range, shape_mismatch,
    /// invalid_argument, out_of_memory; dropped_tokens, with the query as where().token, if a commit has
    /// freed tokens that the layer's sliding window would show it. Pages that drop_pages() took are no error:
    /// attention goes on without them.
    template <executor E = inline_executor>
    status try_attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        return core_->attend(id, layer, queries, outputs, options, run);
    }

    /// Attention for several sequences in one call (continuous batching). Sequence i has queries indptr[i]
    /// ... indptr[i + 1] - 1, over its own cached tokens. The result is bit for bit what one call for each
    /// gives. No sequence may be named twice. options.mask applies to each sequence by itself and is causal
    /// without a first position, or none; options.masks has a mask of any kind for each. Short sequences are
    /// a task each. Errors: those of the call for one sequence, where().token counting tokens of the query
    /// tensor; outputs are then unspecified.
    template <executor E = inline_executor>
    status try_attend(std::span<const sequence_id> ids, std::size_t layer,
                      std::span<const std::size_t> indptr, tensor_view queries, mutable_tensor_view outputs,
                      const attention_options& options = {}, E&& run = {}) const noexcept {
        return core_->attend(ids, layer, indptr, queries, outputs, options, run);
    }

    // ---- rows and pages

    /// Copies tokens first ... first + count - 1 of one KV head out in row format, bit for bit what the
    /// quantizer made of them. Vectors with an encoding (encoding.hpp) go out as they are stored: rotated,
    /// and less their means. Compact words go out as scales, 16 bits each. Errors: invalid_sequence,
    /// out_of_range, dropped_tokens; shape_mismatch for a buffer's size; invalid_argument for keys quantized
    /// per channel.
    status try_export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                           std::size_t first, std::size_t count, row_buffers out) const noexcept {
        return core_->export_rows(id, layer, side, kv_head, first, count, out);
    }

    /// Decodes tokens first ... first + count - 1 of one KV head; rotation and means are undone. out is
    /// [count][channels]. Errors: invalid_sequence, out_of_range, dropped_tokens; shape_mismatch for the size
    /// of out.
    status try_read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                    std::size_t count, std::span<float> out) const noexcept {
        return core_->read(id, layer, side, kv_head, first, count, out);
    }

    /// The number of indices that export_block_tables() writes for these sequences. Errors: invalid_sequence,
    /// out_of_range.
    [[nodiscard]] result<std::size_t> try_count_blocks(std::span<const sequence_id> ids,
                                                       std::size_t layer) const noexcept {
        return core_->count_blocks(ids, layer);
    }

    /// Writes the block tables of a layer, for engines that bring their own kernels: the blocks of the pages
    /// that are not dropped, in order of position. Layers with the same sliding window and retention have the
    /// same tables. Gives the number of indices. Errors: invalid_sequence, out_of_range; shape_mismatch for a
    /// span's size; not_representable for more than 2^31 - 1 indices.
    result<std::size_t> try_export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                                block_tables out) const noexcept {
        return core_->export_block_tables(ids, layer, out);
    }

    /// The bytes of one KV head's page in a block, as layout(layer) describes them. They are valid until the
    /// block is freed or the cache grows. Keys quantized per channel are there once the page is full; before
    /// that, try_open_keys() has them. Errors: out_of_range for a layer, a KV head or a block that is not in
    /// use.
    [[nodiscard]] result<std::span<const std::byte>> try_page(std::size_t layer, std::size_t kv_head,
                                                              std::uint32_t block) const noexcept {
        return core_->page(layer, kv_head, block);
    }

    /// The keys of the open page of a layer that quantizes keys per channel: fp16, rotated and less their
    /// means, in the keys' half of a page_layout(fp16, key_dim, fp16, 0, page_tokens). Errors:
    /// invalid_sequence; out_of_range if the layer has no such keys, or no open page.
    [[nodiscard]] result<std::span<const std::byte>> try_open_keys(sequence_id id, std::size_t layer,
                                                                   std::size_t kv_head) const noexcept {
        return core_->open_keys(id, layer, kv_head);
    }

    // ---- prefixes

    /// Keeps the pages of a prompt for other sequences that begin alike. The sequence holds these tokens from
    /// position 0 on. Only whole pages are kept, unless `partial` is set: then the open page is kept too, and
    /// copied when the sequence appends to it. Nothing is kept from the first dropped page on. Gives the
    /// number of tokens that are known now. Errors: invalid_sequence; layers_disagree; out_of_range for more
    /// tokens than the sequence holds; out_of_memory.
    result<std::size_t> try_store_prefix(sequence_id id, std::span<const token_id> tokens,
                                         prefix_salt salt = {}, bool partial = false) noexcept {
        return core_->store_prefix(id, tokens, salt, partial);
    }

    /// Makes a sequence that shares the pages of the longest known beginning of these tokens, and says how
    /// many tokens that is. Leave out the tokens whose queries are needed, at least the last one. fp16 sinks
    /// are those that were stored; the other tokens are there in quantized form only. O(tokens). Errors:
    /// out_of_memory; with fp16 windows capacity_exceeded.
    [[nodiscard]] result<prefix_match> try_create_from_prefix(std::span<const token_id> tokens,
                                                              prefix_salt salt = {}) noexcept {
        return core_->create_from_prefix(tokens, salt);
    }

    /// The prefix index: pins, events, eviction.
    /// @{
    [[nodiscard]] prefix_index& prefixes() noexcept { return core_->prefixes(); }
    [[nodiscard]] const prefix_index& prefixes() const noexcept { return core_->prefixes(); }
    /// @}

    // ---- statistics

    /// Sizes of all sequences together. O(pages + sequences * layers).
    [[nodiscard]] cache_statistics statistics() const noexcept { return core_->statistics(); }
    /// Sizes of one sequence. O(pages + layers). Errors: invalid_sequence.
    [[nodiscard]] result<cache_statistics> try_statistics(sequence_id id) const noexcept {
        return core_->statistics(id);
    }
    /// The number of free blocks, in the block group that has fewest.
    [[nodiscard]] std::size_t available_pages() const noexcept { return core_->available_pages(); }

    /// Checks every invariant, for tests and debugging: reference counts against all tables and the prefix
    /// index, lengths against pages. O(pages + sequences * layers). Errors: broken_invariant, out_of_memory.
    [[nodiscard]] status try_validate() const noexcept { return core_->validate(); }

#if KV1_EXCEPTIONS
    /// Raises the capacity of the cache to so many tokens; blocks keep their numbers, their bytes move.
    /// O(bytes in use). Throws kv1::error: invalid_argument, out_of_memory.
    void grow(std::size_t capacity_tokens) { detail::throw_if_error(try_grow(capacity_tokens)); }

    /// Makes an empty sequence. O(layers). Throws kv1::error: out_of_memory.
    [[nodiscard]] sequence_id create_sequence() { return try_create_sequence().value(); }

    /// Ends a sequence and gives its pages back; the handle is stale from then on. O(pages). Throws
    /// kv1::error: invalid_sequence.
    void destroy_sequence(sequence_id id) { detail::throw_if_error(try_destroy_sequence(id)); }

    /// The number of tokens that one layer holds, dropped ones included: the position of its next token.
    /// Throws kv1::error: invalid_sequence, out_of_range.
    [[nodiscard]] std::size_t length(sequence_id id, std::size_t layer) const {
        return try_length(id, layer).value();
    }

    /// The number of tokens that every layer holds: the length of the shortest. O(layers). Throws kv1::error:
    /// invalid_sequence.
    [[nodiscard]] std::size_t length(sequence_id id) const { return try_length(id).value(); }

    /// Makes a sequence with the same tokens, which shares every page until one of the two writes to it.
    /// O(pages). Throws kv1::error: invalid_sequence; layers_disagree between commit points; out_of_memory.
    [[nodiscard]] sequence_id fork(sequence_id id) { return try_fork(id).value(); }

    /// Cuts every layer to its first `tokens` tokens. O(pages freed). Throws kv1::error: invalid_sequence;
    /// out_of_range if a layer holds fewer; dropped_tokens if tokens that the next query would see are gone,
    /// or if the cut lies within a dropped page or within codes of keys per channel; with fp16 windows
    /// capacity_exceeded, out_of_memory.
    void truncate(sequence_id id, std::size_t tokens) { detail::throw_if_error(try_truncate(id, tokens)); }

    /// Frees pages first_page ... first_page + pages - 1, which must be full in every layer. The other tokens
    /// keep their positions, and queries see them alone. Throws kv1::error: invalid_sequence; out_of_range
    /// for pages that are not full; out_of_memory.
    void drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) {
        detail::throw_if_error(try_drop_pages(id, first_page, pages));
    }

    /// Ends a step in which every layer got the same tokens: rollback() returns to this length, and windows
    /// free the pages that no later query can see. Gives the length. Throws kv1::error: invalid_sequence;
    /// layers_disagree, naming the first layer that lags; out_of_memory.
    std::size_t commit(sequence_id id) { return try_commit(id).value(); }

    /// Cuts the sequence back to the length of its last commit. Throws kv1::error: nothing_committed if there
    /// was none; invalid_sequence; dropped_tokens; with fp16 windows capacity_exceeded, out_of_memory.
    void rollback(sequence_id id) { detail::throw_if_error(try_rollback(id)); }

    /// Quantizes and stores the next tokens of one layer. keys are [tokens][kv_heads][key_dim], values
    /// [tokens][kv_heads][value_dim], in fp32, fp16 or bf16. Many tokens at once give the same bytes as one
    /// by one. The executor gets one task per KV head. If the call throws, nothing was appended. Throws
    /// kv1::error: invalid_sequence; out_of_range for the layer; shape_mismatch, invalid_argument for the
    /// tensors; capacity_exceeded; out_of_memory; non_finite, not_representable for a value, naming its place.
    template <executor E = inline_executor>
    void append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(id, layer, keys, values, run));
    }

    /// Quantizes and stores the next tokens of a layer whose values lie in its keys. keys are
    /// [tokens][kv_heads][key_dim]. Throws kv1::error: as the call with values.
    template <executor E = inline_executor>
    void append(sequence_id id, std::size_t layer, tensor_view keys, E&& run = {}) {
        detail::throw_if_error(try_append(id, layer, keys, run));
    }

    /// Appends to one layer of several sequences, to all or to none. Sequence i takes tokens indptr[i] ...
    /// indptr[i + 1] - 1 of keys [tokens][kv_heads][key_dim] and values [tokens][kv_heads][value_dim]. Throws
    /// kv1::error: as the call for one sequence, where().token counting tokens of the tensors;
    /// invalid_argument for a sequence that is named twice and for an indptr that does not divide the tokens.
    template <executor E = inline_executor>
    void append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_append(ids, layer, indptr, keys, values, run));
    }

    /// Appends to several sequences, in a layer whose values lie in its keys. Throws kv1::error: as the call
    /// with values.
    template <executor E = inline_executor>
    void append(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view keys, E&& run = {}) {
        detail::throw_if_error(try_append(ids, layer, indptr, keys, run));
    }

    /// Stores tokens that are quantized already, bit for bit: rows [tokens][kv_heads], each as export_rows
    /// gives it. Rows of keys whose means turn (layer_description::rotary) hold for the positions that they
    /// came from. Throws kv1::error: invalid_sequence, out_of_range, capacity_exceeded, out_of_memory;
    /// shape_mismatch for a buffer's size; non_finite for metadata or plain values; invalid_argument for a
    /// layer with fp16 copies or keys quantized per channel.
    void append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                     const_row_buffers values) {
        detail::throw_if_error(try_append_rows(id, layer, tokens, keys, values));
    }

    /// Attention of queries to the cached tokens of one layer, from the packed codes. queries are
    /// [tokens][query_heads][key_dim], outputs [tokens][query_heads][value_dim], in any scalar type;
    /// query_heads is a multiple of kv_heads. By default the queries are the last tokens of the sequence and
    /// see those up to themselves (attention.hpp has masks, scale and precision). Throws kv1::error:
    /// invalid_sequence; out_of_range for the layer; shape_mismatch, invalid_argument for tensors and
    /// options; out_of_memory; dropped_tokens if a commit has freed tokens that a query would see.
    template <executor E = inline_executor>
    void attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                const attention_options& options = {}, E&& run = {}) const {
        detail::throw_if_error(try_attend(id, layer, queries, outputs, options, run));
    }

    /// Attention for several sequences in one call. Sequence i has queries indptr[i] ... indptr[i + 1] - 1 of
    /// queries [tokens][query_heads][key_dim], over its own cached tokens; outputs are
    /// [tokens][query_heads][value_dim]. Throws kv1::error: as the call for one sequence, where().token
    /// counting tokens of the query tensor; outputs are then unspecified.
    template <executor E = inline_executor>
    void attend(std::span<const sequence_id> ids, std::size_t layer, std::span<const std::size_t> indptr,
                tensor_view queries, mutable_tensor_view outputs, const attention_options& options = {},
                E&& run = {}) const {
        detail::throw_if_error(try_attend(ids, layer, indptr, queries, outputs, options, run));
    }

    /// Copies tokens first ... first + count - 1 of one KV head out in row format, as they are stored. Throws
    /// kv1::error: invalid_sequence, out_of_range, dropped_tokens; shape_mismatch for a buffer's size;
    /// invalid_argument for keys quantized per channel.
    void export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
                     std::size_t count, row_buffers out) const {
        detail::throw_if_error(try_export_rows(id, layer, side, kv_head, first, count, out));
    }

    /// Decodes tokens first ... first + count - 1 of one KV head to out [count][channels]. Throws kv1::error:
    /// invalid_sequence, out_of_range, dropped_tokens; shape_mismatch for the size of out.
    void read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head, std::size_t first,
              std::size_t count, std::span<float> out) const {
        detail::throw_if_error(try_read(id, layer, side, kv_head, first, count, out));
    }

    /// The number of indices that export_block_tables() writes for these sequences. Throws kv1::error:
    /// invalid_sequence, out_of_range.
    [[nodiscard]] std::size_t count_blocks(std::span<const sequence_id> ids, std::size_t layer) const {
        return try_count_blocks(ids, layer).value();
    }

    /// Writes the block tables of a layer: the blocks of pages that are not dropped, in order of position.
    /// Gives the number of indices. Throws kv1::error: invalid_sequence, out_of_range; shape_mismatch for a
    /// span's size; not_representable for more than 2^31 - 1 indices.
    std::size_t export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                    block_tables out) const {
        return try_export_block_tables(ids, layer, out).value();
    }

    /// The bytes of one KV head's page in a block, as layout(layer) describes them, valid until the block is
    /// freed or the cache grows. Throws kv1::error: out_of_range for a layer, a KV head or a block that is
    /// not in use.
    [[nodiscard]] std::span<const std::byte> page(std::size_t layer, std::size_t kv_head,
                                                  std::uint32_t block) const {
        return try_page(layer, kv_head, block).value();
    }

    /// The fp16 keys of the open page of a layer that quantizes keys per channel. Throws kv1::error:
    /// invalid_sequence; out_of_range if the layer has no such keys, or no open page.
    [[nodiscard]] std::span<const std::byte> open_keys(sequence_id id, std::size_t layer,
                                                       std::size_t kv_head) const {
        return try_open_keys(id, layer, kv_head).value();
    }

    /// Keeps the pages of a prompt, which the sequence holds from position 0 on, for sequences that begin
    /// alike: whole pages, and with `partial` the open one too. Gives the number of tokens that are known
    /// now. Throws kv1::error: invalid_sequence; layers_disagree; out_of_range for more tokens than the
    /// sequence holds; out_of_memory.
    std::size_t store_prefix(sequence_id id, std::span<const token_id> tokens, prefix_salt salt = {},
                             bool partial = false) {
        return try_store_prefix(id, tokens, salt, partial).value();
    }

    /// Makes a sequence that shares the pages of the longest known beginning of these tokens, and says how
    /// many tokens that is. Leave out the tokens whose queries are needed, at least the last one. Throws
    /// kv1::error: out_of_memory; with fp16 windows capacity_exceeded.
    [[nodiscard]] prefix_match create_from_prefix(std::span<const token_id> tokens, prefix_salt salt = {}) {
        return try_create_from_prefix(tokens, salt).value();
    }

    /// Sizes of one sequence. O(pages + layers). Throws kv1::error: invalid_sequence.
    [[nodiscard]] cache_statistics statistics(sequence_id id) const { return try_statistics(id).value(); }

    /// Checks every invariant, for tests and debugging. Throws kv1::error: broken_invariant, out_of_memory.
    void validate() const { detail::throw_if_error(try_validate()); }
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
/// The cache of models that were trained with it: K and V in affine<2>, 12 bytes per vector at head_dim 32,
/// 36 at 128; levels from a vector's minimum to its maximum unless encodings say otherwise. With these levels
/// it turns the text of a model that was not trained for it to garbage: the perplexity of
/// SmolLM2-135M-Instruct on WikiText-2 goes from 28.8 to 939. For such a model take kv_cache with fitted,
/// rotated formats, fp16 sinks and a window, as examples/quickstart.cpp does.
using kv2_cache = basic_kv_cache<formats<affine<2>>>;

} // namespace kv1::inline KV1_ABI
