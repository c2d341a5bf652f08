// SPDX-License-Identifier: Apache-2.0
//
// Softmax weights from the scores of a chunk, and sums of its values by these weights. Parsed once per target, after
// scores.inl.
//
// A line of V has 16 channels, one a lane, and fills `registers_per_line` registers. A lane's fields are tokens. A
// decoded value is v = slope * c + base, with levels c. z is the middle of the levels: 3/2 at 2 bits. Softmax gives a
// token the weight p. The product p * slope is rounded to step * i: one step for each row and chunk, and i a byte
// (weight_codes.hpp). Then
//
//   sum p v = step * (sum i c - z sum i) + sum p (base + z * slope)
//
// The last term does not depend on the channel.
//
// Cost of the fast path: per line (16 channels x 32/b tokens) and row 8/b dot4. Per tile and row the exponential (7
// multiplications, 4 others) and 13 operations around it, 17 where codes are few (few_codes).

// 2^t for t <= 60, within 3 units of 2^-24 of the result, and zero for t < -63.5: beside the largest weight, which is 1,
// a million weights of 2^-63.5 are less than what fp32 rounds away. Far smaller ones must not be: a processor may take a
// hundred cycles for a product that ends below 2^-126. t = n + f with |f| <= 1/2. A polynomial for 2^f errs by 1.54 units
// at most (minimax of degree 5 with constant term 1), and its rounding adds 1.2. A target multiplies by 2^n in its own
// way, for which t is kept in a range and the polynomial comes times a power of 2.
KV1_LAZY KV1_INLINE f32 exp2_nonpositive(f32 t) {
    const f32 bounded = exponent_in_range(t);
    const f32 n = nearest(bounded);
    const f32 f = bounded - n;
    f32 p = xs::fma(f32(exp2_factor * 0x1.5bba14p-10f), f, f32(exp2_factor * 0x1.3cea88p-7f));
    p = xs::fma(p, f, f32(exp2_factor * 0x1.c6b752p-5f));
    p = xs::fma(p, f, f32(exp2_factor * 0x1.ebf9bcp-3f));
    p = xs::fma(p, f, f32(exp2_factor * 0x1.62e42ap-1f));
    return times_power_of_2(xs::fma(p, f, f32(exp2_factor)), n);
}

// The number that is subtracted from a row's scores, in units of log2. If the row has seen nothing yet, all scores are
// lowest_score, and their weights become zero.
KV1_LAZY KV1_INLINE f32 softmax_shift(float maximum) {
    return f32(maximum == lowest_score ? 0.0f : -maximum);
}

// The weights of a chunk for R rows, rounded for the integer path. Codes lie as a line has its tokens, in a row tile's
// order.
template <std::size_t R>
struct rounded_weights {
    alignas(64) std::int8_t codes[R * max_chunk_slots];
    float step[R];
    std::int32_t code_sum[R];
    float affine_sum[R];
};

// Stores the sixteen codes of row r and tile k at their place among runs of 32 / Bits slots.
template <int Bits, std::size_t R>
KV1_INLINE void store_weight_codes(const std::uint8_t* codes, std::size_t k, std::size_t r,
                                   std::int8_t* out) {
    constexpr std::size_t run = 32 / Bits;
    if constexpr (run <= tile_tokens) {
        constexpr std::size_t lines = tile_tokens / run;
        KV1_UNROLL for (std::size_t l = 0; l < lines; ++l) {
            std::memcpy(out + ((k * lines + l) * R + r) * run, codes + l * run, run);
        }
    } else {
        std::memcpy(out + (k / 2 * R + r) * run + k % 2 * tile_tokens, codes, tile_tokens);
    }
}

// Of the lines that a tile of values fetches for keys, those that are fetched while its weights are made: what is more
// than a line for each of its own, up to half as many. All of them in the sums would be more than memory brings there.
template <class Format>
KV1_INLINE std::size_t early_lines(const chunk_view& view) {
    constexpr std::size_t run = 32 / static_cast<std::size_t>(traits_of(kv_format_of<Format>).field_bits(0));
    if (run > tile_tokens)
        return 0;
    const std::size_t own = tile_tokens / run * view.layout->units();
    const std::size_t more = view.next_lines > own ? view.next_lines - own : 0;
    return more < own / 2 ? more : own / 2;
}

