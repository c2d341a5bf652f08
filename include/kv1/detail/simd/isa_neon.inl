// SPDX-License-Identifier: Apache-2.0
//
// Primitives of AArch64 NEON that xsimd does not have; KV1_ISA_DOTPROD says whether sdot may be used.
// Parsed inside a target namespace that defines `xs` and `arch`, a batch of four lanes.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = 4;
inline constexpr std::size_t registers_per_line = line_lanes / lanes;
inline constexpr bool many_registers = KV1_ISA_DOTPROD != 0;

using dot_row = int8x16_t; // four 8-bit numbers of a row, for every lane
template <bool>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
KV1_LAZY KV1_INLINE int8x16_t signed_bytes(u32 a) { return vreinterpretq_s8_u32(uint32x4_t(a)); }

// Sums four products of bytes in each lane, in 32 bits. Bytes of a are at most 127.
KV1_LAZY KV1_INLINE int32x4_t dot4(int32x4_t sum, int8x16_t a, dot_row b) {
#if KV1_ISA_DOTPROD
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return vpadalq_s16(sum, pairs);
#endif
}

// A running sum of dot4 products. Without sdot the products of low codes are added up in 16 bits, of which there
// is room for 32767 / ((Unsigned ? 255 : 127) * MaxCode). Codes above 15 are added up in 32 bits. Those above 127 are no
// signed bytes, and go nibble by nibble.
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = KV1_ISA_DOTPROD || MaxCode > 15
                                             ? ~std::size_t{0}
                                             : 32767 / ((Unsigned ? 255 : 127) * MaxCode);
inline constexpr bool dot_sums_are_totals = false;
struct dot_sum {
    int32x4_t wide;
    int16x8_t low, high;
};
KV1_LAZY KV1_INLINE dot_sum dot_start() { return {vdupq_n_s32(0), vdupq_n_s16(0), vdupq_n_s16(0)}; }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, dot_row b) {
    if constexpr (MaxCode > 127) {
        sum.wide = dot4(sum.wide, signed_bytes(a & u32(0x0f0f0f0fu)), b);
        const int32x4_t high = dot4(vdupq_n_s32(0), signed_bytes((a >> 4) & u32(0x0f0f0f0fu)), b);
        sum.wide = vaddq_s32(sum.wide, vshlq_n_s32(high, 4));
    } else if constexpr (KV1_ISA_DOTPROD && Unsigned) {
#if KV1_ISA_DOTPROD
        sum.wide = vreinterpretq_s32_u32(vdotq_u32(
            vreinterpretq_u32_s32(sum.wide), vreinterpretq_u8_u32(uint32x4_t(a)), vreinterpretq_u8_s8(b)));
#endif
    } else if constexpr (KV1_ISA_DOTPROD || (MaxCode > 15 && !Unsigned)) {
        sum.wide = dot4(sum.wide, signed_bytes(a), b);
    } else if constexpr (MaxCode > 15) {
        const uint8x16_t codes = vreinterpretq_u8_u32(uint32x4_t(a)), row = vreinterpretq_u8_s8(b);
        const uint16x8_t pairs = vpaddq_u16(vmull_u8(vget_low_u8(codes), vget_low_u8(row)),
                                            vmull_high_u8(codes, row)); // at most 2 * 127 * 255
        sum.wide = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sum.wide), pairs));
    } else if constexpr (Unsigned) {
        const uint8x16_t codes = vreinterpretq_u8_u32(uint32x4_t(a)), row = vreinterpretq_u8_s8(b);
        sum.low = vreinterpretq_s16_u16(
            vmlal_u8(vreinterpretq_u16_s16(sum.low), vget_low_u8(codes), vget_low_u8(row)));
        sum.high = vreinterpretq_s16_u16(vmlal_high_u8(vreinterpretq_u16_s16(sum.high), codes, row));
    } else {
        sum.low = vmlal_s8(sum.low, vget_low_s8(signed_bytes(a)), vget_low_s8(b));
        sum.high = vmlal_high_s8(sum.high, signed_bytes(a), b);
    }
    return sum;
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    if constexpr (KV1_ISA_DOTPROD || MaxCode > 15)
        return i32(sum.wide);
    else
        return i32(vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high)));
}

KV1_LAZY KV1_INLINE u32 load_u16(const std::uint16_t* p) { return u32(vmovl_u16(vld1_u16(p))); }
KV1_LAZY KV1_INLINE f32 load_half(const std::uint16_t* p) {
    return f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
}
KV1_LAZY KV1_INLINE f32 half_to_float(u32 h) {
    return f32(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(uint32x4_t(h)))));
}
KV1_LAZY KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(x))));
}
KV1_LAZY KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    std::uint32_t four;
    std::memcpy(&four, p, sizeof four);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    return u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
