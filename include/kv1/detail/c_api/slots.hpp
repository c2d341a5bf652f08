// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/slots.h.
#pragma once

#include <kv1/c/slots.h>
#include <kv1/detail/c_api/cache.hpp>
#include <kv1/detail/c_api/support.hpp>

#include <kv1/detail/arena.hpp>
#include <kv1/slot_store.hpp>
#include <kv1/work_plan.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

static_assert(static_cast<int>(slot_view_kind::range) == KV1_SLOT_RANGE &&
              static_cast<int>(slot_view_kind::list) == KV1_SLOT_LIST &&
              static_cast<int>(slot_view_kind::table) == KV1_SLOT_TABLE);
static_assert(static_cast<int>(slot_mask_kind::none) == KV1_SLOT_MASK_NONE &&
              static_cast<int>(slot_mask_kind::causal) == KV1_SLOT_MASK_CAUSAL &&
              static_cast<int>(slot_mask_kind::by_position) == KV1_SLOT_MASK_BY_POSITION &&
              static_cast<int>(slot_mask_kind::bytes) == KV1_SLOT_MASK_BYTES &&
              static_cast<int>(slot_mask_kind::additive) == KV1_SLOT_MASK_ADDITIVE);

struct c_slot_description {
    slot_store_description description;
    c_array<slot_memory> memory;
};

inline status c_take_slot_options(const kv1_slot_options& given, c_slot_description& out) noexcept {
    kv1_slot_options o;
    if (const status s = c_take(given, o); !s)
        return s;
    slot_store_description& d = out.description;
    d.slots = o.slots;
    d.page_tokens = o.page_tokens != 0 ? o.page_tokens : d.page_tokens;
    d.fp16_slots = o.fp16_slots;
    d.fp16_sinks = o.fp16_sinks;
    d.fp16_window = o.fp16_window;
    d.huge_pages = o.huge_pages != 0;
    kv1_cache_options layers = {};
    layers.layers = o.layers;
    layers.distinct_layers = o.distinct_layers;
    layers.layer_count = o.layer_count;
    status taken;
    if (const status s = guarded([&] { taken = c_take_layers(layers, d.layers); }); !s)
        return s;
    if (!taken || o.memory == nullptr)
        return taken;
    return out.memory.assign(o.memory, o.layer_count, [](const kv1_slot_memory& m) {
        return slot_memory{{static_cast<std::byte*>(m.bytes), m.size}, m.holds_slots != 0};
    });
}

inline status c_take_slot_view(const kv1_slot_view& v, slot_view& out) noexcept {
    const std::size_t items = v.kind == KV1_SLOT_TABLE ? v.blocks : v.count;
    if (v.kind != KV1_SLOT_RANGE && v.items == nullptr && items != 0)
        return {errc::invalid_argument, "a pointer is null"};
    switch (v.kind) {
    case KV1_SLOT_RANGE:
        out = slot_view::range(v.first, v.count);
        return {};
    case KV1_SLOT_LIST:
        out = slot_view::list({v.items, items});
        return {};
    case KV1_SLOT_TABLE:
        out = slot_view::table({v.items, items}, v.count);
        return {};
    default:
        return {errc::invalid_argument, "a view's kind is an enumerator"};
    }
}

