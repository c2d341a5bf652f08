// SPDX-License-Identifier: Apache-2.0
//
// An executor of n threads that take tasks in a scrambled order.
#pragma once

#include <kv1/executor.hpp>

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace kv1_test {

class thread_executor {
public:
    explicit thread_executor(std::size_t workers) : workers_(workers) {}

    void operator()(std::size_t count, kv1::task_view task) {
        calls_ += count;
        std::atomic<std::size_t> next{0};
        const auto work = [&] {
            for (std::size_t i = next++; i < count; i = next++)
                task(count - 1 - i);
        };
        std::vector<std::thread> threads;
        for (std::size_t w = 1; w < workers_; ++w)
            threads.emplace_back(work);
        work();
        for (std::thread& t : threads)
            t.join();
    }

    [[nodiscard]] std::size_t tasks() const noexcept { return calls_; }

private:
    std::size_t workers_;
    std::size_t calls_ = 0;
};

} // namespace kv1_test
