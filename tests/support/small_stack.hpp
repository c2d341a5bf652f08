// SPDX-License-Identifier: Apache-2.0
//
// Runs calls on a thread with a small stack that ends at a page that cannot be touched, and measures how much
// of the stack they use.
#pragma once

#include "guarded_memory.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>

namespace kv1_test {

class small_stack {
public:
    /// bytes: stack for the calls, besides what the thread library keeps there.
    explicit small_stack(std::size_t bytes)
        : bytes_(bytes), block_(bytes + kept_by_library(), guarded_end::front) {}

    /// Calls f on that thread, and gives the bytes of stack that it used. f does not throw.
    template <class F>
    std::size_t operator()(F&& f) {
        return run(block_.data(), bytes_ + kept_by_library(), f).used;
    }

    /// The bytes that the thread library keeps on the stack, rounded up.
    [[nodiscard]] static std::size_t kept_by_library() {
        static const std::size_t kept = [] {
            constexpr std::size_t enough = 256 << 10;
            const guarded_block block(enough, guarded_end::front);
            auto nothing = [] {};
            return (run(block.data(), enough, nothing).above + 1023) / 1024 * 1024;
        }();
        return kept;
    }

private:
    struct usage {
        std::size_t used, above; // of the call, by the library
    };
    struct call {
        void (*function)(void*);
        void* object;
        const std::byte* top;
    };
    static void* enter(void* p) {
        auto& c = *static_cast<call*>(p);
        const std::byte here{};
        c.top = &here;
        c.function(c.object);
        return nullptr;
    }

    template <class F>
    static usage run(std::byte* stack, std::size_t bytes, F& f) {
        constexpr int untouched = 0xa5;
        std::memset(stack, untouched, bytes);
        call c{[](void* object) { (*static_cast<std::remove_reference_t<F>*>(object))(); },
               const_cast<void*>(static_cast<const void*>(std::addressof(f))), nullptr};
        pthread_attr_t attributes;
        pthread_t thread;
        if (::pthread_attr_init(&attributes) != 0)
            throw std::runtime_error("pthread_attr_init failed");
        const bool made = ::pthread_attr_setstack(&attributes, stack, bytes) == 0 &&
                          ::pthread_create(&thread, &attributes, enter, &c) == 0;
        ::pthread_attr_destroy(&attributes);
        if (!made || ::pthread_join(thread, nullptr) != 0)
            throw std::runtime_error("no thread with a stack of its own");
        const std::byte* lowest = std::find_if(
            stack, stack + bytes, [](std::byte b) { return b != static_cast<std::byte>(untouched); });
        return {lowest < c.top ? static_cast<std::size_t>(c.top - lowest) : 0,
                static_cast<std::size_t>(stack + bytes - c.top)};
    }

    std::size_t bytes_;
    guarded_block block_;
};

} // namespace kv1_test
