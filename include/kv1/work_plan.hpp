// SPDX-License-Identifier: Apache-2.0
//
// A call cut into tasks, for engines whose threads are all there already, and enter a call together (ggml's). One thread
// makes the plan. Then all of them do
//
//   for (std::size_t phase = 0; phase < plan.phases(); ++phase) {
//       for (std::size_t i = thread; i < plan.tasks(phase); i += threads)
//           plan.run(phase, i);
//       barrier();
//   }
//
// and one of them calls finish(). Any order of the tasks of a phase gives the same bits.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/executor.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <memory>
#include <utility>

// In the namespace that translation units with different flags share (detail/any_cache.hpp).
namespace kv1::KV1_KERNELS_ABI {

// What a plan does.
class planned_work {
public:
    planned_work() = default;
    planned_work(const planned_work&) = delete;
    planned_work& operator=(const planned_work&) = delete;
    virtual ~planned_work() = default;

    [[nodiscard]] virtual std::size_t phases() const noexcept = 0;
    [[nodiscard]] virtual std::size_t tasks(std::size_t phase) const noexcept = 0;
    virtual void run(std::size_t phase, std::size_t task) noexcept = 0;
    // Once, when all phases are done, or in the middle to give up.
    virtual status finish() noexcept = 0;
};

} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI {

namespace detail {

using KV1_KERNELS_ABI::planned_work;

// All phases of a plan, on an executor's threads.
inline status run_all(planned_work& work, executor_view run) noexcept {
    for (std::size_t phase = 0; phase < work.phases(); ++phase) {
        auto task = [&](std::size_t i) { work.run(phase, i); };
        run(work.tasks(phase), task_view(task));
    }
    return work.finish();
}

} // namespace detail

/// A call of a slot store that has begun and is not done. What the call was given (tensors, slots, masks) lives until
/// finish() or the plan's end. A plan may end without finish(): slots that were to be written to then hold what they held
/// or what they were to hold, without a new fp16 copy; keys whose means turn then hold numbers of no meaning, and outputs
/// are unspecified.
class work_plan {
public:
    /// Takes a call's work, null for a call that has nothing to do; slot_store makes plans.
    explicit work_plan(std::unique_ptr<detail::planned_work> work) noexcept : work_(std::move(work)) {}

    /// The number of phases. A phase begins when all tasks of the one before are done, and seen to be done: the
    /// engine's barrier does both.
    [[nodiscard]] std::size_t phases() const noexcept { return work_ != nullptr ? work_->phases() : 0; }
    /// The number of tasks of a phase.
    [[nodiscard]] std::size_t tasks(std::size_t phase) const noexcept { return work_->tasks(phase); }
    /// Does a task. Each is done once; tasks of a phase may run at once.
    void run(std::size_t phase, std::size_t task) const noexcept { work_->run(phase, task); }
    /// Ends the call and gives its status. Once, after all phases.
    status finish() noexcept { return work_ != nullptr ? work_->finish() : status{}; }

private:
    std::unique_ptr<detail::planned_work> work_;
};

} // namespace kv1::inline KV1_ABI
