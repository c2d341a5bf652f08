// SPDX-License-Identifier: Apache-2.0
//
// Values that are the first channels of the keys (multi-head latent attention). Parsed once per target.
//
// A line of K has a token in each lane, and sums of values need a channel in each lane. So the lines of a chunk of
// keys are transposed into lines of V, in scratch, and the kernels for values walk those. Sums are bit for bit those
// of values that are stored by themselves, in every format and precision. All query rows of a task share a
// transposition.
//
// Codes. Four lanes of a line of K, a quarter, hold four tokens, with four bytes of n = 8 / Bits channels each. n
// quarters make a line of V:
//
//   quarter q, lane i, byte j, field f    channel n j + f of token 4 q + i, as K has it
//   bytes and lanes change places         quarter q, lane j, byte i, field f
//   quarters and fields, of n registers   register f, lane j, byte i, field q
//   lanes and registers                   register m, four channels 4 m ... a lane, byte i, field q: a quarter of V's line
//
// A register takes as many lines of K as it has quarters. For n registers that takes n shuffles, 5 n / 2 operations
// for each bit of n, n log2 n interleavings, and loads and stores of quarters. At 2 bits it is 8 operations a
// register; a query row takes 4 dot products a line.
//
// Codes of 3 bits are taken apart into fields of 2 bits: their low bits, and their high bits. Both are transposed, and
// joined.
//
// Plain values. Sixteen lines of K are transposed. In fp16, the two halves of a lane change places between two tokens.
//
// ARCHITECTURE.md ("The tile layout") says which other designs were weighed.

// Writes quarters of lines of V. The lines of two runs of 16 channels lie `unit` numbers apart.
struct transposed_line {
    std::uint32_t* first;
    std::size_t unit, units;

    // Quarter q holds channels channel(q) ... channel(q) + 3. Quarters past the channels are not written.
    template <class Channel>
    KV1_INLINE void store(u32 x, const Channel& channel) const {
        alignas(16) std::uint32_t nowhere[4];
        std::uint32_t* to[lanes / 4];
        KV1_UNROLL for (std::size_t q = 0; q < lanes / 4; ++q) {
            const std::size_t c = channel(q);
            to[q] = c / line_lanes < units ? first + c / line_lanes * unit + c % line_lanes : nowhere;
        }
        store_quarters(x, to);
    }
};

template <int Bits>
KV1_NOINLINE void transpose_codes(const std::uint32_t* const* from, std::size_t tiles, std::size_t lines,
                                  std::uint32_t* to, std::size_t unit, std::size_t units) noexcept {
    constexpr std::size_t n = 8 / Bits, at_once = n > 4 ? n / 4 : 1; // tiles of a line of V
    constexpr std::size_t its_lines = 4 * at_once / n, quarters = lanes / 4;
    for (std::size_t k = 0; k < tiles; k += at_once)
        for (std::size_t first = 0; first < lines; first += quarters)
            for (std::size_t v = 0; v < its_lines; ++v) {
                u32 x[n];
                KV1_UNROLL for (std::size_t q = 0; q < n; ++q) {
                    const std::size_t quarter = v * n + q;
                    const std::uint32_t* tile = from[k + quarter / 4] + quarter % 4 * 4;
                    const std::uint32_t* its[quarters];
                    KV1_UNROLL for (std::size_t l = 0; l < quarters; ++l) // past the last line: that again
                        its[l] = tile + (first + l < lines ? first + l : lines - 1) * line_lanes;
                    x[q] = transpose_bytes(load_quarters(its));
                }
                KV1_UNROLL for (std::size_t step = 1; step < n; step *= 2) {
                    const int shift = Bits * static_cast<int>(step);
                    const std::uint32_t low =
                        ~0u / ((1u << shift) + 1u); // fields whose index has a 0 in this step's bit
                    KV1_UNROLL for (std::size_t q = 0; q < n; ++q) {
                        if ((q & step) != 0)
                            continue;
                        const u32 differ = ((x[q] >> shift) ^ x[q + step]) & u32(low);
                        x[q + step] = x[q + step] ^ differ;
                        x[q] = x[q] ^ (differ << shift);
                    }
                }
                u32 y[n];
                if constexpr (n == 1) {
                    y[0] = x[0];
                } else if constexpr (n == 2) {
                    y[0] = first_in_turns(x[0], x[1]);
                    y[1] = last_in_turns(x[0], x[1]);
                } else {
                    KV1_UNROLL for (std::size_t h = 0; h < n / 4;
                                    ++h) { // lane j of x[4 h] ... is channels n j + 4 h ...
                        const u32 *four = x + 4 * h, a = first_in_turns(four[0], four[2]),
                                  b = first_in_turns(four[1], four[3]), c = last_in_turns(four[0], four[2]),
                                  d = last_in_turns(four[1], four[3]);
                        y[h] = first_in_turns(a, b);
                        y[n / 4 + h] = last_in_turns(a, b);
                        y[2 * n / 4 + h] = first_in_turns(c, d);
                        y[3 * n / 4 + h] = last_in_turns(c, d);
                    }
                }
                const transposed_line line{to + (k / at_once * its_lines + v) * line_lanes, unit, units};
                KV1_UNROLL for (std::size_t m = 0; m < n; ++m) line.store(y[m], [&](std::size_t l) {
                    return (first + l < lines ? first + l : lines - 1) * 4 * n + 4 * m;
                });
            }
}

