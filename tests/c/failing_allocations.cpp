// SPDX-License-Identifier: Apache-2.0
#include "failing_allocations.h"

#include "failing_new.hpp"

#include <cstddef>
#include <optional>

namespace {
std::optional<kv1_test::failing_new> guard;
}

extern "C" {

void allow_allocations(std::size_t count) { guard.emplace(count); }

int allow_all_allocations(void) {
    const bool failed = guard->failed();
    guard.reset();
    return failed ? 1 : 0;
}

} // extern "C"
