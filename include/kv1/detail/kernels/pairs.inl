// SPDX-License-Identifier: Apache-2.0
//
// Scores against keys of 2 bits by channel pairs. Parsed once per target; empty unless the target can look bytes of a
// register up in a table of 64 (AVX-512 VBMI). It lies in the region of AVX-512 VNNI, and pair_tables hands it out
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
// Keys of 3 bits do not go by pairs: six bits are a table of 64 for each of a lane's four bytes. Their low bits by pairs
// and their high bits by fours of channels took 57 operations where single codes take 49.
//
//   line of K      lane = token, byte j of it = channels 4 j ... 4 j + 3: pairs (0, 1) in its low half, (2, 3) above
//   tables         [line][half][row of the tile][64]: entry 16 j + c_a + 4 c_b
//   multipliers    [line][half][row of the tile][4]
//
// Per line (16 tokens x 16 channels) and 4 registers of 4 rows: 32 vpermb, 32 vpdpbusd, 4 shifts, 8 vpternlog, 8
// tables and 8 broadcasts loaded. Making tables takes 5 operations a pair, once a task.

#if defined(KV1_ISA_PAIRS)

inline constexpr float pair_top = 255.0f, multiplier_top = 127.0f;

// Makes tables and multipliers of a query row, which is row r of the R rows of its tile. padded: channels, rounded up
// to a multiple of 32.
KV1_LAZY inline void pair_query(const float* query, std::size_t padded, const format_traits& keys,
                                std::uint8_t* tables, std::int8_t* multipliers, std::size_t r,
                                std::size_t rows, float& scale, float& offset) noexcept {
    const float middle = 0.5f * static_cast<float>(keys.top_level());
    f32 widest(0.0f);
    for (std::size_t i = 0; i < padded; i += 2 * lanes) {
        f32 a, b;
        split_pairs(query + i, a, b);
        widest = xs::max(widest, xs::abs(a) + xs::abs(b));
    }
    const float top = middle * xs::reduce_max(widest);
    // of a line and half, the pairs in the order of a table's quarters; of two lines, pairs line by line, half by half
    const i32 quarters(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const i32 halves(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    alignas(64) float lanes_of_a[lanes];
    f32 level_of_b[4];
    for (std::size_t c = 0; c < lanes; ++c)
        lanes_of_a[c] = static_cast<float>(keys.level(static_cast<std::uint32_t>(c & 3))) - middle;
    for (std::size_t c = 0; c < 4; ++c)
        level_of_b[c] = f32(lanes_of_a[c]);
    const f32 level_of_a = f32::load_aligned(lanes_of_a), scaled(multiplier_top / top),
              step(top / multiplier_top), centre(0.5f * pair_top), zero(0.0f);
    f32 total(0.0f);
    for (std::size_t i = 0; i < padded; i += 2 * lanes) { // two lines
        f32 a, b;
        split_pairs(query + i, a, b);
        const f32 reach = f32(middle) * (xs::abs(a) + xs::abs(b));
        // NaN becomes 0, and so does a row of zeros
        const f32 multiplier = xs::min(xs::max(xs::ceil(reach * scaled), f32(0.0f)), f32(multiplier_top));
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
    }
    scale = top / multiplier_top * (2.0f / pair_top);
    offset = -scale * (0.5f * pair_top * xs::reduce_add(total));
}

struct pair_dots {
    const std::int8_t* multipliers;
    const std::uint8_t* tables;
    pair_dots(const query_rows& q, std::size_t row)
        : multipliers(q.codes + row * q.stride), tables(q.tables + row * pair_table_bytes * q.stride) {}

    // the lines of a tile at which others are fetched
    static KV1_INLINE std::size_t walked_lines(const section_layout& s) { return s.own_lines(); }

    template <class Format, std::size_t R, std::size_t N>
    KV1_INLINE void add(const key_walk<N>& walk, const section_layout& s, i32 (&total)[R][N]) const {
        const u32 mask(0x0f0f0f0fu), places(0x30201000u);
        const std::size_t lines = s.own_lines();
        for (std::size_t l = 0; l < lines; ++l) {
            u32 packed[N];
            walk.fetch_at(l);
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { packed[n] = u32::load_aligned(walk.line(l, n)); }
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

private:
    static KV1_INLINE void pin(i32& x) {
        __m512i r = x;
        KV1_IN_ORDER(r, "v");
        x = i32(r);
    }
};

#endif
