// SPDX-License-Identifier: Apache-2.0
//
// How a caller lends its threads. kv1 owns none: calls that can be split take an executor, any callable
//
//   void operator()(std::size_t count, kv1::task_view task);
//
// that calls task(0) ... task(count - 1), each once, in any order, on any threads, and returns when all are
// done. Tasks do not throw and do not block. How work is split depends on shapes alone, never on the
// executor, so that results are the same bits for any number of workers.
//
// Stack. Every call of the library, a task included, makes do with 64 KiB of its thread's stack; in builds
// without optimization, where compilers share no place among values, with 256. A thread needs beside it what
// the thread library keeps there (glibc 5 KiB, and the program's thread-local variables) and what the
// caller's own functions take. What does not fit lies in blocks that the cache owns: it begins with one, a
// task that runs beside others may allocate another, and up to 128 are kept for later tasks.
#pragma once

#include <kv1/detail/config.hpp>

#include <concepts>
#include <cstddef>
#include <memory>
#include <type_traits>

namespace kv1::inline KV1_ABI {

/// Non-owning reference to a function of the task's index; valid during the call it is passed to.
class task_view {
public:
    /// Refers to any function of an index. The function outlives the view.
    template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, task_view> &&
             std::invocable<F&, std::size_t>) constexpr task_view(F& function) noexcept
        : object_(const_cast<void*>(static_cast<const void*>(std::addressof(function)))),
          call_([](void* object, std::size_t i) { (*static_cast<F*>(object))(i); }) {}

    /// Calls the function.
    void operator()(std::size_t i) const { call_(object_, i); }

private:
    void* object_;
    void (*call_)(void*, std::size_t);
};

/// What a call that can be split accepts.
template <class E>
concept executor = std::invocable<E&, std::size_t, task_view>;

/// Runs the tasks one after the other on the calling thread.
struct inline_executor {
    /// Runs task(0) ... task(count - 1) in order.
    void operator()(std::size_t count, task_view task) const {
        for (std::size_t i = 0; i < count; ++i)
            task(i);
    }
};

static_assert(executor<inline_executor>);

namespace detail {

// Non-owning reference to an executor: what is inside the library need not know its type.
class executor_view {
public:
    template <class E>
    requires(!std::same_as<std::remove_cv_t<E>, executor_view> && executor<E>) executor_view(E& run)
    noexcept
        : object_(const_cast<void*>(reinterpret_cast<const volatile void*>(std::addressof(run)))),
          call_([](void* object, std::size_t count, task_view task) {
              (*reinterpret_cast<E*>(object))(count, task);
          }) {}

    void operator()(std::size_t count, task_view task) const { call_(object_, count, task); }

private:
    void* object_;
    void (*call_)(void*, std::size_t, task_view);
};

} // namespace detail

} // namespace kv1::inline KV1_ABI
