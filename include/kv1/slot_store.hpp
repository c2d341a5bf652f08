// SPDX-License-Identifier: Apache-2.0
//
// kv1's bytes and kernels for engines that keep their own books: llama.cpp's cells, vLLM's block tables and slot
// mapping, any paged engine. A store has layers of numbered slots, each with room for the keys and values of one token.
// Which slots belong to which sequence, and where their tokens stand, the engine knows and says in each call.
//
// An engine with cells, as llama.cpp has them (n_kv cells from the first on, an fp16 mask for them):
//
//   kv1::slot_store store({.layers = layers, .slots = cells, .fp16_slots = 640, .fp16_sinks = 4, .fp16_window = 32});
//   for each layer:
//       store.write(layer, slots, k, v);          // any slots, in any order, over whatever they hold
//       store.attend(layer, {{{tokens, kv1::slot_view::range(0, n_kv), kv1::slot_mask::additive(mask, n_kv)}}}, q, out);
//   store.settle(sequences);                      // the step is done: what left the window gives its fp16 back
//
// An engine with blocks, as vLLM has them:
//
//   store.write(layer, slot_mapping, k, v);
//   for each sequence: streams.push_back({queries, kv1::slot_view::table(blocks, length), kv1::slot_mask::causal()});
//   store.attend(layer, streams, q, out);
//
// Slots and pages. Slot s is token s % page_tokens of block s / page_tokens, so an engine's blocks of page_tokens tokens
// are the store's. Kernels walk whole pages. A range or a table costs the pages that it covers; a list costs every page
// that one of its slots lies in, whole. With 64 slots a page, 100 slots that lie scattered over 100 pages cost what 6,400
// consecutive slots cost. A mask hides slots, and does not make a page cheaper.
//
// A slot that was never written to, or was cleared, holds zeros as codes stand for them. Hide it: where means turn, its
// score is a finite number of no meaning.
//
// fp16 copies. With fp16_slots, a slot that is written to is seen by all queries as it was given, rounded to fp16, until
// settle(), release_fp16() or flush() takes its fp16 copy away. From then on it is seen as its codes. settle() leaves the
// copies of a sequence's first positions (attention sinks) and of its newest ones. Codes are made from the fp16 numbers
// and written with them, so slots can be exported, copied and moved at any time. Layers that store keys and values plain
// have no copies. What kv_cache gives a decoded token, a store gives it too. A prompt of many tokens sees itself in
// fp16, where a kv_cache shows each of its tokens the last fp16_window before it.
//
// Which call changes what. write() replaces keys, values or both. A key that turns to another position (context shift) is
// read, turned and written again; each time it is rounded anew.
//
// Means that turn. A layer may keep keys less their mean before RoPE (layer_description::rotary). Its keys come with the
// positions that RoPE has turned them by. The store keeps a position beside each key, an int32 that is exported, copied
// and moved with it, so attention asks for none: a mask's positions may be others. A shifted key is written with its new
// position. The mean's share of a score costs little where slots that follow each other hold positions that do, as a
// prompt's tokens have them. Where slots of a tile of 16 stand elsewhere, shares are found by position and handed out by
// slot: an additive mask of 4 bytes for each query, query head and slot, and a call takes two to three times as long. Under
// a soft cap, with ALiBi, and where that mask had more than 64 MiB, shares are found slot by slot: about 0.2 us a slot and
// KV head.
//
// Keys per channel (quantization_axis::per_channel) are refused. They share a scale a channel over the tokens of a page,
// which is chosen when the page is full. A slot that is written again would need the page's other keys as they came, and
// its scales would be those of tokens that happen to lie side by side.
//
// Errors. Each call has a noexcept `try_` form that returns a status or a result, and a form that throws kv1::error with
// that status. A failed call leaves the store as it was, with one exception: a write() that fails with out_of_memory may
// have written some of its vectors. Keys and values must be finite, and what fp16 metadata or copies cannot hold is
// refused; the error names layer, KV head, token of the tensors (which is the slot's index in the call) and channel.
//
// Memory. Slots lie in memory that the caller lends, or that the store takes from operator new; either way it is touched
// page by page, as slots are written to. The store also holds its fp16 copies, 4 bytes a slot and layer where it has
// any, and scratch as kv_cache.hpp says.
//
// Threads. Const calls may run at once from any threads. Calls that change one layer (write, copy, move, imports, clear of
// slots) need that layer for themselves, others may be in use meanwhile. settle(), release_fp16(), flush() and clear()
// need the whole store. Work is split by shapes alone, so results are the same bits for any executor. A call may be
// planned, and run by threads that are all there already (work_plan.hpp).
#pragma once

