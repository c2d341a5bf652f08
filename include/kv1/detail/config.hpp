// SPDX-License-Identifier: Apache-2.0
//
// Configuration macros, and the inline namespace that everything lives in.
//
//   KV1_STATIC_DISPATCH  defined: only the instruction set the translation unit is compiled for is used.
//                        It is implied where per-function targets are not available (not x86-64, or neither
//                        g++ nor clang).
//   KV1_EXCEPTIONS       1 or 0, detected: without exceptions only the try_ forms exist.
//
// The linker keeps one copy of an inline function. KV1_ABI therefore names all that makes two translation
// units of one program compile the same function differently: the version, the instruction set (the kept copy
// must run on the other one's processor), dispatch, and whether there are exceptions (the kept copy must not
// abort where the other one throws or catches). Kernels that are compiled once for a program (kernels.hpp)
// are reached through the namespace KV1_KERNELS_ABI, which names the version and dispatch alone: kernels
// throw nothing, and are chosen at run time.
#pragma once

#include <kv1/detail/min_max_macros.hpp> // before any standard header
#include <kv1/version.hpp>

#if !defined(KV1_EXCEPTIONS)
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define KV1_EXCEPTIONS 1
#else
#define KV1_EXCEPTIONS 0
#endif
#endif

#if !defined(KV1_STATIC_DISPATCH) && !(defined(__x86_64__) && defined(__GNUC__))
#define KV1_STATIC_DISPATCH 1
#endif

// What the compiler may use by itself, and all that the baseline's kernels ask about (simd/passes.hpp).
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VL__) && defined(__AVX512DQ__) &&       \
    defined(__AVX512BW__)
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define KV1_ABI_LEVEL avx512_vbmi
#elif defined(__AVX512VNNI__)
#define KV1_ABI_LEVEL avx512_vnni
#else
#define KV1_ABI_LEVEL avx512
#endif
#elif defined(__AVX512F__)
#define KV1_ABI_LEVEL avx512f
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#define KV1_ABI_LEVEL avx_vnni
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KV1_ABI_LEVEL avx2_fma
#elif defined(__AVX2__)
#define KV1_ABI_LEVEL avx2
#elif defined(__AVX__) && defined(__FMA__)
#define KV1_ABI_LEVEL avx_fma
#elif defined(__AVX__)
#define KV1_ABI_LEVEL avx
#elif defined(__SSE4_2__)
#define KV1_ABI_LEVEL sse4_2
#elif defined(__SSE4_1__)
#define KV1_ABI_LEVEL sse4_1
#elif defined(__SSSE3__)
#define KV1_ABI_LEVEL ssse3
#elif defined(__SSE3__)
#define KV1_ABI_LEVEL sse3
#elif defined(__ARM_FEATURE_DOTPROD)
#define KV1_ABI_LEVEL neon_dotprod
#elif defined(__ARM_NEON)
#define KV1_ABI_LEVEL neon
#else
#define KV1_ABI_LEVEL base
#endif
#if defined(__BMI2__)
#define KV1_ABI_ISA KV1_ABI_JOIN(KV1_ABI_LEVEL, bmi2)
#else
#define KV1_ABI_ISA KV1_ABI_LEVEL
#endif

#if KV1_VERSION_MAJOR == 0
#define KV1_ABI_VERSION KV1_ABI_JOIN(v0, KV1_VERSION_MINOR) // a minor version may break its users
#else
#define KV1_ABI_VERSION KV1_ABI_JOIN(v, KV1_VERSION_MAJOR)
#endif

#if defined(KV1_STATIC_DISPATCH)
#define KV1_ABI_DISPATCH KV1_ABI_JOIN(KV1_ABI_VERSION, static)
#else
#define KV1_ABI_DISPATCH KV1_ABI_VERSION
#endif

#define KV1_ABI_JOIN_EXPANDED(a, b) a##_##b
#define KV1_ABI_JOIN(a, b) KV1_ABI_JOIN_EXPANDED(a, b)
#define KV1_KERNELS_ABI KV1_ABI_JOIN(KV1_ABI_DISPATCH, kernels)
#if KV1_EXCEPTIONS
#define KV1_ABI KV1_ABI_JOIN(KV1_ABI_DISPATCH, KV1_ABI_ISA)
#else
#define KV1_ABI KV1_ABI_JOIN(KV1_ABI_JOIN(KV1_ABI_DISPATCH, KV1_ABI_ISA), no_exceptions)
#endif