KV1_LAZY KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    const uint16x4_t words = vmovn_u32(uint32x4_t(x));
    const std::uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
    std::memcpy(p, &four, sizeof four);
}
// Stores sixteen numbers 0 ... 255 as bytes, in one store: they are loaded again at once, in pieces of another size,
// and several small stores would not forward to such a load.
KV1_LAZY KV1_INLINE void store_line_u8(const i32 (&x)[registers_per_line], std::uint8_t* p) {
    const auto words = [](i32 a, i32 b) {
        return vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a)), vmovn_u32(vreinterpretq_u32_s32(b)));
    };
    vst1q_u8(p, vcombine_u8(vmovn_u16(words(x[0], x[1])), vmovn_u16(words(x[2], x[3]))));
}
// Levels of a codebook for bytes that are its codes.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    const uint8x16_t table = Levels == code_levels::codebook2
                                 ? vreinterpretq_u8_s32(vdupq_n_s32(packed_codebook))
                                 : vld1q_u8(codebook4_levels.data());
    return u32(vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(uint32x4_t(codes)))));
}
// (x & mask) | bits
KV1_LAZY KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
// A quarter is four numbers of a line. load_quarters() and store_quarters() move a register from and to quarters at
// addresses of their own. transpose_bytes() transposes the 4 x 4 bytes of each quarter. first_in_turns() and
// last_in_turns() take the first, or last, two numbers of each quarter of a and b in turns: a0 b0 a1 b1, a2 b2 a3 b3.
KV1_LAZY KV1_INLINE u32 load_quarters(const std::uint32_t* const (&from)[1]) {
    return u32(vld1q_u32(from[0]));
}
KV1_LAZY KV1_INLINE void store_quarters(u32 x, std::uint32_t* const (&to)[1]) {
    vst1q_u32(to[0], uint32x4_t(x));
}
KV1_LAZY KV1_INLINE u32 transpose_bytes(u32 x) {
    const uint8x16_t bytes = vreinterpretq_u8_u32(uint32x4_t(x));
    const uint8x16_t pairs = vzip1q_u8(bytes, vextq_u8(bytes, bytes, 8));
    return u32(vreinterpretq_u32_u8(vzip1q_u8(pairs, vextq_u8(pairs, pairs, 8))));
}
KV1_LAZY KV1_INLINE u32 first_in_turns(u32 a, u32 b) { return u32(vzip1q_u32(uint32x4_t(a), uint32x4_t(b))); }
KV1_LAZY KV1_INLINE u32 last_in_turns(u32 a, u32 b) { return u32(vzip2q_u32(uint32x4_t(a), uint32x4_t(b))); }
// Transposes a square of lanes x lanes numbers.
KV1_LAZY KV1_INLINE void transpose(f32 (&x)[lanes]) { xs::transpose(x, x + lanes); }
// A pair of neighbouring numbers in all lanes in turns, and the sums of neighbouring lanes: of a, then of b.
KV1_LAZY KV1_INLINE f32 broadcast_pair(const float* p) {
    const float32x2_t both = vld1_f32(p);
    return f32(vcombine_f32(both, both));
}
KV1_LAZY KV1_INLINE f32 add_neighbours(f32 a, f32 b) {
    return f32(vpaddq_f32(float32x4_t(a), float32x4_t(b)));
}
// Lanes in the opposite order.
KV1_LAZY KV1_INLINE f32 reversed(f32 x) {
    const float32x4_t halves = vrev64q_f32(float32x4_t(x));
    return f32(vextq_f32(halves, halves, 2));
}
// Rounds to the nearest integer, ties to even.
KV1_LAZY KV1_INLINE f32 nearest(f32 x) { return f32(vrndnq_f32(float32x4_t(x))); }
KV1_LAZY KV1_INLINE i32 round_to_int(f32 x) { return i32(vcvtnq_s32_f32(float32x4_t(x))); }
// Steps of exp2_nonpositive(). x / exp2_factor * 2^n for integral n, and zero for n = -64, whose bits are zero's: x
// lends 63 to the exponent.
inline constexpr float exp2_factor = 0x1p63f;
KV1_LAZY KV1_INLINE f32 exponent_in_range(f32 t) { return xs::max(t, f32(-64.0f)); }
KV1_LAZY KV1_INLINE f32 times_power_of_2(f32 x, f32 n) {
    return x * xs::bitwise_cast<float>((round_to_int(n) + i32(64)) << 23);
}