#include <kv1/cache_views.hpp>
#include <kv1/executor.hpp>
#include <kv1/float16.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizers/all.hpp>
#include <kv1/slot_store_description.hpp>
#include <kv1/slot_views.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>
#include <kv1/work_plan.hpp>

#include <kv1/detail/any_slots.hpp>
#include <kv1/detail/try_copy.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI {

/// Layers of numbered slots. Formats lists the storage formats that the store carries kernels for.
template <class Formats = all_formats>
class basic_slot_store {
public:
    /// Makes a store of this description. memory: one for each layer, or none. Time O(slots); memory is not touched but
    /// for a page. Errors: invalid_argument and shape_mismatch for a description or memory that no store can have,
    /// naming the layer; unsupported_format, unsupported_target (KV1_TARGET), out_of_memory.
    /// @{
    [[nodiscard]] static result<basic_slot_store> create(slot_store_description&& description,
                                                         std::span<const slot_memory> memory = {}) noexcept {
        result<std::unique_ptr<detail::any_slots>> made =
            detail::make_slots<Formats>(std::move(description), memory);
        if (!made)
            return made.reason();
        return basic_slot_store(std::move(*made));
    }
    [[nodiscard]] static result<basic_slot_store> create(const slot_store_description& description,
                                                         std::span<const slot_memory> memory = {}) noexcept {
        slot_store_description copy;
        if (const status s = detail::try_copy(description, copy); !s)
            return s;
        return create(std::move(copy), memory);
    }
    /// @}
#if KV1_EXCEPTIONS
    /// The same; throws kv1::error where create() gives a status.
    explicit basic_slot_store(slot_store_description description, std::span<const slot_memory> memory = {})
        : basic_slot_store(create(std::move(description), memory).value()) {}
#endif

    /// What the store was made from.
    [[nodiscard]] const slot_store_description& description() const noexcept { return core_->description(); }
    /// The number of layers.
    [[nodiscard]] std::size_t layers() const noexcept { return core_->layers(); }
    /// The number of slots of each layer, whole pages.
    [[nodiscard]] std::size_t slots() const noexcept { return core_->slots(); }
    /// How a page of a KV head lies in memory; a block holds the pages of all KV heads, side by side. Precondition: such
    /// a layer exists.
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept { return core_->layout(layer); }

    // ---- write

    /// Encodes vectors into slots, over whatever they hold. keys are [slots][kv_heads][key_dim], values
    /// [slots][kv_heads][value_dim], in fp32, fp16 or bf16. A tensor whose data are null leaves its side as it is; so
    /// keys and values may come in two calls, and the values of a layer with values in keys are null. No slot comes
    /// twice. Tasks: one a KV head, or one alone for fewer than 16 slots. Errors: out_of_range; shape_mismatch,
    /// invalid_argument; capacity_exceeded for fp16 copies; non_finite, not_representable; out_of_memory.
    /// @{
    template <executor E = inline_executor>
    status try_write(std::size_t layer, std::span<const std::uint32_t> slots, tensor_view keys,
                     tensor_view values, E&& run = {}) noexcept {
        return core_->write(layer, slots, {}, keys, values, run);
    }
    /// As a plan.
    [[nodiscard]] result<work_plan> try_plan_write(std::size_t layer, std::span<const std::uint32_t> slots,
                                                   tensor_view keys, tensor_view values) noexcept {
        return planned(core_->plan_write(layer, slots, {}, keys, values));
    }
    /// @}
    /// The same with the positions that RoPE has turned the keys by, one a slot, none negative. Layers whose means turn
    /// (keeps_positions()) take keys in no other way; others check positions, and do not keep them. Errors: as above;
    /// shape_mismatch, invalid_argument for positions.
    /// @{
    template <executor E = inline_executor>
    status try_write(std::size_t layer, std::span<const std::uint32_t> slots,
                     std::span<const std::int32_t> positions, tensor_view keys, tensor_view values,
                     E&& run = {}) noexcept {
        return core_->write(layer, slots, positions, keys, values, run);
    }
    /// As a plan.
    [[nodiscard]] result<work_plan> try_plan_write(std::size_t layer, std::span<const std::uint32_t> slots,
                                                   std::span<const std::int32_t> positions, tensor_view keys,
                                                   tensor_view values) noexcept {
        return planned(core_->plan_write(layer, slots, positions, keys, values));
    }
    /// @}
    /// The position that a slot's key was written with, in a layer that keeps them (keeps_positions()); -1: there is
    /// none.
    [[nodiscard]] std::int32_t key_position(std::size_t layer, std::uint32_t slot) const noexcept {
        return core_->key_position(layer, slot);
    }
    /// No keys, or no values.
    [[nodiscard]] static constexpr tensor_view nothing() noexcept {
        return {static_cast<const float*>(nullptr), 0, 0, 0};
    }

