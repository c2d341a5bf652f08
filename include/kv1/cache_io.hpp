// SPDX-License-Identifier: Apache-2.0
//
// Saves sequences and the prefix index to any sink of bytes, and loads them. Swapping moves one sequence to
// the caller's memory and back. cache_file.hpp adds files.
//
//   std::vector<std::byte> memory(saved_bytes(cache, {&id, 1}));
//   kv1::swap_out(cache, id, memory);        // the sequence is gone from the cache
//   id = kv1::swap_in(cache, memory);        // and back, bit for bit, under another handle
//
// What is saved describes itself. All numbers little-endian:
//
//   fixed part    96 bytes: "KV1CACHE", version of this form, of the library and of the page layout, tokens a
//                 page, number of layers, groups, sequences and prefix nodes, bytes of tables and of pages,
//                 the model's fingerprint, checksum
//   tables        fp16 sinks and window; each layer's heads, head dims, formats, code bits, quantized axis,
//                 metadata, rotation, checksum of means, groups of channels, values in keys, window and
//                 retention; each block group's number of pages; each sequence's length, position base,
//                 commit point, dropped pages and page numbers; each prefix node's parent, or salt, tokens and
//                 page numbers; checksum
//   pages         by group, page and layer: the bytes of layout.hpp, slots without a token zero; checksum
//
// A page that saved sequences and prefixes share is saved once, and shared again after loading. Checksums are
// CRC-32C.
//
// Which cache can load it. The loading cache has as many layers, and the same page_tokens, fp16 sinks and
// window. Each layer has the same KV heads, head dims, sliding window and retention, formats, groups, axis of
// keys, rotation and means. Else a load fails with different_cache. Capacity, error weights, target, threads
// and the template's arguments may differ. Means and error weights are not in the file: keep them with the
// model.
//
// Models. A description says what a cache looks like, not whose numbers it holds: two models of one shape
// have equal descriptions. A fingerprint (model_fingerprint.hpp) in save_options is stored, and a load
// succeeds only with the same one in load_options. No fingerprint counts as one of its own: what was saved
// with one is not loaded without, and what was saved without is not loaded with one.
//
// Prefixes. save_options::prefixes adds the whole prefix index: tokens, salts, pages, and the order of use. A
// load adds the nodes that the cache's index lacks, as more recently used than all it had; nodes that it has
// keep their pages. Pins are not saved: call pin() again after loading.
//
// Checks. A load checks everything before it changes the cache: shape and formats against the cache, every
// number against the others and against the bytes that are there, checksums, and that stored numbers are
// finite. If the source can be rewound, all checksums are tested first; else those of pages are tested as
// they are read. A failed load leaves the cache as it was, but for prefixes that were evicted to make room. A
// load reads up to the last saved byte and no further, so a stream may hold more. A file may not.
//
// Threads. Saving reads its sequences, and the prefix index as it is when the call begins. Loading and
// swapping in count as creating sequences, swapping out as destroying one.
#pragma once

#include <kv1/byte_stream.hpp>
#include <kv1/detail/cache_loading.hpp>
#include <kv1/detail/cache_saving.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/model_fingerprint.hpp>

#include <cstddef>
#include <span>