template <class Format, std::size_t R>
KV1_INLINE void round_weights(const chunk_view& view, const chunk_metadata<Format>& metadata,
                              const softmax_rows& w, std::size_t row, rounded_weights<R>& out) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr auto top_level = static_cast<float>(t.top_level());
    constexpr auto top_weight = static_cast<float>(top_weight_code(t.code_bits));
    const f32 log2e(log2_e);
    f32 shift[R], sum[R], affine[R], largest[R], all[R];
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        shift[r] = softmax_shift(w.maxima[row + r]);
        sum[r] = affine[r] = largest[r] = all[r] = f32(0.0f);
    }
    float* scores = w.scores + row * score_stride;
    const std::size_t early = early_lines<Format>(view);
    for (std::size_t k = 0; k < view.count; ++k) {
        const tile_ref& ref = view.tiles[k];
        prefetch_metadata(view, k);
        if (row == 0 && k < view.next_count)
            fetch(share_of(view, k), view.next_lines - early, 1, view.next_lines);
        KV1_UNROLL for (std::size_t i = 0; i < registers_per_line; ++i) {
            f32 slope, base;
            metadata.load(*view.layout, k * tile_tokens + i * lanes, ref.page, ref.token + i * lanes, slope,
                          base);
            const f32 centre = xs::fma(slope, f32(0.5f * top_level), base);
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                float* at = scores + r * score_stride + k * tile_tokens + i * lanes;
                const f32 p = exp2_nonpositive(xs::fma(f32::load_aligned(at), log2e, shift[r]));
                const f32 u = p * slope;
                sum[r] = sum[r] + p;
                all[r] = all[r] + u;
                affine[r] = xs::fma(p, centre, affine[r]);
                largest[r] = xs::max(largest[r], u);
                u.store_aligned(at);
            }
        }
    }
    f32 inverse[R], gain[R], carry[R][registers_per_line];
    i32 code_sum[R];
    float total[R];
    bool few = false;
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        const float top = xs::reduce_max(largest[r]);
        w.denominators[row + r] = w.denominators[row + r] * w.rescale[row + r] + xs::reduce_add(sum[r]);
        out.affine_sum[r] = xs::reduce_add(affine[r]);
        total[r] = xs::reduce_add(all[r]);
        const float steps = top > 0.0f ? top_weight / top : 0.0f;
        inverse[r] = f32(steps);
        code_sum[r] = i32(0);
        const bool its_few = total[r] * steps < few_codes;
        few = few || its_few;
        gain[r] = f32(its_few ? 0.5f : 0.0f);
        KV1_UNROLL for (std::size_t i = 0; i < registers_per_line; ++i) {
            carry[r][i] = its_few ? f32::load_aligned(weight_carries.at + i * lanes) : f32(0.0f);
        }
    }
    const auto store = [&](const i32(&code)[registers_per_line], std::size_t k, std::size_t r) {
        alignas(16) std::uint8_t codes[tile_tokens];
        store_line_u8(code, codes);
        store_weight_codes<t.field_bits(0), R>(codes, k, r, out.codes);
    };
    for (std::size_t k = 0; k < view.count && !few; ++k) {
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            const float* at = scores + r * score_stride + k * tile_tokens;
            i32 code[registers_per_line];
            KV1_UNROLL for (std::size_t i = 0; i < registers_per_line; ++i) {
                code[i] = round_to_int(f32::load_aligned(at + i * lanes) * inverse[r]);
                code_sum[r] = code_sum[r] + code[i];
            }
            store(code, k, r);
        }
    }
    for (std::size_t k = 0; k < view.count && few; ++k) {
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            const float* at = scores + r * score_stride + k * tile_tokens;
            i32 code[registers_per_line];
            KV1_UNROLL for (std::size_t i = 0; i < registers_per_line; ++i) {
                const f32 wanted = xs::fma(f32::load_aligned(at + i * lanes), inverse[r], carry[r][i]);
                code[i] = round_to_int(wanted);
                carry[r][i] = gain[r] * (carry[r][i] + (wanted - xs::to_float(code[i])));
                code_sum[r] = code_sum[r] + code[i];
            }
            store(code, k, r);
        }
    }
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        out.code_sum[r] = xs::reduce_add(code_sum[r]);
        out.step[r] = out.code_sum[r] > 0 ? total[r] / static_cast<float>(out.code_sum[r]) : 0.0f;
    }
}

// The lines of a chunk for channels 0 ... 15, those that two of them share, and where the share of K lies that a line's
// tile brings.
struct value_lines {
    const std::byte* at[max_chunk_slots / 4];
    const std::byte* shared[max_chunk_slots / 32];
    const std::byte* next[max_chunk_slots / 4];
    std::size_t count;
    std::size_t share; // lines
};

