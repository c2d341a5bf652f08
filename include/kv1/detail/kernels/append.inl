// SPDX-License-Identifier: Apache-2.0
//
// Quantizes, packs and inserts up to 16 vectors of 2-bit codes at once, tokens of a tile or the KV heads of a token.
// Codes are never stored to memory in between. The bits are those of encode_affine() and insert_codes(). Parsed once
// per target.
//
// No element is divided. Let d = fl(x - lo) and s be the scale. The code is the number of thresholds that fl(d / s)
// passes. Since fl(d / s) grows with d, each threshold is a float to compare d with:
//
//   code >= 1  iff  fl(d / s) >  1/2  iff  d >  s / 2       exact: no float lies between s / 2 and its rounding
//   code >= 2  iff  fl(d / s) >= 3/2  iff  d >= the smallest float for which that holds, fl(3/2 s) or a neighbour
//   code >= 3  iff  fl(d / s) >  5/2  iff  d >  the largest float for which it does not, fl(5/2 s) or a neighbour
//
// (1/2 and 5/2 round to the even codes 0 and 2, 3/2 to 2.) Division decides between a float and its neighbours, for a
// register of vectors at a time.
//
// Cost per 16 values on 16 lanes: 7 operations for the range, a subtraction and 3 comparisons, and for K the
// interleaving of three 16-bit masks, for V 3 selections and 3 others.

#include <kv1/detail/precise_math_begin.inl>

KV1_LAZY KV1_INLINE u32 next_float(f32 x, std::uint32_t step) {
    return xs::bitwise_cast<std::uint32_t>(x) + u32(step);
}

// The thresholds of up to 16 vectors.
struct tile_thresholds {
    alignas(64) float low[tile_tokens];
    alignas(64) float half[tile_tokens], three_halves[tile_tokens], five_halves[tile_tokens];
};

KV1_LAZY KV1_INLINE void find_thresholds(const float* high, tile_thresholds& t, std::uint16_t* scales,
                                         std::uint16_t* minima) {
    for (std::size_t i = 0; i < tile_tokens; i += lanes) {
        const f32 lo = f32::load_aligned(t.low + i);
        const f32 quotient = quotient_of(f32::load_aligned(high + i) - lo, f32(3.0f));
        const f32 s = xs::max(quotient, f32(smallest_scale));
        store_half(s, scales + i);
        store_half(lo, minima + i);
        (s * f32(0.5f)).store_aligned(t.half + i);
        {
            const f32 middle = s * f32(1.5f);
            const f32 below = xs::bitwise_cast<float>(next_float(middle, ~0u));
            const f32 above = xs::bitwise_cast<float>(next_float(middle, 1u));
            const f32 first = xs::select(quotient_of(middle, s) >= f32(1.5f), middle, above);
            xs::select(quotient_of(below, s) >= f32(1.5f), below, first).store_aligned(t.three_halves + i);
        }
        {
            const f32 middle = s * f32(2.5f);
            const f32 below = xs::bitwise_cast<float>(next_float(middle, ~0u));
            const f32 above = xs::bitwise_cast<float>(next_float(middle, 1u));
            const f32 first = xs::select(quotient_of(middle, s) <= f32(2.5f), middle, below);
            xs::select(quotient_of(above, s) <= f32(2.5f), above, first).store_aligned(t.five_halves + i);
        }
    }
}

// Spreads the bits of x to the even places of the result.
KV1_LAZY KV1_INLINE std::uint32_t at_even_bits(std::uint32_t x) {
#if !KV1_ISA_PDEP
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
#else
    return _pdep_u32(x, 0x55555555u);
#endif
}

struct passed {
    xs::batch_bool<float, arch> half, three_halves, five_halves;
};
KV1_LAZY KV1_INLINE passed passes(f32 x, const tile_thresholds& t, std::size_t i) {
    const f32 d = x - f32(t.low[i]);
    return {d > f32(t.half[i]), d >= f32(t.three_halves[i]), d > f32(t.five_halves[i])};
}

KV1_LAZY KV1_INLINE f32 load_channels(const float* x, std::size_t n, std::size_t from) {
    return from + lanes <= n ? f32::load_unaligned(x + from) : load_tail(x, n, from);
}

// Inserts vectors into a K section: tokens token ... token + count - 1 of one tile.
KV1_LAZY KV1_INLINE void insert_keys(const vector_to_append* rows, std::size_t count, std::size_t first,
                                     const tile_thresholds& t) {
    const section_layout& s = *rows[0].section;
    const std::size_t n = s.channels, groups = round_up(n, line_lanes) / line_lanes;
    std::byte* const tile =
        rows[0].page + s.offset + rows[0].token / tile_tokens * s.unit_lines() * line_bytes;
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t g = 0; g < groups; ++g) {
            std::uint32_t half = 0, three_halves = 0, five_halves = 0;
            for (std::size_t k = 0; k < line_lanes && g * line_lanes + k < n; k += lanes) {
                const std::size_t from = g * line_lanes + k;
                const passed p = passes(load_channels(rows[i].x, n, from), t, first + i);
                // copies of the first channel past the last one are not part of the vector
                const std::uint64_t valid =
                    n - from < lanes ? (std::uint64_t{1} << (n - from)) - 1 : ~std::uint64_t{0};
                half |= static_cast<std::uint32_t>(p.half.mask() & valid) << k;
                three_halves |= static_cast<std::uint32_t>(p.three_halves.mask() & valid) << k;
                five_halves |= static_cast<std::uint32_t>(p.five_halves.mask() & valid) << k;
            }
            // 1, 2, 3 as binary: the low bit is set for 1 and 3
            const std::uint32_t low = (half & ~three_halves) | five_halves;
            store_lane(tile, g * line_lanes + rows[i].token % tile_tokens,
                       at_even_bits(low) | at_even_bits(three_halves) << 1);
        }
}