    // ---- attend

    /// Attention of queries [queries][query_heads][key_dim] to the slots of their streams, to outputs
    /// [queries][query_heads][value_dim], in any scalar type; query_heads is a multiple of kv_heads. The streams take the
    /// queries in order. Streams may share slots. A query that sees nothing gets zeros and a log-sum-exp of -infinity.
    /// Errors: out_of_range, shape_mismatch, invalid_argument, the token being a stream's first query; out_of_memory.
    /// @{
    template <executor E = inline_executor>
    status try_attend(std::size_t layer, std::span<const slot_stream> streams, tensor_view queries,
                      mutable_tensor_view outputs, const slot_attention_options& options = {},
                      E&& run = {}) const noexcept {
        return core_->attend(layer, streams, queries, outputs, options, run);
    }
    /// As a plan. The store is not changed until it is finished.
    [[nodiscard]] result<work_plan>
    try_plan_attention(std::size_t layer, std::span<const slot_stream> streams, tensor_view queries,
                       mutable_tensor_view outputs,
                       const slot_attention_options& options = {}) const noexcept {
        return planned(core_->plan_attention(layer, streams, queries, outputs, options));
    }
    /// @}

    // ---- fp16 copies

    /// Ends a step for these sequences: their slots lose their fp16 copies in all layers, but for positions below
    /// fp16_sinks and the newest fp16_window - 1. Slots of no sequence keep theirs. O(slots of the sequences + fp16 slots
    /// * (layers + sequences)). Errors: out_of_range, invalid_argument, shape_mismatch, the token being the sequence's
    /// index; out_of_memory.
    status try_settle(std::span<const slot_sequence> sequences) noexcept { return core_->settle(sequences); }
    /// Takes the fp16 copies of these slots away, in all layers. Errors: out_of_range.
    status try_release_fp16(std::span<const std::uint32_t> slots) noexcept { return core_->release(slots); }
    /// Takes all fp16 copies away: every slot is seen as its codes.
    void flush() noexcept { core_->flush(); }
    /// Whether a slot has an fp16 copy. False where there is no such slot.
    [[nodiscard]] bool has_fp16(std::size_t layer, std::uint32_t slot) const noexcept {
        return core_->has_fp16(layer, slot);
    }
    /// How many slots of a layer have one.
    [[nodiscard]] std::size_t fp16_slots_in_use(std::size_t layer) const noexcept {
        return core_->fp16_slots_in_use(layer);
    }

    // ---- vectors and bytes out and in

