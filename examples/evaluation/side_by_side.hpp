// SPDX-License-Identifier: Apache-2.0
//
// Runs independent pieces of work on several threads, while the calling thread watches.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kv1_lm {

/// Runs pieces 0 ... count - 1 on at most `threads` new threads. Each thread calls make_worker() once, and
/// calls the result with one piece after the other; pieces run in no certain order. Meanwhile the calling
/// thread calls watch(number of finished pieces) five times a second, and once at the end. If a worker
/// throws, the others stop after their piece, and the first exception is thrown.
template <class MakeWorker, class Watch>
void run_side_by_side(std::size_t count, std::size_t threads, MakeWorker make_worker, Watch watch) {
    std::atomic<std::size_t> next{0}, done{0};
    std::exception_ptr failure;
    std::mutex mutex; // of failure and running
    std::condition_variable changed;
    std::size_t running = std::min(threads, count);
    const auto serve = [&] {
        try {
            auto worker = make_worker();
            for (std::size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
                worker(i);
                done.fetch_add(1);
            }
        } catch (...) {
            const std::lock_guard lock(mutex);
            if (!failure)
                failure = std::current_exception();
            next.store(count);
        }
        const std::lock_guard lock(mutex);
        --running;
        changed.notify_one();
    };
    {
        struct joining { // also when watch() throws
            std::atomic<std::size_t>& next;
            const std::size_t count;
            std::vector<std::thread> threads;
            ~joining() {
                next.store(count);
                for (std::thread& thread : threads)
                    thread.join();
            }
        } workers{next, count, {}};
        for (std::size_t i = running; i > 0; --i)
            workers.threads.emplace_back(serve);
        for (bool ended = false; !ended;) {
            std::unique_lock lock(mutex);
            ended = changed.wait_for(lock, std::chrono::milliseconds(200), [&] { return running == 0; });
            lock.unlock();
            watch(done.load());
        }
    }
    if (failure)
        std::rethrow_exception(failure);
}

} // namespace kv1_lm
