// SPDX-License-Identifier: Apache-2.0
//
// The inner loop of the integer path, shared by keys and values. Parsed once per target.
//
//   total[r][n] += (codes in the lanes of register n) . (8-bit numbers of row r), over the lines of one bit slice
//
// A byte holds 8 / Bits codes, so a register of a line is unpacked into as many registers with one code a byte. At
// 2 bits, unpacked register f has bits 2 f and 2 f + 1 of each byte. Unpacked register f of line l meets the four
// bytes of row r at ((l * R + r) * unpacked + f) * 4, broadcast to all lanes. R rows and N registers make R * N
// independent chains, enough to hide the latency of the dot product, and each broadcast serves N of them.
//
// Per line and N registers, with VNNI at 2 bits, R = N = 4: 64 vpdpbusd (ports FP0, FP1; one 512-bit a cycle), 12
// shifts and 16 masks (FP1, FP2; any), 16 broadcasts and 4 loads (load ports): 112 operations in 64 cycles. So the dot
// products alone set the pace. To mask without shifting saves nothing here, and needs accumulators for all of them.

// Into the second-level cache: two sections of a chunk and their scores do not fit the first.
KV1_LAZY KV1_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    static_cast<void>(p);
#endif
}

// A walk says where register n of line l lies, and what to prefetch meanwhile. Of keys: N registers of tokens, whose
// lines follow one another.
template <std::size_t N>
struct key_walk {
    const std::uint32_t* first[N];
    const std::byte* next[N];
    KV1_INLINE const std::uint32_t* line(std::size_t l, std::size_t n) const {
        return first[n] + l * line_lanes;
    }
    KV1_INLINE const std::byte* ahead(std::size_t l, std::size_t n) const { return next[n] + l * line_bytes; }
};
// Of values: a table has the lines of the first 16 channels, and those of other runs of 16 lie at fixed distances.
template <std::size_t N>
struct value_walk {
    const std::byte* const* lines;
    const std::byte* const* next;
    std::size_t offset[N], next_offset[N];
    KV1_INLINE const std::uint32_t* line(std::size_t l, std::size_t n) const {
        return reinterpret_cast<const std::uint32_t*>(lines[l] + offset[n]);
    }
    KV1_INLINE const std::byte* ahead(std::size_t l, std::size_t n) const { return next[l] + next_offset[n]; }
};

// Lines first ... last - 1 into running sums. Unsigned: the rows' 8-bit numbers are 0 ... 255, as weights of codes below
// 128 may be.
template <int Bits, bool Unsigned, int Top, std::size_t R, std::size_t N, class Walk, class Sum>
KV1_INLINE void run_dots(const Walk& walk, std::size_t first, std::size_t last, const std::int8_t* rows,
                         Sum (&sum)[R][N]) {
    constexpr std::size_t unpacked = 8 / Bits;
    const u32 mask(((1u << Bits) - 1u) * 0x01010101u);
    for (std::size_t l = first; l < last; ++l) {
        u32 packed[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            packed[n] = u32::load_aligned(walk.line(l, n));
            if (n % registers_per_line == 0)
                prefetch(walk.ahead(l, n));
        }
        KV1_UNROLL for (std::size_t f = 0; f < unpacked; ++f) {
            u32 codes[N];
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                codes[n] = f == 0 ? packed[n] : packed[n] >> (Bits * static_cast<int>(f));
                if (Bits != 8)
                    codes[n] = codes[n] & mask;
                if (Top != (1 << Bits) - 1)
                    codes[n] = levels_of(codes[n]);
            }
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                std::int32_t four;
                std::memcpy(&four, rows + ((l * R + r) * unpacked + f) * 4, 4);
                const dot_row broadcast = dot_broadcast<Unsigned>(four);
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    sum[r][n] = dot_add<Top, Unsigned>(sum[r][n], codes[n], broadcast);
                }
            }
        }
    }
}

// Top: the largest level, which is the largest code but for the codebook.
template <int Bits, int Shift, bool Unsigned, int Top = (1 << Bits) - 1, std::size_t R, std::size_t N,
          class Walk>
KV1_INLINE void add_dots(const Walk& walk, std::size_t line_count, const std::int8_t* rows,
                         i32 (&total)[R][N]) {
    constexpr std::size_t unpacked = 8 / Bits;
    constexpr std::size_t limit = dot_limit<Top, Unsigned>;
    if constexpr (dot_sums_are_totals && Shift == 0) {
        // not both: they would not fit the registers
        run_dots<Bits, Unsigned, Top>(walk, 0, line_count, rows, total);
    } else {
        constexpr std::size_t run = limit / unpacked; // lines between finishes
        static_assert(run > 0);
        for (std::size_t first = 0; first < line_count;) {
            const std::size_t last = line_count - first < run ? line_count : first + run;
            dot_sum sum[R][N];
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { sum[r][n] = dot_start(); }
            }
            run_dots<Bits, Unsigned, Top>(walk, first, last, rows, sum);
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    total[r][n] = total[r][n] + (dot_finish<Top, Unsigned>(sum[r][n]) << Shift);
                }
            }
            first = last;
        }
    }
}

// What is fetched for tile k of a chunk: its share of the section that will be walked next.
KV1_LAZY KV1_INLINE const std::byte* share_of(const chunk_view& view, std::size_t k) {
    const tile_ref& t = view.next_tiles[k];
    return t.page + view.next_layout->offset + t.token / tile_tokens * view.next_share;
}
// And its metadata, on the way: half a line of each array.
KV1_LAZY KV1_INLINE void prefetch_metadata(const chunk_view& view, std::size_t k) {
    if (k >= view.next_count)
        return;
    const tile_ref& t = view.next_tiles[k];
    prefetch(t.page + view.next_layout->scale_offset + t.token * sizeof(std::uint16_t));
    prefetch(t.page + view.next_layout->minimum_offset + t.token * sizeof(std::uint16_t));
}
