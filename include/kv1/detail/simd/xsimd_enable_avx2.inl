// SPDX-License-Identifier: Apache-2.0
//
// Tells xsimd that the region may use AVX2 and FMA: g++ does not update its feature macros inside a region, so
// xsimd's own detection sees the baseline only. Included after xsimd_config.hpp.

#undef XSIMD_WITH_SSE2
#define XSIMD_WITH_SSE2 1
#undef XSIMD_WITH_SSE3
#define XSIMD_WITH_SSE3 1
#undef XSIMD_WITH_SSSE3
#define XSIMD_WITH_SSSE3 1
#undef XSIMD_WITH_SSE4_1
#define XSIMD_WITH_SSE4_1 1
#undef XSIMD_WITH_SSE4_2
#define XSIMD_WITH_SSE4_2 1
#undef XSIMD_WITH_AVX
#define XSIMD_WITH_AVX 1
#undef XSIMD_WITH_AVX2
#define XSIMD_WITH_AVX2 1
#undef XSIMD_WITH_FMA3_SSE
#define XSIMD_WITH_FMA3_SSE 1
#undef XSIMD_WITH_FMA3_AVX
#define XSIMD_WITH_FMA3_AVX 1
#undef XSIMD_WITH_FMA3_AVX2
#define XSIMD_WITH_FMA3_AVX2 1