// first_line: the line of token 0, of those that hold Run tokens
template <std::size_t Run>
KV1_INLINE std::size_t list_lines(const chunk_view& view, std::size_t first_line, const std::byte** at) {
    constexpr std::size_t run = Run;
    const std::size_t count = view.count * tile_tokens / run;
    for (std::size_t l = 0; l < count; ++l) {
        const tile_ref& ref = view.tiles[l * run / tile_tokens];
        const std::size_t token = ref.token + l * run % tile_tokens;
        at[l] = ref.page + view.layout->offset + (first_line + token / run) * line_bytes;
    }
    return count;
}

template <class Format>
KV1_INLINE void list_lines(const chunk_view& view, value_lines& lines) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr std::size_t run = 32 / t.field_bits(0);
    lines.count = list_lines<run>(view, 0, lines.at);
    if constexpr (t.slice_count() == 2)
        list_lines<2 * run>(view, view.layout->first_shared(), lines.shared);
    for (std::size_t l = 0; l < lines.count; ++l) {
        const std::size_t tile = l * run / tile_tokens;
        lines.next[l] = tile < view.next_count ? share_of(view, tile) : lines.at[l];
    }
    lines.share = view.next_lines - early_lines<Format>(view);
}

// Computes the sums of R rows for N registers of channels, from `channel` on.
template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void fast_sum_step(const section_layout& s, const value_lines& lines,
                              const rounded_weights<R>& rounded, const float* rescale, std::size_t channel,
                              float* sums, std::size_t sum_stride) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr std::int32_t top_level = t.top_level();
    constexpr int top_weight = top_weight_code(t.code_bits);
    const std::size_t unit = s.unit_lines() * line_bytes;
    value_walk<N, 32 / t.field_bits(0)> walk{lines.at,  lines.shared, lines.next, {}, channel / line_lanes,
                                             s.units(), lines.share};
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        const std::size_t at = channel + n * lanes;
        walk.offset[n] = at / line_lanes * unit + at % line_lanes * 4;
    }
    i32 total[R][N];
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { total[r][n] = i32(0); }
    }
    add_dots<t.code_bits, (top_weight > 127), top_level>(walk, lines.count, rounded.codes, total);
    KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            float* out = sums + r * sum_stride + channel + n * lanes;
            const i32 centred = total[r][n] + total[r][n] - i32(top_level * rounded.code_sum[r]);
            const f32 earlier = xs::fma(f32::load_aligned(out), f32(rescale[r]), f32(rounded.affine_sum[r]));
            xs::fma(xs::to_float(centred), f32(0.5f * rounded.step[r]), earlier).store_aligned(out);
        }
    }
}

template <class Format, std::size_t R>
inline void fast_sums(const chunk_view& view, const chunk_metadata<Format>& metadata,
                      const value_lines& lines, const softmax_rows& w, std::size_t row, float* sums,
                      std::size_t sum_stride) {
    constexpr std::size_t at_once = registers_at_once<R>;
    rounded_weights<R> rounded;
    round_weights<Format, R>(view, metadata, w, row, rounded);
    const section_layout& s = *view.layout;
    const std::size_t channels = round_up(s.channels, line_lanes);
    float* out = sums + row * sum_stride;
    std::size_t channel = 0;
    for (; channel + at_once * lanes <= channels; channel += at_once * lanes)
        fast_sum_step<Format, R, at_once>(s, lines, rounded, w.rescale + row, channel, out, sum_stride);
    if constexpr (at_once > 2)
        for (; channel + 2 * lanes <= channels; channel += 2 * lanes)
            fast_sum_step<Format, R, 2>(s, lines, rounded, w.rescale + row, channel, out, sum_stride);
    for (; channel < channels; channel += lanes)
        fast_sum_step<Format, R, 1>(s, lines, rounded, w.rescale + row, channel, out, sum_stride);
}

// Turns scores into weights in place, for the exact path.
template <std::size_t R>
KV1_INLINE void exponentiate(std::size_t slots, const softmax_rows& w, std::size_t row) {
    const f32 log2e(log2_e);
    for (std::size_t r = 0; r < R; ++r) {
        float* at = w.scores + (row + r) * score_stride;
        const f32 shift = softmax_shift(w.maxima[row + r]);
        f32 sum(0.0f);
        for (std::size_t i = 0; i < slots; i += lanes) {
            const f32 p = exp2_nonpositive(xs::fma(f32::load_aligned(at + i), log2e, shift));
            p.store_aligned(at + i);
            sum = sum + p;
        }
        w.denominators[row + r] = w.denominators[row + r] * w.rescale[row + r] + xs::reduce_add(sum);
    }
}

