// SPDX-License-Identifier: Apache-2.0
//
// slot_table: objects behind handles that name a slot and a generation. Objects never move, and find() takes
// no lock, so a handle can be resolved while other threads create and destroy other objects. A slot's
// generation is odd while its object lives: handle {3, 5} is stale once slot 3 has generation 6. A slot that
// runs out of generations is not used again, so a stale handle stays stale.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/sequence_id.hpp>

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// A slot's T is default-constructed once, and later objects of the slot use it again.
template <class T>
class slot_table {
public:
    slot_table() = default;
    slot_table(const slot_table&) = delete;
    slot_table& operator=(const slot_table&) = delete;
    ~slot_table() {
        for (auto& chunk : chunks_)
            delete[] chunk.load(std::memory_order_relaxed);
    }

    // Takes a free slot, whose object does not live yet. Nothing: no memory. Thread-safe.
    [[nodiscard]] std::optional<std::uint32_t> reserve() noexcept {
        const std::lock_guard lock(mutex_);
        if (!free_.empty()) {
            const std::uint32_t slot = free_.back();
            free_.pop_back();
            return slot;
        }
        const std::uint32_t slot = count_.load(std::memory_order_relaxed);
        const place at = place_of(slot);
        if (at.chunk >= chunks_.size() ||
            !free_.reserve(slot + std::size_t{1})) // to be put back without fail
            return std::nullopt;
        if (chunks_[at.chunk].load(std::memory_order_relaxed) == nullptr) {
            entry* fresh = new (std::nothrow) entry[first_chunk << at.chunk];
            if (fresh == nullptr)
                return std::nullopt;
            chunks_[at.chunk].store(fresh, std::memory_order_release);
        }
        count_.store(slot + 1, std::memory_order_release);
        return slot;
    }
    // Gives back a reserved slot without publishing it.
    void cancel(std::uint32_t slot) noexcept {
        const std::lock_guard lock(mutex_);
        free_.push_back(slot);
    }
    // Makes the object of a reserved slot live, and gives its handle.
    [[nodiscard]] sequence_id publish(std::uint32_t slot) noexcept {
        entry& e = at(slot);
        const std::uint32_t generation = e.generation.load(std::memory_order_relaxed) + 1;
        e.generation.store(generation, std::memory_order_release);
        return {slot, generation};
    }
    // Makes a handle stale and gives its object, which the caller empties before recycle(). Null: the handle
    // was stale.
    [[nodiscard]] T* retire(sequence_id id) noexcept {
        if (!known(id))
            return nullptr;
        entry& e = at(id.slot);
        std::uint32_t expected = id.generation;
        return e.generation.compare_exchange_strong(expected, id.generation + 1, std::memory_order_acq_rel)
                   ? &e.object
                   : nullptr;
    }
    void recycle(std::uint32_t slot) noexcept {
        if (at(slot).generation.load(std::memory_order_relaxed) >= last_generation)
            return;
        const std::lock_guard lock(mutex_);
        free_.push_back(slot);
    }

    [[nodiscard]] T* find(sequence_id id) noexcept { return const_cast<T*>(std::as_const(*this).find(id)); }
    [[nodiscard]] const T* find(sequence_id id) const noexcept {
        if (!known(id))
            return nullptr;
        const entry& e = at(id.slot);
        return e.generation.load(std::memory_order_acquire) == id.generation ? &e.object : nullptr;
    }
    [[nodiscard]] T& object(std::uint32_t slot) noexcept { return at(slot).object; }

    // f(handle, object) for every object alive.
    template <class F>
    void for_each(F&& f) const noexcept {
        const std::uint32_t n = count_.load(std::memory_order_acquire);
        for (std::uint32_t slot = 0; slot < n; ++slot) {
            const entry& e = at(slot);
            const std::uint32_t generation = e.generation.load(std::memory_order_acquire);
            if (generation % 2 != 0)
                f(sequence_id{slot, generation}, e.object);
        }
    }

private:
    struct entry {
        std::atomic<std::uint32_t> generation{0};
        T object{};
    };
    struct place {
        std::size_t chunk, index;
    };
    static constexpr std::size_t first_chunk = 32; // chunk k has 32 * 2^k slots
    static constexpr std::uint32_t last_generation = (std::numeric_limits<std::uint32_t>::max)() - 1;

    static place place_of(std::uint32_t slot) noexcept {
        const std::size_t n = slot / first_chunk + 1;
        const auto chunk = static_cast<std::size_t>(std::bit_width(n) - 1);
        return {chunk, slot - first_chunk * ((std::size_t{1} << chunk) - 1)};
    }
    [[nodiscard]] bool known(sequence_id id) const noexcept {
        return id.generation % 2 != 0 && id.slot < count_.load(std::memory_order_acquire);
    }
    [[nodiscard]] entry& at(std::uint32_t slot) noexcept {
        const place p = place_of(slot);
        return chunks_[p.chunk].load(std::memory_order_acquire)[p.index];
    }
    [[nodiscard]] const entry& at(std::uint32_t slot) const noexcept {
        const place p = place_of(slot);
        return chunks_[p.chunk].load(std::memory_order_acquire)[p.index];
    }

    std::array<std::atomic<entry*>, 26> chunks_{};
    std::atomic<std::uint32_t> count_{0};
    std::mutex mutex_; // of free_ and of growing
    buffer<std::uint32_t> free_;
};

} // namespace kv1::inline KV1_ABI::detail
