// SPDX-License-Identifier: Apache-2.0
//
// As many threads as ggml tells the backend to use (ggml_backend_set_n_threads), as an executor and for plans of a slot
// store. ggml lends the threads of its CPU backend to no other backend, so the team has its own. They look for work for a
// short while, since layers follow each other quickly, and then sleep.
#pragma once

#include <kv1/executor.hpp>
#include <kv1/status.hpp>
#include <kv1/work_plan.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace kv1_ggml {

class thread_team {
public:
    thread_team() = default;
    thread_team(const thread_team&) = delete;
    thread_team& operator=(const thread_team&) = delete;
    ~thread_team() { resize(1); }

    // Precondition: no plan is running.
    void resize(std::size_t threads) {
        if (threads == workers_.size() + 1)
            return;
        stop_ = true;
        round_.fetch_add(1);
        round_.notify_all();
        for (std::thread& w : workers_)
            w.join();
        workers_.clear();
        stop_ = false;
        const std::uint32_t round = round_.load();
        for (std::size_t i = 1; i < threads; ++i)
            workers_.emplace_back([this, round] { serve(round); });
    }

    // An executor of kv1's.
    void operator()(std::size_t count, kv1::task_view task) noexcept {
        if (workers_.empty() || count < 2) {
            for (std::size_t i = 0; i < count; ++i)
                task(i);
            return;
        }
        task_ = &task;
        tasks_ = count;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(workers_.size(), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        work();
        for (std::size_t left = busy_.load(std::memory_order_acquire); left != 0;
             left = busy_.load(std::memory_order_acquire))
            busy_.wait(left, std::memory_order_acquire);
    }
    kv1::status run(kv1::work_plan& plan) noexcept {
        for (std::size_t phase = 0; phase < plan.phases(); ++phase) {
            auto task = [&](std::size_t i) { plan.run(phase, i); };
            (*this)(plan.tasks(phase), kv1::task_view(task));
        }
        return plan.finish();
    }

private:
    static constexpr int looks = 2000;

    void work() noexcept {
        for (std::size_t i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1))
            (*task_)(i);
    }
    void serve(std::uint32_t seen) noexcept {
        for (;;) {
            for (int i = 0; i < looks && round_.load(std::memory_order_acquire) == seen; ++i)
                std::this_thread::yield();
            round_.wait(seen, std::memory_order_acquire);
            ++seen;
            if (stop_)
                return;
            work();
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1)
                busy_.notify_one();
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<std::uint32_t> round_{0};
    std::atomic<std::size_t> next_{0}, busy_{0};
    bool stop_ = false;
    const kv1::task_view* task_ = nullptr;
    std::size_t tasks_ = 0;
};

} // namespace kv1_ggml
