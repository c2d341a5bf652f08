// SPDX-License-Identifier: Apache-2.0
//
// Quantizes vectors to codes, bit for bit as kv1/quantizers/*.hpp define. Parsed once per target. It makes two passes
// over a vector, which lies in the first-level cache. The first finds its range and whether it is finite. The second
// takes a subtraction, a division and a rounding addition per register.

#include <kv1/detail/precise_math_begin.inl>

// Sums, differences and quotients whose bits matter. The region's pragma affects clang's own operators. It does not
// affect intrinsics, which keep the flags of the place where their header was included. On NEON, xsimd divides by an
// estimated reciprocal.
#if defined(__clang__) && defined(__x86_64__)
KV1_LAZY KV1_INLINE f32 sum_of(f32 a, f32 b) { return f32(f32::register_type(a) + f32::register_type(b)); }
KV1_LAZY KV1_INLINE f32 difference_of(f32 a, f32 b) {
    return f32(f32::register_type(a) - f32::register_type(b));
}
KV1_LAZY KV1_INLINE f32 quotient_of(f32 a, f32 b) {
    return f32(f32::register_type(a) / f32::register_type(b));
}
#elif defined(__GNUC__) && defined(__ARM_NEON) && !defined(__ARM_FEATURE_SVE)
KV1_LAZY KV1_INLINE f32 sum_of(f32 a, f32 b) {
    f32::register_type sum = a + b;
#if defined(__clang__) && defined(__FAST_MATH__)
    __asm__ volatile("" : "+w"(sum));
#endif
    return f32(sum);
}
KV1_LAZY KV1_INLINE f32 difference_of(f32 a, f32 b) {
    f32::register_type difference = a - b;
#if defined(__clang__) && defined(__FAST_MATH__)
    __asm__ volatile("" : "+w"(difference));
#endif
    return f32(difference);
}
KV1_LAZY KV1_INLINE f32 quotient_of(f32 a, f32 b) {
    f32::register_type divisor = b;
#if defined(__clang__) && defined(__FAST_MATH__)
    __asm__ volatile("" : "+w"(divisor));
#endif
    return f32(f32::register_type(a) / divisor);
}
#elif defined(__GNUC__) && !defined(__clang__) && defined(__SSE2__) &&                                       \
    (defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__))
// A g++ function whose only floats are batches takes over the flags of the first xsimd function that is inlined into
// it, until it is inlined itself. Under -ffast-math (1.5 s) / s became 1.5 there.
KV1_LAZY KV1_INLINE f32 sum_of(f32 a, f32 b) { return a + b; }
KV1_LAZY KV1_INLINE f32 difference_of(f32 a, f32 b) { return a - b; }
KV1_LAZY KV1_INLINE f32 quotient_of(f32 a, f32 b) {
    f32::register_type divisor = b;
    __asm__("" : "+x"(divisor));
    return f32(f32::register_type(a) / divisor);
}
#elif defined(_M_ARM64)
KV1_LAZY KV1_INLINE f32 sum_of(f32 a, f32 b) { return a + b; }
KV1_LAZY KV1_INLINE f32 difference_of(f32 a, f32 b) { return a - b; }
KV1_LAZY KV1_INLINE f32 quotient_of(f32 a, f32 b) { return f32(vdivq_f32(a, b)); }
#else
KV1_LAZY KV1_INLINE f32 sum_of(f32 a, f32 b) { return a + b; }
KV1_LAZY KV1_INLINE f32 difference_of(f32 a, f32 b) { return a - b; }
KV1_LAZY KV1_INLINE f32 quotient_of(f32 a, f32 b) { return a / b; }
#endif

// Order-preserving integer image of a float: min and max of images are min and max of the reals with -0
// before +0, and a NaN or infinity shows as an image outside the finite range. Immune to -ffast-math.
KV1_LAZY KV1_INLINE i32 ordered_bits(f32 x) {
    const i32 bits = xs::bitwise_cast<std::int32_t>(x);
    return bits ^ ((bits >> 31) & i32(0x7fffffff));
}

// Loads the last, partial register of a vector, filled up with copies of its first channel.
KV1_LAZY KV1_INLINE f32 load_tail(const float* x, std::size_t n, std::size_t from) {
    alignas(64) float tail[lanes];
    for (std::size_t k = 0; k < lanes; ++k)
        tail[k] = from + k < n ? x[from + k] : x[0];
    return f32::load_aligned(tail);
}

struct value_range {
    float low, high;
    bool finite;
};

