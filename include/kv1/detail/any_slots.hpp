// SPDX-License-Identifier: Apache-2.0
//
// any_slots: a slot store without its types, as basic_slot_store holds it. make_slots() makes one. Where the kernels are
// compiled apart, it is an interface, whose only class kernels.hpp compiles (any_cache.hpp says why).
#pragma once

#include <kv1/cache_views.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/executor.hpp>
#include <kv1/float16.hpp>
#include <kv1/layout.hpp>
#include <kv1/slot_store_description.hpp>
#include <kv1/slot_views.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>
#include <kv1/work_plan.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#if defined(KV1_EXTERNAL_KERNELS)

namespace kv1::KV1_KERNELS_ABI {

// slot_core has the same functions.
class any_slots {
public:
    any_slots() = default;
    any_slots(const any_slots&) = delete;
    any_slots& operator=(const any_slots&) = delete;
    virtual ~any_slots() = default;

    [[nodiscard]] virtual const slot_store_description& description() const noexcept = 0;
    [[nodiscard]] virtual std::size_t layers() const noexcept = 0;
    [[nodiscard]] virtual const page_layout& layout(std::size_t layer) const noexcept = 0;
    [[nodiscard]] virtual std::size_t slots() const noexcept = 0;

    // ---- write
    virtual status write(std::size_t layer, std::span<const std::uint32_t> slots,
                         std::span<const std::int32_t> positions, const tensor_view& keys,
                         const tensor_view& values, detail::executor_view run) noexcept = 0;
    [[nodiscard]] virtual result<std::unique_ptr<planned_work>>
    plan_write(std::size_t layer, std::span<const std::uint32_t> slots,
               std::span<const std::int32_t> positions, const tensor_view& keys,
               const tensor_view& values) noexcept = 0;

    // ---- attend
    virtual status attend(std::size_t layer, std::span<const slot_stream> streams, const tensor_view& queries,
                          const mutable_tensor_view& outputs, const slot_attention_options& options,
                          detail::executor_view run) const noexcept = 0;
    [[nodiscard]] virtual result<std::unique_ptr<planned_work>>
    plan_attention(std::size_t layer, std::span<const slot_stream> streams, const tensor_view& queries,
                   const mutable_tensor_view& outputs,
                   const slot_attention_options& options) const noexcept = 0;

    // ---- fp16 copies
    virtual status settle(std::span<const slot_sequence> sequences) noexcept = 0;
    virtual status release(std::span<const std::uint32_t> slots) noexcept = 0;
    virtual void flush() noexcept = 0;
    [[nodiscard]] virtual bool has_fp16(std::size_t layer, std::uint32_t slot) const noexcept = 0;
    [[nodiscard]] virtual std::size_t fp16_slots_in_use(std::size_t layer) const noexcept = 0;

    // ---- rows and pages
    virtual status read(std::size_t layer, kv_side side, std::size_t kv_head,
                        std::span<const std::uint32_t> slots, std::span<float> out) const noexcept = 0;
    [[nodiscard]] virtual std::size_t raw_bytes(std::size_t layer) const noexcept = 0;
    virtual status export_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                              std::span<std::byte> out) const noexcept = 0;
    virtual status import_raw(std::size_t layer, std::span<const std::uint32_t> slots,
                              std::span<const std::byte> in) noexcept = 0;
    [[nodiscard]] virtual std::int32_t key_position(std::size_t layer, std::uint32_t slot) const noexcept = 0;
    [[nodiscard]] virtual std::size_t fp16_numbers(std::size_t layer) const noexcept = 0;
    virtual status export_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                               std::span<float16> out) const noexcept = 0;
    virtual status import_fp16(std::size_t layer, std::span<const std::uint32_t> slots,
                               std::span<const float16> in) noexcept = 0;
    [[nodiscard]] virtual result<std::span<const std::byte>>
    page_bytes(std::size_t layer, std::size_t kv_head, std::size_t block) const noexcept = 0;

    // ---- copy and clear
    virtual status copy(std::size_t layer, std::span<const std::uint32_t> from,
                        std::span<const std::uint32_t> to, bool moves) noexcept = 0;
    virtual status clear(std::size_t layer, std::span<const std::uint32_t> slots) noexcept = 0;
    virtual void clear() noexcept = 0;
};

template <class = void>
struct external_slots {
    // Of a detail::slots_request.
    static void make(void* request) noexcept;
};
extern template struct external_slots<>;

} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI::detail {

using KV1_KERNELS_ABI::any_slots;

// What make_slots() asks external_slots for, and what comes back.
struct slots_request {
    slot_store_description* description; // moved from
    std::span<const slot_memory> memory;
    std::uint32_t formats;             // that the store may use: a format_mask
    std::unique_ptr<any_slots> made{}; // where there is none: why
    status failure{};
};

template <class Formats>
[[nodiscard]] result<std::unique_ptr<any_slots>> make_slots(slot_store_description&& description,
                                                            std::span<const slot_memory> memory) noexcept {
    slots_request r{&description, memory, format_mask<Formats>()};
    KV1_KERNELS_ABI::external_slots<>::make(&r);
    if (r.made == nullptr)
        return r.failure;
    return std::move(r.made);
}

} // namespace kv1::inline KV1_ABI::detail

#else

#include <kv1/detail/slot_core.hpp>

namespace kv1::inline KV1_ABI::detail {

using any_slots = slot_core;

template <class Formats>
[[nodiscard]] result<std::unique_ptr<any_slots>> make_slots(slot_store_description&& description,
                                                            std::span<const slot_memory> memory) noexcept {
    return slot_core::create(std::move(description), memory, kernel_set::of<Formats>());
}

} // namespace kv1::inline KV1_ABI::detail

#endif
