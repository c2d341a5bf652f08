// SPDX-License-Identifier: Apache-2.0
//
// arena: one line-aligned allocation, not touched until used. guarded(): runs code that may throw bad_alloc
// and says so with a status. advise_huge_pages(): asks the system for large pages where it can.
#pragma once

#include <kv1/layout.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
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
    } catch (...) { // allocation, or a size that no allocation can have
        return {errc::out_of_memory, "an allocation failed"};
    }
#else
    function();
    return {};
#endif
}

// A hint for the whole large pages within the range; nothing depends on the answer.
inline void advise_huge_pages([[maybe_unused]] std::byte* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t huge = std::uintptr_t{1} << 21;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (address + huge - 1) / huge * huge, last = (address + bytes) / huge * huge;
    if (first < last)
        static_cast<void>(::madvise(data + (first - address), last - first, MADV_HUGEPAGE));
#endif
}

struct alignas(line_bytes) memory_line {
    std::byte bytes[line_bytes];
};

template <class Allocator>
class arena {
    using line_allocator = typename std::allocator_traits<Allocator>::template rebind_alloc<memory_line>;
    using traits = std::allocator_traits<line_allocator>;

public:
    explicit arena(const Allocator& allocator = {}) noexcept : allocator_(allocator) {}
    arena(arena&& other) noexcept
        : allocator_(other.allocator_), lines_(std::exchange(other.lines_, nullptr)),
          count_(std::exchange(other.count_, 0)) {}
    arena& operator=(arena&& other) noexcept {
        std::swap(lines_, other.lines_);
        std::swap(count_, other.count_);
        using std::swap;
        swap(allocator_, other.allocator_);
        return *this;
    }
    ~arena() {
        if (lines_ != nullptr)
            traits::deallocate(allocator_, lines_, count_);
    }

    // Precondition: nothing is allocated yet, bytes a positive multiple of line_bytes.
    [[nodiscard]] bool allocate(std::size_t bytes) noexcept {
        const std::size_t count = bytes / line_bytes;
#if !KV1_EXCEPTIONS
        if constexpr (std::is_same_v<line_allocator, std::allocator<memory_line>>) {
            // what std::allocator does, without its exception
            lines_ =
                static_cast<memory_line*>(::operator new (bytes, std::align_val_t{line_bytes}, std::nothrow));
            count_ = lines_ != nullptr ? count : 0;
            return lines_ != nullptr;
        }
#endif
        const status s = guarded([&] { lines_ = traits::allocate(allocator_, count); });
        count_ = s ? count : 0;
        return static_cast<bool>(s);
    }

    [[nodiscard]] std::byte* data() noexcept { return reinterpret_cast<std::byte*>(lines_); }
    [[nodiscard]] const std::byte* data() const noexcept {
        return reinterpret_cast<const std::byte*>(lines_);
    }

private:
    line_allocator allocator_;
    memory_line* lines_ = nullptr;
    std::size_t count_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
