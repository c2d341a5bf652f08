// SPDX-License-Identifier: Apache-2.0
//
// Writes vectors to slots of a layer, as tasks: one a KV head, or one for all if there are few vectors. A call that
// fails leaves the slots as they were. So all numbers are looked at first. If they are finite and of ordinary size, no
// encoder can refuse them. Else each task keeps the pages that it writes to until all are known to have succeeded.
#pragma once

#include <kv1/detail/append.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/layer_store.hpp>
#include <kv1/detail/slot_layer.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>
#include <kv1/work_plan.hpp>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <span>

namespace kv1::inline KV1_ABI::detail {

class slot_write final : public planned_work {
public:
    // Keys, values, or both; a side without data is left as it is. blocks: 0, 1, 2, ... of the store. Preconditions:
    // slots are those of the layer, none twice; the tensors fit, and positions if the layer has any.
    slot_write(slot_layer& layer, const layer_store& store, const std::uint32_t* blocks,
               std::span<const std::uint32_t> slots, std::span<const std::int32_t> positions,
               const tensor_view& keys, const tensor_view& values) noexcept
        : layer_(layer), store_(store), blocks_(blocks), slots_(slots), positions_(positions), keys_(keys),
          values_(values) {}
    slot_write(const slot_write&) = delete;
    slot_write& operator=(const slot_write&) = delete;
    ~slot_write() override {
        if (!finished_)
            undo();
    }

    // Makes pages and fp16 copies ready. Errors: capacity_exceeded (no room for fp16 copies), out_of_memory.
    [[nodiscard]] status prepare() noexcept {
        const std::size_t n = slots_.size();
        heads_.reset(new (std::nothrow) head_state[task_count()]);
        if (heads_ == nullptr)
            return no_memory();
        if (layer_.has_copies) {
            std::size_t needed = 0;
            for (const std::uint32_t slot : slots_)
                needed += layer_.copied.of(slot) == slot_copies::none ? 1 : 0;
            if (needed > layer_.copied.free())
                return {errc::capacity_exceeded, "no room for fp16 copies: settle() or flush() makes some"};
            if (!copy_slots_.resize(n) || !fresh_.reserve(needed))
                return no_memory();
            for (std::size_t i = 0; i < n; ++i) {
                std::uint32_t copy = layer_.copied.of(slots_[i]);
                if (copy == slot_copies::none) {
                    copy = layer_.copied.add(slots_[i]);
                    fresh_.push_back(slots_[i]);
                }
                copy_slots_[i] = copy;
                layer_.begin_copy(copy);
            }
        }
        for (const std::uint32_t slot : slots_)
            layer_.begin(slot);
        return {};
    }

    [[nodiscard]] std::size_t phases() const noexcept override { return 2; }
    [[nodiscard]] std::size_t tasks(std::size_t) const noexcept override { return task_count(); }

    void run(std::size_t phase, std::size_t task) noexcept override {
        if (phase == 0)
            inspect(task);
        else if (!refused_.load(std::memory_order_relaxed))
            write(task);
    }

    status finish() noexcept override {
        finished_ = true;
        status s;
        for (std::size_t task = 0; s && task < task_count(); ++task) {
            s = heads_[task].failure;
            // a task had no scratch: others had it, and are done
            if (!s && s.code() == errc::out_of_memory && !refused_.load(std::memory_order_relaxed)) {
                write(task);
                s = heads_[task].failure;
            }
        }
        if (!s)
            undo();
        for (std::size_t i = 0; s && keys_.data() != nullptr && i < positions_.size(); ++i)
            layer_.set_position(slots_[i], positions_[i]);
        return s;
    }

private:
    // A page of one KV head as it was.
    struct kept_page {
        std::byte* page;
        std::size_t at, bytes; // in the task's buffer
    };
    struct head_state {
        status failure;
        bool kept = false; // all pages are kept
        buffer<kept_page> pages;
        buffer<std::byte> bytes;
    };

    static status no_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }

    [[nodiscard]] bool together() const noexcept { return slots_.size() < tile_tokens; }
    [[nodiscard]] std::size_t task_count() const noexcept { return together() ? 1 : layer_.body.kv_heads; }
    [[nodiscard]] std::size_t first_head(std::size_t task) const noexcept { return together() ? 0 : task; }
    [[nodiscard]] std::size_t last_head(std::size_t task) const noexcept {
        return together() ? layer_.body.kv_heads : task + 1;
    }

    template <class F>
    void for_each_side(F&& f) const noexcept {
        if (keys_.data() != nullptr)
            f(kv_side::key, keys_);
        if (values_.data() != nullptr)
            f(kv_side::value, values_);
    }

