// SPDX-License-Identifier: Apache-2.0
//
// Region passes: one source of kernels, one namespace per target, all in a header that is compiled without -m
// flags.
//
//   inside a region:   xsimd (under a private name), the isa_*.inl primitives, the kernels; all of it templates
//                      or inline functions in a namespace of the target
//   outside:           everything else. Standard headers come before the first region, so that no inline std
//                      function is ever compiled for a target that the processor may lack
//
// xsimd is parsed once for the baseline (its real namespace, which users share), once for AVX2, once for
// AVX-512: its include guards and settings are forgotten in between. The SSE4.1 target shares the baseline's
// xsimd, the AVX-VNNI target that of AVX2, the AVX-512 VNNI target that of AVX-512; each has its own region.
// The VNNI targets share their kernels without dot products, too. AVX-512 VBMI has no region: its kernels are
// those of AVX-512 VNNI that take keys by channel pairs (kernels/pairs.inl; pair_tables in kernels/tables.inl).
// g++ and clang attach a region's target to the functions and templates that are defined in it; tests/codegen
// checks the outcome on object files.
//
// Off x86-64, and with KV1_STATIC_DISPATCH, there are no regions: the baseline is all.
//
// What a region tells its kernels:
//
//   KV1_ISA_VNNI, KV1_ISA_SSE41, KV1_ISA_DOTPROD   1 or 0: whether dots_*.inl or isa_*.inl may use these
//   KV1_ISA_PDEP                                   1 or 0: whether BMI2's pdep may be used (kernels/append.inl)
//   KV1_ISA_PAIRS                                  defined: keys of 2 bits may go by channel pairs
//   KV1_ISA_GENERIC                                defined as 1: fp16 is converted without instructions for it
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/kernels/softmax.hpp>
#include <kv1/detail/target_features.hpp>
#include <kv1/float16.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/quantizers/all.hpp>

// what xsimd and the kernels include, before any region
#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <climits>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>
#include <ostream>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <version>
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define KV1_INLINE inline __attribute__((always_inline))
#define KV1_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define KV1_INLINE __forceinline
#define KV1_NOINLINE __declspec(noinline)
#else
#define KV1_INLINE inline
#define KV1_NOINLINE
#endif

// Code between the two may use the features of a list in target_features.hpp.
#define KV1_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define KV1_BEGIN_REGION(features)                                                                           \
    KV1_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define KV1_END_REGION KV1_PRAGMA(clang attribute pop)
#else
#define KV1_BEGIN_REGION(features) KV1_PRAGMA(GCC push_options) KV1_PRAGMA(GCC target(features))
#define KV1_END_REGION KV1_PRAGMA(GCC pop_options)
#endif

// Makes a function of a region a template: its body, and all that it needs of xsimd, is compiled where it is
// used, not wherever the library is included.
#define KV1_LAZY template <class = void>

// Before a loop over registers: both compilers keep arrays in registers only where such loops are unrolled.
#if defined(__clang__)
#define KV1_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define KV1_UNROLL _Pragma("GCC unroll 32")
#else
#define KV1_UNROLL
#endif

// Keeps g++ from rearranging a chain of additions into a tree, whose leaves it then spills, and a sum in one register.
#if defined(__GNUC__) && !defined(__clang__)
#define KV1_IN_ORDER(sum, register_class) __asm__("" : "+" register_class(sum))
#else
#define KV1_IN_ORDER(sum, register_class) static_cast<void>(sum)
#endif

// g++ 12 takes the "undefined" operand of AVX-512 intrinsics for a use of an uninitialized variable (GCC
// PR105593)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// xsimd and the kernels use these names; <windows.h> defines macros of them
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max

// ---- baseline: the instruction set of the translation unit
#include <xsimd/config/xsimd_config.hpp>
#if XSIMD_VERSION_MAJOR > 13
#include <functional> // costs time, and older ones do without
#endif
#include <xsimd/xsimd.hpp>

#if XSIMD_VERSION_MAJOR < 13 || (XSIMD_VERSION_MAJOR == 13 && XSIMD_VERSION_MINOR < 2)
#error "kv1 needs xsimd 13.2 or newer"
#endif

#if !defined(XSIMD_NO_SUPPORTED_ARCHITECTURE)
#define KV1_HAS_BASELINE_SIMD 1
namespace kv1::inline KV1_ABI::detail::baseline {
namespace xs = ::xsimd;
using arch = xs::best_arch;
#if defined(__BMI2__)
#define KV1_ISA_PDEP 1
#else
#define KV1_ISA_PDEP 0
#endif
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VL__) && defined(__AVX512DQ__) &&       \
    defined(__AVX512BW__)
#if defined(__AVX512VNNI__)
#define KV1_ISA_VNNI 1
#else
#define KV1_ISA_VNNI 0
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define KV1_ISA_PAIRS 1
#endif
#include <kv1/detail/simd/isa_avx512.inl>
#include <kv1/detail/simd/dots_avx512.inl>
#undef KV1_ISA_VNNI
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#if defined(__AVXVNNI__)
#define KV1_ISA_VNNI 1
#else
#define KV1_ISA_VNNI 0
#endif
#include <kv1/detail/simd/isa_avx2.inl>
#include <kv1/detail/simd/dots_avx2.inl>
#undef KV1_ISA_VNNI
#elif defined(__SSE2__) && !defined(__AVX__)
#if defined(__SSSE3__) && defined(__SSE4_1__)
#define KV1_ISA_SSE41 1
#else
#define KV1_ISA_SSE41 0
#endif
#define KV1_ISA_GENERIC 1
#include <kv1/detail/simd/isa_sse.inl>
#undef KV1_ISA_SSE41
#elif defined(__aarch64__) && defined(__ARM_NEON)
#if defined(__ARM_FEATURE_DOTPROD)
#define KV1_ISA_DOTPROD 1
#else
#define KV1_ISA_DOTPROD 0
#endif
#include <kv1/detail/simd/isa_neon.inl>
#undef KV1_ISA_DOTPROD
#else
#define KV1_ISA_GENERIC 1
#include <kv1/detail/simd/isa_generic.inl>
#endif
#include <kv1/detail/kernels/storing.inl>
#include <kv1/detail/kernels/attending.inl>
#undef KV1_ISA_GENERIC
#undef KV1_ISA_PDEP
#undef KV1_ISA_PAIRS
} // namespace kv1::inline KV1_ABI::detail::baseline
#else
#define KV1_HAS_BASELINE_SIMD 0
#endif

