// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/cache.h.
#pragma once

#include <kv1/c/cache.h>
#include <kv1/detail/c_api/support.hpp>

#include <kv1/cache_policy.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace kv1::inline KV1_ABI::detail {

// Formats have equal numbers on both sides; a test compares all their names with those in C.
static_assert(static_cast<int>(kv_format::fp32) == KV1_PLAIN_FP32 &&
              static_cast<int>(kv_format::affine2) == KV1_AFFINE2);
inline constexpr int c_last_format = static_cast<int>(all_kv_formats.back());
static_assert(static_cast<int>(level_choice::min_max) == KV1_LEVELS_MIN_MAX &&
              static_cast<int>(level_choice::least_squares) == KV1_LEVELS_LEAST_SQUARES &&
              static_cast<int>(level_choice::clip_search) == KV1_LEVELS_CLIP_SEARCH);
static_assert(static_cast<int>(quantization_axis::per_token) == KV1_PER_TOKEN &&
              static_cast<int>(quantization_axis::per_channel) == KV1_PER_CHANNEL);

// The caller's memory, or operator new's.
template <class T>
class c_allocator {
public:
    using value_type = T;

    explicit c_allocator(const kv1_memory& lent) noexcept : lent_(lent) {}
    template <class U>
    c_allocator(const c_allocator<U>& other) noexcept : lent_(other.lent()) {}

    T* allocate(std::size_t n) {
        void* p = lent_.allocate != nullptr
                      ? lent_.allocate(lent_.context, n * sizeof(T), alignof(T))
                      : ::operator new (n * sizeof(T), std::align_val_t{alignof(T)}, std::nothrow);
        if (p != nullptr && reinterpret_cast<std::uintptr_t>(p) % alignof(T) != 0) {
            deallocate(static_cast<T*>(p), n);
            p = nullptr;
        }
        if (p == nullptr)
            throw std::bad_alloc();
        return static_cast<T*>(p);
    }
    void deallocate(T* p, std::size_t n) noexcept {
        if (lent_.allocate != nullptr)
            lent_.release(lent_.context, p, n * sizeof(T), alignof(T));
        else
            ::operator delete (p, std::align_val_t{alignof(T)});
    }
    [[nodiscard]] const kv1_memory& lent() const noexcept { return lent_; }

private:
    kv1_memory lent_;
};

using c_cache = basic_kv_cache<all_formats, c_allocator<std::byte>>;

inline sequence_id c_sequence(kv1_sequence s) noexcept { return {s.slot, s.generation}; }
inline kv1_sequence c_sequence(sequence_id s) noexcept { return {s.slot, s.generation}; }

class c_sequences : public c_array<sequence_id> {
public:
    // Errors: invalid_argument, out_of_memory.
    status assign(const kv1_sequence* sequences, std::size_t count) noexcept {
        if (sequences == nullptr && count != 0)
            return {errc::invalid_argument, "a pointer is null"};
        return c_array::assign(sequences, count, [](kv1_sequence s) { return c_sequence(s); });
    }
};

template <>
inline constexpr std::size_t c_first_size<kv1_encoding> = offsetof(kv1_encoding, basis);
template <>
inline constexpr std::size_t c_first_size<kv1_layer> = offsetof(kv1_layer, rotary);
template <>
inline constexpr std::size_t c_first_size<kv1_cache_options> = offsetof(kv1_cache_options, first_position);

// May throw std::bad_alloc.
inline status c_take_rotary(const kv1_rotary* given, std::size_t dim, rotary_embedding& out) {
    if (given == nullptr)
        return {};
    kv1_rotary r;
    if (const status s = c_take(*given, r); !s)
        return s;
    if (!c_within(r.pairs, KV1_ROTARY_INTERLEAVED))
        return {errc::invalid_argument, "rotary pairs are an enumerator"};
    if (r.pair_count > dim / 2 || (r.pair_count != 0 && r.frequencies == nullptr))
        return {errc::invalid_argument, "there is a rotary frequency for each pair of channels that turn"};
    out.frequencies.assign(r.frequencies, r.frequencies + r.pair_count);
    out.pairs = static_cast<rotary_pairs>(r.pairs);
    out.first_channel = r.first_channel;
    return {};
}