// Transposes sixteen rows of sixteen numbers.
KV1_LAZY KV1_INLINE void transpose_rows(u32 (&x)[line_lanes][registers_per_line]) {
    u32 transposed[line_lanes][registers_per_line];
    KV1_UNROLL for (std::size_t a = 0; a < registers_per_line; ++a)
        KV1_UNROLL for (std::size_t b = 0; b < registers_per_line; ++b) {
        f32 square[lanes];
        KV1_UNROLL for (std::size_t k = 0; k < lanes; ++k) square[k] =
            xs::bitwise_cast<float>(x[a * lanes + k][b]);
        transpose(square);
        KV1_UNROLL for (std::size_t k = 0; k < lanes; ++k) transposed[b * lanes + k][a] =
            xs::bitwise_cast<std::uint32_t>(square[k]);
    }
    KV1_UNROLL for (std::size_t k = 0; k < line_lanes; ++k)
        KV1_UNROLL for (std::size_t p = 0; p < registers_per_line; ++p) x[k][p] = transposed[k][p];
}

template <int Bits>
KV1_NOINLINE void transpose_plain(const std::uint32_t* const* from, std::size_t tiles, std::size_t lines,
                                  std::uint32_t* to, std::size_t unit, std::size_t units) noexcept {
    constexpr std::size_t fields = 32 / Bits;
    for (std::size_t k = 0; k < tiles; ++k)
        for (std::size_t first = 0; first < lines; first += line_lanes) {
            u32 x[line_lanes]
                 [registers_per_line]; // row t, lane i: channels fields (first + i) ... of token t
            KV1_UNROLL for (std::size_t i = 0; i < line_lanes; ++i)
                KV1_UNROLL for (std::size_t p = 0; p < registers_per_line; ++p) x[i][p] =
                    first + i < lines ? u32::load_aligned(from[k] + (first + i) * line_lanes + p * lanes)
                                      : u32(0);
            transpose_rows(x);
            KV1_UNROLL for (std::size_t t = 0; t < tile_tokens; t += fields) {
                const transposed_line line{to + (k * tile_tokens + t) / fields * line_lanes, unit, units};
                KV1_UNROLL for (std::size_t p = 0; p < registers_per_line; ++p) {
                    const auto lane_of = [&](std::size_t q) { return first + p * lanes + 4 * q; };
                    if constexpr (fields == 1) {
                        line.store(x[t][p], lane_of);
                    } else {
                        const u32 differ = ((x[t][p] >> 16) ^ x[t + 1][p]) & u32(0xffffu);
                        const u32 even = x[t][p] ^ (differ << 16), odd = x[t + 1][p] ^ differ;
                        line.store(first_in_turns(even, odd), [&](std::size_t q) { return 2 * lane_of(q); });
                        line.store(last_in_turns(even, odd),
                                   [&](std::size_t q) { return 2 * lane_of(q) + 4; });
                    }
                }
            }
        }
}

// A line of 3-bit codes and the line that it shares as fields of 2 bits: low bits, and high bits.
struct two_fields {
    u32 low, high;
};
KV1_LAZY KV1_INLINE two_fields taken_apart(u32 own, u32 shared, bool odd) {
    const u32 third = (odd ? shared >> 1 : shared) & u32(0x40404040u);
    const u32 fourth = (odd ? shared >> 3 : shared) & u32(0x07070707u);
    return {(own & u32(0x03030303u)) | ((own >> 1) & u32(0x0c0c0c0cu)) | ((own >> 2) & u32(0x30303030u)) |
                ((fourth & u32(0x03030303u)) << 6),
            ((own >> 2) & u32(0x01010101u)) | ((own >> 3) & u32(0x04040404u)) | (third >> 2) |
                ((fourth & u32(0x04040404u)) << 4)};
}
// The first of both lines, and what it adds to the second.
KV1_LAZY KV1_INLINE u32 joined(two_fields x) {
    return (x.low & u32(0x03030303u)) | ((x.high & u32(0x01010101u)) << 2) |
           ((x.low & u32(0x0c0c0c0cu)) << 1) | ((x.high & u32(0x04040404u)) << 3) |
           ((x.low & u32(0x30303030u)) << 2);
}
KV1_LAZY KV1_INLINE u32 joined_shared(two_fields x, bool odd) {
    const u32 third = (x.high & u32(0x10101010u)) << 2,
              fourth = ((x.low >> 6) & u32(0x03030303u)) | ((x.high >> 4) & u32(0x04040404u));
    return odd ? (third << 1) | (fourth << 3) : third | fourth;
}

