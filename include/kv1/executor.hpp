// SPDX-License-Identifier: Apache-2.0
//
// How a caller lends its threads. kv1 owns no threads. A call that can be split takes an executor: any
// callable
//
//   void operator()(std::size_t count, kv1::task_view task);
//
// that calls task(0) ... task(count - 1), each once, in any order, on any threads, and returns when all are
// done. An engine lends its pool with five lines, and names it in each call:
//
//   struct lent_threads {
//       engine::thread_pool& pool;
//       void operator()(std::size_t count, kv1::task_view task) const { pool.run(count, task); }
//   };
//   cache.append(sequence, layer, k, v, lent_threads{pool});
//   cache.attend(sequence, layer, q, out, {}, lent_threads{pool});
//
// Calls without an executor run on the calling thread. Tasks do not throw and do not wait for each other. The
// executor does not throw: it is called from functions that are noexcept. How work is split depends on shapes
// alone, not on the executor, so results are the same bits for any number of threads.
//
// Number of tasks. Append makes at most one for each KV head of each sequence. Attend makes 64 or more where
// there is work for them, and then one for each query row to merge their results (detail/schedule.hpp). One
// query token of 32 query heads on 8 KV heads, with 32,768 tokens cached, makes 64 and then 32. In a batch,
// short sequences are a task each.
//
// Stack. A call of the library, a task included, needs at most 64 KiB of its thread's stack. Builds without
// optimization need 256, since compilers then give each value a place of its own. A thread also needs what
// the thread library keeps on its stack (glibc: 5 KiB, and the program's thread-local variables) and what the
// caller's own functions take.
//
// Scratch memory. Tasks need more memory than that. They take it from the cache, in pieces of 512 KiB. A cache
// has one piece from the start. A task that runs beside others may allocate another, and up to 128 are kept
// for later tasks.
#pragma once

#include <kv1/detail/config.hpp>

#include <concepts>
#include <cstddef>
#include <memory>
#include <type_traits>

namespace kv1::inline KV1_ABI {

/// Refers to a function of the task's index, which it does not own. Valid during the call that passes it on.
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

/// What a call that can be split accepts: run(count, task) calls task(0) ... task(count - 1) and waits for
/// them.
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

// Refers to an executor of any type, so that the library's inside needs no template for it.
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
