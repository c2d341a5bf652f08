// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the AVX-512 targets that xsimd does not have; KV1_ISA_VNNI says whether dot4 is one
// instruction. Parsed inside a target namespace that defines `xs` and `arch`, in an AVX-512 region.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 16;
inline constexpr std::size_t pieces = line_lanes / lanes;
inline constexpr bool many_registers = true;

using dot_row = i32; // four 8-bit numbers of a row, for every lane
template <bool>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    return i32(four);
}

#if KV1_ISA_VNNI
// A running sum of dot4 products, in 32 bits: one vpdpbusd each. See the other branch for the interface.
using dot_sum = i32;
inline constexpr bool dot_sums_are_totals = true;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = ~std::size_t{0};
KV1_INLINE dot_sum dot_start() { return i32(0); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    return Unsigned ? i32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(b), __m512i(a)))
                    : i32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return sum;
}
#else
// A running sum of dot4 products: add, then finish to lanes of 32 bits. dot_limit is how many products of
// codes up to MaxCode may be added before finishing: pairs of products are summed in 16 bits, which take
// 32767 / (2 * 127 * MaxCode) of them, half as many for unsigned rows. Codes above 15 would saturate at once; they go nibble by nibble, in 32 bits.
using dot_sum = __m512i;
inline constexpr bool dot_sums_are_totals = false;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = MaxCode > 15 ? ~std::size_t{0} : 32767 / (2 * (Unsigned ? 255 : 127) * MaxCode);
KV1_INLINE dot_sum dot_start() { return _mm512_setzero_si512(); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    if constexpr (MaxCode > 15) {
        const __m512i ones = _mm512_set1_epi16(1);
        const u32 low = a & u32(0x0f0f0f0fu), high = (a >> 4) & u32(0x0f0f0f0fu);
        const __m512i low_pairs = _mm512_maddubs_epi16(__m512i(low), __m512i(b));
        const __m512i high_pairs = _mm512_maddubs_epi16(__m512i(high), __m512i(b));
        const __m512i high_sums = _mm512_slli_epi32(_mm512_madd_epi16(high_pairs, ones), 4);
        return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(low_pairs, ones), high_sums));
    } else {
        sum = _mm512_add_epi16(sum, Unsigned ? _mm512_maddubs_epi16(__m512i(b), __m512i(a)) : _mm512_maddubs_epi16(__m512i(a), __m512i(b)));
        KV1_IN_ORDER(sum, "v");
        return sum;
    }
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return MaxCode > 15 ? i32(sum) : i32(_mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
}
#endif

#if defined(KV1_ISA_PAIRS)
// Byte by byte table[index % 64]. Assembly, since the region's functions may run without VBMI: only those that ask for
// it call this.
KV1_INLINE u32 look_up(u32 index, u32 table) {
#if defined(__GNUC__)
    __m512i found;
    __asm__("vpermb %2, %1, %0" : "=v"(found) : "v"(__m512i(index)), "v"(__m512i(table)));
    return u32(found);
#else
    return u32(_mm512_permutexvar_epi8(__m512i(index), __m512i(table)));
#endif
}
// (x & mask) | bits
KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) {
    return u32(_mm512_ternarylogic_epi32(__m512i(x), __m512i(mask), __m512i(bits), 0xea));
}
// Numbers at even and at odd places of two registers.
KV1_INLINE void split_pairs(const float* p, f32& even, f32& odd) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = _mm512_load_ps(p), b = _mm512_load_ps(p + lanes);
    even = f32(_mm512_permutex2var_ps(a, places, b));
    odd = f32(_mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b));
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
// Sixteen numbers 0 ... 255 to bytes, in one store: they are read again at once, in other pieces.
KV1_INLINE void store_line_u8(const i32 (&x)[pieces], std::uint8_t* p) {
    store_u8(xs::bitwise_cast<std::uint32_t>(x[0]), p);
}
// A square of lanes x lanes numbers: pairs of numbers, pairs of pairs, then quarters of registers change places.
KV1_INLINE void transpose(f32 (&x)[lanes]) {
    __m512i r[lanes], t[lanes];
    KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i)
        r[i] = _mm512_castps_si512(__m512(x[i]));
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 4)
        KV1_UNROLL for (std::size_t k = 0; k < 2; ++k) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    KV1_UNROLL for (std::size_t i = 0; i < lanes; i += 8)
        KV1_UNROLL for (std::size_t k = 0; k < 4; ++k) { // quarters 0 and 2, 1 and 3
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    KV1_UNROLL for (std::size_t k = 0; k < 4; ++k) {
        x[k] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k], t[k + 8], 0x88)));
        x[k + 8] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd)));
        x[k + 4] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88)));
        x[k + 12] = f32(_mm512_castsi512_ps(_mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd)));
    }
}
// Levels of codebook2 for bytes 0 ... 3.
KV1_INLINE u32 levels_of(u32 codes) {
    return u32(_mm512_shuffle_epi8(_mm512_set1_epi32(packed_codebook), __m512i(codes)));
}
// To the nearest integer, ties to even.
KV1_INLINE f32 nearest(f32 x) { return xs::nearbyint(x); }
KV1_INLINE i32 round_to_int(f32 x) { return i32(_mm512_cvtps_epi32(__m512(x))); }
// x * 2^n for integral n, zero below the range of numbers; smaller n may be taken for exp2_zero_from.
inline constexpr float exp2_zero_from = -200.0f;
KV1_INLINE f32 times_power_of_2(f32 x, f32 n) { return f32(_mm512_scalef_ps(__m512(x), __m512(n))); }
