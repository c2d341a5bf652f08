// SPDX-License-Identifier: Apache-2.0
//
// Scores of query rows against the keys of a block of tokens. Parsed once per target.
//
// A register holds 16 / pieces tokens, one a lane, so a chain of dot products over the channels ends with one
// score a lane. With decoded key k = slope * c + base, codes centred at z = max_code / 2, and a query rounded
// to q ~ step * i (i 8-bit):
//
//   score = slope * step * (sum i c - z sum i) + (base + z * slope) * sum q
//
// The first bracket is exact in 32 bits: at most 4096 channels * 127 * 255 = 1.3e8, doubled.
// Cost of the fast path per line (16 tokens x 32/b channels) and query row: 8/b dot4, the shifts and masks
// being shared by up to 4 rows.

// Quotients by the step to 8-bit codes. A NaN in a query spoils its row, but must not make sums overflow:
// clamping takes it to -127 on x86 (the second operand of maxps), and conversion to 0 on ARM.
KV1_INLINE i32 rounded_codes(f32 quotients) {
    return xs::to_int(xs::nearbyint(xs::min(xs::max(quotients, f32(-127.0f)), f32(127.0f))));
}

// slope and base of the tokens of one register.
template <class Format>
KV1_INLINE void load_affine(const section_layout& s, const std::byte* page, std::size_t token, f32& slope,
                            f32& base) {
    constexpr metadata_kind kind = traits_of(kv_format_of<Format>).metadata;
    if constexpr (kind == metadata_kind::none) {
        slope = f32(1.0f);
        base = f32(0.0f);
    } else {
        slope = load_half(reinterpret_cast<const std::uint16_t*>(page + s.scale_offset) + token);
        if constexpr (kind == metadata_kind::scale) {
            base = f32(0.0f) - slope;
            slope = slope + slope;
        } else {
            base = load_half(reinterpret_cast<const std::uint16_t*>(page + s.minimum_offset) + token);
        }
    }
}

// Scores of R rows for `tokens` tokens, N registers at a time: tiles one after the other where a register is a
// tile, else the pieces of one tile.
template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void fast_score_step(const section_view& view, const query_rows& q, std::size_t row, std::size_t token,
                                float* scores, std::size_t score_stride) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr auto max_code = static_cast<float>((1 << t.code_bits) - 1);
    const section_layout& s = *view.layout;
    const std::size_t unit = s.unit_lines() * line_lanes;
    const std::size_t at = view.first_token + token;
    const std::uint32_t* first = reinterpret_cast<const std::uint32_t*>(view.page + s.offset) +
                                 at / line_lanes * unit + at % line_lanes;
    const std::int8_t* const rows[2] = {q.codes[0] + row * q.stride, q.codes[1] + row * q.stride};
    i32 total[R][N];
    unit_dots<Format, R, N>(s, first, lanes == line_lanes ? unit : lanes, {0, 0}, {s.part_lines(0), s.part_lines(1)},
                            prefetch_distance, rows, q.stride, total);
    for (std::size_t n = 0; n < N; ++n) {
        f32 slope, base;
        load_affine<Format>(s, view.page, at + n * lanes, slope, base);
        const f32 centre = xs::fma(slope, f32(0.5f * max_code), base);
        for (std::size_t r = 0; r < R; ++r) {
            const i32 centred = (total[r][n] << 1) - i32(static_cast<std::int32_t>(max_code) * q.code_sums[row + r]);
            const f32 dot = xs::to_float(centred) * f32(0.5f * q.code_scales[row + r]);
            xs::fma(slope, dot, centre * f32(q.sums[row + r]))
                .store_unaligned(scores + (row + r) * score_stride + token + n * lanes);
        }
    }
}

template <class Format, std::size_t R>
inline void fast_scores(const section_view& view, const query_rows& q, std::size_t row, float* scores,
                        std::size_t score_stride) {
    constexpr std::size_t at_once = registers_at_once<R>;
    std::size_t token = 0;
    for (; token + at_once * lanes <= view.tokens; token += at_once * lanes)
        fast_score_step<Format, R, at_once>(view, q, row, token, scores, score_stride);
    for (; token < view.tokens; token += lanes)
        fast_score_step<Format, R, 1>(view, q, row, token, scores, score_stride);
}

// Decoded values of consecutive fields of a lane: channels of a K lane, tokens of a V lane.
template <class Format>
struct field_reader {
    static constexpr format_traits t = traits_of(kv_format_of<Format>);
    static constexpr std::size_t fields = t.fields_per_lane();
    static constexpr std::size_t lines0 = fields * static_cast<std::size_t>(t.field_bits(0)) / 32;

    u32 part0[lines0];
    u32 part1;

