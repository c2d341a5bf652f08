// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/attention.h.
#pragma once

#include <kv1/c/attention.h>
#include <kv1/detail/c_api/cache.hpp>

#include <kv1/attention.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

static_assert(static_cast<int>(precision::fast) == KV1_FAST &&
              static_cast<int>(precision::exact) == KV1_EXACT);

inline status c_take_mask(const kv1_mask& m, std::size_t queries, attention_mask& out) noexcept {
    switch (m.kind) {
    case KV1_MASK_CAUSAL:
        out = attention_mask::causal();
        return {};
    case KV1_MASK_CAUSAL_FROM:
        out = attention_mask::causal_from(m.first_position);
        return {};
    case KV1_MASK_NONE:
        out = attention_mask::none();
        return {};
    case KV1_MASK_EXPLICIT:
        if ((m.visible == nullptr && queries != 0 && m.keys != 0) ||
            (queries != 0 && m.keys > SIZE_MAX / queries))
            return {errc::invalid_argument, "an explicit mask has its table"};
        out = attention_mask::explicit_for_last(m.keys, {m.visible, queries * m.keys});
        return {};
    default:
        return {errc::invalid_argument, "a mask's kind is an enumerator"};
    }
}

// All but masks.
inline status c_take_attention(const kv1_attention& o, std::size_t queries, std::size_t heads,
                               attention_options& out) noexcept {
    if (!c_within(o.precision, KV1_EXACT))
        return {errc::invalid_argument, "a precision is an enumerator"};
    if (const status s = c_take_mask(o.mask, queries, out.mask); !s)
        return s;
    if (o.scale != 0.0f)
        out.scale = o.scale;
    out.mode = static_cast<precision>(o.precision);
    out.soft_cap = o.soft_cap;
    out.window = o.window;
    if (o.range != nullptr)
        out.range = {o.range->first, o.range->last};
    if (o.alibi_slopes != nullptr)
        out.alibi_slopes = {o.alibi_slopes, heads};
    if (o.sink_logits != nullptr)
        out.sink_logits = {o.sink_logits, heads};
    if (o.log_sum_exp != nullptr) {
        if (heads != 0 && queries > SIZE_MAX / heads)
            return {errc::shape_mismatch, "queries do not fit the address space"};
        out.log_sum_exp = {o.log_sum_exp, queries * heads};
    }
    return {};
}

// One a sequence.
class c_masks : public c_array<attention_mask> {
public:
    // Errors: invalid_argument, naming the sequence's first row, out_of_memory.
    status assign(const kv1_mask* masks, const std::size_t* indptr, std::size_t count) noexcept {
        status wrong;
        const std::size_t* first = indptr;
        const status had_memory = c_array::assign(masks, count, [&](const kv1_mask& m) {
            const std::size_t rows = first[1] >= first[0] ? first[1] - first[0] : 0;
            attention_mask mask;
            if (const status s = c_take_mask(m, rows, mask); !s && wrong)
                wrong = {s.code(), s.rule(), {.token = static_cast<std::int64_t>(*first)}};
            ++first;
            return mask;
        });
        return had_memory ? wrong : had_memory;
    }
};

// fill() gives a mask of the newest tokens.
template <class Fill>
kv1_code c_give_mask(const std::int32_t* tokens, std::size_t count, std::uint8_t* visible, kv1_error* error,
                     Fill&& fill) noexcept {
    if (count != 0 && c_any_null(tokens, visible))
        return c_refuse_null(error);
    const result<token_visibility> made = fill(std::span(tokens, count));
    if (made)
        std::copy(made->begin(), made->end(), visible);
    return c_report(made.reason(), error);
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_attend(const kv1_cache* cache, kv1_sequence sequence, size_t layer, kv1_tensor queries,
                    kv1_output outputs, const kv1_attention* options, const kv1_executor* executor,
                    kv1_error* error) {
    using namespace kv1::detail;
    if (cache == nullptr)
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(queries, outputs); !s)
        return c_report(s, error);
    kv1_attention given;
    if (const kv1::status s = c_take(options, given); !s)
        return c_report(s, error);
    if (given.masks != nullptr)
        return c_report({kv1::errc::invalid_argument, "masks are for several sequences"}, error);
    kv1::attention_options o;
    if (const kv1::status s = c_take_attention(given, queries.tokens, queries.heads, o); !s)
        return c_report(s, error);
    return c_report(cache->cache.try_attend(c_sequence(sequence), layer, c_view(queries), c_view(outputs), o,
                                            c_executor{executor}),
                    error);
}

kv1_code kv1_attend_batch(const kv1_cache* cache, const kv1_sequence* sequences, const size_t* indptr,
                          size_t count, size_t layer, kv1_tensor queries, kv1_output outputs,
                          const kv1_attention* options, const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(cache, indptr))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(queries, outputs); !s)
        return c_report(s, error);
    c_sequences ids;
    if (const kv1::status s = ids.assign(sequences, count); !s)
        return c_report(s, error);
    kv1_attention given;
    if (const kv1::status s = c_take(options, given); !s)
        return c_report(s, error);
    kv1::attention_options o;
    if (const kv1::status s = c_take_attention(given, queries.tokens, queries.heads, o); !s)
        return c_report(s, error);
    c_masks masks;
    if (const kv1::status s = masks.assign(given.masks, indptr, given.masks != nullptr ? count : 0); !s)
        return c_report(s, error);
    o.masks = masks.view();
    return c_report(cache->cache.try_attend(ids.view(), layer, {indptr, count + 1}, c_view(queries),
                                            c_view(outputs), o, c_executor{executor}),
                    error);
}

kv1_code kv1_tree_mask(const int32_t* parents, size_t count, uint8_t* visible, kv1_error* error) {
    return kv1::detail::c_give_mask(parents, count, visible, error,
                                    [](auto tokens) { return kv1::try_tree_mask(tokens); });
}

kv1_code kv1_block_mask(const int32_t* blocks, size_t count, uint8_t* visible, kv1_error* error) {
    return kv1::detail::c_give_mask(blocks, count, visible, error,
                                    [](auto tokens) { return kv1::try_block_mask(tokens); });
}

kv1_code kv1_merge_attention(const kv1_attention_part* parts, size_t count, size_t rows, size_t channels,
                             float* outputs, float* log_sum_exp, kv1_error* error) {
    using namespace kv1::detail;
    if ((count != 0 && parts == nullptr) || outputs == nullptr)
        return c_refuse_null(error);
    if (channels != 0 && rows > SIZE_MAX / channels)
        return c_report({kv1::errc::shape_mismatch, "rows do not fit the address space"}, error);
    for (std::size_t i = 0; i < count; ++i)
        if (c_any_null(parts[i].outputs, parts[i].log_sum_exp))
            return c_refuse_null(error);
    c_array<kv1::attention_part> each;
    const kv1::status had_memory = each.assign(parts, count, [&](const kv1_attention_part& p) {
        return kv1::attention_part{{p.outputs, rows * channels}, {p.log_sum_exp, rows}};
    });
    if (!had_memory)
        return c_report(had_memory, error);
    return c_report(kv1::try_merge_attention(each.view(), channels, {outputs, rows * channels},
                                             {log_sum_exp, log_sum_exp != nullptr ? rows : std::size_t{0}}),
                    error);
}

} // extern "C"
