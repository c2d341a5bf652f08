// SPDX-License-Identifier: Apache-2.0
//
// Primitives of a target that xsimd does not have, in terms of xsimd alone; any lane count up to 16.
// Parsed inside a target namespace that defines `xs` and `arch`.

using f32 = xs::batch<float, arch>;
using i32 = xs::batch<std::int32_t, arch>;
using u32 = xs::batch<std::uint32_t, arch>;
inline constexpr std::size_t lanes = f32::size;
inline constexpr std::size_t registers_per_line = line_lanes / lanes; // registers of a 64-byte line
inline constexpr bool many_registers = false;

using dot_row = i32; // four 8-bit numbers of a row, for every lane
template <bool>
KV1_INLINE dot_row dot_broadcast(std::int32_t four) {
    return i32(four);
}

// acc + the sum of four products of unsigned bytes and bytes of a row, lane by lane.
template <bool Unsigned>
KV1_INLINE i32 dot4(i32 acc, u32 a, i32 row) {
    const i32 ua = xs::bitwise_cast<std::int32_t>(a);
    if constexpr (Unsigned) {
        acc = acc + (ua & i32(0xff)) * (row & i32(0xff));
        acc = acc + ((ua >> 8) & i32(0xff)) * ((row >> 8) & i32(0xff));
        acc = acc + ((ua >> 16) & i32(0xff)) * ((row >> 16) & i32(0xff));
        return acc + ((ua >> 24) & i32(0xff)) * ((row >> 24) & i32(0xff));
    }
    const i32 b = row;
    acc = acc + (ua & i32(0xff)) * ((b << 24) >> 24);
    acc = acc + ((ua >> 8) & i32(0xff)) * ((b << 16) >> 24);
    acc = acc + ((ua >> 16) & i32(0xff)) * ((b << 8) >> 24);
    return acc + ((ua >> 24) & i32(0xff)) * (b >> 24);
}
// A running sum of dot4 products: add, then finish to lanes of 32 bits. dot_limit is how many products of
// codes up to MaxCode may be added before finishing. Any code of 8 bits is allowed on every target.
using dot_sum = i32;
inline constexpr bool dot_sums_are_totals = true;
template <int MaxCode, bool Unsigned>
inline constexpr std::size_t dot_limit = ~std::size_t{0};
KV1_LAZY KV1_INLINE dot_sum dot_start() { return i32(0); }
template <int MaxCode, bool Unsigned>
KV1_INLINE dot_sum dot_add(dot_sum sum, u32 a, i32 b) {
    return dot4<Unsigned>(sum, a, b);
}
template <int MaxCode, bool Unsigned>
KV1_INLINE i32 dot_finish(dot_sum sum) {
    return sum;
}

