// SPDX-License-Identifier: Apache-2.0
//
// arena: one allocation, aligned to lines; its memory is not touched until it is used. guarded(): runs code
// that may throw std::bad_alloc and returns a status. advise_huge_pages(): asks the system for large pages.
#pragma once

#include <kv1/detail/memory_source.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kv1::inline KV1_ABI::detail {

template <class F>
status guarded(F&& function) noexcept {
#if KV1_EXCEPTIONS
    try {
        function();
        return {};
    } catch (...) { // no memory, or a size that no allocation can have
        return {errc::out_of_memory, "an allocation failed"};
    }
#else
    function();
    return {};
#endif
}

// Advises the system to back the whole large pages within the range by such pages. Nothing depends on the
// answer.
inline void advise_huge_pages([[maybe_unused]] std::byte* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t huge = std::uintptr_t{1} << 21;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (address + huge - 1) / huge * huge, last = (address + bytes) / huge * huge;
    if (first < last)
        static_cast<void>(::madvise(data + (first - address), last - first, MADV_HUGEPAGE));
#endif
}

class arena {
public:
    // The source outlives the arena.
    explicit arena(memory_source& source) noexcept : source_(&source) {}
    arena(arena&& other) noexcept
        : source_(other.source_), data_(std::exchange(other.data_, nullptr)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    arena& operator=(arena&& other) noexcept {
        std::swap(source_, other.source_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~arena() {
        if (data_ != nullptr)
            source_->deallocate(data_, bytes_);
    }

    // Precondition: nothing is allocated yet, bytes a positive multiple of line_bytes.
    [[nodiscard]] bool allocate(std::size_t bytes) noexcept {
        data_ = source_->allocate(bytes);
        bytes_ = data_ != nullptr ? bytes : 0;
        return data_ != nullptr;
    }

    [[nodiscard]] std::byte* data() noexcept { return data_; }
    [[nodiscard]] const std::byte* data() const noexcept { return data_; }

private:
    memory_source* source_;
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