// Inserts vectors into N registers of channels of a V section, from channel `c` on. Fields of their lanes are
// replaced. The thresholds of a vector serve all N registers.
template <std::size_t N>
KV1_INLINE void insert_value_step(const vector_to_append* rows, std::size_t count, std::size_t first,
                                  const tile_thresholds& t, const int* shifts, std::uint32_t kept,
                                  std::size_t c) {
    const section_layout& s = *rows[0].section;
    const std::size_t n = s.channels;
    std::byte* const section = rows[0].page + s.offset + rows[0].token / tile_tokens * line_bytes;
    const std::size_t unit = s.unit_lines() * line_bytes;
    std::uint32_t* lane[N];
    u32 word[N];
    KV1_UNROLL for (std::size_t k = 0; k < N; ++k) {
        const std::size_t at = c + k * lanes;
        lane[k] = reinterpret_cast<std::uint32_t*>(section + at / line_lanes * unit) + at % line_lanes;
        word[k] = u32::load_aligned(lane[k]) & u32(kept);
    }
    for (std::size_t i = 0; i < count; ++i) {
        const f32 lo(t.low[first + i]), half(t.half[first + i]), three_halves(t.three_halves[first + i]),
            five_halves(t.five_halves[first + i]);
        const u32 zero(0u), low(1u << shifts[i]), both(3u << shifts[i]);
        KV1_UNROLL for (std::size_t k = 0; k < N; ++k) {
            const std::size_t at = c + k * lanes;
            const f32 d =
                (N > 1 ? f32::load_unaligned(rows[i].x + at) : load_channels(rows[i].x, n, at)) - lo;
            const auto one = xs::batch_bool_cast<std::uint32_t>(d > half);
            const auto two = xs::batch_bool_cast<std::uint32_t>(d >= three_halves);
            const auto three = xs::batch_bool_cast<std::uint32_t>(d > five_halves);
            // three nested comparisons give codes 0, 1, 2, 3: the low bit is 0, 1, 0, 1, the high bit 0, 0, 1, 1
            word[k] = word[k] | (xs::select(one, low, zero) ^ xs::select(two, both, zero) ^
                                 xs::select(three, low, zero));
        }
    }
    if (N == 1 && c + lanes > n) { // lanes past the channels hold copies of the first: not stored
        alignas(64) std::uint32_t keep[lanes];
        for (std::size_t k = 0; k < lanes; ++k)
            keep[k] = c + k < n ? ~0u : kept;
        word[0] = word[0] & u32::load_aligned(keep);
    }
    KV1_UNROLL for (std::size_t k = 0; k < N; ++k) { word[k].store_aligned(lane[k]); }
}

// Inserts vectors of one tile's tokens into a V section. Lanes past the channels are zero and stay so.
KV1_LAZY KV1_INLINE void insert_values(const vector_to_append* rows, std::size_t count, std::size_t first,
                                       const tile_thresholds& t) {
    std::uint32_t replaced = 0;
    int shifts[tile_tokens];
    for (std::size_t i = 0; i < count; ++i) {
        shifts[i] = value_field_shift(2, rows[i].token % tile_tokens);
        replaced |= 3u << shifts[i];
    }
    constexpr std::size_t at_once = 4;
    const std::size_t n = rows[0].section->channels;
    std::size_t c = 0;
    for (; c + at_once * lanes <= n; c += at_once * lanes)
        insert_value_step<at_once>(rows, count, first, t, shifts, ~replaced, c);
    for (; c < n; c += lanes)
        insert_value_step<1>(rows, count, first, t, shifts, ~replaced, c);
}

// Finds the first vector that is refused, in the order in which single vectors would be.
KV1_LAZY inline encode_result first_failure(const vector_to_append* rows, std::size_t count,
                                            std::size_t& failed) noexcept {
    alignas(64) std::uint8_t codes[max_vector_length];
    for (std::size_t i = 0; i < count; ++i) {
        const encode_result r = encode_affine(rows[i].x, rows[i].section->channels, 2, codes);
        failed = i;
        if (r.code != errc::ok)
            return r;
    }
    return {};
}

KV1_LAZY inline encode_result append_affine2(const vector_to_append* rows, std::size_t count,
                                             std::size_t& failed) noexcept {
    alignas(64) float high[tile_tokens] = {};
    alignas(64) std::uint16_t scales[tile_tokens], minima[tile_tokens];
    tile_thresholds t{};
    for (std::size_t i = 0; i < count; ++i) {
        const value_range range = range_of(rows[i].x, rows[i].section->channels);
        if (!range.finite)
            return first_failure(rows, count, failed);
        t.low[i] = range.low;
        high[i] = range.high;
    }
    find_thresholds(high, t, scales, minima);
    for (std::size_t i = 0; i < count; ++i)
        if ((scales[i] & 0x7c00u) == 0x7c00u || (minima[i] & 0x7c00u) == 0x7c00u)
            return first_failure(rows, count, failed);
    for (std::size_t first = 0, last = 0; first < count; first = last) {
        for (last = first + 1; last < count && rows[last].page == rows[first].page &&
                               rows[last].section == rows[first].section &&
                               rows[last].token / tile_tokens == rows[first].token / tile_tokens;)
            ++last;
        for (std::size_t i = first; i < last; ++i)
            store_metadata(*rows[i].section, rows[i].page, rows[i].token, {scales[i], minima[i]});
        if (rows[first].section->keys)
            insert_keys(rows + first, last - first, first, t);
        else
            insert_values(rows + first, last - first, first, t);
    }
    return {};
}

#include <kv1/detail/precise_math_end.inl>