// The lines of fp16 values in which rows of a row tile have weights, for channels 0 ... 15: of two tokens each. Few of the
// tokens that attention to fp16 sinks and a window walks may be seen.
struct half_lines {
    static constexpr std::size_t of_tile = tile_tokens / 2;
    const std::byte* at[max_chunk_slots / 2];
    const std::byte* next[max_chunk_tiles]; // the share of K that a tile brings, or null
    std::uint16_t slot[max_chunk_slots / 2];
    std::size_t count, share; // lines of a share
};

// weights: of R rows
template <std::size_t R>
KV1_INLINE void list_half_lines(const chunk_view& view, const float* weights, half_lines& out) {
    const section_layout& s = *view.layout;
    out.count = 0;
    out.share = view.next_lines;
    for (std::size_t k = 0; k < view.count; ++k, weights += tile_tokens) {
        const tile_ref& ref = view.tiles[k];
        const std::byte* const first = ref.page + s.offset + ref.token / 2 * line_bytes;
        const std::byte* const next = k < view.next_count ? share_of(view, k) : nullptr;
        out.next[k] = next;
        alignas(64) std::uint32_t bits[tile_tokens]; // zero: no row has a weight
        for (std::size_t i = 0; i < tile_tokens; i += lanes) {
            u32 any = xs::bitwise_cast<std::uint32_t>(f32::load_aligned(weights + i));
            KV1_UNROLL for (std::size_t r = 1; r < R; ++r) {
                any =
                    any | xs::bitwise_cast<std::uint32_t>(f32::load_aligned(weights + r * score_stride + i));
            }
            any.store_aligned(bits + i);
        }
        for (std::size_t l = 0; l < half_lines::of_tile; ++l) {
            out.at[out.count] = first + l * line_bytes;
            out.slot[out.count] = static_cast<std::uint16_t>(k * tile_tokens + 2 * l);
            if ((bits[2 * l] | bits[2 * l + 1]) != 0) {
                ++out.count;
                continue;
            }
            for (std::size_t u = 0; next != nullptr && u < s.units(); ++u)
                fetch(next, l * s.units() + u, half_lines::of_tile * s.units(), out.share);
        }
    }
}

// weights, rescale, sums: of R rows. Computes N registers of channels, from `channel` on.
template <std::size_t R, std::size_t N>
KV1_INLINE void half_sum_step(const section_layout& s, const half_lines& lines, const float* weights,
                              const float* rescale, std::size_t channel, float* sums,
                              std::size_t sum_stride) {
    const std::size_t unit = s.unit_lines() * line_bytes, units = s.units();
    std::size_t offset[N];
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        const std::size_t at = channel + n * lanes;
        offset[n] = at / line_lanes * unit + at % line_lanes * 4;
    }
    half_sums<R, N> added;
    for (std::size_t i = 0; i < lines.count; ++i) {
        const std::size_t slot = lines.slot[i];
        const std::byte* const next = lines.next[slot / tile_tokens];
        const std::uint32_t* at[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            at[n] = reinterpret_cast<const std::uint32_t*>(lines.at[i] + offset[n]);
            if (n % registers_per_line == 0 && next != nullptr)
                fetch(next, slot % tile_tokens / 2 * units + (channel + n * lanes) / line_lanes,
                      half_lines::of_tile * units, lines.share);
        }
        added.add(at, weights + slot, score_stride);
    }
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            float* const out = sums + r * sum_stride + channel + n * lanes;
            (f32::load_aligned(out) * f32(rescale[r]) + added.sum(r, n)).store_aligned(out);
        }
    }
}

