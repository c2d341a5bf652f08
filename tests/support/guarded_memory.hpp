// SPDX-License-Identifier: Apache-2.0
//
// Memory between pages that cannot be touched: code that reads or writes past the guarded end stops the
// program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace kv1_test {

/// The end of the memory that lies exactly at a forbidden page. The other end is less than a page away from
/// one.
enum class guarded_end { front, back };

class guarded_block {
public:
    guarded_block(std::size_t bytes, guarded_end end) {
        const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
        const std::size_t room = (bytes + page - 1) / page * page;
        size_ = room + 2 * page;
        void* const p = ::mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            throw std::bad_alloc();
        start_ = static_cast<std::byte*>(p);
        writable_ = {start_ + page, room};
        protect(PROT_READ | PROT_WRITE);
        data_ = end == guarded_end::front ? writable_.data() : writable_.data() + room - bytes;
    }
    guarded_block(const guarded_block&) = delete;
    guarded_block& operator=(const guarded_block&) = delete;
    ~guarded_block() { ::munmap(start_, size_); }

    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    /// Forbids writing to the memory, or permits it.
    void read_only(bool on) { protect(on ? PROT_READ : PROT_READ | PROT_WRITE); }

private:
    void protect(int how) {
        if (!writable_.empty() && ::mprotect(writable_.data(), writable_.size(), how) != 0)
            throw std::runtime_error("mprotect failed");
    }

    std::byte* start_ = nullptr;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    std::span<std::byte> writable_;
};

/// A copy of numbers in guarded memory.
template <class T>
class guarded_array {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    guarded_array(std::size_t n, guarded_end end) : block_(n * sizeof(T), end), n_(n) {
        std::uninitialized_fill_n(data(), n, T{});
    }
    guarded_array(std::span<const T> source, guarded_end end) : guarded_array(source.size(), end) {
        std::copy(source.begin(), source.end(), data());
    }
    [[nodiscard]] T* data() const noexcept { return reinterpret_cast<T*>(block_.data()); }
    [[nodiscard]] std::span<T> span() const noexcept { return {data(), n_}; }

private:
    guarded_block block_;
    std::size_t n_;
};

/// An allocator that puts arenas into guarded memory. Copies of an allocator share the list of arenas.
struct guarded_arenas {
    guarded_end end = guarded_end::back;
    std::vector<guarded_block*> living;

    void read_only(bool on) {
        for (guarded_block* b : living)
            b->read_only(on);
    }
};

template <class T>
class guarded_allocator {
public:
    using value_type = T;

    explicit guarded_allocator(guarded_arenas& arenas) noexcept : arenas_(&arenas) {}
    template <class U>
    guarded_allocator(const guarded_allocator<U>& other) noexcept : arenas_(&other.arenas()) {}

    T* allocate(std::size_t n) {
        auto* const block = new guarded_block(n * sizeof(T), arenas_->end);
        arenas_->living.push_back(block);
        return reinterpret_cast<T*>(block->data());
    }
    void deallocate(T* p, std::size_t) noexcept {
        auto* const data = reinterpret_cast<std::byte*>(p);
        std::erase_if(arenas_->living, [&](guarded_block* b) {
            const bool found = b->data() == data;
            if (found)
                delete b;
            return found;
        });
    }
    [[nodiscard]] guarded_arenas& arenas() const noexcept { return *arenas_; }
    friend bool operator==(const guarded_allocator& a, const guarded_allocator& b) {
        return a.arenas_ == b.arenas_;
    }

private:
    guarded_arenas* arenas_;
};

} // namespace kv1_test