namespace kv1::inline KV1_ABI {

namespace detail {
// Access to what basic_kv_cache does not show.
struct cache_access {
    template <class F, class A>
    static const cache_state& state(const basic_kv_cache<F, A>& cache) noexcept {
        return cache.core_->state();
    }
    template <class F, class A>
    static cache_state& state(basic_kv_cache<F, A>& cache) noexcept {
        return cache.core_->state();
    }
};
} // namespace detail

/// What a save stores beside sequences.
struct save_options {
    model_fingerprint model = {}; ///< the model whose keys and values are saved
    bool prefixes = false;        ///< whether the prefix index is saved
};
/// What a load expects.
struct load_options {
    model_fingerprint model = {}; ///< as in save_options when it was saved
};

/// The number of bytes that try_save() writes for these sequences. O(pages). Errors: invalid_sequence,
/// layers_disagree, out_of_memory.
template <class F, class A>
[[nodiscard]] result<std::size_t> try_saved_bytes(const basic_kv_cache<F, A>& cache,
                                                  std::span<const sequence_id> ids,
                                                  const save_options& options = {}) noexcept {
    detail::cache_saving s(detail::cache_access::state(cache), ids);
    if (const status collected = s.collect(options.model, options.prefixes); !collected)
        return collected;
    return s.bytes();
}

/// Saves sequences to a sink, in this order. `ids` may be empty, to save prefixes alone. The same sequences
/// give the same bytes. O(bytes). Errors: invalid_sequence, layers_disagree, out_of_memory; io_error if the
/// sink refuses bytes.
template <class F, class A, byte_sink S>
status try_save(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids, S&& sink,
                const save_options& options = {}) noexcept {
    detail::cache_saving s(detail::cache_access::state(cache), ids);
    if (const status collected = s.collect(options.model, options.prefixes); !collected)
        return collected;
    return s.write(sink);
}

/// Loads sequences and prefixes into the cache, beside what it holds. Writes the handles of the sequences to
/// `out`, in the order of saving, and gives their number. O(bytes). Errors: bad_format, unsupported_version,
/// checksum_mismatch, truncated, different_model; different_cache, naming the layer; shape_mismatch if `out`
/// is too small; capacity_exceeded, out_of_memory, non_finite, io_error.
template <class F, class A, byte_source S>
result<std::size_t> try_load(basic_kv_cache<F, A>& cache, S&& source, std::span<sequence_id> out,
                             const load_options& options = {}) noexcept {
    return detail::cache_loading(detail::cache_access::state(cache)).load(source, out, {options.model});
}

/// Saves one sequence to memory of at least try_saved_bytes() bytes, and destroys it. Pages that it shares
/// with others are saved too. Errors: invalid_sequence, layers_disagree, out_of_memory; shape_mismatch if the
/// memory is too small.
template <class F, class A>
status try_swap_out(basic_kv_cache<F, A>& cache, sequence_id id, std::span<std::byte> memory) noexcept {
    const result<std::size_t> bytes = try_saved_bytes(cache, {&id, 1});
    if (!bytes)
        return bytes.reason();
    if (*bytes > memory.size())
        return {errc::shape_mismatch, "the memory is smaller than the saved sequence"};
    if (const status s = try_save(cache, {&id, 1}, memory_sink(memory)); !s)
        return s;
    return cache.try_destroy_sequence(id);
}
/// Loads the sequence that try_swap_out() saved, and gives its new handle. Errors: those of try_load();
/// bad_format if the memory holds anything but one sequence.
template <class F, class A>
[[nodiscard]] result<sequence_id> try_swap_in(basic_kv_cache<F, A>& cache,
                                              std::span<const std::byte> memory) noexcept {
    sequence_id id;
    memory_source source(memory);
    const result<std::size_t> n =
        detail::cache_loading(detail::cache_access::state(cache)).load(source, {&id, 1}, {{}, true});
    if (!n)
        return n.reason();
    return id;
}

#if KV1_EXCEPTIONS
/// The number of bytes that save() writes for these sequences. O(pages). Throws kv1::error: invalid_sequence,
/// layers_disagree, out_of_memory.
template <class F, class A>
[[nodiscard]] std::size_t saved_bytes(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
                                      const save_options& options = {}) {
    return try_saved_bytes(cache, ids, options).value();
}
/// Saves sequences to a sink, in this order. Throws kv1::error: invalid_sequence; layers_disagree between
/// commit points; out_of_memory; io_error if the sink refuses bytes.
template <class F, class A, byte_sink S>
void save(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids, S&& sink,
          const save_options& options = {}) {
    detail::throw_if_error(try_save(cache, ids, sink, options));
}
/// Loads sequences and prefixes into the cache, beside what it holds. Writes the sequences' handles to `out`,
/// in the order of saving, and gives their number. If it throws, the cache is as it was, but for evicted
/// prefixes. Throws kv1::error: bad_format, unsupported_version, checksum_mismatch, truncated,
/// different_model, different_cache, shape_mismatch if `out` is too small, capacity_exceeded, out_of_memory,
/// non_finite, io_error.
template <class F, class A, byte_source S>
std::size_t load(basic_kv_cache<F, A>& cache, S&& source, std::span<sequence_id> out,
                 const load_options& options = {}) {
    return try_load(cache, source, out, options).value();
}
/// Saves one sequence to memory of at least saved_bytes() bytes, and destroys it. Throws kv1::error:
/// invalid_sequence, layers_disagree, out_of_memory; shape_mismatch if the memory is too small.
template <class F, class A>
void swap_out(basic_kv_cache<F, A>& cache, sequence_id id, std::span<std::byte> memory) {
    detail::throw_if_error(try_swap_out(cache, id, memory));
}
/// Loads the sequence that swap_out() saved, and gives its new handle. Throws kv1::error: as load();
/// bad_format if the memory holds anything but one sequence.
template <class F, class A>
[[nodiscard]] sequence_id swap_in(basic_kv_cache<F, A>& cache, std::span<const std::byte> memory) {
    return try_swap_in(cache, memory).value();
}
#endif

} // namespace kv1::inline KV1_ABI
