// SPDX-License-Identifier: Apache-2.0
//
// A user of xsimd who includes it before kv1.
#include <xsimd/xsimd.hpp>

#include <kv1/kv1.hpp>

#include "part.hpp"

#include <span>
#include <typeinfo>

#if defined(xsimd)
#error "kv1 leaves its private name for xsimd behind"
#endif
#if !defined(__AVX__) && XSIMD_WITH_AVX
#error "kv1 leaves xsimd's settings for another target behind"
#endif

namespace part_xsimd_before {
#include "body.inl"
}

outcome run_xsimd_before() {
    outcome o = part_xsimd_before::run();
    const xsimd::batch<float> two(2.0f);
    o.batch_bytes = static_cast<int>(sizeof(two)) * (xsimd::reduce_add(two) == 2.0f * two.size ? 1 : -1);
    return o;
}
