// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the AVX2 + FMA + F16C targets that xsimd does not have, but for dot products (dots_avx2.inl). Parsed
// inside a target namespace that defines `xs` and `arch`, in an AVX2 region.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 8;
inline constexpr std::size_t registers_per_line = line_lanes / lanes;
inline constexpr bool many_registers = false;

KV1_LAZY KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    return u32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_LAZY KV1_INLINE f32 load_half(const std::uint16_t* p) {
    return f32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_LAZY KV1_INLINE f32 half_to_float(u32 h) {
    const __m256i packed =
        _mm256_packus_epi32(_mm256_and_si256(__m256i(h), _mm256_set1_epi32(0xffff)), __m256i(h));
    return f32(_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08))));
}
KV1_LAZY KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
}
KV1_LAZY KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    return u32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KV1_LAZY KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                               4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(__m256i(x), low_bytes);
    const __m128i joined =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), joined);
}
// Stores sixteen numbers 0 ... 255 as bytes, in one store: they are loaded again at once, in pieces of another size,
// and several small stores would not forward to such a load.
KV1_LAZY KV1_INLINE void store_line_u8(const i32 (&x)[registers_per_line], std::uint8_t* p) {
    const __m256i words = _mm256_packs_epi32(__m256i(x[0]), __m256i(x[1])); // by halves of both
    const __m256i bytes = _mm256_packus_epi16(words, words);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
// (x & mask) | bits
KV1_LAZY KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
// A quarter is four numbers of a line. load_quarters() and store_quarters() move a register from and to quarters at
// addresses of their own. transpose_bytes() transposes the 4 x 4 bytes of each quarter. first_in_turns() and
// last_in_turns() take the first, or last, two numbers of each quarter of a and b in turns: a0 b0 a1 b1, a2 b2 a3 b3.
KV1_LAZY KV1_INLINE u32 load_quarters(const std::uint32_t* const (&from)[2]) {
    const auto quarter = [&](std::size_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
    };
    return u32(_mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1));
}
KV1_LAZY KV1_INLINE void store_quarters(u32 x, std::uint32_t* const (&to)[2]) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[0]), _mm256_castsi256_si128(__m256i(x)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[1]), _mm256_extracti128_si256(__m256i(x), 1));
}
KV1_LAZY KV1_INLINE u32 transpose_bytes(u32 x) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return u32(_mm256_shuffle_epi8(__m256i(x), _mm256_broadcastsi128_si256(order)));
}
KV1_LAZY KV1_INLINE u32 first_in_turns(u32 a, u32 b) {
    return u32(_mm256_unpacklo_epi32(__m256i(a), __m256i(b)));
}
KV1_LAZY KV1_INLINE u32 last_in_turns(u32 a, u32 b) {
    return u32(_mm256_unpackhi_epi32(__m256i(a), __m256i(b)));
}
// Levels of a codebook for bytes that are its codes.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    __m256i table = _mm256_set1_epi32(packed_codebook);
    if (Levels == code_levels::codebook4)
        table = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook4_levels.data())));
    return u32(_mm256_shuffle_epi8(table, __m256i(codes)));
}
// Transposes a square of lanes x lanes numbers.
KV1_LAZY KV1_INLINE void transpose(f32 (&x)[lanes]) { xs::transpose(x, x + lanes); }
// A pair of neighbouring numbers in all lanes in turns, and the sums of neighbouring lanes: of a, then of b.
KV1_LAZY KV1_INLINE f32 broadcast_pair(const float* p) {
    std::int64_t both;
    std::memcpy(&both, p, sizeof both);
    return f32(_mm256_castsi256_ps(_mm256_set1_epi64x(both)));
}
KV1_LAZY KV1_INLINE f32 add_neighbours(f32 a, f32 b) {
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(__m256(a), __m256(b))); // by halves of both
    return f32(_mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8)));
}
// Lanes in the opposite order.
KV1_LAZY KV1_INLINE f32 reversed(f32 x) {
    return f32(_mm256_permutevar8x32_ps(__m256(x), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)));
}
// Rounds to the nearest integer, ties to even.
KV1_LAZY KV1_INLINE f32 nearest(f32 x) { return xs::nearbyint(x); }
KV1_LAZY KV1_INLINE i32 round_to_int(f32 x) { return i32(_mm256_cvtps_epi32(__m256(x))); }
// Steps of exp2_nonpositive(). x / exp2_factor * 2^n for integral n, and zero for n = -64, whose bits are zero's: x
// lends 63 to the exponent.
inline constexpr float exp2_factor = 0x1p63f;
KV1_LAZY KV1_INLINE f32 exponent_in_range(f32 t) { return xs::max(t, f32(-64.0f)); }
KV1_LAZY KV1_INLINE f32 times_power_of_2(f32 x, f32 n) {
    return x * xs::bitwise_cast<float>((round_to_int(n) + i32(64)) << 23);
}