// Codes of 3 bits, two tiles by four lines at a time. from: tiles, whose shared lines begin at first_shared. to: lines of
// V, of 16 channels each, `unit` numbers apart from those of the next; shared ones begin at to_shared.
KV1_LAZY KV1_NOINLINE inline void transpose_3_bits(const std::uint32_t* const* from, std::size_t tiles,
                                                   std::size_t first_shared, std::uint32_t* to,
                                                   std::size_t to_shared, std::size_t unit,
                                                   std::size_t units) noexcept {
    constexpr std::size_t at_once = 4; // lines of K: of 16 channels, as many as runs of V
    alignas(64) std::uint32_t apart[2][2][at_once * line_lanes];  // [low, high][tile]
    alignas(64) std::uint32_t turned[2][at_once][2 * line_lanes]; // [low, high][run][tile]
    for (std::size_t k = 0; k < tiles; k += 2)
        for (std::size_t first = 0; first < units; first += at_once) {
            const std::size_t lines = units - first < at_once ? units - first : at_once;
            for (std::size_t tile = 0; tile < 2; ++tile)
                for (std::size_t l = 0; l < lines; ++l)
                    for (std::size_t i = 0; i < line_lanes; i += lanes) {
                        const std::size_t line = first + l;
                        const two_fields x = taken_apart(
                            u32::load_aligned(from[k + tile] + line * line_lanes + i),
                            u32::load_aligned(from[k + tile] + (first_shared + line / 2) * line_lanes + i),
                            line % 2 != 0);
                        x.low.store_aligned(apart[0][tile] + l * line_lanes + i);
                        x.high.store_aligned(apart[1][tile] + l * line_lanes + i);
                    }
            for (std::size_t p = 0; p < 2; ++p) {
                const std::uint32_t* const both[] = {apart[p][0], apart[p][1]};
                transpose_codes<2>(both, 2, lines, turned[p][0], 2 * line_lanes, lines);
            }
            for (std::size_t u = 0; u < lines; ++u)
                for (std::size_t i = 0; i < line_lanes; i += lanes) {
                    std::uint32_t* const run = to + (first + u) * unit + i;
                    u32 shared(0u);
                    for (std::size_t tile = 0; tile < 2; ++tile) {
                        const std::size_t at = tile * line_lanes + i;
                        const two_fields x{u32::load_aligned(turned[0][u] + at),
                                           u32::load_aligned(turned[1][u] + at)};
                        joined(x).store_aligned(run + (k + tile) * line_lanes);
                        shared = shared | joined_shared(x, tile != 0);
                    }
                    shared.store_aligned(run + (to_shared + k / 2) * line_lanes);
                }
        }
}

// Transposes the first channels of a chunk of keys into `room`, which is laid out as `values` (transposed_values()). The
// tiles of the chunk are whole granules.
KV1_LAZY inline void transpose_values(const section_layout& keys, const tile_ref* tiles, std::size_t count,
                                      const section_layout& values, std::byte* room) noexcept {
    const format_traits t = keys.traits();
    const std::size_t tile_lines = keys.unit_lines();
    const std::uint32_t* from[max_chunk_tiles];
    for (std::size_t k = 0; k < count; ++k)
        from[k] = reinterpret_cast<const std::uint32_t*>(tiles[k].page + keys.offset) +
                  tiles[k].token / tile_tokens * tile_lines * line_lanes;
    const int bits = t.code_bits == 0 ? t.plain_bits : t.code_bits;
    const std::size_t fields = static_cast<std::size_t>(32 / bits);
    const std::size_t lines = round_up(values.channels, fields) / fields;
    auto* const to = reinterpret_cast<std::uint32_t*>(room);
    const std::size_t unit = values.unit_lines() * line_lanes, units = values.units();
    switch (bits) {
    case 1:
        transpose_codes<1>(from, count, lines, to, unit, units);
        break;
    case 2:
        transpose_codes<2>(from, count, lines, to, unit, units);
        break;
    case 3:
        transpose_3_bits(from, count, keys.first_shared(), to, values.first_shared(), unit, units);
        break;
    case 4:
        transpose_codes<4>(from, count, lines, to, unit, units);
        break;
    case 8:
        transpose_codes<8>(from, count, lines, to, unit, units);
        break;
    case 16:
        transpose_plain<16>(from, count, lines, to, unit, units);
        break;
    case 32:
        transpose_plain<32>(from, count, lines, to, unit, units);
        break;
    }
    const auto copy = [&](std::size_t kept, std::size_t copied) {
        for (std::size_t g = 0; g < values.groups(); ++g)
            for (std::size_t k = 0; k < count; ++k)
                std::memcpy(room + copied + (g * values.tokens + k * tile_tokens) * sizeof(std::uint16_t),
                            tiles[k].page + kept + (g * keys.tokens + tiles[k].token) * sizeof(std::uint16_t),
                            tile_tokens * sizeof(std::uint16_t));
    };
    if (t.metadata != metadata_kind::none)
        copy(keys.scale_offset, values.scale_offset);
    if (t.metadata == metadata_kind::scale_and_minimum)
        copy(keys.minimum_offset, values.minimum_offset);
}
