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

// Transposes the first channels of a chunk of keys into `room`, which is laid out as `values` (transposed_values()). The
// tiles of the chunk are whole granules.
KV1_LAZY inline void transpose_values(const section_layout& keys, const tile_ref* tiles, std::size_t count,
                                      const section_layout& values, std::byte* room) noexcept {
    const format_traits t = keys.traits();
    const std::size_t tile_lines = keys.unit_lines();
    for (int p = 0; p < t.slice_count(); ++p) {
        const std::uint32_t* from[max_chunk_tiles];
        for (std::size_t k = 0; k < count; ++k)
            from[k] =
                reinterpret_cast<const std::uint32_t*>(tiles[k].page + keys.offset) +
                (tiles[k].token / tile_tokens * tile_lines + (p == 1 ? keys.second_slice() : 0)) * line_lanes;
        const auto fields = static_cast<std::size_t>(32 / t.field_bits(p));
        const std::size_t lines = round_up(values.channels, fields) / fields;
        auto* const to =
            reinterpret_cast<std::uint32_t*>(room) + (p == 1 ? values.second_slice() : 0) * line_lanes;
        const std::size_t unit = values.unit_lines() * line_lanes, units = values.units();
        switch (t.field_bits(p)) {
        case 1:
            transpose_codes<1>(from, count, lines, to, unit, units);
            break;
        case 2:
            transpose_codes<2>(from, count, lines, to, unit, units);
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
    }
    const auto copy = [&](std::size_t from, std::size_t to) {
        for (std::size_t g = 0; g < values.groups(); ++g)
            for (std::size_t k = 0; k < count; ++k)
                std::memcpy(room + to + (g * values.tokens + k * tile_tokens) * sizeof(std::uint16_t),
                            tiles[k].page + from + (g * keys.tokens + tiles[k].token) * sizeof(std::uint16_t),
                            tile_tokens * sizeof(std::uint16_t));
    };
    if (t.metadata != metadata_kind::none)
        copy(keys.scale_offset, values.scale_offset);
    if (t.metadata == metadata_kind::scale_and_minimum)
        copy(keys.minimum_offset, values.minimum_offset);
}