// Converts fp16 bits in the low halves of lanes to floats. Precondition: finite numbers. No denormal float occurs on
// the way.
KV1_LAZY KV1_INLINE f32 half_to_float(u32 h) {
    const u32 magnitude = (h & u32(0x7fffu)) << 13;
    const u32 sign = (h & u32(0x8000u)) << 16;
    const u32 normal = magnitude + u32(112u << 23);
    const f32 subnormal =
        xs::bitwise_cast<float>(magnitude + u32(113u << 23)) - f32(6.103515625e-05f); // 2^-14
    const auto is_subnormal = magnitude < u32(1u << 23);
    const u32 value = xs::select(is_subnormal, xs::bitwise_cast<std::uint32_t>(subnormal), normal);
    return xs::bitwise_cast<float>(value | sign);
}
KV1_LAZY KV1_INLINE u32 load_u16(const std::uint16_t* p) {
    alignas(64) std::uint32_t wide[lanes];
    for (std::size_t i = 0; i < lanes; ++i)
        wide[i] = p[i];
    return u32::load_aligned(wide);
}
KV1_LAZY KV1_INLINE f32 load_half(const std::uint16_t* p) { return half_to_float(load_u16(p)); }
KV1_LAZY KV1_INLINE void store_half(f32 x, std::uint16_t* p) {
    alignas(64) float narrow[lanes];
    x.store_aligned(narrow);
    for (std::size_t i = 0; i < lanes; ++i)
        p[i] = float_to_half(narrow[i]);
}
KV1_LAZY KV1_INLINE u32 load_u8(const std::uint8_t* p) {
    alignas(64) std::uint32_t wide[lanes];
    for (std::size_t i = 0; i < lanes; ++i)
        wide[i] = p[i];
    return u32::load_aligned(wide);
}
KV1_LAZY KV1_INLINE void store_u8(u32 x, std::uint8_t* p) {
    alignas(64) std::uint32_t wide[lanes];
    x.store_aligned(wide);
    for (std::size_t i = 0; i < lanes; ++i)
        p[i] = static_cast<std::uint8_t>(wide[i]);
}
// Stores sixteen numbers 0 ... 255 as bytes.
KV1_LAZY KV1_INLINE void store_line_u8(const i32 (&x)[registers_per_line], std::uint8_t* p) {
    for (std::size_t i = 0; i < registers_per_line; ++i)
        store_u8(xs::bitwise_cast<std::uint32_t>(x[i]), p + i * lanes);
}
// (x & mask) | bits
KV1_LAZY KV1_INLINE u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
// A quarter is four numbers of a line. load_quarters() and store_quarters() move a register from and to quarters at
// addresses of their own. transpose_bytes() transposes the 4 x 4 bytes of each quarter. first_in_turns() and
// last_in_turns() take the first, or last, two numbers of each quarter of a and b in turns: a0 b0 a1 b1, a2 b2 a3 b3.
KV1_LAZY KV1_INLINE u32 load_quarters(const std::uint32_t* const (&from)[lanes / 4]) {
    alignas(64) std::uint32_t x[lanes];
    for (std::size_t q = 0; q < lanes / 4; ++q)
        std::memcpy(x + 4 * q, from[q], 16);
    return u32::load_aligned(x);
}
KV1_LAZY KV1_INLINE void store_quarters(u32 x, std::uint32_t* const (&to)[lanes / 4]) {
    alignas(64) std::uint32_t all[lanes];
    x.store_aligned(all);
    for (std::size_t q = 0; q < lanes / 4; ++q)
        std::memcpy(to[q], all + 4 * q, 16);
}
KV1_LAZY KV1_INLINE u32 transpose_bytes(u32 x) {
    alignas(64) std::uint32_t all[lanes], transposed[lanes];
    x.store_aligned(all);
    for (std::size_t i = 0; i < lanes; ++i) {
        transposed[i] = 0;
        for (std::size_t k = 0; k < 4; ++k)
            transposed[i] |= (all[i / 4 * 4 + k] >> (8 * (i % 4)) & 0xffu) << (8 * k);
    }
    return u32::load_aligned(transposed);
}
// Numbers from and from + 1 of each quarter of a and of b, in turns.
template <std::size_t From>
KV1_INLINE u32 in_turns(u32 a, u32 b) {
    alignas(64) std::uint32_t x[lanes], y[lanes], mixed[lanes];
    a.store_aligned(x);
    b.store_aligned(y);
    for (std::size_t i = 0; i < lanes; ++i)
        mixed[i] = (i % 2 == 0 ? x : y)[i / 4 * 4 + From + i % 4 / 2];
    return u32::load_aligned(mixed);
}
KV1_LAZY KV1_INLINE u32 first_in_turns(u32 a, u32 b) { return in_turns<0>(a, b); }
KV1_LAZY KV1_INLINE u32 last_in_turns(u32 a, u32 b) { return in_turns<2>(a, b); }
// Transposes a square of lanes x lanes numbers.
KV1_LAZY KV1_INLINE void transpose(f32 (&x)[lanes]) { xs::transpose(x, x + lanes); }
// A pair of neighbouring numbers in all lanes in turns, and the sums of neighbouring lanes: of a, then of b.
KV1_LAZY KV1_INLINE f32 broadcast_pair(const float* p) {
    alignas(64) float all[lanes];
    for (std::size_t i = 0; i < lanes; ++i)
        all[i] = p[i % 2];
    return f32::load_aligned(all);
}
KV1_LAZY KV1_INLINE f32 add_neighbours(f32 a, f32 b) {
    alignas(64) float all[2 * lanes], sums[lanes];
    a.store_aligned(all);
    b.store_aligned(all + lanes);
    for (std::size_t i = 0; i < lanes; ++i)
        sums[i] = all[2 * i] + all[2 * i + 1];
    return f32::load_aligned(sums);
}
// Lanes in the opposite order.
KV1_LAZY KV1_INLINE f32 reversed(f32 x) {
    alignas(64) float all[lanes], turned[lanes];
    x.store_aligned(all);
    for (std::size_t i = 0; i < lanes; ++i)
        turned[i] = all[lanes - 1 - i];
    return f32::load_aligned(turned);
}
// Rounds to the nearest integer, ties to even.
KV1_LAZY KV1_INLINE f32 nearest(f32 x) { return xs::nearbyint(x); }
KV1_LAZY KV1_INLINE i32 round_to_int(f32 x) { return xs::to_int(xs::nearbyint(x)); }
// Levels of a codebook for bytes that are its codes. codebook2: 5 c - c / 2, which borrows nothing from the next byte.
// codebook4: 2 c + 3, and codes 0, 1, 14 and 15 lie 3, 1, 1 and 3 further out.
template <code_levels Levels>
KV1_INLINE u32 levels_of(u32 codes) {
    const u32 ones(0x01010101u);
    if (Levels == code_levels::codebook2)
        return ((codes << 2) + codes) - ((codes >> 1) & ones);
    const u32 one = codes >> 1, two = codes >> 2, three = codes >> 3;
    const u32 high = one & two & three & ones, low = ones & ~(one | two | three);
    const u32 highest = high & codes, lowest = low & ~codes;
    const u32 up = high + (highest << 1), down = low + (lowest << 1);
    return (codes << 1) + u32(0x03030303u) + up - down;
}
// Steps of exp2_nonpositive(). x / exp2_factor * 2^n for integral n, and zero for n = -64, whose bits are zero's: x
// lends 63 to the exponent.
inline constexpr float exp2_factor = 0x1p63f;
KV1_LAZY KV1_INLINE f32 exponent_in_range(f32 t) { return xs::max(t, f32(-64.0f)); }
KV1_LAZY KV1_INLINE f32 times_power_of_2(f32 x, f32 n) {
    return x * xs::bitwise_cast<float>((xs::to_int(n) + i32(64)) << 23);
}