// Of vectors of `dim` channels; may throw std::bad_alloc.
inline status c_take_encoding(const kv1_encoding* given, std::size_t heads, std::size_t dim,
                              vector_encoding& out) {
    kv1_encoding e;
    if (const status s = c_take(given, e); !s)
        return s;
    if (!c_within(e.levels, KV1_LEVELS_CLIP_SEARCH))
        return {errc::invalid_argument, "a choice of levels is an enumerator"};
    out.levels = static_cast<level_choice>(e.levels);
    out.hadamard = e.hadamard;
    if (dim > max_vector_length || heads > SIZE_MAX / sizeof(float) / (max_vector_length * max_vector_length))
        return {}; // no cache has such a layer, and no caller such arrays
    if (e.means != nullptr)
        out.means.assign(e.means, e.means + heads * dim);
    if (e.error_weights != nullptr)
        out.error_weights.assign(e.error_weights, e.error_weights + heads * dim * dim);
    if (e.basis != nullptr)
        out.basis.assign(e.basis, e.basis + heads * dim * dim);
    return {};
}

// May throw std::bad_alloc.
inline status c_take_layer(const kv1_layer& given, layer_description& out) {
    kv1_layer l;
    if (const status s = c_take(given, l); !s)
        return s;
    if (!c_within(l.key_format, c_last_format) || !c_within(l.value_format, c_last_format))
        return {errc::unsupported_format, "a format is an enumerator"};
    if (!c_within(l.key_axis, KV1_PER_CHANNEL))
        return {errc::invalid_argument, "an axis is an enumerator"};
    out.kv_heads = l.kv_heads;
    out.key_dim = l.key_dim;
    out.value_dim = l.value_dim;
    out.key_format = static_cast<kv_format>(l.key_format);
    out.value_format = static_cast<kv_format>(l.value_format);
    out.sliding_window = l.sliding_window;
    out.window_retention = l.window_retention;
    out.key_group = l.key_group;
    out.value_group = l.value_group;
    out.key_axis = static_cast<quantization_axis>(l.key_axis);
    out.values_in_keys = l.values_in_keys != 0;
    if (const status s = c_take_rotary(l.rotary, l.key_dim, out.rotary); !s)
        return s;
    if (const status s = c_take_encoding(l.key_encoding, l.kv_heads, l.key_dim, out.key_encoding); !s)
        return s;
    return c_take_encoding(l.value_encoding, l.kv_heads, l.value_dim, out.value_encoding);
}

// May throw std::bad_alloc.
inline status c_take_layers(const kv1_cache_options& o, std::vector<layer_description>& out) {
    if (o.layers == nullptr)
        return {errc::invalid_argument, "a pointer is null"};
    if (o.distinct_layers == 0 || o.layer_count == 0 || o.layer_count % o.distinct_layers != 0)
        return {errc::invalid_argument, "the distinct layers divide the layers"};
    const std::size_t stride = o.layers->struct_size;
    if (stride % alignof(kv1_layer) != 0)
        return {errc::invalid_argument, "struct_size is the size of the structure"};
    const auto* const first = reinterpret_cast<const unsigned char*>(o.layers);
    out.resize(o.layer_count);
    for (std::size_t i = 0; i < o.layer_count; ++i) {
        if (i >= o.distinct_layers) {
            out[i] = out[i - o.distinct_layers];
            continue;
        }
        const auto& given = *reinterpret_cast<const kv1_layer*>(first + i * stride);
        const status s = given.struct_size == stride
                             ? c_take_layer(given, out[i])
                             : status{errc::invalid_argument, "layers have one struct_size"};
        if (!s)
            return {s.code(), s.rule(), {.layer = static_cast<std::int64_t>(i)}};
    }
    return {};
}

