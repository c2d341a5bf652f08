// SPDX-License-Identifier: Apache-2.0
//
// any_cache: a cache without its types, as basic_kv_cache holds it. make_cache() makes one.
//
// Where the kernels are compiled apart (KV1_EXTERNAL_KERNELS), so is the rest of the cache: any_cache is then
// an interface, whose only class kernels.hpp compiles, and the cache's parts are not even parsed. Else it is
// that class itself, of which a program compiles what it calls.
#pragma once

#include <kv1/attention.hpp>
#include <kv1/cache_description.hpp>
#include <kv1/cache_statistics.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/memory_source.hpp>
#include <kv1/executor.hpp>
#include <kv1/layout.hpp>
#include <kv1/prefix_index.hpp>
#include <kv1/sequence_id.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#if defined(KV1_EXTERNAL_KERNELS)

namespace kv1::inline KV1_ABI::detail {
class cache_state;
} // namespace kv1::inline KV1_ABI::detail

// In the namespace that all translation units share, as what they link with is (registry.hpp).
namespace kv1::KV1_KERNELS_ABI {

// The calls of a cache, which basic_kv_cache documents. cache_core implements them.
class any_cache {
public:
    any_cache() = default;
    any_cache(const any_cache&) = delete;
    any_cache& operator=(const any_cache&) = delete;
    virtual ~any_cache() = default;

    [[nodiscard]] virtual const cache_description& description() const noexcept = 0;
    [[nodiscard]] virtual std::size_t layers() const noexcept = 0;
    [[nodiscard]] virtual const page_layout& layout(std::size_t layer) const noexcept = 0;
    virtual status grow(std::size_t capacity_tokens) noexcept = 0;

    // ---- sequences
    [[nodiscard]] virtual result<sequence_id> create_sequence() noexcept = 0;
    virtual status destroy_sequence(sequence_id id) noexcept = 0;
    [[nodiscard]] virtual bool contains(sequence_id id) const noexcept = 0;
    [[nodiscard]] virtual result<std::size_t> length(sequence_id id, std::size_t layer) const noexcept = 0;
    [[nodiscard]] virtual result<std::size_t> length(sequence_id id) const noexcept = 0;
    [[nodiscard]] virtual result<sequence_id> fork(sequence_id id) noexcept = 0;
    virtual status truncate(sequence_id id, std::size_t tokens) noexcept = 0;
    virtual status drop_pages(sequence_id id, std::size_t first_page, std::size_t pages) noexcept = 0;
    virtual result<std::size_t> commit(sequence_id id) noexcept = 0;
    virtual status rollback(sequence_id id) noexcept = 0;

    // ---- append
    virtual status append(sequence_id id, std::size_t layer, tensor_view keys, tensor_view values,
                          detail::executor_view run) noexcept = 0;
    virtual status append(std::span<const sequence_id> ids, std::size_t layer,
                          std::span<const std::size_t> indptr, tensor_view keys, tensor_view values,
                          detail::executor_view run) noexcept = 0;
    virtual status append_rows(sequence_id id, std::size_t layer, std::size_t tokens, const_row_buffers keys,
                               const_row_buffers values) noexcept = 0;

    // ---- attend
    virtual status attend(sequence_id id, std::size_t layer, tensor_view queries, mutable_tensor_view outputs,
                          const attention_options& options, detail::executor_view run) const noexcept = 0;
    virtual status attend(std::span<const sequence_id> ids, std::size_t layer,
                          std::span<const std::size_t> indptr, tensor_view queries,
                          mutable_tensor_view outputs, const attention_options& options,
                          detail::executor_view run) const noexcept = 0;

    // ---- rows and pages
    virtual status export_rows(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                               std::size_t first, std::size_t count, row_buffers out) const noexcept = 0;
    virtual status read(sequence_id id, std::size_t layer, kv_side side, std::size_t kv_head,
                        std::size_t first, std::size_t count, std::span<float> out) const noexcept = 0;
    [[nodiscard]] virtual result<std::size_t> count_blocks(std::span<const sequence_id> ids,
                                                           std::size_t layer) const noexcept = 0;
    virtual result<std::size_t> export_block_tables(std::span<const sequence_id> ids, std::size_t layer,
                                                    block_tables out) const noexcept = 0;
    [[nodiscard]] virtual result<std::span<const std::byte>> page(std::size_t layer, std::size_t kv_head,
                                                                  std::uint32_t block) const noexcept = 0;
    [[nodiscard]] virtual result<std::span<const std::byte>>
    open_keys(sequence_id id, std::size_t layer, std::size_t kv_head) const noexcept = 0;

    // ---- prefixes
    virtual result<std::size_t> store_prefix(sequence_id id, std::span<const token_id> tokens,
                                             prefix_salt salt, bool partial) noexcept = 0;
    [[nodiscard]] virtual result<prefix_match> create_from_prefix(std::span<const token_id> tokens,
                                                                  prefix_salt salt) noexcept = 0;
    [[nodiscard]] virtual prefix_index& prefixes() noexcept = 0;
    [[nodiscard]] virtual const prefix_index& prefixes() const noexcept = 0;

    // ---- statistics
    [[nodiscard]] virtual cache_statistics statistics() const noexcept = 0;
    [[nodiscard]] virtual result<cache_statistics> statistics(sequence_id id) const noexcept = 0;
    [[nodiscard]] virtual std::size_t available_pages() const noexcept = 0;
    [[nodiscard]] virtual status validate() const noexcept = 0;

    // ---- for those who save and load
    [[nodiscard]] virtual detail::cache_state& state() noexcept = 0;
    [[nodiscard]] virtual const detail::cache_state& state() const noexcept = 0;
};

template <class = void>
struct external_caches {
    // Of a detail::cache_request.
    static void make(void* request) noexcept;
};
extern template struct external_caches<>;

} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI::detail {

using KV1_KERNELS_ABI::any_cache;

// What make_cache() asks external_caches for, and what comes back.
struct cache_request {
    cache_description* description; // moved from
    std::unique_ptr<memory_source> memory;
    std::uint32_t formats;             // that the cache may use: a format_mask
    std::unique_ptr<any_cache> made{}; // where there is none: why
    status failure{};
};

template <class Formats>
[[nodiscard]] result<std::unique_ptr<any_cache>> make_cache(cache_description&& description,
                                                            std::unique_ptr<memory_source> memory) noexcept {
    cache_request r{&description, std::move(memory), format_mask<Formats>()};
    KV1_KERNELS_ABI::external_caches<>::make(&r);
    if (r.made == nullptr)
        return r.failure;
    return std::move(r.made);
}

} // namespace kv1::inline KV1_ABI::detail

#else

#include <kv1/detail/cache_core.hpp>

namespace kv1::inline KV1_ABI::detail {

using any_cache = cache_core;

template <class Formats>
[[nodiscard]] result<std::unique_ptr<any_cache>> make_cache(cache_description&& description,
                                                            std::unique_ptr<memory_source> memory) noexcept {
    return cache_core::create(std::move(description), std::move(memory), kernel_set::of<Formats>());
}

} // namespace kv1::inline KV1_ABI::detail

#endif
