// SPDX-License-Identifier: Apache-2.0
//
// The engine's threads, which it lends to kv1: a kv1::executor. Threads take tasks one by one, and the
// calling thread works too. One call at a time.
#pragma once

#include <kv1/executor.hpp>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

namespace kv1_lm {

class thread_pool {
public:
    explicit thread_pool(std::size_t threads) {
        for (std::size_t i = 1; i < threads; ++i)
            workers_.emplace_back([this] { serve(); });
    }
    thread_pool(const thread_pool&) = delete;
    thread_pool& operator=(const thread_pool&) = delete;
    ~thread_pool() {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_)
            worker.join();
    }

    [[nodiscard]] std::size_t size() const noexcept { return workers_.size() + 1; }

    void operator()(std::size_t count, kv1::task_view task) {
        if (workers_.empty() || count < 2) {
            for (std::size_t i = 0; i < count; ++i)
                task(i);
            return;
        }
        {
            const std::lock_guard lock(mutex_);
            task_ = &task;
            count_ = count;
            next_.store(0);
            busy_ = workers_.size();
            ++round_;
        }
        wake_.notify_all();
        work(task, count);
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void work(const kv1::task_view& task, std::size_t count) {
        for (std::size_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1))
            task(i);
    }

    void serve() {
        std::size_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
            if (stopping_)
                return;
            seen = round_;
            const kv1::task_view* task = task_;
            const std::size_t count = count_;
            lock.unlock();
            work(*task, count);
            lock.lock();
            if (--busy_ == 0)
                done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const kv1::task_view* task_ = nullptr;
    std::size_t count_ = 0, busy_ = 0, round_ = 0;
    std::atomic<std::size_t> next_{0};
    bool stopping_ = false;
    std::vector<std::thread> workers_; // last: they use the members above
};

} // namespace kv1_lm