    // unit: first line of the part walk, already offset to this register's lanes; n-th run of `fields` fields
    KV1_INLINE void load(const std::uint32_t* unit, std::size_t part1_line, std::size_t n) {
        for (std::size_t l = 0; l < lines0; ++l)
            part0[l] = u32::load_aligned(unit + (n * lines0 + l) * line_lanes);
        if constexpr (t.part_count() == 2)
            part1 = u32::load_aligned(unit + (part1_line + n) * line_lanes);
    }

    template <bool Keys>
    KV1_INLINE f32 value(std::size_t i, f32 slope, f32 base) const {
        constexpr int bits = t.field_bits(0);
        constexpr std::size_t per_lane = static_cast<std::size_t>(32 / bits);
        if constexpr (t.id == kv_format::fp32) {
            return xs::bitwise_cast<float>(part0[0]);
        } else {
            const int shift =
                Keys ? key_field_shift(bits, i % per_lane) : value_field_shift(bits, i % per_lane);
            const u32 field = (part0[i / per_lane] >> shift) & u32(field_mask(bits));
            if constexpr (t.id == kv_format::fp16) {
                return half_to_float(field);
            } else if constexpr (t.part_count() == 2) {
                const int high_shift =
                    Keys ? key_field_shift(t.parts[1].bits, i) : value_field_shift(t.parts[1].bits, i);
                const u32 high = (part1 >> high_shift) & u32(field_mask(t.parts[1].bits));
                return decode(field | (high << t.parts[1].shift), slope, base);
            } else {
                return decode(field, slope, base);
            }
        }
    }

    // code * slope is exact (at most 8 + 11 significant bits), so fma equals the format's definition
    KV1_INLINE static f32 decode(u32 code, f32 slope, f32 base) {
        return xs::fma(xs::to_float(xs::bitwise_cast<std::int32_t>(code)), slope, base);
    }
};

template <class Format, std::size_t R>
inline void exact_scores(const section_view& view, const query_rows& q, std::size_t row, float* scores,
                         std::size_t score_stride) {
    using reader = field_reader<Format>;
    const section_layout& s = *view.layout;
    const std::size_t unit = s.unit_lines() * line_lanes;
    const std::size_t runs = round_up(s.channels, reader::fields) / reader::fields;
    const auto* tile =
        reinterpret_cast<const std::uint32_t*>(view.page + s.offset) + view.first_token / tile_tokens * unit;
    for (std::size_t token = 0; token < view.tokens; token += tile_tokens, tile += unit) {
        for (std::size_t k = 0; k < pieces; ++k) {
            f32 slope, base;
            load_affine<Format>(s, view.page, view.first_token + token + k * lanes, slope, base);
            f32 sum[R];
            for (std::size_t r = 0; r < R; ++r)
                sum[r] = f32(0.0f);
            const float* query = q.values + row * q.stride;
            for (std::size_t n = 0; n < runs; ++n, query += reader::fields) {
                reader lane;
                lane.load(tile + k * lanes, s.part_lines(0), n);
                for (std::size_t i = 0; i < reader::fields; ++i) {
                    const f32 key = lane.template value<true>(i, slope, base);
                    for (std::size_t r = 0; r < R; ++r)
                        sum[r] = xs::fma(key, f32(query[r * q.stride + i]), sum[r]);
                }
            }
            for (std::size_t r = 0; r < R; ++r)
                sum[r].store_unaligned(scores + (row + r) * score_stride + token + k * lanes);
        }
    }
}

// Rows in register tiles: unpacked codes are shared by the rows of a tile.
template <class Format>
inline void key_scores_fast(const section_view& view, const query_rows& q, float* scores,
                            std::size_t stride) noexcept {
    std::size_t row = 0;
    for (; row + 4 <= q.rows; row += 4)
        fast_scores<Format, 4>(view, q, row, scores, stride);
    for (; row + 2 <= q.rows; row += 2)
        fast_scores<Format, 2>(view, q, row, scores, stride);
    for (; row < q.rows; ++row)
        fast_scores<Format, 1>(view, q, row, scores, stride);
}

template <class Format>
inline void key_scores_exact(const section_view& view, const query_rows& q, float* scores,
                             std::size_t stride) noexcept {
    std::size_t row = 0;
    if constexpr (lanes == 16)
        for (; row + 8 <= q.rows; row += 8)
            exact_scores<Format, 8>(view, q, row, scores, stride);
    for (; row + 4 <= q.rows; row += 4)
        exact_scores<Format, 4>(view, q, row, scores, stride);
    for (; row < q.rows; ++row)
        exact_scores<Format, 1>(view, q, row, scores, stride);
}
