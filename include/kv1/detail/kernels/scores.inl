// SPDX-License-Identifier: Apache-2.0
//
// Scores of query rows against the keys of a chunk of tokens. Parsed once per target. pairs.inl has another way to
// take the dot products, for keys of 2 bits with AVX-512 VBMI.
//
// A line of K has 16 tokens, one a lane, and fills `registers_per_line` registers: one with AVX-512, two with AVX2. A
// chain of dot products over the channels ends with one score in each lane. A decoded key is k = slope * c + base, with
// levels c. z is the middle of the levels: 3/2 at 2 bits. A query is rounded to q ~ step * i, with i in 8 bits. Then
//
//   score = slope * step * (sum i c - z sum i) + (base + z * slope) * sum q
//
// sum i c is exact in 32 bits: at most 4096 channels * 127 * 255 = 1.3e8. It is converted to a float, which is exact
// up to 2^24: for 518 channels of 8 bits, and for any number of 2 bits. step * (...) is one fma. It takes the product
// step * z * sum i, which was rounded before.
//
// Cost of the fast path: per line (16 tokens x 32/b channels) and query row 8/b dot4; shifts and masks are shared by
// up to 4 rows. Per tile and row 1 conversion, 3 multiplications, 1 maximum and a store.

// Rounds quotients by the step to 8-bit codes. A NaN in a query makes its row meaningless, but must not make sums
// overflow: clamping takes it to -127 on x86 (the second operand of maxps), conversion takes it to 0 on ARM.
KV1_LAZY KV1_INLINE i32 rounded_codes(f32 quotients) {
    return xs::to_int(nearest(xs::min(xs::max(quotients, f32(-127.0f)), f32(127.0f))));
}

// Slope and base of a chunk's tokens, [slot].
struct affine_slots {
    alignas(64) float slopes[max_chunk_slots];
    alignas(64) float bases[max_chunk_slots];
};

// Metadata for keys quantized per channel. Scales and minima are in the query, so codes are the values: slope 1, base
// 0.
KV1_LAZY KV1_NOINLINE inline void plain_slots(const chunk_view& view, affine_slots& out) noexcept {
    for (std::size_t slot = 0; slot < view.count * tile_tokens; slot += lanes) {
        f32(1.0f).store_aligned(out.slopes + slot);
        f32(0.0f).store_aligned(out.bases + slot);
    }
}

// Slope and base from the compact words of a tile.
KV1_LAZY KV1_INLINE float compact_steps(const format_traits& t) {
    return static_cast<float>(t.top_level()) / 128.0f;
}
KV1_LAZY KV1_INLINE void decode_compact_words(u32 word, f32 steps, f32& slope, f32& base) {
    const i32 magnitude = xs::bitwise_cast<std::int32_t>(word & u32(compact_word::largest_offset));
    const i32 sign = i32(0) - xs::bitwise_cast<std::int32_t>(word >> 15);
    slope = half_to_float(word & u32(compact_word::scale_mask));
    base = slope * (xs::to_float(((magnitude ^ sign) - sign) - i32(64)) * steps);
}

// Decodes the compact words of a section. Out of line, so that all kernels share one copy, and its constants do not
// take their registers.
KV1_LAZY KV1_NOINLINE inline void decode_compact(const chunk_view& view, affine_slots& out) noexcept {
    // stores might change what is not in a variable of its own
    const std::size_t offset = view.layout->scale_offset, slots = view.count * tile_tokens;
    const tile_ref* const tiles = view.tiles;
    const f32 steps(compact_steps(view.layout->traits()));
    float *const slopes = out.slopes, *const bases = out.bases;
    for (std::size_t slot = 0; slot < slots; slot += lanes) {
        const tile_ref& ref = tiles[slot / tile_tokens];
        const u32 word = load_u16(reinterpret_cast<const std::uint16_t*>(ref.page + offset) + ref.token +
                                  slot % tile_tokens);
        f32 slope, base;
        decode_compact_words(word, steps, slope, base);
        slope.store_aligned(slopes + slot);
        base.store_aligned(bases + slot);
    }
}

// The metadata of a chunk, for any format that the kernels of Format serve. Compact words are decoded once for all
// rows, into `room`; other metadata are loaded where they are needed.
template <class Format>
struct chunk_metadata {
    static constexpr int bits = traits_of(kv_format_of<Format>).code_bits;
    static constexpr bool may_be_compact = bits >= 2 && bits <= 4;

