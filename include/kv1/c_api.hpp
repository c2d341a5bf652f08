// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/kv1.h. Not a header to include widely: one translation unit of the program includes it
// (or kv1_c is linked, which is just that). It translates, and decides nothing.
#pragma once

#include <kv1/kv1.h>

#include <kv1/detail/arena.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

/// The handle of kv1/kv1.h.
struct kv1_cache {
    kv1::kv_cache cache; ///< of any mix of formats
};

namespace kv1::inline KV1_ABI::detail {

static_assert(static_cast<int>(errc::ok) == KV1_OK &&
              static_cast<int>(errc::unsupported_target) == KV1_UNSUPPORTED_TARGET &&
              static_cast<int>(errc::layers_disagree) == KV1_LAYERS_DISAGREE &&
              static_cast<int>(errc::dropped_tokens) == KV1_DROPPED_TOKENS &&
              static_cast<int>(errc::nothing_committed) == KV1_NOTHING_COMMITTED);
static_assert(static_cast<int>(kv_format::fp32) == KV1_PLAIN_FP32 &&
              static_cast<int>(kv_format::affine2) == KV1_AFFINE2 &&
              static_cast<int>(kv_format::binary) == KV1_BINARY &&
              static_cast<int>(kv_format::compact4) == KV1_COMPACT4 &&
              static_cast<int>(kv1::all_kv_formats.back()) == KV1_CODEBOOK2);
static_assert(static_cast<int>(scalar_type::fp32) == KV1_FP32 &&
              static_cast<int>(scalar_type::bf16) == KV1_BF16);
static_assert(static_cast<int>(precision::fast) == KV1_FAST &&
              static_cast<int>(precision::exact) == KV1_EXACT);

inline kv1_code c_report(const status& s, kv1_error* error) noexcept {
    const auto code = static_cast<kv1_code>(s.code());
    if (!s && error != nullptr) {
        const error_location& at = s.where();
        *error = {code, s.rule(), at.layer, at.kv_head, at.token, at.channel};
    }
    return code;
}

inline kv1_code c_refuse_null(kv1_error* error) noexcept {
    return c_report({errc::invalid_argument, "a pointer is null"}, error);
}

inline sequence_id c_sequence(kv1_sequence s) noexcept { return {s.slot, s.generation}; }

// Values that are no enumerator reach C++ as such: they are looked at before they are cast.
template <class Enum>
bool c_within(Enum value, Enum last) noexcept {
    return static_cast<std::int64_t>(value) >= 0 &&
           static_cast<std::int64_t>(value) <= static_cast<std::int64_t>(last);
}

inline tensor_view c_view(const kv1_tensor& t) noexcept {
    switch (t.type) {
    case KV1_FP16:
        return {static_cast<const float16*>(t.data),
                t.tokens,
                t.heads,
                t.channels,
                t.token_stride,
                t.head_stride};
    case KV1_BF16:
        return {static_cast<const bfloat16*>(t.data),
                t.tokens,
                t.heads,
                t.channels,
                t.token_stride,
                t.head_stride};
    case KV1_FP32:
        break;
    }
    return {static_cast<const float*>(t.data), t.tokens, t.heads, t.channels, t.token_stride, t.head_stride};
}

inline mutable_tensor_view c_view(const kv1_output& t) noexcept {
    switch (t.type) {
    case KV1_FP16:
        return {static_cast<float16*>(t.data), t.tokens, t.heads, t.channels, t.token_stride, t.head_stride};
    case KV1_BF16:
        return {static_cast<bfloat16*>(t.data), t.tokens, t.heads, t.channels, t.token_stride, t.head_stride};
    case KV1_FP32:
        break;
    }
    return {static_cast<float*>(t.data), t.tokens, t.heads, t.channels, t.token_stride, t.head_stride};
}

struct c_executor {
    const kv1_executor* lent; // null: the calling thread

