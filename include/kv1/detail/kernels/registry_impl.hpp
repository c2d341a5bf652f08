// SPDX-License-Identifier: Apache-2.0
//
// What registry.hpp finds: pulls in every target's kernels.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/scalar.hpp>
#include <kv1/detail/simd/passes.hpp>

namespace kv1::inline KV1_ABI::detail {

#if KV1_HAS_BASELINE_SIMD
using baseline_tables = baseline::pair_tables;
#else
using baseline_tables = scalar::tables;
#endif

// f of a target's tables. A target that is not compiled in is refused long before (is_supported): the scalar
// tables stand for it.
template <class F>
decltype(auto) with_tables(target t, F&& f) noexcept {
#if defined(KV1_STATIC_DISPATCH)
    if (t == target::baseline)
        return f(baseline_tables{});
#else
    switch (t) {
    case target::scalar:
        break;
    case target::baseline:
        return f(baseline_tables{});
    case target::sse41:
        return f(sse41::tables{});
    case target::avx2:
        return f(avx2::tables{});
    case target::avx_vnni:
        return f(avx_vnni::tables{});
    case target::avx512:
        return f(avx512::tables{});
    case target::avx512_vnni:
        return f(avx512_vnni::tables{});
    case target::avx512_vbmi:
        return f(avx512_vnni::pair_tables{});
    }
#endif
    return f(scalar::tables{});
}

// A template: who never calls it compiles no kernel.
template <class = void>
const target_kernels& compiled_kernels(target t) noexcept {
    return with_tables(
        t, []<class Tables>(Tables) noexcept -> const target_kernels& { return Tables::common(); });
}

template <storage_format F>
const format_kernels& format_kernels_at(target t) noexcept {
    return with_tables(t, []<class Tables>(Tables) noexcept -> const format_kernels& {
        return Tables::template of_format<F>();
    });
}

// Null where the list does not contain the format.
template <class... Fs>
const format_kernels* compiled_format_kernels(formats<Fs...>, target t, kv_format f) noexcept {
    const format_kernels* found = nullptr;
    static_cast<void>(((kv_format_of<Fs> == f && (found = &format_kernels_at<Fs>(t), true)) || ...));
    return found;
}

} // namespace kv1::inline KV1_ABI::detail