    const affine_slots* decoded = nullptr;

    KV1_INLINE chunk_metadata(const chunk_view& view, affine_slots& room) {
        if (!may_be_compact)
            return;
        if (view.layout->axis == quantization_axis::per_channel) {
            plain_slots(view, room);
            decoded = &room;
        } else if (view.layout->traits().metadata == metadata_kind::compact) {
            decode_compact(view, room);
            decoded = &room;
        }
    }
    // Slope and base of the register that begins at a slot, which is token `token` of a page.
    KV1_INLINE void load(const section_layout& s, std::size_t slot, const std::byte* page, std::size_t token,
                         f32& slope, f32& base) const {
        const auto* scales = reinterpret_cast<const std::uint16_t*>(page + s.scale_offset) + token;
        if (bits == 0 || (bits == 1 && s.format == kv_format::binary)) {
            slope = f32(1.0f);
            base = f32(0.0f);
        } else if (bits == 1) {
            slope = load_half(scales);
            base = f32(0.0f) - slope;
            slope = slope + slope;
        } else if (may_be_compact && decoded != nullptr) {
            slope = f32::load_aligned(decoded->slopes + slot);
            base = f32::load_aligned(decoded->bases + slot);
        } else {
            slope = load_half(scales);
            base = load_half(reinterpret_cast<const std::uint16_t*>(page + s.minimum_offset) + token);
        }
    }
};

// The number of registers of tokens that are taken at once. Four rows then have 16 accumulators on targets with 32
// registers, 8 on those with 16.
template <std::size_t R>
inline constexpr std::size_t registers_at_once = many_registers ? 4
                                                 : R >= 3       ? 2
                                                                : 4;

// Dot products of codes. It copies the pointers to a row tile's queries, so that the compiler knows that storing
// scores does not change them.
struct single_dots {
    const std::int8_t* codes;
    single_dots(const query_rows& q, std::size_t row) : codes(q.codes + row * q.stride) {}

    // the lines of a tile at which others are fetched
    static KV1_INLINE std::size_t walked_lines(const section_layout& s) { return s.own_lines(); }

    template <class Format, std::size_t R, std::size_t N>
    KV1_INLINE void add(const key_walk<N>& walk, const section_layout& s, i32 (&total)[R][N]) const {
        constexpr format_traits t = traits_of(kv_format_of<Format>);
        add_dots<t.code_bits, false, t.top_level()>(walk, s.own_lines(), codes, total);
    }
};

// The constants of R rows.
template <std::size_t R>
struct score_rows {
    float scale[R], offset[R], sum[R];
};

// Computes the scores of R rows for N registers of tokens, from register `at` of the chunk on. A tile has
// `registers_per_line` registers.
template <class Format, std::size_t R, std::size_t N, class Dots>
KV1_INLINE void fast_score_step(const chunk_view& view, const section_layout& s,
                                const chunk_metadata<Format>& metadata, const Dots& dots,
                                const score_rows<R>& q, std::size_t at, float* scores, f32 (&top)[R]) {
    constexpr auto top_level = static_cast<float>(traits_of(kv_format_of<Format>).top_level());
    key_walk<N> walk;
    walk.first_shared = s.first_shared();
    walk.own = Dots::walked_lines(s);
    walk.share = view.next_lines;
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        const std::size_t tile = (at + n) / registers_per_line;
        const tile_ref& ref = view.tiles[tile];
        walk.first[n] = reinterpret_cast<const std::uint32_t*>(ref.page + s.offset) +
                        ref.token / tile_tokens * s.unit_lines() * line_lanes +
                        (at + n) % registers_per_line * lanes;
        walk.next[n] =
            tile < view.next_count ? share_of(view, tile) : reinterpret_cast<const std::byte*>(walk.first[n]);
    }
    i32 total[R][N];
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { total[r][n] = i32(0); }
    }
    dots.template add<Format>(walk, s, total);
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        if ((at + n) % registers_per_line == 0)
            prefetch_metadata(view, (at + n) / registers_per_line);
        f32 slope, base;
        const tile_ref& ref = view.tiles[(at + n) / registers_per_line];
        metadata.load(s, (at + n) * lanes, ref.page, ref.token + (at + n) % registers_per_line * lanes, slope,
                      base);
        const f32 centre = xs::fma(slope, f32(0.5f * top_level), base);
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            const f32 dot = xs::fma(xs::to_float(total[r][n]), f32(q.scale[r]), f32(q.offset[r]));
            const f32 score = xs::fma(slope, dot, centre * f32(q.sum[r]));
            score.store_aligned(scores + r * score_stride + (at + n) * lanes);
            top[r] = xs::max(top[r], score);
        }
    }
}

