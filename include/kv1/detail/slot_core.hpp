// SPDX-License-Identifier: Apache-2.0
//
// A slot store without its template arguments: it checks arguments, and leaves the work to the headers that it includes.
#pragma once

#include <kv1/cache_views.hpp>
#if defined(KV1_EXTERNAL_KERNELS)
#include <kv1/detail/any_slots.hpp>
#endif
#include <kv1/detail/fixed_vector.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/slot_attention.hpp>
#include <kv1/detail/slot_layer.hpp>
#include <kv1/detail/slot_places.hpp>
#include <kv1/detail/slot_rows.hpp>
#include <kv1/detail/slot_write.hpp>
#include <kv1/executor.hpp>
#include <kv1/float16.hpp>
#include <kv1/slot_store_description.hpp>
#include <kv1/slot_views.hpp>
#include <kv1/status.hpp>
#include <kv1/target.hpp>
#include <kv1/tensor.hpp>
#include <kv1/work_plan.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

class slot_core final
#if defined(KV1_EXTERNAL_KERNELS)
    : public any_slots // whose functions these are
#endif
{
public:
    [[nodiscard]] static result<std::unique_ptr<slot_core>> create(slot_store_description&& d,
                                                                   std::span<const slot_memory> memory,
                                                                   const kernel_set& kernels) noexcept {
        if (environment_target().refused)
            return status{errc::unsupported_target,
                          "KV1_TARGET names no target that this processor supports"};
        std::unique_ptr<slot_core> made(new (std::nothrow) slot_core(kernels));
        if (made == nullptr)
            return no_memory();
        if (const status s = made->initialize(std::move(d), memory); !s)
            return s;
        return made;
    }

    [[nodiscard]] const slot_store_description& description() const noexcept { return description_; }
    [[nodiscard]] std::size_t layers() const noexcept { return layers_.size(); }
    [[nodiscard]] const page_layout& layout(std::size_t layer) const noexcept {
        return layers_[layer].body.layout;
    }
    [[nodiscard]] std::size_t slots() const noexcept { return blocks_ * page(); }

    [[nodiscard]] static std::size_t blocks_for(const slot_store_description& d) noexcept {
        return d.slots / d.page_tokens + (d.slots % d.page_tokens != 0 ? 1 : 0);
    }

    // ---- write

    // Checks a call and makes its work. Null: no work.
    [[nodiscard]] result<std::unique_ptr<planned_work>> plan_write(std::size_t layer,
                                                                   std::span<const std::uint32_t> slots,
                                                                   std::span<const std::int32_t> positions,
                                                                   const tensor_view& keys,
                                                                   const tensor_view& values) noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_write(layers_[layer].shape(), slots, positions, keys, values); !s)
            return placed(s, layer);
        if (slots.empty())
            return std::unique_ptr<planned_work>();
        std::unique_ptr<slot_write> work(new (std::nothrow) slot_write(
            layers_[layer], store_of(layer), identity_.data(), slots, positions, keys, values));
        if (work == nullptr)
            return no_memory();
        if (const status s = work->prepare(); !s)
            return placed(s, layer);
        return std::unique_ptr<planned_work>(std::move(work));
    }
    status write(std::size_t layer, std::span<const std::uint32_t> slots,
                 std::span<const std::int32_t> positions, const tensor_view& keys, const tensor_view& values,
                 executor_view run) noexcept {
        const result<std::unique_ptr<planned_work>> work = plan_write(layer, slots, positions, keys, values);
        if (!work || *work == nullptr)
            return work.reason();
        return placed(run_all(**work, run), layer);
    }

    // ---- attend

    [[nodiscard]] result<std::unique_ptr<planned_work>>
    plan_attention(std::size_t layer, std::span<const slot_stream> streams, const tensor_view& queries,
                   const mutable_tensor_view& outputs, const slot_attention_options& options) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_attention(layer, streams, queries, outputs, options); !s)
            return placed(s, layer);
        if (queries.tokens() == 0)
            return std::unique_ptr<planned_work>();
        std::unique_ptr<slot_attention> work(new (std::nothrow) slot_attention(
            layers_[layer], store_of(layer), streams, queries, outputs, options));
        if (work == nullptr)
            return no_memory();
        if (const status s = work->prepare(); !s)
            return placed(s, layer);
        return std::unique_ptr<planned_work>(std::move(work));
    }
    status attend(std::size_t layer, std::span<const slot_stream> streams, const tensor_view& queries,
                  const mutable_tensor_view& outputs, const slot_attention_options& options,
                  executor_view run) const noexcept {
        const result<std::unique_ptr<planned_work>> work =
            plan_attention(layer, streams, queries, outputs, options);
        if (!work || *work == nullptr)
            return work.reason();
        return placed(run_all(**work, run), layer);
    }

    // ---- fp16 copies

    status settle(std::span<const slot_sequence> sequences) noexcept {
        const std::unique_ptr<slot_places[]> places(new (std::nothrow) slot_places[sequences.size()]);
        if (places == nullptr)
            return no_memory();
        for (std::size_t i = 0; i < sequences.size(); ++i) {
            const slot_sequence& q = sequences[i];
            const error_location where{.token = static_cast<std::int64_t>(i)};
            if (const status s = places[i].find(q.slots, page(), blocks_); !s)
                return {s.code(), s.rule(), where};
            if (!q.positions.empty() && q.positions.size() != q.slots.size())
                return {errc::shape_mismatch, "one position per slot of a sequence", where};
        }
        for (std::size_t i = 0; i < sequences.size(); ++i) {
            std::int64_t newest = static_cast<std::int64_t>(sequences[i].slots.size()) - 1;
            if (const std::span<const std::int32_t> positions = sequences[i].positions; !positions.empty())
                newest = *std::max_element(positions.begin(), positions.end());
            for (slot_layer& layer : layers_)
                settle(layer, sequences[i], places[i], newest);
        }
        return {};
    }
    status release(std::span<const std::uint32_t> slots) noexcept {
        if (const status s = check_slots(slots); !s)
            return s;
        for (slot_layer& layer : layers_)
            for (const std::uint32_t slot : slots)
                layer.copied.remove(slot);
        return {};
    }
    void flush() noexcept {
        for (slot_layer& layer : layers_)
            layer.copied.clear();
    }
    [[nodiscard]] bool has_fp16(std::size_t layer, std::uint32_t slot) const noexcept {
        return layer < layers() && slot < slots() && layers_[layer].copied.of(slot) != slot_copies::none;
    }
    [[nodiscard]] std::size_t fp16_slots_in_use(std::size_t layer) const noexcept {
        return layer < layers() ? layers_[layer].copied.size() : 0;
    }

    // ---- rows

    status read(std::size_t layer, kv_side side, std::size_t kv_head, std::span<const std::uint32_t> slots,
                std::span<float> out) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        const slot_layer& l = layers_[layer];
        if (kv_head >= l.body.kv_heads)
            return {errc::out_of_range, "no such KV head", {.kv_head = static_cast<std::int64_t>(kv_head)}};
        if (const status s = check_slots(slots); !s)
            return placed(s, layer);
        const std::size_t channels = l.section(side).channels;
        if (out.size() / channels != slots.size() || out.size() % channels != 0)
            return placed({errc::shape_mismatch, "the buffer does not fit the rows"}, layer);
        const layer_store store = store_of(layer);
        for (std::size_t i = 0; i < slots.size(); ++i)
            slot_rows(l, store).read(side, slots[i], kv_head, out.subspan(i * channels, channels));
        return {};
    }
    [[nodiscard]] std::size_t raw_bytes(std::size_t layer) const noexcept {
        return slot_rows(layers_[layer], store_of(layer)).raw_bytes();
    }
    status export_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                      std::span<std::byte> out) const noexcept {
        if (const status s = check_raw(layer, slots, out.size()); !s)
            return s;
        const layer_store store = store_of(layer);
        const slot_rows rows(layers_[layer], store);
        for (std::size_t i = 0; i < slots.size(); ++i)
            rows.store_raw(slots[i], out.subspan(i * rows.raw_bytes(), rows.raw_bytes()));
        return {};
    }
    status import_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                      std::span<const std::byte> in) noexcept {
        if (const status s = check_raw(layer, slots, in.size()); !s)
            return s;
        if (const status s = check_distinct(slots); !s)
            return placed(s, layer);
        slot_layer& l = layers_[layer];
        const layer_store store = store_of(layer);
        const slot_rows rows(l, store);
        const std::size_t size = rows.raw_bytes();
        for (std::size_t i = 0; i < slots.size(); ++i)
            if (const status s = rows.check_raw(in.subspan(i * size, size)); !s)
                return {s.code(),
                        s.rule(),
                        {.layer = static_cast<std::int64_t>(layer),
                         .kv_head = s.where().kv_head,
                         .token = static_cast<std::int64_t>(i)}};
        for (std::size_t i = 0; i < slots.size(); ++i) {
            l.begin(slots[i]);
            l.copied.remove(slots[i]);
            rows.load_raw(l, slots[i], in.subspan(i * size, size));
        }
        return {};
    }
    [[nodiscard]] std::int32_t key_position(std::size_t layer, std::uint32_t slot) const noexcept {
        return layer < layers() && slot < slots() ? layers_[layer].position_of(slot) : -1;
    }
    [[nodiscard]] std::size_t fp16_numbers(std::size_t layer) const noexcept {
        return slot_rows(layers_[layer], store_of(layer)).fp16_numbers();
    }
    status export_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                       std::span<float16> out) const noexcept {
        if (const status s = check_fp16(layer, slots, out.size()); !s)
            return s;
        for (std::size_t i = 0; i < slots.size(); ++i)
            if (!has_fp16(layer, slots[i]))
                return placed({errc::out_of_range,
                               "the slot has no fp16 copy",
                               {.token = static_cast<std::int64_t>(i)}},
                              layer);
        const layer_store store = store_of(layer);
        const slot_rows rows(layers_[layer], store);
        for (std::size_t i = 0; i < slots.size(); ++i)
            rows.store_fp16(slots[i], out.subspan(i * rows.fp16_numbers(), rows.fp16_numbers()));
        return {};
    }
    status import_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                       std::span<const float16> in) noexcept {
        if (const status s = check_fp16(layer, slots, in.size()); !s)
            return s;
        if (const status s = check_distinct(slots); !s)
            return placed(s, layer);
        slot_layer& l = layers_[layer];
        const layer_store store = store_of(layer);
        const slot_rows rows(l, store);
        const std::size_t size = rows.fp16_numbers();
        std::size_t needed = 0;
        for (std::size_t i = 0; i < slots.size(); ++i) {
            for (const float16 x : in.subspan(i * size, size))
                if (!is_finite(x))
                    return placed(
                        {errc::non_finite, "fp16 copies are finite", {.token = static_cast<std::int64_t>(i)}},
                        layer);
            needed += l.copied.of(slots[i]) == slot_copies::none ? 1 : 0;
        }
        if (needed > l.copied.free())
            return placed({errc::capacity_exceeded, "no room for fp16 copies"}, layer);
        for (std::size_t i = 0; i < slots.size(); ++i) {
            if (l.copied.of(slots[i]) == slot_copies::none)
                l.begin_copy(l.copied.add(slots[i]));
            rows.load_fp16(slots[i], in.subspan(i * size, size));
        }
        return {};
    }

    [[nodiscard]] result<std::span<const std::byte>> page_bytes(std::size_t layer, std::size_t kv_head,
                                                                std::size_t block) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        const slot_layer& l = layers_[layer];
        if (kv_head >= l.body.kv_heads || block >= blocks_)
            return placed({errc::out_of_range, "no such page"}, layer);
        return std::span<const std::byte>(l.body.page(l.block_of(block), kv_head), l.body.layout.bytes());
    }

    // ---- copy and clear

    // As if all sources were read before any destination is written.
    status copy(std::size_t layer, std::span<const std::uint32_t> from, std::span<const std::uint32_t> to,
                bool moves) noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (from.size() != to.size())
            return placed({errc::shape_mismatch, "as many destinations as sources"}, layer);
        for (const std::span<const std::uint32_t> each : {from, to})
            if (const status s = check_slots(each); !s)
                return placed(s, layer);
        if (const status s = check_distinct(to); !s)
            return placed(s, layer);
        if (moves)
            if (const status s = check_distinct(from); !s)
                return placed(s, layer);
        slot_layer& l = layers_[layer];
        const layer_store store = store_of(layer);
        return placed(slot_rows(l, store).copy(l, from, to, moves), layer);
    }
    status clear(std::size_t layer, std::span<const std::uint32_t> slots) noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_slots(slots); !s)
            return placed(s, layer);
        slot_layer& l = layers_[layer];
        const layer_store store = store_of(layer);
        for (const std::uint32_t slot : slots) {
            l.copied.remove(slot);
            if (l.begun[slot / page()] != 0)
                slot_rows(l, store).clear(l, slot);
        }
        return {};
    }
    void clear() noexcept {
        for (slot_layer& l : layers_) {
            l.copied.clear();
            std::fill(l.begun.begin(), l.begun.end(), std::uint8_t{0});
        }
    }