#if !defined(KV1_STATIC_DISPATCH)

// ---- SSSE3 and SSE4.1, on the baseline's xsimd and its SSE2 batches
KV1_BEGIN_REGION(KV1_FEATURES_SSE41)
namespace kv1::inline KV1_ABI::detail::sse41 {
namespace xs = ::xsimd;
using arch = xs::sse2;
#define KV1_ISA_SSE41 1
#define KV1_ISA_GENERIC 1
#define KV1_ISA_PDEP 0
#include <kv1/detail/simd/isa_sse.inl>
#include <kv1/detail/kernels/storing.inl>
#include <kv1/detail/kernels/attending.inl>
#undef KV1_ISA_PDEP
#undef KV1_ISA_GENERIC
#undef KV1_ISA_SSE41
} // namespace kv1::inline KV1_ABI::detail::sse41
KV1_END_REGION

// every target from here on has BMI2
#define KV1_ISA_PDEP 1

// ---- AVX2 + FMA + F16C
#include <kv1/detail/simd/xsimd_guards_undef.inl>
#include <kv1/detail/simd/xsimd_settings_undef.inl>
#include <xsimd/config/xsimd_config.hpp>
#include <kv1/detail/simd/xsimd_enable_avx2.inl>
#define xsimd kv1_xsimd_avx2
KV1_BEGIN_REGION(KV1_FEATURES_AVX2)
#include <xsimd/xsimd.hpp>
namespace kv1::inline KV1_ABI::detail::avx2 {
namespace xs = ::kv1_xsimd_avx2;
using arch = xs::fma3<xs::avx2>;
#define KV1_ISA_VNNI 0
#include <kv1/detail/simd/isa_avx2.inl>
#include <kv1/detail/simd/dots_avx2.inl>
#undef KV1_ISA_VNNI
#include <kv1/detail/kernels/storing.inl>
#include <kv1/detail/kernels/attending.inl>
} // namespace kv1::inline KV1_ABI::detail::avx2
KV1_END_REGION

// ---- AVX2 with AVX-VNNI, on the same xsimd
KV1_BEGIN_REGION(KV1_FEATURES_AVX_VNNI)
namespace kv1::inline KV1_ABI::detail::avx_vnni {
using namespace avx2;
#define KV1_ISA_VNNI 1
#include <kv1/detail/simd/dots_avx2.inl>
#undef KV1_ISA_VNNI
#include <kv1/detail/kernels/attending.inl>
} // namespace kv1::inline KV1_ABI::detail::avx_vnni
KV1_END_REGION
#undef xsimd

// ---- AVX-512 F, CD, VL, DQ, BW
#include <kv1/detail/simd/xsimd_guards_undef.inl>
#include <kv1/detail/simd/xsimd_settings_undef.inl>
#include <xsimd/config/xsimd_config.hpp>
#include <kv1/detail/simd/xsimd_enable_avx2.inl>
#include <kv1/detail/simd/xsimd_enable_avx512.inl>
#define xsimd kv1_xsimd_avx512
KV1_BEGIN_REGION(KV1_FEATURES_AVX512)
#include <xsimd/xsimd.hpp>
namespace kv1::inline KV1_ABI::detail::avx512 {
namespace xs = ::kv1_xsimd_avx512;
using arch = xs::avx512bw;
#define KV1_ISA_VNNI 0
#include <kv1/detail/simd/isa_avx512.inl>
#include <kv1/detail/simd/dots_avx512.inl>
#undef KV1_ISA_VNNI
#include <kv1/detail/kernels/storing.inl>
#include <kv1/detail/kernels/attending.inl>
} // namespace kv1::inline KV1_ABI::detail::avx512
KV1_END_REGION
#undef xsimd

// ---- AVX-512 with VNNI, on the same xsimd
KV1_BEGIN_REGION(KV1_FEATURES_AVX512_VNNI)
namespace kv1::inline KV1_ABI::detail::avx512_vnni {
using namespace avx512;
#define KV1_ISA_VNNI 1
#define KV1_ISA_PAIRS 1
#include <kv1/detail/simd/dots_avx512.inl>
#undef KV1_ISA_VNNI
#include <kv1/detail/kernels/attending.inl>
#undef KV1_ISA_PAIRS
} // namespace kv1::inline KV1_ABI::detail::avx512_vnni
KV1_END_REGION

#undef KV1_ISA_PDEP

// ---- xsimd's settings as its users left them; the guards stay defined, so that a later inclusion does
// nothing
#include <kv1/detail/simd/xsimd_settings_undef.inl>
#undef XSIMD_CONFIG_HPP
#include <xsimd/config/xsimd_config.hpp>

#endif // !KV1_STATIC_DISPATCH

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#pragma pop_macro("max")
#pragma pop_macro("min")
#undef KV1_PRAGMA
#undef KV1_BEGIN_REGION
#undef KV1_END_REGION
#undef KV1_INLINE
#undef KV1_NOINLINE
#undef KV1_UNROLL
#undef KV1_LAZY
#undef KV1_IN_ORDER