template <class Format, std::size_t R, class Dots>
inline void fast_scores(const chunk_view& chunk, const chunk_metadata<Format>& known, const query_rows& q,
                        std::size_t row, float* scores, float* tops) {
    constexpr std::size_t at_once = registers_at_once<R>;
    const chunk_view view = chunk;
    const section_layout layout = *chunk.layout;
    const chunk_metadata<Format> metadata = known;
    const Dots dots(q, row);
    score_rows<R> rows{};
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        rows.scale[r] = q.code_scales[row + r];
        rows.offset[r] = q.code_offsets[row + r];
        rows.sum[r] = q.sums[row + r];
    }
    scores += row * score_stride;
    f32 top[R];
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) { top[r] = f32(lowest_score); }
    const std::size_t end = view.count * registers_per_line;
    std::size_t at = 0;
    for (; at + at_once <= end; at += at_once)
        fast_score_step<Format, R, at_once>(view, layout, metadata, dots, rows, at, scores, top);
    for (; at < end; ++at)
        fast_score_step<Format, R, 1>(view, layout, metadata, dots, rows, at, scores, top);
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) { tops[row + r] = xs::reduce_max(top[r]); }
}

// Decodes consecutive fields of a lane: channels of a K lane, tokens of a V lane.
template <class Format>
struct field_reader {
    static constexpr format_traits t = traits_of(kv_format_of<Format>);
    static constexpr std::size_t fields = t.fields_per_lane();
    static constexpr std::size_t own_lines = fields * static_cast<std::size_t>(t.field_bits(0)) / 32;

    u32 own[own_lines];
    u32 shared;

    // unit: the first line of the walk, offset to this register's lanes. Decodes run n of `fields` fields.
    KV1_INLINE void load(const std::uint32_t* unit, std::size_t first_shared, std::size_t n) {
        for (std::size_t l = 0; l < own_lines; ++l)
            own[l] = u32::load_aligned(unit + (n * own_lines + l) * line_lanes);
        if constexpr (t.slice_count() == 2)
            shared = u32::load_aligned(unit + (first_shared + n) * line_lanes);
    }

    template <bool Keys>
    KV1_INLINE f32 value(std::size_t i, f32 slope, f32 base) const {
        constexpr int bits = t.field_bits(0);
        constexpr std::size_t per_lane = static_cast<std::size_t>(32 / bits);
        if constexpr (t.id == kv_format::fp32) {
            return xs::bitwise_cast<float>(own[0]);
        } else if constexpr (t.slice_count() == 2) {
            u32 code(0u);
            for (int p = 0; p < 2; ++p) {
                const bit_slice part = t.slices[static_cast<std::size_t>(p)];
                const shared_place at = place_of_3_bits(Keys, p, i % per_lane, i / per_lane);
                const u32 line = at.shared ? shared : own[i / per_lane];
                code = code | (((line >> at.shift) & u32(field_mask(part.bits))) << part.shift);
            }
            return decode(code, slope, base);
        } else {
            const int shift =
                Keys ? key_field_shift(bits, i % per_lane) : value_field_shift(bits, i % per_lane);
            const u32 field = (own[i / per_lane] >> shift) & u32(field_mask(bits));
            if constexpr (t.id == kv_format::fp16)
                return half_to_float(field);
            else
                return decode(field, slope, base);
        }
    }

    // code * slope is exact (at most 8 + 11 significant bits), so an fma gives what the format defines
    KV1_INLINE static f32 decode(u32 code, f32 slope, f32 base) {
        if constexpr (t.codebook())
            code = levels_of<t.levels>(code);
        return xs::fma(xs::to_float(xs::bitwise_cast<std::int32_t>(code)), slope, base);
    }
};

