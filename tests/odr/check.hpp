// SPDX-License-Identifier: Apache-2.0
//
// What the programs that link the parts compare them with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <vector>

inline bool check(bool holds, const char* what) {
    if (!holds)
        std::printf("failed: %s\n", what);
    return holds;
}

inline bool near(const std::vector<float>& a, const std::vector<float>& b) {
    if (a.size() != b.size())
        return false;
    for (std::size_t i = 0; i < a.size(); ++i)
        if (!(std::fabs(a[i] - b[i]) <= 1e-5f))
            return false;
    return true;
}

#if defined(KV1_ODR_HAS_V3)
// Whether this processor can run what is compiled with -march=x86-64-v3.
inline bool has_v3() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#endif
