// SPDX-License-Identifier: Apache-2.0
//
// Dot products of four 8-bit numbers for the AVX-512 targets: KV1_ISA_VNNI says whether one is one instruction,
// KV1_ISA_PAIRS whether keys may go in pairs (kernels/pairs.inl). Parsed after isa_avx512.inl, or where it is used.

using dot_row = i32; // four 8-bit numbers of a row, for every lane
template <bool>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    return i32(four);
}

#if KV1_ISA_VNNI
// A running sum of dot4 products, in 32 bits: one vpdpbusd each. See the other branch for the interface.
// g++ 12 would copy each sum to another register and back, and spill what does not fit: KV1_IN_ORDER keeps it in one.
using dot_sum = i32;
inline constexpr bool dot_sums_are_totals = true;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = ~std::size_t{0};
KV1_LAZY KV1_INLINE dot_sum dot_start() { return i32(0); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    __m512i s = Unsigned ? _mm512_dpbusd_epi32(__m512i(sum), __m512i(b), __m512i(a))
                         : _mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(b));
    KV1_IN_ORDER(s, "v");
    return i32(s);
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return sum;
}
#else
// A running sum of dot4 products: add, then finish to lanes of 32 bits. dot_limit is how many products of
// codes up to MaxCode may be added before finishing: pairs of products are summed in 16 bits, which take
// 32767 / (2 * 127 * MaxCode) of them, half as many for unsigned rows. Of codes above 15 each pair is added up in
// 32 bits: 16 bits hold 2 * 255 * 64. Codes above 64 would saturate them; they go nibble by nibble.
using dot_sum = __m512i;
inline constexpr bool dot_sums_are_totals = false;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = MaxCode > 15 ? ~std::size_t{0}
                                                      : 32767 / (2 * (Unsigned ? 255 : 127) * MaxCode);
KV1_LAZY KV1_INLINE dot_sum dot_start() { return _mm512_setzero_si512(); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    if constexpr (MaxCode > 64) {
        const __m512i ones = _mm512_set1_epi16(1);
        const u32 low = a & u32(0x0f0f0f0fu), high = (a >> 4) & u32(0x0f0f0f0fu);
        const __m512i low_pairs = _mm512_maddubs_epi16(__m512i(low), __m512i(b));
        const __m512i high_pairs = _mm512_maddubs_epi16(__m512i(high), __m512i(b));
        const __m512i high_sums = _mm512_slli_epi32(_mm512_madd_epi16(high_pairs, ones), 4);
        return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(low_pairs, ones), high_sums));
    } else if constexpr (MaxCode > 15) {
        const __m512i pairs = Unsigned ? _mm512_maddubs_epi16(__m512i(b), __m512i(a))
                                       : _mm512_maddubs_epi16(__m512i(a), __m512i(b));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    } else {
        sum = _mm512_add_epi16(sum, Unsigned ? _mm512_maddubs_epi16(__m512i(b), __m512i(a))
                                             : _mm512_maddubs_epi16(__m512i(a), __m512i(b)));
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
// Looks up table[index % 64] for each byte. It is assembly, since the region does not permit VBMI: other functions of
// the region run on processors without it. Only functions for VBMI call this one.
KV1_LAZY KV1_INLINE u32 look_up(u32 index, u32 table) {
#if defined(__GNUC__)
    __m512i found;
    __asm__("vpermb %2, %1, %0" : "=v"(found) : "v"(__m512i(index)), "v"(__m512i(table)));
    return u32(found);
#else
    return u32(_mm512_permutexvar_epi8(__m512i(index), __m512i(table)));
#endif
}
// The numbers at even places of two registers, and those at odd places.
KV1_LAZY KV1_INLINE void split_pairs(const float* p, f32& even, f32& odd) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = _mm512_load_ps(p), b = _mm512_load_ps(p + lanes);
    even = f32(_mm512_permutex2var_ps(a, places, b));
    odd = f32(_mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b));
}
// Numbers `from` ... of x, each in a register's place.
KV1_LAZY KV1_INLINE f32 numbers_at(f32 x, i32 from) {
    return f32(_mm512_permutexvar_ps(__m512i(from), __m512(x)));
}
KV1_LAZY KV1_INLINE i32 numbers_at(i32 x, i32 from) {
    return i32(_mm512_permutexvar_epi32(__m512i(from), __m512i(x)));
}
// Numbers 0 ... 255 as bytes: the first quarters of a, b, c and d, the second quarters, and so on.
KV1_LAZY KV1_INLINE u32 pack_quarters(i32 a, i32 b, i32 c, i32 d) {
    return u32(_mm512_packus_epi16(_mm512_packs_epi32(__m512i(a), __m512i(b)),
                                   _mm512_packs_epi32(__m512i(c), __m512i(d))));
}
#endif