private:
    explicit slot_core(const kernel_set& kernels) noexcept : kernels_(kernels) {}

    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }
    static status no_such_layer(std::size_t layer) noexcept {
        return {errc::out_of_range, "no such layer", {.layer = static_cast<std::int64_t>(layer)}};
    }
    static status placed(const status& s, std::size_t layer) noexcept {
        if (s)
            return s;
        error_location where = s.where();
        where.layer = static_cast<std::int64_t>(layer);
        return {s.code(), s.rule(), where};
    }

    [[nodiscard]] std::size_t page() const noexcept { return description_.page_tokens; }
    [[nodiscard]] layer_store store_of(std::size_t layer) const noexcept {
        const slot_layer& l = layers_[layer];
        return {l.encodings, kernels_, l.body, l.has_copies ? &l.copies : nullptr, nullptr, scratches_};
    }

    status initialize(slot_store_description&& d, std::span<const slot_memory> memory) noexcept {
        if (d.page_tokens == 0 || d.page_tokens % tile_tokens != 0)
            return {errc::invalid_argument, "a page holds a positive multiple of 16 tokens"};
        if (d.layers.empty() || d.slots == 0)
            return {errc::invalid_argument, "a store has layers and slots"};
        constexpr std::size_t most = (std::numeric_limits<std::int32_t>::max)();
        if (d.slots > most || d.fp16_slots > most || d.page_tokens > most)
            return {errc::invalid_argument, "a store has at most 2^31 - 1 slots"};
        if (d.fp16_sinks > most || d.fp16_window > most)
            return {errc::invalid_argument, "fp16 sinks and windows are at most 2^31 - 1 tokens"};
        if (d.fp16_slots == 0 && (d.fp16_sinks != 0 || d.fp16_window != 0))
            return {errc::invalid_argument, "fp16 sinks and windows need fp16_slots"};
        if (!memory.empty() && memory.size() != d.layers.size())
            return {errc::shape_mismatch, "lent memory is one span for each layer"};
        description_ = std::move(d);
        blocks_ = blocks_for(description_);
        const std::size_t copy_blocks = (description_.fp16_slots + page() - 1) / page();
        const std::size_t identities = (std::max)(blocks_, copy_blocks);
        if (!layers_.reserve(description_.layers.size()) || !identity_.resize(identities) ||
            !scratches_.begin())
            return no_memory();
        for (std::size_t b = 0; b < identities; ++b)
            identity_[b] = static_cast<std::uint32_t>(b);
        for (std::size_t i = 0; i < description_.layers.size(); ++i) {
            const layer_description& l = description_.layers[i];
            const slot_memory lent = memory.empty() ? slot_memory{} : memory[i];
            if (!memory.empty() && lent.bytes.data() == nullptr)
                return placed({errc::invalid_argument, "lent memory is not null"}, i);
            if (l.sliding_window != 0 || l.window_retention != 0)
                return placed({errc::invalid_argument, "windows of a slot store are options of a call"}, i);
            if (l.key_axis != quantization_axis::per_token)
                return placed({errc::invalid_argument,
                               "keys per channel need pages that are filled in order: not in a slot store"},
                              i);
            slot_layer& made = layers_.emplace_back(l, lent.bytes);
            if (const status s = made.make(page(), blocks_, copy_blocks * page(), kernels_, lent.holds_slots,
                                           description_.huge_pages);
                !s)
                return placed(s, i);
        }
        return {};
    }

    // Takes the fp16 copies of one sequence away, but for sinks and window.
    void settle(slot_layer& layer, const slot_sequence& q, const slot_places& places,
                std::int64_t newest) const noexcept {
        const auto sinks = static_cast<std::int64_t>(description_.fp16_sinks),
                   window = static_cast<std::int64_t>(description_.fp16_window);
        for (const std::uint32_t slot : layer.copied.slots()) {
            const std::uint32_t column =
                slot == slot_copies::none ? slot_places::none : places.column_of(slot);
            if (column == slot_places::none)
                continue;
            const std::int64_t at = q.positions.empty() ? std::int64_t{column} : q.positions[column];
            if (at < 0 || (at >= sinks && at + window < newest + 2))
                layer.copied.remove(slot);
        }
    }

    // ---- checks

    [[nodiscard]] status check_slots(std::span<const std::uint32_t> slots) const noexcept {
        for (std::size_t i = 0; i < slots.size(); ++i)
            if (slots[i] >= this->slots())
                return {errc::out_of_range, "no such slot", {.token = static_cast<std::int64_t>(i)}};
        return {};
    }
    // Ascending slots, the usual case, are distinct at a glance.
    [[nodiscard]] static status check_distinct(std::span<const std::uint32_t> slots) noexcept {
        const auto not_less = [](std::uint32_t a, std::uint32_t b) { return a >= b; };
        if (std::adjacent_find(slots.begin(), slots.end(), not_less) == slots.end())
            return {};
        buffer<std::uint32_t> sorted;
        if (!sorted.assign(slots))
            return no_memory();
        std::sort(sorted.begin(), sorted.end());
        const std::uint32_t* const twice = std::adjacent_find(sorted.begin(), sorted.end());
        if (twice == sorted.end())
            return {};
        const auto at = std::find(slots.rbegin(), slots.rend(), *twice);
        return {errc::invalid_argument,
                "a slot comes once in a call",
                {.token = static_cast<std::int64_t>(slots.rend() - at) - 1}};
    }
    [[nodiscard]] status check_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                                   std::size_t bytes) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (const status s = check_slots(slots); !s)
            return placed(s, layer);
        const std::size_t size = raw_bytes(layer);
        if (bytes / size != slots.size() || bytes % size != 0)
            return placed({errc::shape_mismatch, "the buffer has raw_bytes() for each slot"}, layer);
        return {};
    }
    [[nodiscard]] status check_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                                    std::size_t numbers) const noexcept {
        if (layer >= layers())
            return no_such_layer(layer);
        if (!layers_[layer].has_copies)
            return placed({errc::invalid_argument, "the layer has no fp16 copies"}, layer);
        if (const status s = check_slots(slots); !s)
            return placed(s, layer);
        const std::size_t size = fp16_numbers(layer);
        if (numbers / size != slots.size() || numbers % size != 0)
            return placed({errc::shape_mismatch, "the buffer has fp16_numbers() for each slot"}, layer);
        return {};
    }

    [[nodiscard]] status check_write(const layer_description& l, std::span<const std::uint32_t> slots,
                                     std::span<const std::int32_t> positions, const tensor_view& keys,
                                     const tensor_view& values) const noexcept {
        if (keys.has_negative_extent() || values.has_negative_extent())
            return {errc::invalid_argument, rule_extents};
        const bool has_keys = keys.data() != nullptr, has_values = values.data() != nullptr;
        if (l.values_in_keys && has_values)
            return {errc::invalid_argument, "the layer's values lie in its keys"};
        if (!slots.empty() && !has_keys && !has_values)
            return {errc::invalid_argument, "keys and values are not both null"};
        const auto fits_slots = [&](const tensor_view& x, std::size_t channels) -> status {
            if (x.tokens() != slots.size())
                return {errc::shape_mismatch, "one vector of each KV head for each slot"};
            if (x.heads() != l.kv_heads)
                return {errc::shape_mismatch, "keys and values have the layer's number of KV heads"};
            if (x.channels() != channels)
                return {errc::shape_mismatch, "keys and values have the layer's head dims"};
            return {};
        };
        if (has_keys)
            if (const status s = fits_slots(keys, l.key_dim); !s)
                return s;
        if (has_values)
            if (const status s = fits_slots(values, l.value_dim); !s)
                return s;
        if (positions.size() != slots.size() && !positions.empty())
            return {errc::shape_mismatch, "one position for each slot"};
        if (has_keys && keeps_positions(l) && positions.size() != slots.size())
            return {errc::shape_mismatch,
                    "keys whose means turn come with the positions that they turned by"};
        for (std::size_t i = 0; i < positions.size(); ++i)
            if (positions[i] < 0)
                return {errc::invalid_argument,
                        "positions of keys are not negative",
                        {.token = static_cast<std::int64_t>(i)}};
        if (const status s = check_slots(slots); !s)
            return s;
        return check_distinct(slots);
    }

    [[nodiscard]] status check_attention(std::size_t layer, std::span<const slot_stream> streams,
                                         const tensor_view& queries, const mutable_tensor_view& outputs,
                                         const slot_attention_options& o) const noexcept {
        const layer_description& l = layers_[layer].shape();
        if (queries.has_negative_extent() || outputs.has_negative_extent())
            return {errc::invalid_argument, rule_extents};
        if (queries.heads() == 0 || queries.heads() % l.kv_heads != 0)
            return {errc::shape_mismatch, "query heads are a multiple of the KV heads"};
        if (queries.channels() != l.key_dim || outputs.channels() != l.value_dim)
            return {errc::shape_mismatch, "queries and outputs have the layer's head dims"};
        if (outputs.tokens() != queries.tokens() || outputs.heads() != queries.heads())
            return {errc::shape_mismatch, "one output row per query row"};
        if (queries.tokens() != 0 && (queries.data() == nullptr || outputs.data() == nullptr))
            return {errc::invalid_argument, "queries and outputs are not null"};
        std::size_t left = queries.tokens();
        for (const slot_stream& s : streams) {
            if (s.queries > left)
                return {errc::shape_mismatch, "the streams' queries are those of the tensor"};
            left -= s.queries;
        }
        if (left != 0)
            return {errc::shape_mismatch, "the streams' queries are those of the tensor"};
        attention_options with_scale;
        with_scale.scale = o.scale;
        if (!is_finite(store_of(layer).scale(with_scale)))
            return {errc::invalid_argument, "the softmax scale is finite"};
        if (!o.log_sum_exp.empty() && o.log_sum_exp.size() != queries.tokens() * queries.heads())
            return {errc::shape_mismatch, "one log-sum-exp per query row"};
        if (!(o.soft_cap >= 0.0f) || !is_finite(o.soft_cap))
            return {errc::invalid_argument, "the soft cap is finite and not negative"};
        for (const std::span<const float> per_head : {o.alibi_slopes, o.sink_logits}) {
            if (!per_head.empty() && per_head.size() != queries.heads())
                return {errc::shape_mismatch, "one slope, and one sink logit, per query head"};
            if (!std::all_of(per_head.begin(), per_head.end(), [](float x) { return is_finite(x); }))
                return {errc::invalid_argument, "slopes and sink logits are finite"};
        }
        return {};
    }

    slot_store_description description_;
    kernel_set kernels_;
    std::size_t blocks_ = 0;
    fixed_vector<slot_layer> layers_;
    buffer<std::uint32_t> identity_; // 0, 1, 2, ...: the block table of slots as they are numbered
    mutable scratch_pool scratches_;
};

} // namespace kv1::inline KV1_ABI::detail
