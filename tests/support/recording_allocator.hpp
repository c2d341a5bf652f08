// SPDX-License-Identifier: Apache-2.0
//
// An allocator for caches that lets a test look into the arenas, and that can be told to fail.
#pragma once

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <vector>

namespace kv1_test {

/// The state that all copies of an allocator share.
struct allocation_log {
    std::size_t allowed = std::numeric_limits<std::size_t>::max(); // allocations before the first that fails
    std::size_t made = 0, freed = 0;
    std::vector<std::span<std::byte>> living;
};

template <class T>
class recording_allocator {
public:
    using value_type = T;

    explicit recording_allocator(allocation_log& log) noexcept : log_(&log) {}
    recording_allocator() noexcept : log_(&unused()) {}
    template <class U>
    recording_allocator(const recording_allocator<U>& other) noexcept : log_(&other.log()) {}

    T* allocate(std::size_t n) {
        if (log_->made >= log_->allowed)
            throw std::bad_alloc();
        auto* p = static_cast<std::byte*>(::operator new (n * sizeof(T), std::align_val_t{alignof(T)}));
        std::memset(p, 0, n * sizeof(T));
        log_->living.emplace_back(p, n * sizeof(T));
        ++log_->made;
        return reinterpret_cast<T*>(p);
    }
    void deallocate(T* p, std::size_t) noexcept {
        auto* const bytes = reinterpret_cast<std::byte*>(p);
        std::erase_if(log_->living, [&](const auto& span) { return span.data() == bytes; });
        ++log_->freed;
        ::operator delete (p, std::align_val_t{alignof(T)});
    }
    [[nodiscard]] allocation_log& log() const noexcept { return *log_; }
    friend bool operator==(const recording_allocator& a, const recording_allocator& b) {
        return a.log_ == b.log_;
    }

private:
    static allocation_log& unused() noexcept {
        static allocation_log log;
        return log;
    }
    allocation_log* log_;
};

/// A cache of any format whose arenas a test can read.
using open_cache = kv1::basic_kv_cache<kv1::all_formats, recording_allocator<std::byte>>;

/// All bytes of all arenas, layer by layer.
inline std::vector<std::byte> arena_bytes(const allocation_log& log) {
    std::vector<std::byte> all;
    for (const std::span<std::byte> arena : log.living)
        all.insert(all.end(), arena.begin(), arena.end());
    return all;
}

} // namespace kv1_test