inline status c_take_slot_mask(const kv1_slot_mask& m, std::size_t queries, std::size_t columns,
                               slot_mask& out) noexcept {
    switch (m.kind) {
    case KV1_SLOT_MASK_NONE:
        out = slot_mask::none();
        return {};
    case KV1_SLOT_MASK_CAUSAL:
        out = slot_mask::causal();
        return {};
    case KV1_SLOT_MASK_BY_POSITION:
        if ((m.query_positions == nullptr && queries != 0) || (m.column_positions == nullptr && columns != 0))
            return {errc::invalid_argument, "a pointer is null"};
        out = slot_mask::by_position({m.query_positions, queries}, {m.column_positions, columns});
        return {};
    case KV1_SLOT_MASK_BYTES: {
        if (m.data == nullptr && columns != 0)
            return {errc::invalid_argument, "a pointer is null"};
        const auto stride = static_cast<std::size_t>(m.query_stride);
        if (m.query_stride < 0 || (queries != 0 && stride > (SIZE_MAX / 2 - columns) / queries))
            return {errc::invalid_argument, "a stride of bytes is not negative, and addressable"};
        const std::size_t size = columns == 0 || queries == 0 ? 0 : (queries - 1) * stride + columns;
        out = slot_mask::bytes({static_cast<const std::uint8_t*>(m.data), size}, stride);
        return {};
    }
    case KV1_SLOT_MASK_ADDITIVE:
        if (!c_within(m.type, KV1_BF16))
            return {errc::invalid_argument, "a scalar type is an enumerator"};
        out = c_view_of(m, [&]<class T>(T*) {
            return slot_mask::additive(static_cast<const T*>(m.data), m.query_stride, m.head_stride);
        });
        return {};
    default:
        return {errc::invalid_argument, "a mask's kind is an enumerator"};
    }
}

// What a call of attention is given.
struct c_slot_call {
    c_array<slot_stream> streams;
    slot_attention_options options;

    // Errors: invalid_argument, naming a stream's first query; shape_mismatch, out_of_memory.
    status take(const kv1_slot_stream* given, std::size_t count, const kv1_tensor& queries,
                const kv1_output& outputs, const kv1_slot_attention* o) noexcept {
        if (given == nullptr && count != 0)
            return {errc::invalid_argument, "a pointer is null"};
        if (const status s = c_check_types(queries, outputs); !s)
            return s;
        kv1_slot_attention a;
        if (const status s = c_take(o, a); !s)
            return s;
        if (!c_within(a.precision, KV1_EXACT))
            return {errc::invalid_argument, "a precision is an enumerator"};
        if (a.scale != 0.0f)
            options.scale = a.scale;
        options.mode = static_cast<precision>(a.precision);
        options.soft_cap = a.soft_cap;
        options.window = a.window;
        if (a.alibi_slopes != nullptr)
            options.alibi_slopes = {a.alibi_slopes, queries.heads};
        if (a.sink_logits != nullptr)
            options.sink_logits = {a.sink_logits, queries.heads};
        if (a.log_sum_exp != nullptr) {
            if (queries.heads != 0 && queries.tokens > SIZE_MAX / queries.heads)
                return {errc::shape_mismatch, "queries do not fit the address space"};
            options.log_sum_exp = {a.log_sum_exp, queries.tokens * queries.heads};
        }
        status wrong;
        std::size_t first = 0;
        const status had_memory = streams.assign(given, count, [&](const kv1_slot_stream& s) {
            slot_stream taken{s.queries, {}, {}};
            status own = c_take_slot_view(s.slots, taken.slots);
            if (own)
                own = c_take_slot_mask(s.mask, s.queries, s.slots.count, taken.mask);
            if (!own && wrong)
                wrong = {own.code(), own.rule(), {.token = static_cast<std::int64_t>(first)}};
            first += s.queries;
            return taken;
        });
        return had_memory ? wrong : had_memory;
    }
};

inline bool c_missing(const void* pointer, std::size_t count) noexcept {
    return pointer == nullptr && count != 0;
}

} // namespace kv1::inline KV1_ABI::detail

/// The handle of kv1/c/slots.h.
struct kv1_slot_store {
    kv1::slot_store store; ///< of any mix of formats
};

/// A plan, and what it refers to.
struct kv1_plan {
    std::optional<kv1::detail::c_slot_call> call; ///< of attention
    std::optional<kv1::work_plan> work;           ///< the plan itself
};