template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void exact_sum_step(const chunk_view& view, const affine_slots& affine, const softmax_rows& w,
                               std::size_t row, std::size_t channel, float* sums, std::size_t sum_stride) {
    using reader = field_reader<Format>;
    constexpr bool coded = reader::t.code_bits != 0;
    const section_layout& s = *view.layout;
    const std::size_t unit = s.unit_lines() * line_bytes;
    constexpr std::size_t tile_lines = reader::fields < tile_tokens ? tile_tokens / reader::fields : 1;
    constexpr std::size_t line_tiles = reader::fields > tile_tokens ? reader::fields / tile_tokens : 1;
    const std::size_t units = s.units();
    std::size_t offset[N];
    f32 sum[R][N];
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        const std::size_t at = channel + n * lanes;
        offset[n] = s.offset + at / line_lanes * unit + at % line_lanes * 4;
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            sum[r][n] = f32::load_aligned(sums + (row + r) * sum_stride + at) * f32(w.rescale[row + r]);
        }
    }
    const float* weights = w.scores + row * score_stride;
    for (std::size_t slot = 0; slot < view.count * tile_tokens; slot += reader::fields) {
        const std::size_t tile = slot / tile_tokens;
        const tile_ref& ref = view.tiles[tile];
        const std::byte* const next = tile < view.next_count ? share_of(view, tile) : nullptr;
        const std::size_t line = slot % tile_tokens / reader::fields * units;
        const std::size_t its_line = (ref.token + slot % tile_tokens) / reader::fields;
        const std::uint32_t* at[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
            at[n] = reinterpret_cast<const std::uint32_t*>(ref.page + offset[n]);
            if (n % registers_per_line == 0 && next != nullptr)
                fetch(next, line + (channel + n * lanes) / line_lanes, tile_lines * units,
                      line_tiles * view.next_lines);
        }
        reader lane[N];
        KV1_UNROLL for (std::size_t n = 0; n < N; ++n) { lane[n].load(at[n], s.first_shared(), its_line); }
        KV1_UNROLL for (std::size_t i = 0; i < reader::fields; ++i) {
            const f32 slope(coded ? affine.slopes[slot + i] : 1.0f);
            const f32 base(coded ? affine.bases[slot + i] : 0.0f);
            f32 value[N];
            KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                value[n] = lane[n].template value<false>(i, slope, base);
            }
            KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
                const f32 factor(weights[r * score_stride + slot + i]);
                KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
                    sum[r][n] = xs::fma(value[n], factor, sum[r][n]);
                }
            }
        }
    }
    KV1_UNROLL for (std::size_t n = 0; n < N; ++n) {
        KV1_UNROLL for (std::size_t r = 0; r < R; ++r) {
            sum[r][n].store_aligned(sums + (row + r) * sum_stride + channel + n * lanes);
        }
    }
}

template <class Format, std::size_t R>
inline void exact_sums(const chunk_view& view, const affine_slots& affine, const softmax_rows& w,
                       std::size_t row, float* sums, std::size_t sum_stride) {
    exponentiate<R>(view.count * tile_tokens, w, row);
    constexpr bool halves = kv_format_of<Format> == kv_format::fp16;
    std::conditional_t<halves, half_lines, char> lines;
    const section_layout s = *view.layout;
    if constexpr (halves)
        list_half_lines<R>(view, w.scores + row * score_stride, lines);
    const auto step = [&](auto registers, std::size_t channel) {
        if constexpr (halves)
            half_sum_step<R, registers()>(s, lines, w.scores + row * score_stride, w.rescale + row, channel,
                                          sums + row * sum_stride, sum_stride);
        else
            exact_sum_step<Format, R, registers()>(view, affine, w, row, channel, sums, sum_stride);
    };
    const std::size_t channels = round_up(s.channels, line_lanes);
    std::size_t channel = 0;
    constexpr std::size_t at_once = exact_registers<Format>;
    for (; channel + at_once * lanes <= channels; channel += at_once * lanes)
        step(std::integral_constant<std::size_t, at_once>{}, channel);
    if constexpr (registers_per_line % at_once != 0)
        for (; channel < channels; channel += lanes)
            step(std::integral_constant<std::size_t, 1>{}, channel);
}

template <class Format>
inline void value_sums_fast(const chunk_view& view, const softmax_rows& w, float* sums,
                            std::size_t stride) noexcept {
    value_lines lines;
    list_lines<Format>(view, lines);
    affine_slots room;
    const chunk_metadata<Format> metadata(view, room);
    for_row_tiles(w.rows, [&](auto size, std::size_t row) {
        fast_sums<Format, size()>(view, metadata, lines, w, row, sums, stride);
    });
}

template <class Format>
inline void value_sums_exact(const chunk_view& view, const softmax_rows& w, float* sums,
                             std::size_t stride) noexcept {
    affine_slots affine;
    if constexpr (traits_of(kv_format_of<Format>).code_bits != 0) {
        const chunk_metadata<Format> metadata(view, affine);
        for (std::size_t k = 0; k < view.count; ++k) {
            prefetch_metadata(view, k);
            for (std::size_t i = 0; i < tile_tokens && metadata.decoded == nullptr; i += lanes) {
                f32 slope, base;
                metadata.load(*view.layout, k * tile_tokens + i, view.tiles[k].page, view.tiles[k].token + i,
                              slope, base);
                slope.store_aligned(affine.slopes + k * tile_tokens + i);
                base.store_aligned(affine.bases + k * tile_tokens + i);
            }
        }
    }
    const auto some = [&](auto size, std::size_t row) {
        exact_sums<Format, size()>(view, affine, w, row, sums, stride);
    };
    if constexpr (traits_of(kv_format_of<Format>).code_bits != 0)
        for_few_row_tiles(w.rows, some);
    else
        for_row_tiles(w.rows, some);
}
