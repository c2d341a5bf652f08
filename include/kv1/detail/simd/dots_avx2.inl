// SPDX-License-Identifier: Apache-2.0
//
// Dot products of four 8-bit numbers for the AVX2 targets: KV1_ISA_VNNI says whether one is one instruction
// (AVX-VNNI). Parsed after isa_avx2.inl, or where it is used.

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
    __m256i s = Unsigned ? _mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(b), __m256i(a))
                         : _mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(a), __m256i(b));
    KV1_IN_ORDER(s, "x");
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
using dot_sum = __m256i;
inline constexpr bool dot_sums_are_totals = false;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = MaxCode > 15 ? ~std::size_t{0}
                                                      : 32767 / (2 * (Unsigned ? 255 : 127) * MaxCode);
KV1_LAZY KV1_INLINE dot_sum dot_start() { return _mm256_setzero_si256(); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    if constexpr (MaxCode > 64) {
        const __m256i ones = _mm256_set1_epi16(1);
        const u32 low = a & u32(0x0f0f0f0fu), high = (a >> 4) & u32(0x0f0f0f0fu);
        const __m256i low_pairs = _mm256_maddubs_epi16(__m256i(low), __m256i(b));
        const __m256i high_pairs = _mm256_maddubs_epi16(__m256i(high), __m256i(b));
        const __m256i high_sums = _mm256_slli_epi32(_mm256_madd_epi16(high_pairs, ones), 4);
        return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low_pairs, ones), high_sums));
    } else if constexpr (MaxCode > 15) {
        const __m256i pairs = Unsigned ? _mm256_maddubs_epi16(__m256i(b), __m256i(a))
                                       : _mm256_maddubs_epi16(__m256i(a), __m256i(b));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
        sum = _mm256_add_epi16(sum, Unsigned ? _mm256_maddubs_epi16(__m256i(b), __m256i(a))
                                             : _mm256_maddubs_epi16(__m256i(a), __m256i(b)));
        KV1_IN_ORDER(sum, "x");
        return sum;
    }
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return MaxCode > 15 ? i32(sum) : i32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}
#endif
