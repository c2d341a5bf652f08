// SPDX-License-Identifier: Apache-2.0
//
// The inner loop of the integer path, shared by keys and values. Parsed once per target.
//
//   total[r][n] += (codes in the lanes of register n) . (8-bit numbers of row r), over the lines of one part
//
// A line's lanes are unpacked once into 8 / Bits planes of bytes; plane f of line l meets the four bytes at
// (l * planes + f) * 4 of each row, broadcast. R rows and N registers make R * N independent chains, enough to
// hide the latency of the dot product, and each broadcast serves N of them.
//
// Per line, with VNNI: N loads, N * (planes - 1) shifts, N * planes masks, R * planes broadcasts and
// N * R * planes vpdpbusd; at 2 bits, R = 4, N = 2: 32 vpdpbusd, the port's limit, beside 32 other operations.

KV1_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    static_cast<void>(p);
#endif
}

// step: lanes between registers; ahead: bytes from a line to the one to be prefetched for later.
template <int Bits, std::size_t R, std::size_t N>
KV1_INLINE void add_dots(const std::uint32_t* lines, std::size_t step, std::size_t line_count, std::ptrdiff_t ahead,
                         const std::int8_t* rows, std::size_t row_stride, int shift, i32 (&total)[R][N]) {
    constexpr int planes = 8 / Bits;
    constexpr int max_code = (1 << Bits) - 1;
    constexpr std::size_t run = dot_limit<max_code> / planes; // lines between finishes
    const u32 mask(static_cast<std::uint32_t>(max_code) * 0x01010101u);
    for (std::size_t first = 0; first < line_count;) {
        const std::size_t last = line_count - first < run ? line_count : first + run;
        dot_sum sum[R][N];
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t n = 0; n < N; ++n)
                sum[r][n] = dot_start();
        for (std::size_t l = first; l < last; ++l) {
            const std::uint32_t* line = lines + l * line_lanes;
            u32 packed[N];
            for (std::size_t n = 0; n < N; ++n) {
                packed[n] = u32::load_aligned(line + n * step);
                if (n == 0 || lanes == line_lanes)
                    prefetch(reinterpret_cast<const std::byte*>(line + n * step) + ahead);
            }
            for (int f = 0; f < planes; ++f) {
                u32 codes[N];
                for (std::size_t n = 0; n < N; ++n)
                    codes[n] = Bits == 8 ? packed[n] : (packed[n] >> (Bits * f)) & mask;
                for (std::size_t r = 0; r < R; ++r) {
                    std::int32_t four;
                    std::memcpy(&four, rows + r * row_stride + (l * planes + static_cast<std::size_t>(f)) * 4, 4);
                    const i32 broadcast(four);
                    for (std::size_t n = 0; n < N; ++n)
                        sum[r][n] = dot_add<max_code>(sum[r][n], codes[n], broadcast);
                }
            }
        }
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t n = 0; n < N; ++n)
                total[r][n] = total[r][n] + (dot_finish<max_code>(sum[r][n]) << shift);
        first = last;
    }
}

// Both parts of a unit (a tile of keys, a channel group of values) for N registers that are `step` lanes apart.
// part_first, part_count: lines of each part to walk.
template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void unit_dots(const section_layout& s, const std::uint32_t* unit, std::size_t step,
                          const std::size_t (&part_first)[2], const std::size_t (&part_count)[2], std::ptrdiff_t ahead,
                          const std::int8_t* const (&rows)[2], std::size_t row_stride, i32 (&total)[R][N]) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t n = 0; n < N; ++n)
            total[r][n] = i32(0);
    add_dots<t.parts[0].bits, R, N>(unit + part_first[0] * line_lanes, step, part_count[0], ahead, rows[0], row_stride,
                                    t.parts[0].shift, total);
    if constexpr (t.part_count() == 2)
        add_dots<t.parts[1].bits, R, N>(unit + (s.part_lines(0) + part_first[1]) * line_lanes, step, part_count[1],
                                        ahead, rows[1], row_stride, t.parts[1].shift, total);
}

// Registers taken at once: enough chains for one row, no more than the register file holds for four, and within a
// line where a register is less than one.
template <std::size_t R>
inline constexpr std::size_t registers_at_once = R >= 4 || pieces == 2 ? 2 : 4;

// Bytes from a line to the one fetched beside it: far enough to hide DRAM's latency, within the page walk.
inline constexpr std::ptrdiff_t prefetch_distance = 4096;
