// SPDX-License-Identifier: Apache-2.0
//
// Sums of a few vectors outside kernels. Loops run over eight numbers at a time: compilers leave loops of unknown length
// scalar at -O2.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

// x[i] *= w for i < n
inline void multiply(float* x, float w, std::size_t n) noexcept {
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (std::size_t k = 0; k < 8; ++k)
            x[i + k] *= w;
    for (; i < n; ++i)
        x[i] *= w;
}

// sum[i] += w * x[i] for i < n
inline void add_multiple(float* sum, float w, const float* x, std::size_t n) noexcept {
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (std::size_t k = 0; k < 8; ++k)
            sum[i + k] += w * x[i + k];
    for (; i < n; ++i)
        sum[i] += w * x[i];
}

} // namespace kv1::inline KV1_ABI::detail
