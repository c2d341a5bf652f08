// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/page.h.
#pragma once

#include <kv1/c/page.h>
#include <kv1/detail/c_api/cache.hpp>

#include <kv1/cache_views.hpp>
#include <kv1/layout.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace kv1::inline KV1_ABI::detail {

static_assert(static_cast<int>(kv_side::key) == KV1_KEYS && static_cast<int>(kv_side::value) == KV1_VALUES);
static_assert(sizeof(float16) == sizeof(std::uint16_t) && std::is_trivially_copyable_v<float16>);

// So many of one KV head's vectors of a layer, and what they take.
class c_vectors {
public:
    // Errors: invalid_argument, out_of_range.
    static result<c_vectors> of(const c_cache& cache, std::size_t layer, kv1_side side,
                                std::size_t count) noexcept {
        if (!c_within(side, KV1_VALUES))
            return status{errc::invalid_argument, "a side is an enumerator"};
        if (layer >= cache.layers())
            return status{errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}};
        const page_layout& page = cache.layout(layer);
        c_vectors v;
        v.section_ = side == KV1_VALUES ? &page.values() : &page.keys();
        v.count_ = count;
        if (count > SIZE_MAX / sizeof(float) / v.section_->channels)
            return status{errc::out_of_range, "the tokens are not all cached"};
        return v;
    }
    [[nodiscard]] std::size_t values() const noexcept { return count_ * section_->channels; }

    // Spans of the caller's pointers: as long as they have to be.
    template <class Buffers, class Rows>
    [[nodiscard]] Buffers buffers(const Rows& rows) const noexcept {
        const metadata_kind kind = section_->traits().metadata;
        const std::size_t metadata = count_ * section_->groups();
        return {bytes(rows.packed, count_ * packed_bytes(section_->format, section_->channels)),
                halves(rows.scales, kind != metadata_kind::none ? metadata : 0),
                halves(rows.minima, kind == metadata_kind::scale_and_minimum ? metadata : 0)};
    }
    // Whether what the format has is there.
    template <class Rows>
    [[nodiscard]] bool complete(const Rows& rows) const noexcept {
        const metadata_kind kind = section_->traits().metadata;
        return count_ == 0 ||
               (rows.packed != nullptr && (kind == metadata_kind::none || rows.scales != nullptr) &&
                (kind != metadata_kind::scale_and_minimum || rows.minima != nullptr));
    }

private:
    static std::span<std::byte> bytes(void* p, std::size_t n) noexcept {
        return {static_cast<std::byte*>(p), n};
    }
    static std::span<const std::byte> bytes(const void* p, std::size_t n) noexcept {
        return {static_cast<const std::byte*>(p), n};
    }
    static std::span<float16> halves(std::uint16_t* p, std::size_t n) noexcept {
        return {reinterpret_cast<float16*>(p), n};
    }
    static std::span<const float16> halves(const std::uint16_t* p, std::size_t n) noexcept {
        return {reinterpret_cast<const float16*>(p), n};
    }

    const section_layout* section_ = nullptr;
    std::size_t count_ = 0;
};

inline kv1_section c_section(const section_layout& s) noexcept {
    kv1_section out = {};
    out.format = static_cast<kv1_format>(s.format);
    out.axis = static_cast<kv1_axis>(s.axis);
    out.channels = s.channels;
    out.group_channels = s.group_channels;
    out.offset = s.offset;
    out.units = s.units();
    out.unit_lines = s.unit_lines();
    out.own_lines = s.own_lines();
    out.shared_lines = s.shared_lines();
    out.first_shared = s.first_shared();
    out.scale_offset = s.scale_offset;
    out.minimum_offset = s.minimum_offset;
    return out;
}

inline kv1_code c_give_bytes(const result<std::span<const std::byte>>& from, const void** begin, size_t* size,
                             kv1_error* error) noexcept {
    if (from) {
        *begin = from->data();
        *size = from->size();
    }
    return c_report(from.reason(), error);
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_read(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_side side, size_t kv_head,
                  size_t first, size_t count, float* out, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr || (out == nullptr && count != 0))
        return c_refuse_null(error);
    const auto vectors = c_vectors::of(cache->cache, layer, side, count);
    if (!vectors)
        return c_report(vectors.reason(), error);
    return c_report(cache->cache.try_read(c_sequence(sequence), layer, static_cast<kv1::kv_side>(side),
                                          kv_head, first, count, {out, vectors->values()}),
                    error);
}

