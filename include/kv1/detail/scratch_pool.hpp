// SPDX-License-Identifier: Apache-2.0
//
// Memory that a task works in, too large for a thread's stack. It comes in pieces of one size that belong to
// the cache. A task takes a piece when it begins and gives it back when it ends; if none is free, it
// allocates one. A cache begins with one piece, so tasks that run one after the other allocate nothing. A
// piece's contents do not outlive the task.
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

// The piece of a task that appends.
struct append_scratch {
    alignas(64) float converted[max_vector_length]; // one vector as floats, or a batch of shorter ones
    alignas(64) float prepared[max_vector_length];  // one vector, less its mean and rotated
    alignas(64) float means[max_vector_length];     // where means turn: of a vector, or of a batch
    alignas(64) std::uint16_t halves[max_vector_length];
    alignas(64) std::uint8_t codes[4 * max_vector_length]; // of a batch
    row_metadata metadata[max_groups];                     // [vector][group]
    alignas(64) float page[4 * max_vector_length];         // keys of a page, [channel][token]
    alignas(64) float lanes[1024 * tile_tokens], wanted[1024 * tile_tokens];
    alignas(64) std::uint32_t words[256 * tile_tokens];
    alignas(64) std::uint32_t candidate_words[256 * weighted_together * tile_tokens];

    [[nodiscard]] encode_scratch encoder() noexcept { return {1024, lanes, wanted, words, candidate_words}; }
};

class scratch_pool {
public:
    static constexpr std::size_t piece_bytes = (std::max)(sizeof(attention_scratch), sizeof(append_scratch));

    scratch_pool() = default;
    scratch_pool(const scratch_pool&) = delete;
    scratch_pool& operator=(const scratch_pool&) = delete;
    ~scratch_pool() {
        for (place& p : places_)
            discard(p.piece.load(std::memory_order_relaxed));
    }

    // Allocates the first piece. False: no memory.
    [[nodiscard]] bool begin() noexcept {
        void* piece = make();
        if (piece != nullptr)
            give(piece);
        return piece != nullptr;
    }

    // Takes a piece that nobody else has. Null: no memory. Thread-safe.
    [[nodiscard]] void* take() noexcept {
        const std::size_t own = own_place();
        for (std::size_t i = 0; i < places_.size(); ++i) {
            std::atomic<void*>& at = places_[(own + i) % places_.size()].piece;
            if (at.load(std::memory_order_relaxed) != nullptr)
                if (void* piece = at.exchange(nullptr, std::memory_order_acquire))
                    return piece;
        }
        return make();
    }
    void give(void* piece) noexcept {
        const std::size_t own = own_place();
        for (std::size_t i = 0; i < places_.size(); ++i) {
            void* none = nullptr;
            if (places_[(own + i) % places_.size()].piece.compare_exchange_strong(
                    none, piece, std::memory_order_release, std::memory_order_relaxed))
                return;
        }
        discard(piece); // all places are taken
    }

private:
    static constexpr std::size_t alignment = (std::max)(alignof(attention_scratch), alignof(append_scratch));

    // A free piece lies in a place. Each place has a cache line of its own, so that threads that begin at
    // different places do not slow each other down.
    struct alignas(64) place {
        std::atomic<void*> piece{nullptr};
    };

    static void* make() noexcept {
        return ::operator new (piece_bytes, std::align_val_t{alignment}, std::nothrow);
    }
    static void discard(void* piece) noexcept { ::operator delete (piece, std::align_val_t{alignment}); }

    // The place at which this thread begins to look. A thread finds the piece that it gave back, still in its
    // cache.
    static std::size_t own_place() noexcept {
        static thread_local char mark; // its address tells threads apart
        const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(&mark));
        return static_cast<std::size_t>(address * 0x9e3779b97f4a7c15u >> 57);
    }

    std::array<place, 128> places_;
};

// A piece for the time of a task. It tests as false if there was no memory.
class scratch_lease {
public:
    explicit scratch_lease(scratch_pool& pool) noexcept : pool_(pool), piece_(pool.take()) {}
    scratch_lease(const scratch_lease&) = delete;
    scratch_lease& operator=(const scratch_lease&) = delete;
    ~scratch_lease() {
        if (piece_ != nullptr)
            pool_.give(piece_);
    }

    explicit operator bool() const noexcept { return piece_ != nullptr; }
    // The piece as an attention_scratch or append_scratch; its contents are unspecified.
    template <class T>
    [[nodiscard]] T& as() const noexcept {
        static_assert(sizeof(T) <= scratch_pool::piece_bytes && std::is_trivially_destructible_v<T>);
        return *::new (piece_) T;
    }

private:
    scratch_pool& pool_;
    void* piece_;
};

inline status no_scratch() noexcept { return {errc::out_of_memory, "no memory for a task's scratch"}; }

} // namespace kv1::inline KV1_ABI::detail