    // Looks for numbers that are not finite, and for large ones.
    void inspect(std::size_t task) noexcept {
        head_state& state = heads_[task];
        const target_kernels& kernels = store_.kernels();
        for_each_side([&](kv_side side, const tensor_view& x) {
            const float limit = layer_.always_fits(side);
            for (std::size_t head = first_head(task); head < last_head(task); ++head)
                for (std::size_t i = 0; state.failure && i < x.tokens(); ++i) {
                    float some[256];
                    const auto* at = static_cast<const std::byte*>(x.at(i, head));
                    const std::size_t size = x.type() == scalar_type::fp32 ? 4 : 2;
                    for (std::size_t c = 0; c < x.channels(); c += std::size(some)) {
                        const std::size_t n = (std::min)(std::size(some), x.channels() - c);
                        kernels.load_floats(x.type(), at + c * size, n, some);
                        std::uint32_t largest = 0; // by magnitude bits, NaN above infinity
                        for (std::size_t k = 0; k < n; ++k)
                            largest =
                                (std::max)(largest, std::bit_cast<std::uint32_t>(some[k]) & 0x7fffffffu);
                        if (largest >= 0x7f800000u) {
                            state.failure = append_error(
                                {errc::non_finite, rule_finite, c + first_non_finite({some, n}), {}}, head,
                                i);
                            refused_.store(true, std::memory_order_relaxed);
                            return;
                        }
                        if (!(std::bit_cast<float>(largest) <= limit))
                            careful_.store(true, std::memory_order_relaxed);
                    }
                }
        });
    }

    void write(std::size_t task) noexcept {
        head_state& state = heads_[task];
        state.failure = {};
        if (careful_.load(std::memory_order_relaxed) && !state.kept) {
            state.pages.clear();
            state.bytes.clear();
            state.failure = keep_pages(task);
            state.kept = static_cast<bool>(state.failure);
        }
        layer_store::destination to{{blocks_, 0, slots_.data()}, {blocks_, 0, copy_slots_.data()}};
        to.positions = layer_.has_positions ? positions_.data() : nullptr;
        for_each_side([&](kv_side side, const tensor_view& x) {
            if (state.failure)
                state.failure = store_.write_side(side, to, x, first_head(task), last_head(task));
        });
    }

    // Copies what a task is going to change.
    [[nodiscard]] status keep_pages(std::size_t task) noexcept {
        head_state& state = heads_[task];
        const auto keep = [&](plane& p, std::span<const std::uint32_t> slots) {
            const std::size_t page = p.layout.page_tokens();
            for (std::size_t i = 0; i < slots.size(); ++i) {
                const std::size_t block = slots[i] / page;
                if (i != 0 && slots[i - 1] / page == block)
                    continue;
                for (std::size_t head = first_head(task); head < last_head(task); ++head) {
                    const std::size_t at = state.bytes.size();
                    std::byte* from = p.page(static_cast<std::uint32_t>(block), head);
                    if (!state.bytes.reserve(at + p.layout.bytes()) ||
                        !state.pages.try_push_back({from, at, p.layout.bytes()}))
                        return false;
                    state.bytes.set_size(at + p.layout.bytes());
                    std::memcpy(state.bytes.data() + at, from, p.layout.bytes());
                }
            }
            return true;
        };
        return keep(layer_.body, slots_) && keep(layer_.copies, copy_slots_.view()) ? status{} : no_memory();
    }

    void undo() noexcept {
        for (std::size_t task = 0; heads_ != nullptr && task < task_count(); ++task) {
            const head_state& state = heads_[task];
            if (!state.kept)
                continue;
            for (std::size_t i = state.pages.size(); i-- > 0;) // what was kept first is oldest
                std::memcpy(state.pages[i].page, state.bytes.data() + state.pages[i].at,
                            state.pages[i].bytes);
        }
        for (const std::uint32_t slot : fresh_)
            layer_.copied.remove(slot);
    }

    slot_layer& layer_;
    layer_store store_;
    const std::uint32_t* blocks_;
    std::span<const std::uint32_t> slots_;
    std::span<const std::int32_t> positions_;
    tensor_view keys_, values_;
    buffer<std::uint32_t> copy_slots_; // of the copies, [slots]; empty: the layer has none
    buffer<std::uint32_t> fresh_;      // slots that had no copy before
    std::unique_ptr<head_state[]> heads_;
    std::atomic<bool> refused_{false}; // a number is not finite
    std::atomic<bool> careful_{false}; // a vector may be refused
    bool finished_ = false;
};

} // namespace kv1::inline KV1_ABI::detail
