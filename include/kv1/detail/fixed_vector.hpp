// SPDX-License-Identifier: Apache-2.0
//
// fixed_vector: room for a number of objects that is known beforehand. Nothing moves, so they may refer to
// each other and need not be movable; and the one allocation reports failure instead of throwing.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

template <class T>
class fixed_vector {
public:
    fixed_vector() = default;
    fixed_vector(const fixed_vector&) = delete;
    fixed_vector& operator=(const fixed_vector&) = delete;
    ~fixed_vector() {
        std::destroy_n(items_, size_);
        ::operator delete(items_, alignment);
    }

    // Room for n objects; the first call that succeeds is the last one. False: no memory.
    [[nodiscard]] bool reserve(std::size_t n) noexcept {
        if (n > (std::numeric_limits<std::ptrdiff_t>::max)() / sizeof(T))
            return false;
        items_ = static_cast<T*>(::operator new(n * sizeof(T), alignment, std::nothrow));
        return items_ != nullptr;
    }
    // Precondition: there is room.
    template <class... Args>
    T& emplace_back(Args&&... args) noexcept {
        return *::new (static_cast<void*>(items_ + size_++)) T{std::forward<Args>(args)...};
    }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] T* data() noexcept { return items_; }
    [[nodiscard]] const T* data() const noexcept { return items_; }
    [[nodiscard]] T& operator[](std::size_t i) noexcept { return items_[i]; }
    [[nodiscard]] const T& operator[](std::size_t i) const noexcept { return items_[i]; }
    [[nodiscard]] T& back() noexcept { return items_[size_ - 1]; }
    [[nodiscard]] T* begin() noexcept { return items_; }
    [[nodiscard]] T* end() noexcept { return items_ + size_; }
    [[nodiscard]] const T* begin() const noexcept { return items_; }
    [[nodiscard]] const T* end() const noexcept { return items_ + size_; }

private:
    static constexpr std::align_val_t alignment{alignof(T)};

    T* items_ = nullptr;
    std::size_t size_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
