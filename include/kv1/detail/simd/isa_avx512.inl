// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the AVX-512 targets that xsimd does not have, but for dot products (dots_avx512.inl). Parsed inside
// a target namespace that defines `xs` and `arch`, in an AVX-512 region.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 16;
inline constexpr std::size_t registers_per_line = line_lanes / lanes;
inline constexpr bool many_registers = true;

KV1_LAZY KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    return u32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
KV1_LAZY KV1_INLINE f32 load_half(const std::uint16_t* p) {
    return f32(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
KV1_LAZY KV1_INLINE f32 half_to_float(u32 h) {
    return f32(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(__m512i(h))));
}
KV1_LAZY KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
}
KV1_LAZY KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    return u32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KV1_LAZY KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(x)));
}
// Stores sixteen numbers 0 ... 255 as bytes, in one store: they are loaded again at once, in pieces of another size,
// and several small stores would not forward to such a load.
KV1_LAZY KV1_INLINE void store_line_u8(const i32 (&x)[registers_per_line], std::uint8_t* p) {
    store_u8(xs::bitwise_cast<std::uint32_t>(x[0]), p);
}
// A square of lanes x lanes numbers: pairs of numbers, pairs of pairs, then quarters of registers change places.
KV1_LAZY KV1_INLINE void transpose(f32 (&x)[lanes]) {
    __m512i r[lanes], t[lanes];
    KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i) { r[i] = _mm512_castps_si512(__m512(x[i])); }
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 4) {
        KV1_UNROLL for (std::size_t k = 0; k < 2; ++k) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    }
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 8) {
        KV1_UNROLL for (std::size_t k = 0; k < 4; ++k) { // quarters 0 and 2, 1 and 3
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    }
    KV1_UNROLL for (std::size_t k = 0; k < 4; ++k) {
        x[k] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k], t[k + 8], 0x88)));
        x[k + 8] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd)));
        x[k + 4] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88)));
        x[k + 12] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd)));
    }
}
// (x & mask) | bits
KV1_LAZY KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) {
    return u32(_mm512_ternarylogic_epi32(__m512i(x), __m512i(mask), __m512i(bits), 0xea));
}
// A quarter is four numbers of a line. load_quarters() and store_quarters() move a register from and to quarters at
// addresses of their own. transpose_bytes() transposes the 4 x 4 bytes of each quarter. first_in_turns() and
// last_in_turns() take the first, or last, two numbers of each quarter of a and b in turns: a0 b0 a1 b1, a2 b2 a3 b3.
KV1_LAZY KV1_INLINE u32 load_quarters(const std::uint32_t* const (&from)[4]) {
    const auto quarter = [&](std::size_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
    };
    __m512i x = _mm512_castsi128_si512(quarter(0));
    x = _mm512_inserti32x4(x, quarter(1), 1);
    x = _mm512_inserti32x4(x, quarter(2), 2);
    return u32(_mm512_inserti32x4(x, quarter(3), 3));
}
KV1_LAZY KV1_INLINE void store_quarters(u32 x, std::uint32_t* const (&to)[4]) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[0]), _mm512_castsi512_si128(__m512i(x)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[1]), _mm512_extracti32x4_epi32(__m512i(x), 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[2]), _mm512_extracti32x4_epi32(__m512i(x), 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[3]), _mm512_extracti32x4_epi32(__m512i(x), 3));
}
KV1_LAZY KV1_INLINE u32 transpose_bytes(u32 x) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return u32(_mm512_shuffle_epi8(__m512i(x), _mm512_broadcast_i32x4(order)));
}
KV1_LAZY KV1_INLINE u32 first_in_turns(u32 a, u32 b) {
    return u32(_mm512_unpacklo_epi32(__m512i(a), __m512i(b)));
}
KV1_LAZY KV1_INLINE u32 last_in_turns(u32 a, u32 b) {
    return u32(_mm512_unpackhi_epi32(__m512i(a), __m512i(b)));
}
// Levels of a codebook for bytes that are its codes.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    __m512i table = _mm512_set1_epi32(packed_codebook);
    if (Levels == code_levels::codebook4)
        table = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook4_levels.data())));
    return u32(_mm512_shuffle_epi8(table, __m512i(codes)));
}
// A pair of neighbouring numbers in all lanes in turns, and the sums of neighbouring lanes: of a, then of b.
KV1_LAZY KV1_INLINE f32 broadcast_pair(const float* p) {
    std::int64_t both;
    std::memcpy(&both, p, sizeof both);
    return f32(_mm512_castsi512_ps(_mm512_set1_epi64(both)));
}
KV1_LAZY KV1_INLINE f32 add_neighbours(f32 a, f32 b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return f32(_mm512_permutex2var_ps(__m512(a), even, __m512(b))) +
           f32(_mm512_permutex2var_ps(__m512(a), odd, __m512(b)));
}
// Lanes in the opposite order.
KV1_LAZY KV1_INLINE f32 reversed(f32 x) {
    const __m512i order = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return f32(_mm512_permutexvar_ps(order, __m512(x)));
}
// Rounds to the nearest integer, ties to even.
KV1_LAZY KV1_INLINE f32 nearest(f32 x) { return xs::nearbyint(x); }
KV1_LAZY KV1_INLINE i32 round_to_int(f32 x) { return i32(_mm512_cvtps_epi32(__m512(x))); }
// Steps of exp2_nonpositive(). x * 2^n for integral n, and zero for n <= -64. Lanes that are masked take no time, where
// vscalefps takes a hundred cycles to round to zero.
inline constexpr float exp2_factor = 1.0f;
KV1_LAZY KV1_INLINE f32 exponent_in_range(f32 t) { return t; }
KV1_LAZY KV1_INLINE f32 times_power_of_2(f32 x, f32 n) {
    const __mmask16 some = _mm512_cmp_ps_mask(__m512(n), _mm512_set1_ps(-64.0f), _CMP_NLE_UQ);
    return f32(_mm512_maskz_scalef_ps(some, __m512(x), __m512(n)));
}
