// SPDX-License-Identifier: Apache-2.0
//
// buffer: a growing array of plain values whose allocations report failure instead of throwing, so that one
// code path serves programs with and without exceptions.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

template <class T>
requires std::is_trivially_copyable_v<T>
class buffer {
public:
    buffer() = default;
    buffer(buffer&& other) noexcept
        : items_(std::move(other.items_)), size_(std::exchange(other.size_, 0)),
          capacity_(std::exchange(other.capacity_, 0)) {}
    buffer& operator=(buffer&& other) noexcept {
        items_ = std::move(other.items_);
        size_ = std::exchange(other.size_, 0);
        capacity_ = std::exchange(other.capacity_, 0);
        return *this;
    }

    // Room for n elements, at least doubled where it must grow. False: no memory, nothing changed.
    [[nodiscard]] bool reserve(std::size_t n) noexcept {
        if (n <= capacity_)
            return true;
        if (n > (std::numeric_limits<std::ptrdiff_t>::max)() / sizeof(T))
            return false;
        const std::size_t wanted = n > 2 * capacity_ ? n : 2 * capacity_;
        std::unique_ptr<T[]> grown(new (std::nothrow) T[wanted]);
        if (grown == nullptr)
            return false;
        if (size_ != 0)
            std::memcpy(static_cast<void*>(grown.get()), items_.get(), size_ * sizeof(T));
        items_ = std::move(grown);
        capacity_ = wanted;
        return true;
    }
    [[nodiscard]] bool resize(std::size_t n, const T& value = {}) noexcept {
        if (!reserve(n))
            return false;
        while (size_ < n)
            items_[size_++] = value;
        size_ = n;
        return true;
    }
    [[nodiscard]] bool assign(std::span<const T> other) noexcept {
        if (!reserve(other.size()))
            return false;
        if (!other.empty())
            std::memcpy(static_cast<void*>(items_.get()), other.data(), other.size() * sizeof(T));
        size_ = other.size();
        return true;
    }
    [[nodiscard]] bool try_push_back(const T& value) noexcept {
        if (!reserve(size_ + 1))
            return false;
        items_[size_++] = value;
        return true;
    }
    // Precondition: size() < capacity().
    void push_back(const T& value) noexcept { items_[size_++] = value; }
    void pop_back() noexcept { --size_; }
    void clear() noexcept { size_ = 0; }
    // Shortens, or lengthens within the capacity by elements to be written.
    void set_size(std::size_t n) noexcept { size_ = n; }
    void erase(std::size_t first, std::size_t last) noexcept {
        if (first != last && last != size_)
            std::memmove(static_cast<void*>(items_.get() + first), items_.get() + last,
                         (size_ - last) * sizeof(T));
        size_ -= last - first;
    }
    // Precondition: size() < capacity().
    void insert(std::size_t at, const T& value) noexcept {
        if (at != size_)
            std::memmove(static_cast<void*>(items_.get() + at + 1), items_.get() + at,
                         (size_ - at) * sizeof(T));
        items_[at] = value;
        ++size_;
    }

    [[nodiscard]] T* data() noexcept { return items_.get(); }
    [[nodiscard]] const T* data() const noexcept { return items_.get(); }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
    [[nodiscard]] T& operator[](std::size_t i) noexcept { return items_[i]; }
    [[nodiscard]] const T& operator[](std::size_t i) const noexcept { return items_[i]; }
    [[nodiscard]] T& back() noexcept { return items_[size_ - 1]; }
    [[nodiscard]] T* begin() noexcept { return items_.get(); }
    [[nodiscard]] T* end() noexcept { return items_.get() + size_; }
    [[nodiscard]] const T* begin() const noexcept { return items_.get(); }
    [[nodiscard]] const T* end() const noexcept { return items_.get() + size_; }
    [[nodiscard]] std::span<const T> view() const noexcept { return {items_.get(), size_}; }

private:
    std::unique_ptr<T[]> items_;
    std::size_t size_ = 0, capacity_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
