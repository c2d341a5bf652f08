// SPDX-License-Identifier: Apache-2.0
//
// Lets the calling thread's n-th allocation by operator new fail (failing_new.cpp replaces it).
#pragma once

#include <cstddef>

namespace kv1_test {

/// While it lives, `allowed` allocations succeed and the ones after them throw std::bad_alloc.
class failing_new {
public:
    explicit failing_new(std::size_t allowed) noexcept;
    failing_new(const failing_new&) = delete;
    failing_new& operator=(const failing_new&) = delete;
    ~failing_new();
    /// Whether an allocation was refused.
    [[nodiscard]] bool failed() const noexcept;
};

} // namespace kv1_test