extern "C" {

kv1_code kv1_slot_memory_bytes(const kv1_slot_options* options, size_t layer, size_t* bytes,
                               kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(options, bytes))
        return c_refuse_null(error);
    c_slot_description d;
    if (const kv1::status s = c_take_slot_options(*options, d); !s)
        return c_report(s, error);
    if (layer >= d.description.layers.size())
        return c_report(
            {kv1::errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}}, error);
    // a store of one page finds what is wrong with the options
    kv1::slot_store_description small = std::move(d.description);
    const std::size_t slots = small.slots;
    small.slots = slots != 0 ? 1 : 0;
    small.fp16_slots = small.fp16_slots != 0 ? 1 : 0;
    const auto made = kv1::slot_store::create(std::move(small));
    if (!made)
        return c_report(made.reason(), error);
    const std::size_t page = made->layout(layer).page_tokens();
    const std::size_t block = kv1::slot_memory_bytes(made->description(), layer) / 2; // one and one more
    const std::size_t blocks = slots / page + (slots % page != 0 ? 1 : 0) + 1;
    if (blocks > SIZE_MAX / 2 / block)
        return c_report({kv1::errc::invalid_argument, "the memory's size overflows"}, error);
    *bytes = blocks * block;
    return KV1_OK;
}

kv1_code kv1_slots_create(const kv1_slot_options* options, kv1_slot_store** store, kv1_error* error) {
    using namespace kv1::detail;
    if (store != nullptr)
        *store = nullptr;
    if (c_any_null(options, store))
        return c_refuse_null(error);
    c_slot_description d;
    if (const kv1::status s = c_take_slot_options(*options, d); !s)
        return c_report(s, error);
    auto made = kv1::slot_store::create(std::move(d.description), d.memory.view());
    if (!made)
        return c_report(made.reason(), error);
    *store = new (std::nothrow) kv1_slot_store{std::move(*made)};
    return c_report(*store != nullptr ? kv1::status{} : c_no_memory(), error);
}

void kv1_slots_destroy(kv1_slot_store* store) { delete store; }

size_t kv1_slots_count(const kv1_slot_store* store) { return store != nullptr ? store->store.slots() : 0; }

kv1_code kv1_slots_write(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                         kv1_tensor keys, kv1_tensor values, const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    return c_report(
        store->store.try_write(layer, {slots, count}, c_view(keys), c_view(values), c_executor{executor}),
        error);
}

kv1_code kv1_slots_write_at(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                            const int32_t* positions, size_t count, kv1_tensor keys, kv1_tensor values,
                            const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(positions, count))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    return c_report(store->store.try_write(layer, {slots, count}, {positions, count}, c_view(keys),
                                           c_view(values), c_executor{executor}),
                    error);
}

int32_t kv1_slots_key_position(const kv1_slot_store* store, size_t layer, uint32_t slot) {
    return store == nullptr ? -1 : store->store.key_position(layer, slot);
}

kv1_code kv1_slots_attend(const kv1_slot_store* store, size_t layer, const kv1_slot_stream* streams,
                          size_t count, kv1_tensor queries, kv1_output outputs,
                          const kv1_slot_attention* options, const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr)
        return c_refuse_null(error);
    c_slot_call call;
    if (const kv1::status s = call.take(streams, count, queries, outputs, options); !s)
        return c_report(s, error);
    return c_report(store->store.try_attend(layer, call.streams.view(), c_view(queries), c_view(outputs),
                                            call.options, c_executor{executor}),
                    error);
}

kv1_code kv1_slots_plan_write(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                              kv1_tensor keys, kv1_tensor values, kv1_plan** plan, kv1_error* error) {
    using namespace kv1::detail;
    if (plan != nullptr)
        *plan = nullptr;
    if (c_any_null(store, plan) || c_missing(slots, count))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    std::unique_ptr<kv1_plan> made(new (std::nothrow) kv1_plan);
    if (made == nullptr)
        return c_report(c_no_memory(), error);
    auto work = store->store.try_plan_write(layer, {slots, count}, c_view(keys), c_view(values));
    if (!work)
        return c_report(work.reason(), error);
    made->work.emplace(std::move(*work));
    *plan = made.release();
    return KV1_OK;
}

