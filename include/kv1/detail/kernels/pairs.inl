// SPDX-License-Identifier: Apache-2.0
//
// Scores against keys of 2 and 3 bits by channel pairs. Parsed once per target; empty unless the target can look bytes
// of a register up in a table of 64 (AVX-512 VBMI). It lies in the region of AVX-512 VNNI, and pair_tables hands it out
// (tables.inl). tests/support/attention_oracle.hpp has the same rounding in plain C++ (paired_query).
//
// Let a and b be the query's numbers for the two channels of a pair, and c_a and c_b their codes. The pair adds
// f = a (c_a - 3/2) + b (c_b - 3/2) to the score. f takes sixteen values, within +-R, R = 3/2 (|a| + |b|). With a step
// that all pairs of the query row share, and a multiplier m of the pair,
//
//   step = 2 max R / (127 * 255), m = ceil(127 R / max R), f ~ step * m * (t - 255/2), t = 0 ... 255
//
// Example: a = 2, b = 1, and no pair of the row is larger: R = max R = 4.5, m = 127, step * m = 9 / 255. Codes 3 and 0
// add f = 2 * 1.5 - 1 * 1.5 = 1.5, which is t = 170.
//
// So the four bits of a pair's codes are an index into a table of t. Four pairs make one table of 64 bytes. One vpermb
// and one vpdpbusd do what two vpdpbusd do with single codes, on other ports (vpermb: FP1, FP2; vpdpbusd: FP0, FP1).
// A rounding is at most m max R / (127 * 255), which depends on the pair's own size; that of single 8-bit queries
// depends on the largest channel.
//
// For the codebook, the level less 7 takes the place of c - 3/2, and 7 that of 3/2 in R.
//
// A code of 3 bits is its two low bits and 4 h, with the high bit h. Low bits go by pairs, as above. High bits go by
// fours of channels, in lines and tables of their own. A four adds the sum of 4 q (h - 1/2), which is within
// +-2 (|q_0| + ... + |q_3|). Pairs and fours share the step.
//
//   line of K      lane = token, byte j of it = channels 4 j ... 4 j + 3: pairs (0, 1) in its low half, (2, 3) above
//   tables         [line][half][row of the tile][64]: entry 16 j + c_a + 4 c_b
//   multipliers    [line][half][row of the tile][4]
//   of high bits   byte j = channels 8 j ... 8 j + 7: fours in its low half and above; tables and multipliers alike,
//                  behind those of all pairs, with entry 16 j + h_0 + 2 h_1 + 4 h_2 + 8 h_3
//
// Per line (16 tokens x 16 channels) and 4 registers of 4 rows: 32 vpermb, 32 vpdpbusd, 4 shifts, 8 vpternlog, 8
// tables and 8 broadcasts loaded. High bits take as much for 32 channels. Making tables takes 5 operations a pair, once a
// task.

#if defined(KV1_ISA_PAIRS)

inline constexpr float pair_top = 255.0f, multiplier_top = 127.0f;
inline constexpr float high_half = 2.0f; // of the level 4 of a high bit, which lies about its middle