struct c_description {
    cache_description description;
    kv1_memory memory{};
};

inline status c_take_options(const kv1_cache_options& given, c_description& out) noexcept {
    kv1_cache_options o;
    if (const status s = c_take(given, o); !s)
        return s;
    if (o.memory != nullptr) {
        if (c_any_null(o.memory->allocate, o.memory->release))
            return {errc::invalid_argument, "memory has both functions"};
        out.memory = *o.memory;
    }
    cache_description& d = out.description;
    d.capacity_tokens = o.capacity_tokens;
    d.page_tokens = o.page_tokens != 0 ? o.page_tokens : d.page_tokens;
    d.fp16_sinks = o.fp16_sinks;
    d.fp16_window = o.fp16_window;
    d.window_capacity_tokens = o.window_capacity_tokens;
    d.fp16_capacity_tokens = o.fp16_capacity_tokens;
    d.huge_pages = o.huge_pages != 0;
    d.prefix_events = o.prefix_events;
    d.first_position = o.first_position;
    status taken;
    const status had_memory = guarded([&] { taken = c_take_layers(o, d.layers); });
    return had_memory ? taken : had_memory;
}

// The cache of a policy. What it takes from a calibration are the parts of the options' encodings.
inline status c_take_policy(const char* text, const kv1_cache_options& options, c_description& out) noexcept {
    result<cache_policy> policy = try_parse_policy(text);
    if (!policy)
        return policy.reason();
    c_description given; // whose parts are read while out's are written
    if (const status s = c_take_options(options, given); !s)
        return s;
    if (const status s = c_take_options(options, out); !s)
        return s;
    buffer<layer_calibration> parts;
    if (!parts.resize(given.description.layers.size()))
        return c_no_memory();
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const vector_encoding &k = given.description.layers[i].key_encoding,
                              &v = given.description.layers[i].value_encoding;
        parts[i] = {k.means, v.means, k.error_weights, v.error_weights, k.basis, v.basis};
    }
    result<cache_description> described =
        try_describe_cache(*policy, std::move(out.description), parts.view());
    if (!described)
        return described.reason();
    out.description = std::move(*described);
    return {};
}

inline result<c_cache> c_make(c_description&& from) noexcept {
    return c_cache::create(std::move(from.description), c_allocator<std::byte>(from.memory));
}

inline status c_give_statistics(const cache_statistics& from, kv1_statistics& out) noexcept {
    kv1_statistics s = {};
    s.sequences = from.sequences;
    s.tokens = from.tokens;
    s.layers = from.layers;
    s.pages_in_use = from.pages_in_use;
    s.pages_total = from.pages_total;
    s.bytes_reserved = from.bytes_reserved;
    s.bytes_in_use = from.bytes_in_use;
    s.bytes_stored = from.bytes_stored;
    s.bytes_as_fp16 = from.bytes_as_fp16;
    s.bytes_fp16_copies = from.bytes_fp16_copies;
    s.bytes_retained = from.bytes_retained;
    s.bytes_unfilled = from.bytes_unfilled;
    s.bytes_shared = from.bytes_shared;
    s.pages_indexed = from.pages_indexed;
    return c_give(s, out);
}

} // namespace kv1::inline KV1_ABI::detail

/// The handle of kv1/kv1.h.
struct kv1_cache {
    kv1::detail::c_cache cache; ///< of any mix of formats
};