kv1_code kv1_slots_plan_write_at(kv1_slot_store* store, size_t layer, const uint32_t* slots,
                                 const int32_t* positions, size_t count, kv1_tensor keys, kv1_tensor values,
                                 kv1_plan** plan, kv1_error* error) {
    using namespace kv1::detail;
    if (plan != nullptr)
        *plan = nullptr;
    if (c_any_null(store, plan) || c_missing(slots, count) || c_missing(positions, count))
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(keys, values); !s)
        return c_report(s, error);
    std::unique_ptr<kv1_plan> made(new (std::nothrow) kv1_plan);
    if (made == nullptr)
        return c_report(c_no_memory(), error);
    auto work =
        store->store.try_plan_write(layer, {slots, count}, {positions, count}, c_view(keys), c_view(values));
    if (!work)
        return c_report(work.reason(), error);
    made->work.emplace(std::move(*work));
    *plan = made.release();
    return KV1_OK;
}

kv1_code kv1_slots_plan_attend(const kv1_slot_store* store, size_t layer, const kv1_slot_stream* streams,
                               size_t count, kv1_tensor queries, kv1_output outputs,
                               const kv1_slot_attention* options, kv1_plan** plan, kv1_error* error) {
    using namespace kv1::detail;
    if (plan != nullptr)
        *plan = nullptr;
    if (c_any_null(store, plan))
        return c_refuse_null(error);
    std::unique_ptr<kv1_plan> made(new (std::nothrow) kv1_plan);
    if (made == nullptr)
        return c_report(c_no_memory(), error);
    c_slot_call& call = made->call.emplace();
    if (const kv1::status s = call.take(streams, count, queries, outputs, options); !s)
        return c_report(s, error);
    auto work = store->store.try_plan_attention(layer, call.streams.view(), c_view(queries), c_view(outputs),
                                                call.options);
    if (!work)
        return c_report(work.reason(), error);
    made->work.emplace(std::move(*work));
    *plan = made.release();
    return KV1_OK;
}

size_t kv1_plan_phases(const kv1_plan* plan) { return plan != nullptr ? plan->work->phases() : 0; }

size_t kv1_plan_tasks(const kv1_plan* plan, size_t phase) {
    return plan != nullptr ? plan->work->tasks(phase) : 0;
}

void kv1_plan_run(const kv1_plan* plan, size_t phase, size_t task) {
    if (plan != nullptr)
        plan->work->run(phase, task);
}

kv1_code kv1_plan_finish(kv1_plan* plan, kv1_error* error) {
    const std::unique_ptr<kv1_plan> ends(plan);
    return kv1::detail::c_report(plan != nullptr ? plan->work->finish() : kv1::status{}, error);
}

void kv1_plan_destroy(kv1_plan* plan) { delete plan; }

kv1_code kv1_slots_settle(kv1_slot_store* store, const kv1_slot_view* sequences,
                          const int32_t* const* positions, size_t count, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(sequences, count))
        return c_refuse_null(error);
    c_array<kv1::slot_sequence> all;
    kv1::status wrong;
    std::size_t i = 0;
    const kv1::status had_memory = all.assign(sequences, count, [&](const kv1_slot_view& v) {
        kv1::slot_sequence q;
        if (const kv1::status s = c_take_slot_view(v, q.slots); !s && wrong)
            wrong = {s.code(), s.rule(), {.token = static_cast<std::int64_t>(i)}};
        if (positions != nullptr && positions[i] != nullptr)
            q.positions = {positions[i], v.count};
        ++i;
        return q;
    });
    if (!had_memory || !wrong)
        return c_report(had_memory ? wrong : had_memory, error);
    return c_report(store->store.try_settle(all.view()), error);
}

kv1_code kv1_slots_release_fp16(kv1_slot_store* store, const uint32_t* slots, size_t count,
                                kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count))
        return c_refuse_null(error);
    return c_report(store->store.try_release_fp16({slots, count}), error);
}

kv1_code kv1_slots_flush(kv1_slot_store* store, kv1_error* error) {
    if (store == nullptr)
        return kv1::detail::c_refuse_null(error);
    store->store.flush();
    return KV1_OK;
}

int32_t kv1_slots_has_fp16(const kv1_slot_store* store, size_t layer, uint32_t slot) {
    return store != nullptr && store->store.has_fp16(layer, slot) ? 1 : 0;
}

size_t kv1_slots_fp16_in_use(const kv1_slot_store* store, size_t layer) {
    return store != nullptr ? store->store.fp16_slots_in_use(layer) : 0;
}

