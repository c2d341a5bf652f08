// SPDX-License-Identifier: Apache-2.0
//
// What registry.hpp finds: pulls in every target's kernels.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/scalar.hpp>
#include <kv1/detail/simd/passes.hpp>

namespace kv1::inline KV1_ABI::detail {

// A template: who never calls it compiles no kernel.
template <class = void>
const target_kernels& compiled_kernels(target t) noexcept {
    switch (t) {
    case target::scalar:
        break;
    case target::baseline:
#if KV1_HAS_BASELINE_SIMD
        return baseline::best_kernels();
#else
        break;
#endif
#if !defined(KV1_STATIC_DISPATCH)
    case target::sse41:
        return sse41::kernels();
    case target::avx2:
        return avx2::kernels();
    case target::avx_vnni:
        return avx_vnni::kernels();
    case target::avx512:
        return avx512::kernels();
    case target::avx512_vnni:
        return avx512_vnni::kernels();
    case target::avx512_vbmi:
        return avx512_vnni::best_kernels();
#else
    default:
        break;
#endif
    }
    return scalar::kernels();
}

template <storage_format F>
const format_kernels& format_kernels_at(target t) noexcept {
    switch (t) {
    case target::scalar:
        break;
    case target::baseline:
#if KV1_HAS_BASELINE_SIMD
        return baseline::best_kernels_for<F>();
#else
        break;
#endif
#if !defined(KV1_STATIC_DISPATCH)
    case target::sse41:
        return sse41::kernels_for<F>();
    case target::avx2:
        return avx2::kernels_for<F>();
    case target::avx_vnni:
        return avx_vnni::kernels_for<F>();
    case target::avx512:
        return avx512::kernels_for<F>();
    case target::avx512_vnni:
        return avx512_vnni::kernels_for<F>();
    case target::avx512_vbmi:
        return avx512_vnni::best_kernels_for<F>();
#else
    default:
        break;
#endif
    }
    return scalar::kernels_for<F>();
}

// Null where the list does not contain the format.
template <class... Fs>
const format_kernels* compiled_format_kernels(formats<Fs...>, target t, kv_format f) noexcept {
    const format_kernels* found = nullptr;
    static_cast<void>(((kv_format_of<Fs> == f && (found = &format_kernels_at<Fs>(t), true)) || ...));
    return found;
}

} // namespace kv1::inline KV1_ABI::detail