extern "C" {

const char* kv1_format_name(kv1_format format) {
    return kv1::detail::c_within(format, kv1::detail::c_last_format)
               ? to_string(static_cast<kv1::kv_format>(format)).data() // of literals, which end with a zero
               : "unknown";
}

size_t kv1_packed_bytes(kv1_format format, size_t channels) {
    return kv1::detail::c_within(format, kv1::detail::c_last_format)
               ? kv1::packed_bytes(static_cast<kv1::kv_format>(format), channels)
               : 0;
}

size_t kv1_row_bytes(kv1_format format, size_t channels, size_t group) {
    return kv1::detail::c_within(format, kv1::detail::c_last_format) && (group == 0 || channels % group == 0)
               ? kv1::row_bytes(static_cast<kv1::kv_format>(format), channels, group)
               : 0;
}

size_t kv1_rotation_width(size_t channels) { return kv1::rotation_width(channels); }

void kv1_rotary_frequencies(double theta, size_t channels, float* frequencies) {
    for (size_t j = 0; frequencies != nullptr && j < channels / 2; ++j)
        frequencies[j] = kv1::rotary_frequency(theta, channels, j);
}

kv1_code kv1_cache_create(const kv1_cache_options* options, kv1_cache** cache, kv1_error* error) {
    using namespace kv1::detail;
    if (cache != nullptr)
        *cache = nullptr;
    if (c_any_null(options, cache))
        return c_refuse_null(error);
    c_description d;
    if (const kv1::status s = c_take_options(*options, d); !s)
        return c_report(s, error);
    auto made = c_make(std::move(d));
    if (!made)
        return c_report(made.reason(), error);
    *cache = new (std::nothrow) kv1_cache{std::move(*made)};
    return c_report(*cache != nullptr ? kv1::status{} : c_no_memory(), error);
}

kv1_code kv1_cache_create_with_policy(const char* policy, const kv1_cache_options* options, kv1_cache** cache,
                                      kv1_error* error) {
    using namespace kv1::detail;
    if (cache != nullptr)
        *cache = nullptr;
    if (c_any_null(policy, options, cache))
        return c_refuse_null(error);
    c_description d;
    if (const kv1::status s = c_take_policy(policy, *options, d); !s)
        return c_report(s, error);
    auto made = c_make(std::move(d));
    if (!made)
        return c_report(made.reason(), error);
    *cache = new (std::nothrow) kv1_cache{std::move(*made)};
    return c_report(*cache != nullptr ? kv1::status{} : c_no_memory(), error);
}

void kv1_cache_destroy(kv1_cache* cache) { delete cache; }

// A cache of one page finds what is wrong with the options.
kv1_code kv1_capacity_for_bytes(const kv1_cache_options* options, size_t bytes, size_t* tokens,
                                kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(options, tokens))
        return c_refuse_null(error);
    c_description d;
    if (const kv1::status s = c_take_options(*options, d); !s)
        return c_report(s, error);
    kv1::cache_description& shape = d.description;
    shape.capacity_tokens = shape.page_tokens;
    shape.window_capacity_tokens = shape.fp16_capacity_tokens = 0;
    const auto made = c_make(std::move(d));
    if (made)
        *tokens = kv1::capacity_for_bytes(made->description(), bytes);
    return c_report(made.reason(), error);
}

kv1_code kv1_cache_grow(kv1_cache* cache, size_t capacity_tokens, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    return c_report(cache->cache.try_grow(capacity_tokens), error);
}

size_t kv1_cache_layers(const kv1_cache* cache) { return cache != nullptr ? cache->cache.layers() : 0; }

size_t kv1_cache_available_pages(const kv1_cache* cache) {
    return cache != nullptr ? cache->cache.available_pages() : 0;
}

kv1_code kv1_cache_validate(const kv1_cache* cache, kv1_error* error) {
    using namespace kv1::detail;
    return cache != nullptr ? c_report(cache->cache.try_validate(), error) : c_refuse_null(error);
}

kv1_code kv1_cache_statistics(const kv1_cache* cache, kv1_statistics* statistics, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, statistics))
        return c_refuse_null(error);
    return c_report(c_give_statistics(cache->cache.statistics(), *statistics), error);
}

kv1_code kv1_sequence_statistics(const kv1_cache* cache, kv1_sequence sequence, kv1_statistics* statistics,
                                 kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, statistics))
        return c_refuse_null(error);
    const auto s = cache->cache.try_statistics(c_sequence(sequence));
    return c_report(s ? c_give_statistics(*s, *statistics) : s.reason(), error);
}

} // extern "C"
