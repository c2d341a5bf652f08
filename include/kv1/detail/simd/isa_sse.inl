// SPDX-License-Identifier: Apache-2.0
//
// Primitives of the SSE targets that xsimd does not have; KV1_ISA_SSE41 says whether SSSE3 and SSE4.1 may be used,
// else SSE2 it is. Parsed inside a target namespace that defines `xs` and `arch`, a batch of four lanes.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 4;
inline constexpr std::size_t registers_per_line = line_lanes / lanes;
inline constexpr bool many_registers = false;

#if KV1_ISA_SSE41
// As in isa_avx2.inl: pairs of products in 16 bits.
using dot_row = i32;
template <bool>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    return i32(four);
}
using dot_sum = __m128i;
inline constexpr bool dot_sums_are_totals = false;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = MaxCode > 15 ? ~std::size_t{0}
                                                      : 32767 / (2 * (Unsigned ? 255 : 127) * MaxCode);
KV1_LAZY KV1_INLINE dot_sum dot_start() { return _mm_setzero_si128(); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, dot_row b) {
    if constexpr (MaxCode > 64) {
        const __m128i ones = _mm_set1_epi16(1);
        const u32 low = a & u32(0x0f0f0f0fu), high = (a >> 4) & u32(0x0f0f0f0fu);
        const __m128i low_pairs = _mm_maddubs_epi16(__m128i(low), __m128i(b));
        const __m128i high_pairs = _mm_maddubs_epi16(__m128i(high), __m128i(b));
        const __m128i high_sums = _mm_slli_epi32(_mm_madd_epi16(high_pairs, ones), 4);
        return _mm_add_epi32(sum, _mm_add_epi32(_mm_madd_epi16(low_pairs, ones), high_sums));
    } else if constexpr (MaxCode > 15) {
        const __m128i pairs =
            Unsigned ? _mm_maddubs_epi16(__m128i(b), __m128i(a)) : _mm_maddubs_epi16(__m128i(a), __m128i(b));
        return _mm_add_epi32(sum, _mm_madd_epi16(pairs, _mm_set1_epi16(1)));
    } else {
        sum = _mm_add_epi16(sum, Unsigned ? _mm_maddubs_epi16(__m128i(b), __m128i(a))
                                          : _mm_maddubs_epi16(__m128i(a), __m128i(b)));
        KV1_IN_ORDER(sum, "x");
        return sum;
    }
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return MaxCode > 15 ? i32(sum) : i32(_mm_madd_epi16(sum, _mm_set1_epi16(1)));
}
KV1_LAZY KV1_INLINE f32 nearest(f32 x) {
    return f32(_mm_round_ps(__m128(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Levels of a codebook for bytes that are its codes.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    const __m128i table = Levels == code_levels::codebook2
                              ? _mm_set1_epi32(packed_codebook)
                              : _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook4_levels.data()));
    return u32(_mm_shuffle_epi8(table, __m128i(codes)));
}
#else
// Even and odd bytes are multiplied as 16-bit numbers, two pmaddwd for four products.
struct dot_row {
    __m128i even, odd;
};
template <bool Unsigned>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    const __m128i b = _mm_set1_epi32(four);
    if constexpr (Unsigned)
        return {_mm_and_si128(b, _mm_set1_epi16(0xff)), _mm_srli_epi16(b, 8)};
    else
        return {_mm_srai_epi16(_mm_slli_epi16(b, 8), 8), _mm_srai_epi16(b, 8)};
}
using dot_sum = i32;
inline constexpr bool dot_sums_are_totals = true;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = ~std::size_t{0};
KV1_LAZY KV1_INLINE dot_sum dot_start() { return i32(0); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, const dot_row& b) {
    const __m128i even = _mm_and_si128(__m128i(a), _mm_set1_epi16(0xff)), odd = _mm_srli_epi16(__m128i(a), 8);
    const __m128i products = _mm_add_epi32(_mm_madd_epi16(even, b.even), _mm_madd_epi16(odd, b.odd));
    return i32(_mm_add_epi32(__m128i(sum), products));
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return sum;
}
// For numbers that fit 32 bits.
KV1_LAZY KV1_INLINE f32 nearest(f32 x) { return f32(_mm_cvtepi32_ps(_mm_cvtps_epi32(__m128(x)))); }
// Levels of a codebook for bytes that are its codes. codebook2: 5 c - c / 2, which borrows nothing from the next byte.
// codebook4: 2 c + 3, but 4 c below 2, and 4 c - 24 above 13.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    if (Levels == code_levels::codebook2)
        return ((codes << 2) + codes) - ((codes >> 1) & u32(0x01010101u));
    const __m128i two = __m128i((codes << 1) + u32(0x03030303u)), four = __m128i(codes << 2);
    return u32(_mm_max_epu8(_mm_min_epu8(two, four), _mm_subs_epu8(four, _mm_set1_epi8(24))));
}
#endif

