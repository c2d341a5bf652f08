// SPDX-License-Identifier: Apache-2.0
//
// A progress bar with the time left. It shows on terminals only. (No C++ progress bar library is packaged for
// Debian.)
#pragma once

#include <chrono>
#include <cstddef>
#include <iosfwd>
#include <string>

namespace kv1_lm {

class progress_bar {
public:
    /// `visible`: whether `out` is a terminal.
    progress_bar(std::ostream& out, bool visible, std::string unit, std::size_t total);
    progress_bar(const progress_bar&) = delete;
    progress_bar& operator=(const progress_bar&) = delete;
    /// Ends the line.
    ~progress_bar();

    /// Redraws at most ten times a second; `note` follows the bar.
    void show(std::size_t done, const std::string& note);

    /// The text of the bar.
    [[nodiscard]] static std::string line(std::size_t done, std::size_t total, const std::string& unit,
                                          double seconds, const std::string& note);

private:
    using clock = std::chrono::steady_clock;
    std::ostream& out_;
    bool visible_, drawn_ = false;
    std::string unit_;
    std::size_t total_;
    clock::time_point start_ = clock::now(), last_{};
};

} // namespace kv1_lm