KV1_LAZY KV1_INLINE value_range range_of(const float* x, std::size_t n) {
    const i32 first = ordered_bits(f32(x[0]));
    i32 low = first, high = first;
    for (std::size_t i = 0; i < n; i += lanes) {
        const i32 key = ordered_bits(i + lanes <= n ? f32::load_unaligned(x + i) : load_tail(x, n, i));
        low = xs::min(low, key);
        high = xs::max(high, key);
    }
    const std::int32_t lo = xs::reduce_min(low);
    const std::int32_t hi = xs::reduce_max(high);
    constexpr std::int32_t infinity = 0x7f800000;
    return {std::bit_cast<float>(lo ^ ((lo >> 31) & 0x7fffffff)),
            std::bit_cast<float>(hi ^ ((hi >> 31) & 0x7fffffff)), hi < infinity && lo > ~infinity};
}

// Codes past n are written as 0 up to the register's end, so the buffer holds round_up(n, 16) bytes.
KV1_LAZY KV1_INLINE void store_codes(u32 c, std::uint8_t* codes, std::size_t i, std::size_t n) {
    store_u8(c, codes + i);
    for (std::size_t k = n; k < i + lanes; ++k)
        codes[k] = 0;
}

KV1_LAZY inline encode_result refuse_non_finite(const float* x, std::size_t n) noexcept {
    return {errc::non_finite, rule_finite, first_non_finite({x, n}), {}};
}

KV1_LAZY inline encode_result encode_affine(const float* x, std::size_t n, int bits,
                                            std::uint8_t* codes) noexcept {
    const value_range range = range_of(x, n);
    if (!range.finite)
        return refuse_non_finite(x, n);
    const auto levels = static_cast<float>((1 << bits) - 1);
    const float quotient = (range.high - range.low) / as_written(levels);
    const float scale = quotient > smallest_scale ? quotient : smallest_scale;
    const row_metadata stored{float_to_half(scale), float_to_half(range.low)};
    if ((stored.scale & 0x7c00u) == 0x7c00u || (stored.minimum & 0x7c00u) == 0x7c00u)
        return {errc::not_representable, rule_fp16_metadata, no_channel, {}};
    const f32 lo(range.low), s(scale), top(levels), zero(0.0f);
    for (std::size_t i = 0; i < n; i += lanes) {
        const f32 v = i + lanes <= n ? f32::load_unaligned(x + i) : load_tail(x, n, i);
        const f32 level = xs::min(xs::max(quotient_of(v - lo, s), zero), top);
        // the sum is rounded to an integer, half to even, which is in its low bits
        store_codes(xs::bitwise_cast<std::uint32_t>(level + f32(8388608.0f)) & u32(0xffu), codes, i, n);
    }
    return {errc::ok, "", 0, stored};
}

KV1_LAZY KV1_INLINE void encode_signs(const float* x, std::size_t n, std::uint8_t* codes) {
    for (std::size_t i = 0; i < n; i += lanes) {
        const f32 v = i + lanes <= n ? f32::load_unaligned(x + i) : load_tail(x, n, i);
        // v >= 0, tested on bits: the image of -0 is -1
        const i32 code = xs::select(ordered_bits(v) > i32(-2), i32(1), i32(0));
        store_codes(xs::bitwise_cast<std::uint32_t>(code), codes, i, n);
    }
}

KV1_LAZY inline encode_result encode_binary(const float* x, std::size_t n, std::uint8_t* codes) noexcept {
    if (!range_of(x, n).finite)
        return refuse_non_finite(x, n);
    encode_signs(x, n, codes);
    return {};
}

KV1_LAZY inline encode_result encode_scaled_binary(const float* x, std::size_t n,
                                                   std::uint8_t* codes) noexcept {
    if (!range_of(x, n).finite)
        return refuse_non_finite(x, n);
    f32 sums[registers_per_line]; // 16 partial sums, the definition's order on any lane count
    for (std::size_t k = 0; k < registers_per_line; ++k)
        sums[k] = f32(0.0f);
    for (std::size_t i = 0; i < n; i += line_lanes) {
        for (std::size_t k = 0; k < registers_per_line; ++k) {
            const std::size_t at = i + k * lanes;
            if (at + lanes <= n) {
                sums[k] = sum_of(sums[k], xs::abs(f32::load_unaligned(x + at)));
            } else {
                alignas(64) float tail[lanes];
                for (std::size_t j = 0; j < lanes; ++j)
                    tail[j] = at + j < n ? x[at + j] : 0.0f;
                sums[k] = sum_of(sums[k], xs::abs(f32::load_aligned(tail)));
            }
        }
    }
    alignas(64) std::array<float, line_lanes> partial;
    for (std::size_t k = 0; k < registers_per_line; ++k)
        sums[k].store_aligned(partial.data() + k * lanes);
    const float mean = add_pairwise(partial) / static_cast<float>(n);
    const row_metadata stored{float_to_half(mean > smallest_scale ? mean : smallest_scale), 0};
    if ((stored.scale & 0x7c00u) == 0x7c00u)
        return {errc::not_representable, rule_fp16_metadata, no_channel, {}};
    encode_signs(x, n, codes);
    return {errc::ok, "", 0, stored};
}

#include <kv1/detail/precise_math_end.inl>