kv1_code kv1_slots_read(const kv1_slot_store* store, size_t layer, kv1_side side, size_t kv_head,
                        const uint32_t* slots, size_t count, float* out, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(out, count))
        return c_refuse_null(error);
    if (!c_within(side, KV1_VALUES))
        return c_report({kv1::errc::invalid_argument, "a side is an enumerator"}, error);
    if (layer >= store->store.layers())
        return c_report(
            {kv1::errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}}, error);
    const kv1::layer_description& l = store->store.description().layers[layer];
    const std::size_t channels = side == KV1_KEYS ? l.key_dim : l.value_dim;
    if (count > SIZE_MAX / sizeof(float) / channels)
        return c_report({kv1::errc::shape_mismatch, "rows do not fit the address space"}, error);
    return c_report(store->store.try_read(layer, static_cast<kv1::kv_side>(side), kv_head, {slots, count},
                                          {out, count * channels}),
                    error);
}

size_t kv1_slots_raw_bytes(const kv1_slot_store* store, size_t layer) {
    return store != nullptr && layer < store->store.layers() ? store->store.raw_bytes(layer) : 0;
}

kv1_code kv1_slots_export(const kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                          void* bytes, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(bytes, count))
        return c_refuse_null(error);
    return c_report(store->store.try_export_raw(
                        layer, {slots, count},
                        {static_cast<std::byte*>(bytes), count * kv1_slots_raw_bytes(store, layer)}),
                    error);
}

kv1_code kv1_slots_import(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                          const void* bytes, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(bytes, count))
        return c_refuse_null(error);
    return c_report(store->store.try_import_raw(
                        layer, {slots, count},
                        {static_cast<const std::byte*>(bytes), count * kv1_slots_raw_bytes(store, layer)}),
                    error);
}

size_t kv1_slots_fp16_numbers(const kv1_slot_store* store, size_t layer) {
    return store != nullptr && layer < store->store.layers() ? store->store.fp16_numbers(layer) : 0;
}

kv1_code kv1_slots_export_fp16(const kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                               uint16_t* numbers, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(numbers, count))
        return c_refuse_null(error);
    static_assert(sizeof(kv1::float16) == sizeof(std::uint16_t));
    return c_report(store->store.try_export_fp16(layer, {slots, count},
                                                 {reinterpret_cast<kv1::float16*>(numbers),
                                                  count * kv1_slots_fp16_numbers(store, layer)}),
                    error);
}

kv1_code kv1_slots_import_fp16(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                               const uint16_t* numbers, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count) || c_missing(numbers, count))
        return c_refuse_null(error);
    return c_report(store->store.try_import_fp16(layer, {slots, count},
                                                 {reinterpret_cast<const kv1::float16*>(numbers),
                                                  count * kv1_slots_fp16_numbers(store, layer)}),
                    error);
}

kv1_code kv1_slots_copy(kv1_slot_store* store, size_t layer, const uint32_t* from, const uint32_t* to,
                        size_t count, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(from, count) || c_missing(to, count))
        return c_refuse_null(error);
    return c_report(store->store.try_copy(layer, {from, count}, {to, count}), error);
}

kv1_code kv1_slots_move(kv1_slot_store* store, size_t layer, const uint32_t* from, const uint32_t* to,
                        size_t count, kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(from, count) || c_missing(to, count))
        return c_refuse_null(error);
    return c_report(store->store.try_move(layer, {from, count}, {to, count}), error);
}

kv1_code kv1_slots_clear(kv1_slot_store* store, size_t layer, const uint32_t* slots, size_t count,
                         kv1_error* error) {
    using namespace kv1::detail;
    if (store == nullptr || c_missing(slots, count))
        return c_refuse_null(error);
    return c_report(store->store.try_clear(layer, {slots, count}), error);
}

kv1_code kv1_slots_clear_all(kv1_slot_store* store, kv1_error* error) {
    if (store == nullptr)
        return kv1::detail::c_refuse_null(error);
    store->store.clear();
    return KV1_OK;
}

} // extern "C"
