// SPDX-License-Identifier: Apache-2.0
//
// memory_source: gives memory for a cache's arenas, and hides the type of the user's allocator.
// allocator_memory: a memory_source that asks such an allocator.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/layout.hpp>

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

// In the namespace that translation units with different flags share (kernels/registry.hpp).
namespace kv1::KV1_KERNELS_ABI {

// Memory in whole lines, aligned to them. Sizes are positive multiples of line_bytes.
class memory_source {
public:
    memory_source() = default;
    memory_source(const memory_source&) = delete;
    memory_source& operator=(const memory_source&) = delete;
    virtual ~memory_source() = default;

    // Null: no memory.
    [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) noexcept = 0;
    // `data` came from allocate(bytes).
    virtual void deallocate(std::byte* data, std::size_t bytes) noexcept = 0;
};

} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI::detail {

using KV1_KERNELS_ABI::memory_source;

struct alignas(line_bytes) memory_line {
    std::byte bytes[line_bytes];
};

template <class Allocator>
class allocator_memory final : public memory_source {
    using line_allocator = typename std::allocator_traits<Allocator>::template rebind_alloc<memory_line>;
    using traits = std::allocator_traits<line_allocator>;

public:
    explicit allocator_memory(const Allocator& allocator) noexcept : allocator_(allocator) {}

    std::byte* allocate(std::size_t bytes) noexcept override {
#if KV1_EXCEPTIONS
        try {
            return reinterpret_cast<std::byte*>(traits::allocate(allocator_, bytes / line_bytes));
        } catch (...) { // whatever the allocator throws
            return nullptr;
        }
#else
        if constexpr (std::is_same_v<line_allocator, std::allocator<memory_line>>) // without its exception
            return static_cast<std::byte*>(
                ::operator new (bytes, std::align_val_t{line_bytes}, std::nothrow));
        else
            return reinterpret_cast<std::byte*>(traits::allocate(allocator_, bytes / line_bytes));
#endif
    }
    void deallocate(std::byte* data, std::size_t bytes) noexcept override {
        traits::deallocate(allocator_, reinterpret_cast<memory_line*>(data), bytes / line_bytes);
    }

private:
    line_allocator allocator_;
};

} // namespace kv1::inline KV1_ABI::detail
