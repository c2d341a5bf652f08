// SPDX-License-Identifier: Apache-2.0
//
// Configuration macros, and the inline namespace that everything lives in.
//
//   KV1_STATIC_DISPATCH  defined: only the instruction set the translation unit is compiled for is used.
//                        It is implied where per-function targets are not available (not x86-64, or neither
//                        g++ nor clang).
//   KV1_EXCEPTIONS       1 or 0, detected: without exceptions only the try_ forms exist.
//
// The inline namespace carries the instruction set of the translation unit: two translation units of one
// program compiled with different -march flags must not share inline functions, or the linker may keep the
// copy that the other one's processor cannot run.
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

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define KV1_ABI_ISA avx512vbmi
#elif defined(__AVX512F__) && defined(__AVX512VNNI__)
#define KV1_ABI_ISA avx512vnni
#elif defined(__AVX512F__)
#define KV1_ABI_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define KV1_ABI_ISA avx2_fma
#elif defined(__AVX2__)
#define KV1_ABI_ISA avx2
#elif defined(__AVX__)
#define KV1_ABI_ISA avx
#elif defined(__SSE4_2__)
#define KV1_ABI_ISA sse4_2
#elif defined(__SSE4_1__)
#define KV1_ABI_ISA sse4_1
#elif defined(__SSSE3__)
#define KV1_ABI_ISA ssse3
#elif defined(__SSE3__)
#define KV1_ABI_ISA sse3
#elif defined(__ARM_FEATURE_DOTPROD)
#define KV1_ABI_ISA neon_dotprod
#elif defined(__ARM_NEON)
#define KV1_ABI_ISA neon
#else
#define KV1_ABI_ISA base
#endif

#if defined(KV1_STATIC_DISPATCH)
#define KV1_ABI_JOIN(isa) v0_##isa##_static
#else
#define KV1_ABI_JOIN(isa) v0_##isa
#endif
#define KV1_ABI_EXPAND(isa) KV1_ABI_JOIN(isa)
#define KV1_ABI KV1_ABI_EXPAND(KV1_ABI_ISA)