KV1_LAZY KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    return u32(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128()));
}
// Converts fp16 bits in the low halves of lanes to floats. Precondition: finite numbers. No denormal float occurs on
// the way.
KV1_LAZY KV1_INLINE f32 half_to_float(u32 h) {
    const u32 magnitude = (h & u32(0x7fffu)) << 13;
    const u32 sign = (h & u32(0x8000u)) << 16;
    const u32 normal = magnitude + u32(112u << 23);
    const f32 subnormal =
        xs::bitwise_cast<float>(magnitude + u32(113u << 23)) - f32(6.103515625e-05f); // 2^-14
    const __m128i is_subnormal = _mm_cmplt_epi32(__m128i(magnitude), _mm_set1_epi32(1 << 23));
    const __m128i value = _mm_or_si128(_mm_and_si128(is_subnormal, _mm_castps_si128(__m128(subnormal))),
                                       _mm_andnot_si128(is_subnormal, __m128i(normal)));
    return xs::bitwise_cast<float>(u32(value) | sign);
}
KV1_LAZY KV1_INLINE f32 load_half(const std::uint16_t* p) { return half_to_float(load_u16(p)); }
KV1_LAZY KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    alignas(16) float narrow[lanes];
    x.store_aligned(narrow);
    for (std::size_t i = 0; i < lanes; ++i)
        p[i] = float_to_half(narrow[i]);
}
KV1_LAZY KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, sizeof four);
    const __m128i zero = _mm_setzero_si128();
    return u32(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero));
}
KV1_LAZY KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    const __m128i bytes = _mm_and_si128(__m128i(x), _mm_set1_epi32(0xff));
    const __m128i words = _mm_packs_epi32(bytes, bytes);
    const std::int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(p, &four, sizeof four);
}
// Stores sixteen numbers 0 ... 255 as bytes, in one store: they are loaded again at once, in pieces of another size,
// and several small stores would not forward to such a load.
KV1_LAZY KV1_INLINE void store_line_u8(const i32 (&x)[registers_per_line], std::uint8_t* p) {
    const __m128i low = _mm_packs_epi32(__m128i(x[0]), __m128i(x[1])),
                  high = _mm_packs_epi32(__m128i(x[2]), __m128i(x[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, high));
}
// (x & mask) | bits
KV1_LAZY KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
// A quarter is four numbers of a line. load_quarters() and store_quarters() move a register from and to quarters at
// addresses of their own. transpose_bytes() transposes the 4 x 4 bytes of each quarter. first_in_turns() and
// last_in_turns() take the first, or last, two numbers of each quarter of a and b in turns: a0 b0 a1 b1, a2 b2 a3 b3.
KV1_LAZY KV1_INLINE u32 load_quarters(const std::uint32_t* const (&from)[1]) {
    return u32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0])));
}
KV1_LAZY KV1_INLINE void store_quarters(u32 x, std::uint32_t* const (&to)[1]) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[0]), __m128i(x));
}
KV1_LAZY KV1_INLINE u32 transpose_bytes(u32 x) {
#if KV1_ISA_SSE41
    return u32(
        _mm_shuffle_epi8(__m128i(x), _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
#else
    const __m128i pairs = _mm_unpacklo_epi8(__m128i(x), _mm_srli_si128(__m128i(x), 8));
    return u32(_mm_unpacklo_epi8(pairs, _mm_srli_si128(pairs, 8)));
#endif
}
KV1_LAZY KV1_INLINE u32 first_in_turns(u32 a, u32 b) {
    return u32(_mm_unpacklo_epi32(__m128i(a), __m128i(b)));
}
KV1_LAZY KV1_INLINE u32 last_in_turns(u32 a, u32 b) {
    return u32(_mm_unpackhi_epi32(__m128i(a), __m128i(b)));
}
// Transposes a square of lanes x lanes numbers.
KV1_LAZY KV1_INLINE void transpose(f32 (&x)[lanes]) { xs::transpose(x, x + lanes); }
// A pair of neighbouring numbers in all lanes in turns, and the sums of neighbouring lanes: of a, then of b.
KV1_LAZY KV1_INLINE f32 broadcast_pair(const float* p) {
    std::int64_t both;
    std::memcpy(&both, p, sizeof both);
    return f32(_mm_castsi128_ps(_mm_set1_epi64x(both)));
}
KV1_LAZY KV1_INLINE f32 add_neighbours(f32 a, f32 b) {
    return f32(_mm_add_ps(_mm_shuffle_ps(__m128(a), __m128(b), _MM_SHUFFLE(2, 0, 2, 0)),
                          _mm_shuffle_ps(__m128(a), __m128(b), _MM_SHUFFLE(3, 1, 3, 1))));
}
// Lanes in the opposite order.
KV1_LAZY KV1_INLINE f32 reversed(f32 x) {
    return f32(_mm_shuffle_ps(__m128(x), __m128(x), _MM_SHUFFLE(0, 1, 2, 3)));
}
// Rounds to the nearest integer, ties to even.
KV1_LAZY KV1_INLINE i32 round_to_int(f32 x) { return i32(_mm_cvtps_epi32(__m128(x))); }
// Steps of exp2_nonpositive(). x / exp2_factor * 2^n for integral n, and zero for n = -64, whose bits are zero's: x
// lends 63 to the exponent.
inline constexpr float exp2_factor = 0x1p63f;
KV1_LAZY KV1_INLINE f32 exponent_in_range(f32 t) { return xs::max(t, f32(-64.0f)); }
KV1_LAZY KV1_INLINE f32 times_power_of_2(f32 x, f32 n) {
    return x * xs::bitwise_cast<float>((round_to_int(n) + i32(64)) << 23);
}
