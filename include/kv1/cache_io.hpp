// SPDX-License-Identifier: Apache-2.0
//
// Saving and loading sequences, and the prefix index: to any sink of bytes, and to caller memory (swapping).
// cache_file.hpp adds files.
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
//                 metadata, rotation, checksum of means, groups of channels, values in keys, window and what is
//                 kept behind it; each page group's number of pages; each sequence's length, position base,
//                 commit point, dropped pages and page numbers; each prefix node's parent, or salt, tokens and
//                 page numbers; checksum
//   pages         by group, page and layer: the bytes of layout.hpp, slots without a token zero; checksum
//
// Pages that saved sequences and prefixes share are saved once, and shared again after loading. Checksums are
// CRC-32C.
//
// Models. The description says what a cache looks like, not whose numbers it holds, and two models of one
// shape have equal descriptions. Who gives a fingerprint (model_fingerprint.hpp) has it stored, and loads
// only what was saved with the same one. Naming none is a name as others: what was saved with a fingerprint
// is not loaded by who gives none, nor the other way round.
//
// Prefixes. save_options::prefixes adds the whole prefix index: tokens, salts, pages, and the order of use. A
// load adds what the cache's index does not know yet, as used after all it knew; known nodes keep their
// pages. Pins belong to who holds them and are not saved: pin() again after loading.
//
// Loading checks before it changes anything: shape and formats against the cache, every number against the
// others and the bytes that are there, checksums (all of them beforehand where the source can be rewound,
// else those of the pages while they are read), and that stored numbers are finite. A failed load leaves the
// cache as it was, but for prefixes that were evicted to make room. It reads up to the end of what was saved
// and no byte further, so that a stream may hold more; files may not.
//
// Threads: saving reads its sequences, and the prefix index as it is when it begins; loading and swapping in
// are like creating sequences, swapping out like destroying one.
#pragma once

#include <kv1/detail/cache_loading.hpp>
#include <kv1/detail/cache_saving.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/model_fingerprint.hpp>

#include <concepts>
#include <cstddef>
#include <cstring>
#include <span>

namespace kv1::inline KV1_ABI {

/// sink(bytes): takes them all, or says false. Does not throw.
template <class S>
concept byte_sink = requires(S& sink, std::span<const std::byte> bytes) {
    { sink(bytes) } -> std::convertible_to<bool>;
};
/// source(bytes): fills them all, or says false. Does not throw. source.rewind(), where there is one, goes
/// back to where reading began, or says false. source.at_end(), where there is one, says whether no byte is
/// left; bytes after the end are then refused.
template <class S>
concept byte_source = requires(S& source, std::span<std::byte> bytes) {
    { source(bytes) } -> std::convertible_to<bool>;
};

/// Caller memory as a source.
class memory_source {
public:
    /// The bytes are read while the source is used.
    explicit memory_source(std::span<const std::byte> bytes) noexcept : all_(bytes), left_(bytes) {}
    /// The next bytes; false, and none, where fewer are left.
    bool operator()(std::span<std::byte> out) noexcept {
        if (out.size() > left_.size())
            return false;
        if (!out.empty())
            std::memcpy(out.data(), left_.data(), out.size());
        left_ = left_.subspan(out.size());
        return true;
    }
    /// Back to the first byte.
    bool rewind() noexcept {
        left_ = all_;
        return true;
    }

private:
    std::span<const std::byte> all_, left_;
};

/// Caller memory as a sink; one that is too small refuses.
class memory_sink {
public:
    /// The bytes are written while the sink is used.
    explicit memory_sink(std::span<std::byte> bytes) noexcept : left_(bytes) {}
    /// Takes bytes; false, and none, where there is no room.
    bool operator()(std::span<const std::byte> in) noexcept {
        if (in.size() > left_.size())
            return false;
        if (!in.empty())
            std::memcpy(left_.data(), in.data(), in.size());
        left_ = left_.subspan(in.size());
        return true;
    }

private:
    std::span<std::byte> left_;
};

namespace detail {
// What basic_kv_cache keeps to itself.
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
    model_fingerprint model = {}; ///< whose keys and values they are
    bool prefixes = false;        ///< the prefix index too
};
/// What a load expects.
struct load_options {
    model_fingerprint model = {}; ///< the one that was given when it was saved
};

/// Bytes that saving these sequences takes. O(pages). Errors: invalid_sequence, layers_disagree,
/// out_of_memory.
template <class F, class A>
[[nodiscard]] result<std::size_t> try_saved_bytes(const basic_kv_cache<F, A>& cache,
                                                  std::span<const sequence_id> ids,
                                                  const save_options& options = {}) noexcept {
    detail::cache_saving s(detail::cache_access::state(cache), ids);
    if (const status collected = s.collect(options.model, options.prefixes); !collected)
        return collected;
    return s.bytes();
}

/// Saves sequences, in this order; none of them, where only prefixes are wanted. The same sequences give the
/// same bytes. O(bytes). Errors: invalid_sequence, layers_disagree, out_of_memory, io_error (the sink
/// refused).
template <class F, class A, byte_sink S>
status try_save(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids, S&& sink,
                const save_options& options = {}) noexcept {
    detail::cache_saving s(detail::cache_access::state(cache), ids);
    if (const status collected = s.collect(options.model, options.prefixes); !collected)
        return collected;
    return s.write(sink);
}

/// Loads what was saved, beside what the cache holds: handles in the order of saving, and how many. O(bytes).
/// Errors: bad_format, unsupported_version, checksum_mismatch, truncated, different_model, different_cache
/// (naming the layer), shape_mismatch (too few handles), capacity_exceeded, out_of_memory, non_finite,
/// io_error.
template <class F, class A, byte_source S>
result<std::size_t> try_load(basic_kv_cache<F, A>& cache, S&& source, std::span<sequence_id> out,
                             const load_options& options = {}) noexcept {
    return detail::cache_loading(detail::cache_access::state(cache)).load(source, out, {options.model});
}

/// Saves one sequence to memory of at least saved_bytes() and destroys it; pages it shared are saved as its
/// own. Errors: as save, shape_mismatch where the memory does not suffice.
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
/// Loads one sequence from memory. Errors: as load; bad_format where that is not what the memory holds.
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
/// As the try_ forms; throw kv1::error.
/// @{
template <class F, class A>
[[nodiscard]] std::size_t saved_bytes(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
                                      const save_options& options = {}) {
    return try_saved_bytes(cache, ids, options).value();
}
template <class F, class A, byte_sink S>
void save(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids, S&& sink,
          const save_options& options = {}) {
    detail::throw_if_error(try_save(cache, ids, sink, options));
}
template <class F, class A, byte_source S>
std::size_t load(basic_kv_cache<F, A>& cache, S&& source, std::span<sequence_id> out,
                 const load_options& options = {}) {
    return try_load(cache, source, out, options).value();
}
template <class F, class A>
void swap_out(basic_kv_cache<F, A>& cache, sequence_id id, std::span<std::byte> memory) {
    detail::throw_if_error(try_swap_out(cache, id, memory));
}
template <class F, class A>
[[nodiscard]] sequence_id swap_in(basic_kv_cache<F, A>& cache, std::span<const std::byte> memory) {
    return try_swap_in(cache, memory).value();
}
/// @}
#endif

} // namespace kv1::inline KV1_ABI
