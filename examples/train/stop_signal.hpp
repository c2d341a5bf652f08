// SPDX-License-Identifier: Apache-2.0
//
// While an object lives, SIGTERM and SIGINT do not end the program; they set a flag that asks it to stop.
#pragma once

#include <csignal>

namespace kv1_train {

class stop_signal {
public:
    stop_signal() noexcept {
        requested_ = 0;
        before_[0] = std::signal(SIGTERM, note);
        before_[1] = std::signal(SIGINT, note);
    }
    stop_signal(const stop_signal&) = delete;
    stop_signal& operator=(const stop_signal&) = delete;
    ~stop_signal() {
        std::signal(SIGTERM, before_[0]);
        std::signal(SIGINT, before_[1]);
    }
    [[nodiscard]] bool requested() const noexcept { return requested_ != 0; }

private:
    static void note(int) noexcept { requested_ = 1; }
    // static, since a signal handler gets no argument of ours
    inline static volatile std::sig_atomic_t requested_ = 0;
    void (*before_[2])(int);
};

} // namespace kv1_train