    /// Decodes keys or values of one KV head to out [slots][channels]: fp16 copies where there are, else what the codes
    /// stand for. Errors: out_of_range; shape_mismatch for the size of out.
    status try_read(std::size_t layer, kv_side side, std::size_t kv_head,
                    std::span<const std::uint32_t> slots, std::span<float> out) const noexcept {
        return core_->read(layer, side, kv_head, slots, out);
    }
    /// Bytes of one slot of a layer in export_raw(): for each KV head the key's row, then the value's (row.hpp), each as
    /// packed codes, scales, minima; behind them the key's position (int32), where the store keeps it. Precondition: such
    /// a layer exists.
    [[nodiscard]] std::size_t raw_bytes(std::size_t layer) const noexcept { return core_->raw_bytes(layer); }
    /// Copies the codes of slots out, [slots][raw_bytes()]. Errors: out_of_range; shape_mismatch for the size of out.
    status try_export_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                          std::span<std::byte> out) const noexcept {
        return core_->export_raw(layer, slots, out);
    }
    /// Stores what export_raw() gave, bit for bit; the slots lose their fp16 copies. No slot comes twice. Errors:
    /// out_of_range, invalid_argument, also for a position below -1; shape_mismatch for the size of in; non_finite for
    /// metadata or plain values.
    status try_import_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                          std::span<const std::byte> in) noexcept {
        return core_->import_raw(layer, slots, in);
    }
    /// Numbers of one slot's fp16 copy: for each KV head the key, then the value. Precondition: such a layer exists.
    [[nodiscard]] std::size_t fp16_numbers(std::size_t layer) const noexcept {
        return core_->fp16_numbers(layer);
    }
    /// Copies the fp16 copies of slots out, [slots][fp16_numbers()]. Errors: out_of_range, also for a slot without one;
    /// shape_mismatch; invalid_argument for a layer that has none.
    status try_export_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                           std::span<float16> out) const noexcept {
        return core_->export_fp16(layer, slots, out);
    }
    /// Gives slots the fp16 copies that export_fp16() gave, after import_raw(): both together put slots back as they
    /// were. Errors: as there; capacity_exceeded; non_finite.
    status try_import_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                           std::span<const float16> in) noexcept {
        return core_->import_fp16(layer, slots, in);
    }

    /// The bytes of one KV head's page in a block, as layout() describes them, valid until the store changes; zeros for a
    /// page that was never written to. Errors: out_of_range.
    [[nodiscard]] result<std::span<const std::byte>> try_page(std::size_t layer, std::size_t kv_head,
                                                              std::size_t block) const noexcept {
        return core_->page_bytes(layer, kv_head, block);
    }

    // ---- copy and clear

    /// Copies slots of a layer onto others with their fp16 copies, bit for bit, as if all were read before any is
    /// written. No destination comes twice. Whole pages in order, which no page of the other side is among, cost a
    /// memcpy; else a slot costs about as much as two of import_raw(). Errors: out_of_range, shape_mismatch,
    /// invalid_argument, capacity_exceeded, out_of_memory.
    status try_copy(std::size_t layer, std::span<const std::uint32_t> from,
                    std::span<const std::uint32_t> to) noexcept {
        return core_->copy(layer, from, to, false);
    }
    /// The same, but fp16 copies go along: sources keep their codes and lose their fp16 copies. No source comes twice.
    status try_move(std::size_t layer, std::span<const std::uint32_t> from,
                    std::span<const std::uint32_t> to) noexcept {
        return core_->copy(layer, from, to, true);
    }
    /// Makes slots of a layer those that were never written to. Errors: out_of_range.
    status try_clear(std::size_t layer, std::span<const std::uint32_t> slots) noexcept {
        return core_->clear(layer, slots);
    }
    /// Makes all slots of all layers those that were never written to. O(pages * layers); memory is not touched.
    void clear() noexcept { core_->clear(); }

