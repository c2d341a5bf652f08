// SPDX-License-Identifier: Apache-2.0
//
// What input is refused with.
#pragma once

#include "error.hpp"

#include <string>

namespace kv1_test {

/// The message of the input_error that f() throws.
template <class F>
std::string refusal(F&& f) {
    try {
        f();
    } catch (const kv1_lm::input_error& e) {
        return e.what();
    }
    return "(accepted)";
}

} // namespace kv1_test