// The number of registers that the exact path takes at once: two for plain formats, which have no other path; one for
// codes, for which it is the reference, and for fp16, whose sums take twice the registers, where there are few.
template <class Format>
inline constexpr std::size_t exact_registers = traits_of(kv_format_of<Format>).code_bits != 0 ? 1
                                               : kv_format_of<Format> == kv_format::fp16 && !many_registers
                                                   ? 1
                                                   : 2;

// Sums of fp16 numbers times the factors of R rows. A lane holds two of them. They are converted as they lie in memory,
// so a register has the first number and the second in turns, and meets both factors in turns. Sums of the two are added
// up at the end.
template <std::size_t R, std::size_t N>
struct half_sums {
    f32 low[R][N], high[R][N]; // of the first half of a register's lanes, of the second

    KV1_INLINE half_sums() {
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { low[r][n] = high[r][n] = f32(0.0f); }
        }
    }
    // at: of N registers. factors: two of each row, `stride` apart.
    KV1_INLINE void add(const std::uint32_t* const (&at)[N], const float* factors, std::size_t stride) {
        f32 first[N], second[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(at[n]);
            first[n] = load_half(halves);
            second[n] = load_half(halves + lanes);
        }
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            const f32 both = broadcast_pair(factors + r * stride);
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                low[r][n] = xs::fma(first[n], both, low[r][n]);
                high[r][n] = xs::fma(second[n], both, high[r][n]);
            }
        }
    }
    KV1_INLINE f32 sum(std::size_t r, std::size_t n) const { return add_neighbours(low[r][n], high[r][n]); }
};

// Sums of codes' products that do not wait for each other: a fused multiply-add takes four cycles or five, and R rows
// give R of them.
template <std::size_t R>
inline constexpr std::size_t sums_in_turns = R == 1 ? 4 : 2;

// queries, scores: of the R rows
template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void exact_score_step(const chunk_view& view, const chunk_metadata<Format>& metadata,
                                 const float* const (&queries)[R], std::size_t stride, std::size_t at,
                                 float* const (&scores)[R], f32 (&top)[R]) {
    using reader = field_reader<Format>;
    const section_layout& s = *view.layout;
    const std::size_t runs = round_up(s.channels, reader::fields) / reader::fields;
    const std::uint32_t* first[N];
    const std::byte* next[N];
    const std::size_t own = runs * reader::own_lines, share = view.next_lines;
    f32 slope[N], base[N], sum[R][N];
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        const std::size_t tile = (at + n) / registers_per_line;
        const tile_ref& ref = view.tiles[tile];
        first[n] = reinterpret_cast<const std::uint32_t*>(ref.page + s.offset) +
                   ref.token / tile_tokens * s.unit_lines() * line_lanes +
                   (at + n) % registers_per_line * lanes;
        next[n] =
            tile < view.next_count ? share_of(view, tile) : reinterpret_cast<const std::byte*>(first[n]);
        metadata.load(s, (at + n) * lanes, ref.page, ref.token + (at + n) % registers_per_line * lanes,
                      slope[n], base[n]);
        if ((at + n) % registers_per_line == 0)
            prefetch_metadata(view, tile);
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) { sum[r][n] = f32(0.0f); }
    }
    if constexpr (kv_format_of<Format> == kv_format::fp16) {
        half_sums<R, N> sums;
        const float* query = queries[0];
        for (std::size_t run = 0; run < runs; ++run, query += reader::fields) {
            sums.add(first, query, stride);
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                first[n] += line_lanes;
                if (n % registers_per_line == 0)
                    fetch(next[n], run, own, share);
            }
        }
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { sum[r][n] = sums.sum(r, n); }
        }
    } else {
        constexpr std::size_t turns = reader::fields % sums_in_turns<R> == 0 ? sums_in_turns<R> : 1;
        f32 parts[turns][R][N];
        KV1_UNROLL for (std::size_t t = 0; t < turns; ++t) {
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { parts[t][r][n] = f32(0.0f); }
            }
        }
        for (std::size_t run = 0; run < runs; ++run) {
            reader lane[N];
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                lane[n].load(first[n], s.first_shared(), run);
                for (std::size_t l = 0; n % registers_per_line == 0 && l < reader::own_lines; ++l)
                    fetch(next[n], run * reader::own_lines + l, own, share);
            }
            KV1_UNROLL for (std::size_t i = 0; i < reader::fields; ++i) {
                f32 key[N];
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    key[n] = lane[n].template value<true>(i, slope[n], base[n]);
                }
                KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                    const f32 factor(queries[r][run * reader::fields + i]);
                    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                        f32& part = parts[i % turns][r][n];
                        part = xs::fma(key[n], factor, part);
                    }
                }
            }
        }
        KV1_UNROLL for (std::size_t t = 0; t < turns; ++t) {
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { sum[r][n] = sum[r][n] + parts[t][r][n]; }
            }
        }
    }
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            sum[r][n].store_aligned(scores[r] + (at + n) * lanes);
            top[r] = xs::max(top[r], sum[r][n]);
        }
    }
}