kv1_code kv1_export_rows(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_side side,
                         size_t kv_head, size_t first, size_t count, kv1_rows out, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    const auto vectors = c_vectors::of(cache->cache, layer, side, count);
    if (!vectors)
        return c_report(vectors.reason(), error);
    if (!vectors->complete(out))
        return c_refuse_null(error);
    return c_report(cache->cache.try_export_rows(c_sequence(sequence), layer, static_cast<kv1::kv_side>(side),
                                                 kv_head, first, count,
                                                 vectors->buffers<kv1::row_buffers>(out)),
                    error);
}

kv1_code kv1_append_rows(kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t tokens,
                         kv1_const_rows keys, kv1_const_rows values, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    const auto& layers = cache->cache.description().layers;
    const std::size_t heads = layer < layers.size() ? layers[layer].kv_heads : 1;
    if (tokens > SIZE_MAX / heads)
        return c_report({kv1::errc::capacity_exceeded, "no cache has room for the tokens"}, error);
    const auto k = c_vectors::of(cache->cache, layer, KV1_KEYS, tokens * heads);
    const auto v = c_vectors::of(cache->cache, layer, KV1_VALUES, tokens * heads);
    if (!k || !v)
        return c_report(!k ? k.reason() : v.reason(), error);
    const bool keys_alone = cache->cache.layout(layer).values_in_keys();
    if (!k->complete(keys) || (!keys_alone && !v->complete(values)))
        return c_refuse_null(error);
    if (keys_alone && (values.packed != nullptr || values.scales != nullptr || values.minima != nullptr))
        return c_report({kv1::errc::invalid_argument,
                         "the values are part of the keys",
                         {.layer = static_cast<std::int64_t>(layer)}},
                        error);
    return c_report(cache->cache.try_append_rows(
                        c_sequence(sequence), layer, tokens, k->buffers<kv1::const_row_buffers>(keys),
                        keys_alone ? kv1::const_row_buffers{} : v->buffers<kv1::const_row_buffers>(values)),
                    error);
}

kv1_code kv1_cache_layout(const kv1_cache* cache, size_t layer, kv1_page_layout* layout, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, layout))
        return c_refuse_null(error);
    if (layer >= cache->cache.layers())
        return c_report(
            {kv1::errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}}, error);
    const kv1::page_layout& page = cache->cache.layout(layer);
    kv1_page_layout made = {};
    made.page_tokens = page.page_tokens();
    made.bytes = page.bytes();
    made.keys = c_section(page.keys());
    made.values = c_section(page.values());
    made.values_in_keys = page.values_in_keys() ? 1 : 0;
    return c_report(c_give(made, *layout), error);
}

kv1_code kv1_count_blocks(const kv1_cache* cache, const kv1_sequence* sequences, size_t count, size_t layer,
                          size_t* blocks, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, blocks))
        return c_refuse_null(error);
    c_sequences ids;
    if (const kv1::status s = ids.assign(sequences, count); !s)
        return c_report(s, error);
    const auto counted = cache->cache.try_count_blocks(ids.view(), layer);
    if (counted)
        *blocks = *counted;
    return c_report(counted.reason(), error);
}

kv1_code kv1_export_block_tables(const kv1_cache* cache, const kv1_sequence* sequences, size_t count,
                                 size_t layer, kv1_block_tables out, size_t* blocks, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, out.indptr) || (out.indices == nullptr && out.index_capacity != 0) ||
        (out.last_page_tokens == nullptr && count != 0))
        return c_refuse_null(error);
    c_sequences ids;
    if (const kv1::status s = ids.assign(sequences, count); !s)
        return c_report(s, error);
    const auto exported = cache->cache.try_export_block_tables(
        ids.view(), layer,
        {{out.indptr, count + 1}, {out.indices, out.index_capacity}, {out.last_page_tokens, count}});
    if (exported && blocks != nullptr)
        *blocks = *exported;
    return c_report(exported.reason(), error);
}

kv1_code kv1_page(const kv1_cache* cache, size_t layer, size_t kv_head, uint32_t block, const void** page,
                  size_t* bytes, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, page, bytes))
        return c_refuse_null(error);
    return c_give_bytes(cache->cache.try_page(layer, kv_head, block), page, bytes, error);
}

kv1_code kv1_open_keys(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t kv_head,
                       const void** keys, size_t* bytes, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, keys, bytes))
        return c_refuse_null(error);
    return c_give_bytes(cache->cache.try_open_keys(c_sequence(sequence), layer, kv_head), keys, bytes, error);
}

} // extern "C"