// Makes tables and multipliers of a query row, which is row r of the R rows of its tile. padded: channels, rounded up
// to a multiple of 32.
KV1_LAZY inline void pair_query(const float* query, std::size_t padded, const format_traits& keys,
                                std::uint8_t* tables, std::int8_t* multipliers, std::size_t r,
                                std::size_t rows, float& scale, float& offset) noexcept {
    const bool fours = keys.slice_count() == 2;
    const float middle = fours ? 1.5f : 0.5f * static_cast<float>(keys.top_level()); // of a pair's levels
    const i32 neighbours(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    f32 widest(0.0f), widest_four(0.0f);
    for (std::size_t i = 0; i < padded; i += 2 * lanes) {
        f32 a, b;
        split_pairs(query + i, a, b);
        const f32 pair = xs::abs(a) + xs::abs(b);
        widest = xs::max(widest, pair);
        if (fours)
            widest_four = xs::max(widest_four, pair + numbers_at(pair, neighbours));
    }
    const float top_pair = middle * xs::reduce_max(widest),
                top_four = high_half * xs::reduce_max(widest_four);
    const float top = top_four > top_pair ? top_four : top_pair;
    // of a line and half, the pairs in the order of a table's quarters; of two lines, pairs line by line, half by half
    const i32 quarters(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const i32 halves(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    // of a line of the second slice, the fours half by half, each once
    const i32 four_halves(0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14);
    alignas(64) float lanes_of_a[lanes];
    alignas(64) float first_sides[lanes],
        second_sides[lanes]; // of the high bits of a four's first two channels
    f32 level_of_b[4];
    for (std::size_t c = 0; c < lanes; ++c) {
        lanes_of_a[c] = static_cast<float>(keys.level(static_cast<std::uint32_t>(c & 3))) - middle;
        first_sides[c] = (c & 1) != 0 ? high_half : -high_half;
        second_sides[c] = (c & 2) != 0 ? high_half : -high_half;
    }
    for (std::size_t c = 0; c < 4; ++c)
        level_of_b[c] = f32(lanes_of_a[c]);
    const f32 first_side = f32::load_aligned(first_sides), second_side = f32::load_aligned(second_sides);
    const f32 level_of_a = f32::load_aligned(lanes_of_a), scaled(multiplier_top / top),
              step(top / multiplier_top), centre(0.5f * pair_top), zero(0.0f);
    std::uint8_t* const four_tables = tables + 8 * padded * rows;
    std::int8_t* const four_multipliers = multipliers + padded / 2 * rows;
    f32 total(0.0f), four_total(0.0f);
    // NaN becomes 0, and so does a row of zeros
    const auto multiplier_of = [&](f32 reach) {
        return xs::min(xs::max(xs::ceil(reach * scaled), f32(0.0f)), f32(multiplier_top));
    };
    for (std::size_t i = 0; i < padded; i += 2 * lanes) { // two lines
        f32 a, b;
        split_pairs(query + i, a, b);
        const f32 size = xs::abs(a) + xs::abs(b);
        const f32 multiplier = multiplier_of(f32(middle) * size);
        const f32 inverse = centre / (multiplier * step);
        const auto any = multiplier > zero;
        const f32 first = xs::select(any, a * inverse, zero), second = xs::select(any, b * inverse, zero);
        total = total + multiplier;
        alignas(16) std::uint8_t bytes[lanes];
        store_u8(xs::bitwise_cast<std::uint32_t>(numbers_at(xs::to_int(multiplier), halves)), bytes);
        for (int part = 0; part < 4; ++part) { // line and half
            const std::size_t at = (i / 8 + static_cast<std::size_t>(part)) * rows + r;
            const i32 from = quarters + i32(part / 2 * 8 + part % 2);
            const f32 by_a = xs::fma(numbers_at(first, from), level_of_a, centre),
                      of_b = numbers_at(second, from);
            i32 entry[4];
            KV1_UNROLL for (std::size_t c = 0; c < 4; ++c) {
                entry[c] = round_to_int(xs::fma(of_b, level_of_b[c], by_a));
            }
            pack_quarters(entry[0], entry[1], entry[2], entry[3])
                .store_aligned(reinterpret_cast<std::uint32_t*>(tables + at * 64));
            std::memcpy(multipliers + at * 4, bytes + part * 4, 4);
        }
        if (!fours)
            continue;
        // lanes 2 i and 2 i + 1 have four i
        const f32 its_multiplier = multiplier_of(f32(high_half) * (size + numbers_at(size, neighbours)));
        const f32 its_inverse = centre / (its_multiplier * step);
        const auto its_any = its_multiplier > zero;
        four_total = four_total + its_multiplier;
        const f32 even = xs::select(its_any, a * its_inverse, zero),
                  odd = xs::select(its_any, b * its_inverse, zero);
        store_u8(xs::bitwise_cast<std::uint32_t>(numbers_at(xs::to_int(its_multiplier), four_halves)), bytes);
        for (int half = 0; half < 2; ++half) {
            const std::size_t at = (i / 16 + static_cast<std::size_t>(half)) * rows + r;
            const i32 from = quarters + quarters + i32(2 * half), next = from + i32(1);
            const f32 low = xs::fma(numbers_at(odd, from), second_side,
                                    xs::fma(numbers_at(even, from), first_side, centre));
            const f32 third = numbers_at(even, next), fourth = numbers_at(odd, next);
            i32 entry[4];
            KV1_UNROLL for (std::size_t c = 0; c < 4; ++c) {
                const f32 sum = xs::fma(third, f32(c % 2 != 0 ? high_half : -high_half), low);
                entry[c] = round_to_int(xs::fma(fourth, f32(c / 2 != 0 ? high_half : -high_half), sum));
            }
            pack_quarters(entry[0], entry[1], entry[2], entry[3])
                .store_aligned(reinterpret_cast<std::uint32_t*>(four_tables + at * 64));
            std::memcpy(four_multipliers + at * 4, bytes + half * 4, 4);
        }
    }
    scale = top / multiplier_top * (2.0f / pair_top);
    offset = -scale * (0.5f * pair_top * (xs::reduce_add(total) + 0.5f * xs::reduce_add(four_total)));
}

struct pair_dots {
    const std::int8_t* multipliers;
    const std::uint8_t* tables;
    pair_dots(const query_rows& q, std::size_t row)
        : multipliers(q.codes + row * q.stride), tables(q.tables + row * pair_table_bytes * q.stride) {}

    static KV1_INLINE std::size_t walked_lines(const section_layout& s) {
        return s.slice_lines(0) + s.slice_lines(1);
    }

    template <class Format, std::size_t R, std::size_t N>
    KV1_INLINE void add(const key_walk<N>& walk, const section_layout& s, i32 (&total)[R][N]) const {
        const std::size_t lines = s.slice_lines(0);
        add_lines(walk, lines, 0, 0, multipliers, tables, total);
        if constexpr (traits_of(kv_format_of<Format>).slice_count() == 2)
            add_lines(walk, s.slice_lines(1), s.second_slice(), lines, multipliers + lines * R * 8,
                      tables + lines * R * 128, total);
    }

private:
    // count lines from `first` on, of which the first is line `walked` of the walk
    template <std::size_t R, std::size_t N>
    static KV1_INLINE void add_lines(const key_walk<N>& walk, std::size_t count, std::size_t first,
                                     std::size_t walked, const std::int8_t* multipliers,
                                     const std::uint8_t* tables, i32 (&total)[R][N]) {
        const u32 mask(0x0f0f0f0fu), places(0x30201000u);
        for (std::size_t l = 0; l < count; ++l) {
            u32 packed[N];
            walk.fetch_at(walked + l);
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                packed[n] = u32::load_aligned(walk.line(first + l, n));
            }
            KV1_UNROLL for (std::size_t half = 0; half < 2; ++half) {
                u32 index[N];
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    index[n] = and_or(half == 0 ? packed[n] : packed[n] >> 4, mask, places);
                }
                KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                    const std::size_t at = (l * 2 + half) * R + r;
                    const u32 table =
                        u32::load_aligned(reinterpret_cast<const std::uint32_t*>(tables + at * 64));
                    std::int32_t four;
                    std::memcpy(&four, multipliers + at * 4, 4);
                    const dot_row broadcast = dot_broadcast<false>(four);
                    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                        total[r][n] = dot_add<255, false>(total[r][n], look_up(index[n], table), broadcast);
                        pin(total[r][n]);
                    }
                }
            }
        }
    }

    static KV1_INLINE void pin(i32& x) {
        __m512i r = x;
        KV1_IN_ORDER(r, "v");
        x = i32(r);
    }
};

#endif