    void operator()(std::size_t count, task_view task) const {
        if (lent != nullptr && lent->run != nullptr)
            lent->run(
                lent->context, count,
                [](void* state, std::size_t i) { (*static_cast<const task_view*>(state))(i); }, &task);
        else
            inline_executor{}(count, task);
    }
};

inline status c_options(const kv1_attention& o, std::size_t tokens, std::size_t heads,
                        attention_options& out) noexcept {
    if (!c_within(o.mask, KV1_MASK_EXPLICIT) || !c_within(o.precision, KV1_EXACT))
        return {errc::invalid_argument, "mask and precision are enumerators"};
    if (o.scale != 0.0f)
        out.scale = o.scale;
    switch (o.mask) {
    case KV1_MASK_CAUSAL:
        break;
    case KV1_MASK_CAUSAL_FROM:
        out.mask = attention_mask::causal_from(o.first_position);
        break;
    case KV1_MASK_NONE:
        out.mask = attention_mask::none();
        break;
    case KV1_MASK_EXPLICIT:
        if (o.visible == nullptr || (tokens != 0 && o.mask_keys > SIZE_MAX / tokens))
            return {errc::invalid_argument, "an explicit mask has its table"};
        out.mask = attention_mask::explicit_for_last(o.mask_keys, {o.visible, tokens * o.mask_keys});
        break;
    }
    out.mode = static_cast<precision>(o.precision);
    if (o.log_sum_exp != nullptr)
        out.log_sum_exp = {o.log_sum_exp, tokens * heads};
    return {};
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

int kv1_version(void) { return KV1_VERSION; }

const char* kv1_code_name(kv1_code code) {
    return to_string(static_cast<kv1::errc>(code)).data(); // of literals, which end with a zero
}

size_t kv1_describe(const kv1_error* error, char* text, size_t size) {
    if (error == nullptr)
        return 0;
    try {
        const kv1::status s(static_cast<kv1::errc>(error->code), error->rule,
                            {error->layer, error->kv_head, error->token, error->channel});
        const std::string message = s.message();
        if (text != nullptr && size != 0) {
            const std::size_t n = (std::min)(message.size(), size - 1);
            std::memcpy(text, message.data(), n);
            text[n] = '\0';
        }
        return message.size();
    } catch (...) { // no memory for the message
        if (text != nullptr && size != 0)
            *text = '\0';
        return 0;
    }
}

const char* kv1_target(void) { return to_string(kv1::current_target()).data(); }

kv1_code kv1_set_target(const char* name) {
    const auto target = name != nullptr ? kv1::target_from_string(name) : std::nullopt;
    return target ? static_cast<kv1_code>(kv1::try_set_target(*target).code()) : KV1_UNSUPPORTED_TARGET;
}

kv1_code kv1_cache_create(const kv1_layer* layers, size_t distinct_layers, size_t layer_count,
                          size_t capacity_tokens, size_t page_tokens, kv1_cache** cache, kv1_error* error) {
    using kv1::errc, kv1::detail::c_report;
    if (cache == nullptr || layers == nullptr)
        return kv1::detail::c_refuse_null(error);
    *cache = nullptr;
    if (distinct_layers == 0 || layer_count % distinct_layers != 0)
        return c_report({errc::invalid_argument, "the distinct layers divide the layers"}, error);
    kv1::cache_description d;
    const kv1::status room = kv1::detail::guarded([&] { d.layers.reserve(layer_count); });
    if (!room)
        return c_report(room, error);
    for (std::size_t i = 0; i < layer_count; ++i) {
        const kv1_layer& l = layers[i % distinct_layers];
        if (!kv1::detail::c_within(l.key_format, KV1_CODEBOOK2) ||
            !kv1::detail::c_within(l.value_format, KV1_CODEBOOK2))
            return c_report({errc::unsupported_format,
                             "a format is an enumerator",
                             {.layer = static_cast<std::int64_t>(i)}},
                            error);
        if (!kv1::detail::c_within(l.key_axis, KV1_PER_CHANNEL))
            return c_report(
                {errc::invalid_argument, "an axis is an enumerator", {.layer = static_cast<std::int64_t>(i)}},
                error);
        d.layers.push_back({.kv_heads = l.kv_heads,
                            .key_dim = l.key_dim,
                            .value_dim = l.value_dim,
                            .key_format = static_cast<kv1::kv_format>(l.key_format),
                            .value_format = static_cast<kv1::kv_format>(l.value_format),
                            .sliding_window = l.sliding_window,
                            .window_retention = l.window_retention,
                            .key_group = l.key_group,
                            .value_group = l.value_group,
                            .key_axis = static_cast<kv1::quantization_axis>(l.key_axis),
                            .values_in_keys = l.values_in_keys != 0});
    }
    d.capacity_tokens = capacity_tokens;
    d.page_tokens = page_tokens;
    auto made = kv1::kv_cache::create(std::move(d));
    if (!made)
        return c_report(made.reason(), error);
    *cache = new (std::nothrow) kv1_cache{std::move(*made)};
    return c_report(*cache != nullptr ? kv1::status{}
                                      : kv1::status{errc::out_of_memory, "no memory for the cache"},
                    error);
}

void kv1_cache_destroy(kv1_cache* cache) { delete cache; }

kv1_code kv1_sequence_create(kv1_cache* cache, kv1_sequence* sequence, kv1_error* error) {
    if (cache == nullptr || sequence == nullptr)
        return kv1::detail::c_refuse_null(error);
    const auto made = cache->cache.try_create_sequence();
    if (made)
        *sequence = {made->slot, made->generation};
    return kv1::detail::c_report(made.reason(), error);
}

kv1_code kv1_sequence_destroy(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    if (cache == nullptr)
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_report(cache->cache.try_destroy_sequence(kv1::detail::c_sequence(sequence)), error);
}

kv1_code kv1_length(const kv1_cache* cache, kv1_sequence sequence, size_t layer, size_t* tokens,
                    kv1_error* error) {
    if (cache == nullptr || tokens == nullptr)
        return kv1::detail::c_refuse_null(error);
    const auto length = cache->cache.try_length(kv1::detail::c_sequence(sequence), layer);
    if (length)
        *tokens = *length;
    return kv1::detail::c_report(length.reason(), error);
}

kv1_code kv1_commit(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    if (cache == nullptr)
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_report(cache->cache.try_commit(kv1::detail::c_sequence(sequence)).reason(), error);
}

kv1_code kv1_rollback(kv1_cache* cache, kv1_sequence sequence, kv1_error* error) {
    if (cache == nullptr)
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_report(cache->cache.try_rollback(kv1::detail::c_sequence(sequence)), error);
}

kv1_code kv1_truncate(kv1_cache* cache, kv1_sequence sequence, size_t tokens, kv1_error* error) {
    if (cache == nullptr)
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_report(cache->cache.try_truncate(kv1::detail::c_sequence(sequence), tokens), error);
}

kv1_code kv1_append(kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor keys, kv1_tensor values,
                    const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    if (!c_within(keys.type, KV1_BF16) || !c_within(values.type, KV1_BF16))
        return c_report({kv1::errc::invalid_argument, "a scalar type is an enumerator"}, error);
    return c_report(cache->cache.try_append(c_sequence(sequence), layer, c_view(keys), c_view(values),
                                            c_executor{executor}),
                    error);
}

kv1_code kv1_attend(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor queries,
                    kv1_output outputs, const kv1_attention* options, const kv1_executor* executor,
                    kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    if (!c_within(queries.type, KV1_BF16) || !c_within(outputs.type, KV1_BF16))
        return c_report({kv1::errc::invalid_argument, "a scalar type is an enumerator"}, error);
    kv1::attention_options o;
    if (options != nullptr)
        if (const kv1::status s = c_options(*options, queries.tokens, queries.heads, o); !s)
            return c_report(s, error);
    return c_report(cache->cache.try_attend(c_sequence(sequence), layer, c_view(queries), c_view(outputs), o,
                                            c_executor{executor}),
                    error);
}

kv1_code kv1_read(const kv1_cache* cache, kv1_sequence sequence, size_t layer, int values, size_t kv_head,
                  size_t first, size_t count, float* out, kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr || out == nullptr)
        return c_refuse_null(error);
    const kv1::kv_side side = values != 0 ? kv1::kv_side::value : kv1::kv_side::key;
    std::size_t floats = 0; // a layer that is not there is refused below
    if (layer < cache->cache.layers()) {
        const kv1::page_layout& page = cache->cache.layout(layer);
        const std::size_t channels = (values != 0 ? page.values() : page.keys()).channels;
        if (count > SIZE_MAX / channels)
            return c_report({kv1::errc::out_of_range, "the tokens are not all cached"}, error);
        floats = count * channels;
    }
    return c_report(
        cache->cache.try_read(c_sequence(sequence), layer, side, kv_head, first, count, {out, floats}),
        error);
}

kv1_code kv1_cache_statistics(const kv1_cache* cache, kv1_statistics* statistics, kv1_error* error) {
    if (cache == nullptr || statistics == nullptr)
        return kv1::detail::c_refuse_null(error);
    const kv1::cache_statistics s = cache->cache.statistics();
    *statistics = {s.sequences,      s.tokens,       s.layers,       s.pages_in_use,  s.pages_total,
                   s.bytes_reserved, s.bytes_in_use, s.bytes_stored, s.bytes_as_fp16, s.bytes_retained};
    return KV1_OK;
}

} // extern "C"