// rows: R, or fewer. The last one then stands for those that are missing, and is computed more than once: to decode keys
// for each row would take longer.
template <class Format, std::size_t R>
inline void exact_scores(const chunk_view& view, const chunk_metadata<Format>& metadata, const query_rows& q,
                         std::size_t row, std::size_t rows, float* scores, float* tops) {
    f32 top[R];
    const float* queries[R];
    float* own[R];
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        const std::size_t at = row + (r < rows ? r : rows - 1);
        top[r] = f32(lowest_score);
        queries[r] = q.values + at * q.stride;
        own[r] = scores + at * score_stride;
    }
    constexpr std::size_t at_once = exact_registers<Format>;
    static_assert(registers_per_line % at_once == 0 || at_once == 2);
    const std::size_t end = view.count * registers_per_line;
    std::size_t at = 0;
    for (; at + at_once <= end; at += at_once)
        exact_score_step<Format, R, at_once>(view, metadata, queries, q.stride, at, own, top);
    if constexpr (registers_per_line % at_once != 0)
        for (; at < end; ++at)
            exact_score_step<Format, R, 1>(view, metadata, queries, q.stride, at, own, top);
    for (std::size_t r = 0; r < rows; ++r)
        tops[row + r] = xs::reduce_max(top[r]);
}

// Calls function(R, first row) for four rows at a time, then for each of the rest alone: the exact path of codes.
template <class F>
KV1_INLINE void for_few_row_tiles(std::size_t rows, const F& function) {
    std::size_t row = 0;
    for (; row + 4 <= rows; row += 4)
        function(std::integral_constant<std::size_t, 4>{}, row);
    for (; row < rows; ++row)
        function(std::integral_constant<std::size_t, 1>{}, row);
}

// Calls function(R, first row) for each row tile.
template <class F>
KV1_INLINE void for_row_tiles(std::size_t rows, const F& function) {
    std::size_t row = 0;
    for (std::size_t tile = 0; tile < row_tiles(rows); ++tile) {
        const std::size_t size = row_tile_size(rows, tile);
        switch (size) {
        case 1:
            function(std::integral_constant<std::size_t, 1>{}, row);
            break;
        case 2:
            function(std::integral_constant<std::size_t, 2>{}, row);
            break;
        case 3:
            function(std::integral_constant<std::size_t, 3>{}, row);
            break;
        default:
            function(std::integral_constant<std::size_t, 4>{}, row);
            break;
        }
        row += size;
    }
}

template <class Format, class Dots>
inline void key_scores_fast(const chunk_view& view, const query_rows& q, float* scores,
                            float* tops) noexcept {
    affine_slots room;
    const chunk_metadata<Format> metadata(view, room);
    for_row_tiles(q.rows, [&](auto size, std::size_t row) {
        fast_scores<Format, size(), Dots>(view, metadata, q, row, scores, tops);
    });
}

template <class Format>
inline void key_scores_exact(const chunk_view& view, const query_rows& q, float* scores,
                             float* tops) noexcept {
    affine_slots room;
    const chunk_metadata<Format> metadata(view, room);
    if constexpr (traits_of(kv_format_of<Format>).code_bits != 0) {
        std::size_t row = 0;
        for (; row + 2 <= q.rows; row += 4)
            exact_scores<Format, 4>(view, metadata, q, row, q.rows - row < 4 ? q.rows - row : 4, scores,
                                    tops);
        if (row < q.rows)
            exact_scores<Format, 1>(view, metadata, q, row, 1, scores, tops);
    } else {
        for_row_tiles(q.rows, [&](auto size, std::size_t row) {
            exact_scores<Format, size()>(view, metadata, q, row, size(), scores, tops);
        });
    }
}
