// SPDX-License-Identifier: Apache-2.0
//
// What tasks need while they run, and a thread's stack is too small for. Blocks of one size belong to the
// cache and serve any of its tasks, one at a time: a cache begins with one, a task that finds none makes
// another, and what is given back is used again. Nothing that they hold outlives a task.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/quantizer.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

namespace kv1::inline KV1_ABI::detail {

// Of a task that appends.
struct append_scratch {
    alignas(64) float converted[max_head_dim]; // a vector as floats, or a batch of them
    alignas(64) float prepared[max_head_dim];  // a vector less its mean, rotated
    alignas(64) std::uint16_t halves[max_head_dim];
    alignas(64) std::uint8_t codes[4 * max_vector_length]; // of a batch
    row_metadata metadata[max_groups];                     // [row][group]
    alignas(64) float page[4 * max_vector_length];         // channels of a page's keys
    alignas(64) float lanes[1024 * tile_tokens], errors[1024 * tile_tokens];
    alignas(64) std::uint32_t words[256 * tile_tokens], candidate_words[256 * tile_tokens];

    [[nodiscard]] encode_scratch encoder() noexcept { return {1024, lanes, errors, words, candidate_words}; }
};

class scratch_pool {
public:
    static constexpr std::size_t block_bytes = (std::max)(sizeof(attention_scratch), sizeof(append_scratch));

    scratch_pool() = default;
    scratch_pool(const scratch_pool&) = delete;
    scratch_pool& operator=(const scratch_pool&) = delete;
    ~scratch_pool() {
        for (place& p : places_)
            discard(p.block.load(std::memory_order_relaxed));
    }

    // One block, so that tasks that run one after the other allocate nothing. False: no memory.
    [[nodiscard]] bool begin() noexcept {
        void* block = make();
        if (block != nullptr)
            give(block);
        return block != nullptr;
    }

    // A block that nobody else has; null: no memory. From any thread.
    [[nodiscard]] void* take() noexcept {
        const std::size_t own = own_place();
        for (std::size_t i = 0; i < places_.size(); ++i) {
            std::atomic<void*>& at = places_[(own + i) % places_.size()].block;
            if (at.load(std::memory_order_relaxed) != nullptr)
                if (void* block = at.exchange(nullptr, std::memory_order_acquire))
                    return block;
        }
        return make();
    }
    void give(void* block) noexcept {
        const std::size_t own = own_place();
        for (std::size_t i = 0; i < places_.size(); ++i) {
            void* none = nullptr;
            if (places_[(own + i) % places_.size()].block.compare_exchange_strong(
                    none, block, std::memory_order_release, std::memory_order_relaxed))
                return;
        }
        discard(block); // more tasks at once than places
    }

private:
    static constexpr std::size_t alignment = (std::max)(alignof(attention_scratch), alignof(append_scratch));

    // A place a cache line: threads do not meet there, since each begins at one of its own.
    struct alignas(64) place {
        std::atomic<void*> block{nullptr};
    };

    static void* make() noexcept {
        return ::operator new (block_bytes, std::align_val_t{alignment}, std::nothrow);
    }
    static void discard(void* block) noexcept { ::operator delete (block, std::align_val_t{alignment}); }

    // Where a thread begins to look: it finds the block that it gave back, warm in its cache.
    static std::size_t own_place() noexcept {
        static thread_local char mark; // nothing but an address that no other thread has
        const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(&mark));
        return static_cast<std::size_t>(address * 0x9e3779b97f4a7c15u >> 57);
    }

    std::array<place, 128> places_;
};

// A block for the time of a task, or none where there is no memory.
class scratch_lease {
public:
    explicit scratch_lease(scratch_pool& pool) noexcept : pool_(pool), block_(pool.take()) {}
    scratch_lease(const scratch_lease&) = delete;
    scratch_lease& operator=(const scratch_lease&) = delete;
    ~scratch_lease() {
        if (block_ != nullptr)
            pool_.give(block_);
    }

    explicit operator bool() const noexcept { return block_ != nullptr; }
    // The block as an attention_scratch or append_scratch; its contents are unspecified.
    template <class T>
    [[nodiscard]] T& as() const noexcept {
        static_assert(sizeof(T) <= scratch_pool::block_bytes && std::is_trivially_destructible_v<T>);
        return *::new (block_) T;
    }

private:
    scratch_pool& pool_;
    void* block_;
};

inline status no_scratch() noexcept { return {errc::out_of_memory, "no memory for a task's scratch"}; }

} // namespace kv1::inline KV1_ABI::detail
