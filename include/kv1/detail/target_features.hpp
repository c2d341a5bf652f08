// SPDX-License-Identifier: Apache-2.0
//
// What the code of a target may use: one list a target, in the compilers' names, as a string literal, since that is
// what `#pragma GCC target` and clang's attribute take. Regions (simd/passes.hpp), the tests of the processor
// (target.hpp) and those of object files (tests/codegen) derive from it.
#pragma once

#define KV1_FEATURES_SSE41 "sse3,ssse3,sse4.1"
#define KV1_FEATURES_AVX2 KV1_FEATURES_SSE41 ",sse4.2,popcnt,avx,avx2,fma,f16c,bmi,bmi2"
#define KV1_FEATURES_AVX_VNNI KV1_FEATURES_AVX2 ",avxvnni"
#define KV1_FEATURES_AVX512 KV1_FEATURES_AVX2 ",avx512f,avx512cd,avx512vl,avx512dq,avx512bw"
#define KV1_FEATURES_AVX512_VNNI KV1_FEATURES_AVX512 ",avx512vnni"
// no region of its own: the one instruction that it takes besides is written in assembly (simd/dots_avx512.inl)
#define KV1_FEATURES_AVX512_VBMI KV1_FEATURES_AVX512_VNNI ",avx512vbmi"
