// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the AVX2 + FMA + F16C target that xsimd does not have.
// Parsed inside a target namespace that defines `xs` and `arch`, in an AVX2 region.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 8;
inline constexpr std::size_t pieces = line_lanes / lanes;

// acc + the sum of four products of unsigned and signed bytes, lane by lane; `a` at most 127, or the pairwise
// sum in 16 bits would saturate.
KV1_INLINE i32 dot4(i32 acc, u32 a, i32 b) {
    const __m256i pairs = _mm256_maddubs_epi16(__m256i(a), __m256i(b));
    return i32(_mm256_add_epi32(__m256i(acc), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
// The same for any `a`: the two nibbles separately.
KV1_INLINE i32 dot4_wide(i32 acc, u32 a, i32 b) {
    const u32 low = a & u32(0x0f0f0f0fu);
    const u32 high = (a >> 4) & u32(0x0f0f0f0fu);
    return dot4(acc, low, b) + (dot4(i32(0), high, b) << 4);
}

KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    return u32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_INLINE f32 load_half(const std::uint16_t* p) {
    return f32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_INLINE f32 half_to_float(u32 h) {
    const __m256i packed =
        _mm256_packus_epi32(_mm256_and_si256(__m256i(h), _mm256_set1_epi32(0xffff)), __m256i(h));
    return f32(_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08))));
}
KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
}
KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    return u32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                               4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(__m256i(x), low_bytes);
    const __m128i joined =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), joined);
}
