// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the AVX-512 targets that xsimd does not have; KV1_ISA_VNNI says whether dot4 is one
// instruction. Parsed inside a target namespace that defines `xs` and `arch`, in an AVX-512 region.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 16;
inline constexpr std::size_t pieces = line_lanes / lanes;

#if KV1_ISA_VNNI
// acc + the sum of four products of unsigned and signed bytes, lane by lane.
KV1_INLINE i32 dot4(i32 acc, u32 a, i32 b) {
    return i32(_mm512_dpbusd_epi32(__m512i(acc), __m512i(a), __m512i(b)));
}
KV1_INLINE i32 dot4_wide(i32 acc, u32 a, i32 b) { return dot4(acc, a, b); }
#else
// acc + the sum of four products of unsigned and signed bytes, lane by lane; `a` at most 127, or the pairwise
// sum in 16 bits would saturate.
KV1_INLINE i32 dot4(i32 acc, u32 a, i32 b) {
    const __m512i pairs = _mm512_maddubs_epi16(__m512i(a), __m512i(b));
    return i32(_mm512_add_epi32(__m512i(acc), _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
}
// The same for any `a`: the two nibbles separately.
KV1_INLINE i32 dot4_wide(i32 acc, u32 a, i32 b) {
    const u32 low = a & u32(0x0f0f0f0fu);
    const u32 high = (a >> 4) & u32(0x0f0f0f0fu);
    return dot4(acc, low, b) + (dot4(i32(0), high, b) << 4);
}
#endif

KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    return u32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
KV1_INLINE f32 load_half(const std::uint16_t* p) {
    return f32(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
KV1_INLINE f32 half_to_float(u32 h) { return f32(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(__m512i(h)))); }
KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
}
KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    return u32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(x)));
}
