// SPDX-License-Identifier: Apache-2.0
//
// Runs kv1-lm's command line in this process.
#pragma once

#include "cli.hpp"

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

namespace kv1_test {

struct command_result {
    int code = 0;
    std::string out, err;
    [[nodiscard]] bool one_error_line() const {
        return std::count(err.begin(), err.end(), '\n') == 1 && err.back() == '\n';
    }
};

inline command_result run_kv1_lm(std::vector<std::string> arguments, const std::string& input = {}) {
    std::vector<const char*> argv{"kv1-lm"};
    for (const std::string& a : arguments)
        argv.push_back(a.c_str());
    std::istringstream in(input);
    std::ostringstream out, err;
    const int code = kv1_lm::run(static_cast<int>(argv.size()), argv.data(), in, out, err);
    return {code, out.str(), err.str()};
}

} // namespace kv1_test