#if KV1_EXCEPTIONS
    /// Encodes vectors into slots, over whatever they hold: keys [slots][kv_heads][key_dim], values
    /// [slots][kv_heads][value_dim], or nothing() for one of them. Throws kv1::error: out_of_range; shape_mismatch,
    /// invalid_argument; capacity_exceeded for fp16 copies; non_finite, not_representable; out_of_memory.
    template <executor E = inline_executor>
    void write(std::size_t layer, std::span<const std::uint32_t> slots, tensor_view keys, tensor_view values,
               E&& run = {}) {
        detail::throw_if_error(try_write(layer, slots, keys, values, run));
    }
    /// The same with the positions that RoPE has turned the keys by. Throws kv1::error: as above.
    template <executor E = inline_executor>
    void write(std::size_t layer, std::span<const std::uint32_t> slots,
               std::span<const std::int32_t> positions, tensor_view keys, tensor_view values, E&& run = {}) {
        detail::throw_if_error(try_write(layer, slots, positions, keys, values, run));
    }
    /// The same as a plan. Throws kv1::error: as write().
    [[nodiscard]] work_plan plan_write(std::size_t layer, std::span<const std::uint32_t> slots,
                                       tensor_view keys, tensor_view values) {
        return try_plan_write(layer, slots, keys, values).value();
    }
    /// With positions. Throws kv1::error: as write().
    [[nodiscard]] work_plan plan_write(std::size_t layer, std::span<const std::uint32_t> slots,
                                       std::span<const std::int32_t> positions, tensor_view keys,
                                       tensor_view values) {
        return try_plan_write(layer, slots, positions, keys, values).value();
    }
    /// Attention of queries [queries][query_heads][key_dim] to the slots of their streams, to outputs
    /// [queries][query_heads][value_dim]. Throws kv1::error: out_of_range, shape_mismatch, invalid_argument, the token
    /// being a stream's first query; out_of_memory.
    template <executor E = inline_executor>
    void attend(std::size_t layer, std::span<const slot_stream> streams, tensor_view queries,
                mutable_tensor_view outputs, const slot_attention_options& options = {}, E&& run = {}) const {
        detail::throw_if_error(try_attend(layer, streams, queries, outputs, options, run));
    }
    /// The same as a plan. Throws kv1::error: as attend().
    [[nodiscard]] work_plan plan_attention(std::size_t layer, std::span<const slot_stream> streams,
                                           tensor_view queries, mutable_tensor_view outputs,
                                           const slot_attention_options& options = {}) const {
        return try_plan_attention(layer, streams, queries, outputs, options).value();
    }
    /// Ends a step for these sequences: their slots lose their fp16 copies in all layers, but for positions below
    /// fp16_sinks and the newest fp16_window - 1. Throws kv1::error: out_of_range, invalid_argument, shape_mismatch,
    /// out_of_memory.
    void settle(std::span<const slot_sequence> sequences) { detail::throw_if_error(try_settle(sequences)); }
    /// Takes the fp16 copies of these slots away, in all layers. Throws kv1::error: out_of_range.
    void release_fp16(std::span<const std::uint32_t> slots) {
        detail::throw_if_error(try_release_fp16(slots));
    }
    /// Decodes keys or values of one KV head to out [slots][channels]. Throws kv1::error: out_of_range, shape_mismatch.
    void read(std::size_t layer, kv_side side, std::size_t kv_head, std::span<const std::uint32_t> slots,
              std::span<float> out) const {
        detail::throw_if_error(try_read(layer, side, kv_head, slots, out));
    }
    /// Copies the codes of slots out, [slots][raw_bytes()]. Throws kv1::error: out_of_range, shape_mismatch.
    void export_raw(std::size_t layer, std::span<const std::uint32_t> slots, std::span<std::byte> out) const {
        detail::throw_if_error(try_export_raw(layer, slots, out));
    }
    /// Stores what export_raw() gave, bit for bit; the slots lose their fp16 copies. Throws kv1::error: out_of_range,
    /// invalid_argument, shape_mismatch, non_finite.
    void import_raw(std::size_t layer, std::span<const std::uint32_t> slots, std::span<const std::byte> in) {
        detail::throw_if_error(try_import_raw(layer, slots, in));
    }
    /// Copies the fp16 copies of slots out, [slots][fp16_numbers()]. Throws kv1::error: out_of_range, shape_mismatch,
    /// invalid_argument.
    void export_fp16(std::size_t layer, std::span<const std::uint32_t> slots, std::span<float16> out) const {
        detail::throw_if_error(try_export_fp16(layer, slots, out));
    }
    /// Gives slots the fp16 copies that export_fp16() gave. Throws kv1::error: out_of_range, shape_mismatch,
    /// invalid_argument, capacity_exceeded, non_finite.
    void import_fp16(std::size_t layer, std::span<const std::uint32_t> slots, std::span<const float16> in) {
        detail::throw_if_error(try_import_fp16(layer, slots, in));
    }
    /// The bytes of one KV head's page in a block, as layout() describes them. Throws kv1::error: out_of_range.
    [[nodiscard]] std::span<const std::byte> page(std::size_t layer, std::size_t kv_head,
                                                  std::size_t block) const {
        return try_page(layer, kv_head, block).value();
    }
    /// Copies slots of a layer onto others with their fp16 copies. Throws kv1::error: out_of_range, shape_mismatch,
    /// invalid_argument, capacity_exceeded, out_of_memory.
    void copy(std::size_t layer, std::span<const std::uint32_t> from, std::span<const std::uint32_t> to) {
        detail::throw_if_error(try_copy(layer, from, to));
    }
    /// The same, but sources lose their fp16 copies. Throws kv1::error: as copy().
    void move(std::size_t layer, std::span<const std::uint32_t> from, std::span<const std::uint32_t> to) {
        detail::throw_if_error(try_move(layer, from, to));
    }
    /// Makes slots of a layer those that were never written to. Throws kv1::error: out_of_range.
    void clear(std::size_t layer, std::span<const std::uint32_t> slots) {
        detail::throw_if_error(try_clear(layer, slots));
    }
#endif

private:
    explicit basic_slot_store(std::unique_ptr<detail::any_slots> core) noexcept : core_(std::move(core)) {}

    static result<work_plan> planned(result<std::unique_ptr<detail::planned_work>>&& work) noexcept {
        if (!work)
            return work.reason();
        return work_plan(std::move(*work));
    }

    std::unique_ptr<detail::any_slots> core_;
};

/// A store for any mix of formats.
using slot_store = basic_slot_store<>;

} // namespace kv1::inline KV1_ABI
