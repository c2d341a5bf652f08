// SPDX-License-Identifier: Apache-2.0
//
// The inner loop of the integer path, shared by keys and values. Parsed once per target.
//
//   total[r][n] += (codes in the lanes of register n) . (8-bit numbers of row r), over the lines of a unit
//
// A byte holds 8 / Bits codes, so a register of a line is unpacked into as many registers with one code a byte. At
// 2 bits, unpacked register f has bits 2 f and 2 f + 1 of each byte. Unpacked register f of line l meets the four
// bytes of row r at ((l * R + r) * unpacked + f) * 4, broadcast to all lanes. R rows and N registers make R * N
// independent chains, enough to hide the latency of the dot product, and each broadcast serves N of them.
//
// At 3 bits fields 0 and 1 of a byte lie in its line, field 3 in the line that it shares with a neighbour, and field 2 in
// both (layout.hpp). Two lines take 17 shifts, masks and selections, 14 at 2 bits.
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

// Fetches lines at, at + own, ... of the `share` lines that a tile brings of what is walked next.
KV1_LAZY KV1_INLINE void fetch(const std::byte* next, std::size_t at, std::size_t own, std::size_t share) {
    for (; at < share; at += own)
        prefetch(next + at * line_bytes);
}

// A walk says where register n of line l lies, and fetches meanwhile: each of the `own` lines of a tile some of the
// `share` lines that the tile brings. Of keys: N registers of tokens, whose lines follow one another. first_shared:
// the first line that two others share.
template <std::size_t N>
struct key_walk {
    const std::uint32_t* first[N];
    const std::byte* next[N];
    std::size_t first_shared, own, share;

    KV1_INLINE const std::uint32_t* line(std::size_t l, std::size_t n) const {
        return first[n] + l * line_lanes;
    }
    // the line that line l shares
    KV1_INLINE const std::uint32_t* shared_line(std::size_t l, std::size_t n) const {
        return line(first_shared + l / 2, n);
    }
    KV1_INLINE void fetch_at(std::size_t l) const {
        KV1_UNROLL for (std::size_t n = 0; n < N; n += registers_per_line) { fetch(next[n], l, own, share); }
    }
};
// Of values: tables have the lines of the first 16 channels, and their shared lines. Those of other runs of 16 lie at
// fixed distances. A line holds `Run` tokens, so there are several for a tile, or one for two of them.
template <std::size_t N, std::size_t Run>
struct value_walk {
    static constexpr std::size_t tile_lines = Run < tile_tokens ? tile_tokens / Run : 1;
    static constexpr std::size_t line_tiles = Run > tile_tokens ? Run / tile_tokens : 1;
    const std::byte* const* lines;
    const std::byte* const* shared;
    const std::byte* const* next;
    std::size_t offset[N];
    std::size_t unit, units, share; // the first register's unit

    KV1_INLINE const std::uint32_t* line(std::size_t l, std::size_t n) const {
        return reinterpret_cast<const std::uint32_t*>(lines[l] + offset[n]);
    }
    KV1_INLINE const std::uint32_t* shared_line(std::size_t l, std::size_t n) const {
        return reinterpret_cast<const std::uint32_t*>(shared[l / 2] + offset[n]);
    }
    KV1_INLINE void fetch_at(std::size_t l) const {
        KV1_UNROLL for (std::size_t n = 0; n < N; n += registers_per_line) {
            fetch(next[l], l % tile_lines * units + unit + n / registers_per_line, tile_lines * units,
                  line_tiles * share);
        }
    }
};

// Field f of each byte of a line. shared: at 3 bits, the line that it shares as the first or the second (odd) of two.
template <int Bits>
KV1_INLINE u32 unpacked_field(u32 packed, u32 shared, std::size_t f, std::size_t odd) {
    const u32 mask(((1u << Bits) - 1u) * 0x01010101u);
    const auto shifted = [](u32 x, std::size_t by) { return by == 0 ? x : x >> static_cast<int>(by); };
    if (Bits == 8)
        return packed;
    if (Bits != 3)
        return shifted(packed, f * Bits) & mask;
    if (f == 2)
        return and_or(packed >> 6, u32(0x03030303u), shifted(shared, 4 + odd) & u32(0x04040404u));
    return (f == 3 ? shifted(shared, 3 * odd) : shifted(packed, 3 * f)) & mask;
}

// Lines first ... last - 1 into running sums. Unsigned: the rows' 8-bit numbers are 0 ... 255, as weights of codes below
// 128 may be. Bits: of a code; at 3 bits, first and last are even.
template <int Bits, bool Unsigned, int Top, std::size_t R, std::size_t N, class Walk, class Sum>
KV1_INLINE void run_dots(const Walk& walk, std::size_t first, std::size_t last, const std::int8_t* rows,
                         Sum (&sum)[R][N]) {
    constexpr std::size_t unpacked = Bits == 3 ? 4 : 8 / Bits, at_once = Bits == 3 ? 2 : 1;
    constexpr code_levels codebook = Bits == 2 ? code_levels::codebook2 : code_levels::codebook4;
    for (std::size_t pair = first; pair < last; pair += at_once) {
        u32 shared[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { // at other widths it is not used
            shared[n] = u32::load_aligned(Bits == 3 ? walk.shared_line(pair, n) : walk.line(pair, n));
        }
        KV1_UNROLL for (std::size_t odd = 0; odd < at_once; ++odd) {
            const std::size_t l = pair + odd;
            u32 packed[N];
            walk.fetch_at(l);
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { packed[n] = u32::load_aligned(walk.line(l, n)); }
            KV1_UNROLL for (std::size_t f = 0; f < unpacked; ++f) {
                u32 codes[N];
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    codes[n] = unpacked_field<Bits>(packed[n], shared[n], f, odd);
                    if constexpr (Top != (1 << Bits) - 1)
                        codes[n] = levels_of<codebook>(codes[n]);
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
}

// All lines of a unit. Top: the largest level, which is the largest code but for codebooks.
template <int Bits, bool Unsigned, int Top = (1 << Bits) - 1, std::size_t R, std::size_t N, class Walk>
KV1_INLINE void add_dots(const Walk& walk, std::size_t line_count, const std::int8_t* rows,
                         i32 (&total)[R][N]) {
    if constexpr (dot_sums_are_totals) {
        // not both: they would not fit the registers
        run_dots<Bits, Unsigned, Top>(walk, 0, line_count, rows, total);
    } else {
        constexpr std::size_t unpacked = Bits == 3 ? 4 : 8 / Bits;
        constexpr std::size_t fit = dot_limit<Top, Unsigned> / unpacked;
        constexpr std::size_t run = Bits == 3 ? fit / 2 * 2 : fit; // lines between finishes
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
                    total[r][n] = total[r][n] + dot_finish<Top, Unsigned>(sum[r][n]);
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
// And its metadata, on the way: half a line of each array there is.
KV1_LAZY KV1_INLINE void prefetch_metadata(const chunk_view& view, std::size_t k) {
    if (k >= view.next_count)
        return;
    const tile_ref& t = view.next_tiles[k];
    prefetch(t.page + view.next_layout->scale_offset + t.token * sizeof(std::uint16_t));
    if (view.next_layout->traits().metadata == metadata_kind::scale_and_minimum)
        prefetch(t.page + view.next_layout->minimum_offset + t.token * sizeof(std::uint16_t));
}
