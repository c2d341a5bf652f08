// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <iomanip>
#include <ostream>
#include <sstream>
#include <utility>

namespace kv1_lm {

namespace {

void put_clock(std::ostream& out, double seconds) {
    const auto whole = static_cast<unsigned long long>(seconds + 0.5);
    if (whole >= 3600)
        out << whole / 3600 << ':' << std::setfill('0') << std::setw(2);
    out << whole / 60 % 60 << ':' << std::setfill('0') << std::setw(2) << whole % 60;
}

} // namespace

progress_bar::progress_bar(std::ostream& out, bool visible, std::string unit, std::size_t total)
    : out_(out), visible_(visible), unit_(std::move(unit)), total_(total) {}

progress_bar::~progress_bar() {
    if (drawn_)
        out_ << '\n' << std::flush;
}

std::string progress_bar::line(std::size_t done, std::size_t total, const std::string& unit, double seconds,
                               const std::string& note) {
    constexpr std::size_t width = 30;
    const std::size_t filled = total == 0 ? width : done * width / total;
    std::ostringstream text;
    text << '[' << std::string(filled, '#') << std::string(width - filled, '.') << "] " << done << '/'
         << total << ' ' << unit << "  ";
    put_clock(text, seconds);
    if (done != 0 && done < total) {
        text << "  ETA ";
        put_clock(text, seconds * static_cast<double>(total - done) / static_cast<double>(done));
    }
    if (!note.empty())
        text << "  " << note;
    return text.str();
}

void progress_bar::show(std::size_t done, const std::string& note) {
    const clock::time_point now = clock::now();
    if (!visible_ || (drawn_ && done < total_ && now - last_ < std::chrono::milliseconds(100)))
        return;
    last_ = now;
    drawn_ = true;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    out_ << '\r' << line(done, total_, unit_, seconds, note) << "\x1b[K"
         << std::flush; // and clear what was longer
}

} // namespace kv1_lm
