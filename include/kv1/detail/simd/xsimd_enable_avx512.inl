// SPDX-License-Identifier: Apache-2.0
//
// Tells xsimd that the region may use AVX-512 F, CD, VL, DQ and BW, after xsimd_enable_avx2.inl.

#undef XSIMD_WITH_AVX512F
#define XSIMD_WITH_AVX512F 1
#undef XSIMD_WITH_AVX512CD
#define XSIMD_WITH_AVX512CD 1
#undef XSIMD_WITH_AVX512VL
#define XSIMD_WITH_AVX512VL 1
#undef XSIMD_WITH_AVX512DQ
#define XSIMD_WITH_AVX512DQ 1
#undef XSIMD_WITH_AVX512BW
#define XSIMD_WITH_AVX512BW 1
