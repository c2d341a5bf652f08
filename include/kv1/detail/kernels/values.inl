// SPDX-License-Identifier: Apache-2.0
//
// Weighted sums of the values of a block of tokens. Parsed once per target; follows scores.inl.
//
// A register holds 16 / pieces channels, one a lane; a lane's fields are tokens. With decoded value
// v = slope * c + base, softmax weight p, u = p * slope rounded to u ~ step * i (i 8-bit, one step per row
// and block), codes centred at z = max_code / 2:
//
//   sum p v = step * (sum i c - z sum i) + sum p (base + z * slope)
//
// The last term does not depend on the channel.
// Cost of the fast path per line (16 channels x 32/b tokens) and row: 8/b dot4.

// A block's weights of one row, rounded for the integer path.
struct rounded_weights {
    alignas(64) std::int8_t codes[max_block_tokens];
    float step;
    std::int32_t code_sum;
    float affine_sum;
};

template <class Format>
KV1_INLINE void round_weights(const section_view& view, const float* weights, std::size_t padded,
                              rounded_weights& out) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr auto max_code = static_cast<float>((1 << t.code_bits) - 1);
    alignas(64) float scaled[max_block_tokens];
    f32 largest(0.0f), affine(0.0f);
    for (std::size_t i = 0; i < view.tokens; i += lanes) {
        f32 slope, base;
        load_affine<Format>(*view.layout, view.page, view.first_token + i, slope, base);
        const f32 p = f32::load_unaligned(weights + i);
        const f32 u = p * slope;
        affine = xs::fma(p, xs::fma(slope, f32(0.5f * max_code), base), affine);
        largest = xs::max(largest, u);
        u.store_aligned(scaled + i);
    }
    const float top = xs::reduce_max(largest);
    out.step = top / 127.0f;
    out.affine_sum = xs::reduce_add(affine);
    const f32 inverse(top > 0.0f ? 127.0f / top : 0.0f);
    i32 sum(0);
    for (std::size_t i = 0; i < view.tokens; i += lanes) {
        const i32 code = rounded_codes(f32::load_aligned(scaled + i) * inverse);
        sum = sum + code;
        store_u8(xs::bitwise_cast<std::uint32_t>(code), reinterpret_cast<std::uint8_t*>(out.codes) + i);
    }
    for (std::size_t i = view.tokens; i < padded; ++i)
        out.codes[i] = 0;
    out.code_sum = xs::reduce_add(sum);
}

// Sums of R rows for N registers of channels from `channel` on.
template <class Format, std::size_t R, std::size_t N>
KV1_INLINE void fast_sum_step(const section_view& view, const rounded_weights* rounded, std::size_t padded,
                              const float* rescale, std::size_t channel, float* sums, std::size_t sum_stride) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr std::int32_t max_code = (1 << t.code_bits) - 1;
    constexpr std::size_t per_lane0 = static_cast<std::size_t>(32 / t.parts[0].bits);
    constexpr std::size_t per_lane1 = t.part_count() == 2 ? static_cast<std::size_t>(32 / t.parts[1].bits) : 1;
    const section_layout& s = *view.layout;
    const std::size_t unit = s.unit_lines() * line_lanes;
    const std::uint32_t* first = reinterpret_cast<const std::uint32_t*>(view.page + s.offset) +
                                 channel / line_lanes * unit + channel % line_lanes;
    i32 total[R][N];
    unit_dots<Format, R, N>(s, first, lanes == line_lanes ? unit : lanes,
                            {view.first_token / per_lane0, view.first_token / per_lane1},
                            {padded / per_lane0, padded / per_lane1}, prefetch_distance,
                            {rounded[0].codes, rounded[0].codes}, sizeof(rounded_weights), total);
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t n = 0; n < N; ++n) {
            float* out = sums + r * sum_stride + channel + n * lanes;
            const i32 centred = (total[r][n] << 1) - i32(max_code * rounded[r].code_sum);
            const f32 earlier = xs::fma(f32::load_aligned(out), f32(rescale[r]), f32(rounded[r].affine_sum));
            xs::fma(xs::to_float(centred), f32(0.5f * rounded[r].step), earlier).store_aligned(out);
        }
}

template <class Format, std::size_t R>
inline void fast_sums(const section_view& view, const weight_rows& w, std::size_t row, float* sums,
                      std::size_t sum_stride) {
    constexpr format_traits t = traits_of(kv_format_of<Format>);
    constexpr std::size_t at_once = registers_at_once<R>;
    const std::size_t padded = round_up(view.tokens, t.fields_per_lane());
    rounded_weights rounded[R];
    for (std::size_t r = 0; r < R; ++r)
        round_weights<Format>(view, w.weights + (row + r) * w.stride, padded, rounded[r]);
    const std::size_t channels = round_up(view.layout->channels, line_lanes);
    float* out = sums + row * sum_stride;
    std::size_t channel = 0;
    for (; channel + at_once * lanes <= channels; channel += at_once * lanes)
        fast_sum_step<Format, R, at_once>(view, rounded, padded, w.rescale + row, channel, out, sum_stride);
    for (; channel < channels; channel += lanes)
        fast_sum_step<Format, R, 1>(view, rounded, padded, w.rescale + row, channel, out, sum_stride);
}

template <class Format, std::size_t R>
inline void exact_sums(const section_view& view, const weight_rows& w, std::size_t row, float* sums,
                       std::size_t sum_stride) {
    using reader = field_reader<Format>;
    constexpr metadata_kind kind = reader::t.metadata;
    const section_layout& s = *view.layout;
    const std::size_t padded = round_up(view.tokens, reader::fields);
    alignas(64) float slopes[max_block_tokens];
    alignas(64) float bases[max_block_tokens];
    if constexpr (kind != metadata_kind::none) {
        for (std::size_t i = 0; i < view.tokens; i += lanes) {
            f32 slope, base;
            load_affine<Format>(s, view.page, view.first_token + i, slope, base);
            slope.store_aligned(slopes + i);
            base.store_aligned(bases + i);
        }
        for (std::size_t i = view.tokens; i < padded; ++i)
            slopes[i] = bases[i] = 0.0f;
    }
    const std::size_t unit = s.unit_lines() * line_lanes;
    const std::size_t first_run = view.first_token / reader::fields;
    const auto* group = reinterpret_cast<const std::uint32_t*>(view.page + s.offset);
    for (std::size_t channel = 0; channel < s.channels; channel += line_lanes, group += unit) {
        for (std::size_t k = 0; k < pieces; ++k) {
            f32 sum[R];
            for (std::size_t r = 0; r < R; ++r)
                sum[r] = f32::load_aligned(sums + (row + r) * sum_stride + channel + k * lanes) *
                         f32(w.rescale[row + r]);
            for (std::size_t token = 0; token < padded; token += reader::fields) {
                reader lane;
                lane.load(group + k * lanes, s.part_lines(0), first_run + token / reader::fields);
                const float* weights = w.weights + row * w.stride + token;
                for (std::size_t i = 0; i < reader::fields; ++i) {
                    f32 value;
                    if constexpr (kind == metadata_kind::none)
                        value = lane.template value<false>(i, f32(1.0f), f32(0.0f));
                    else
                        value = lane.template value<false>(i, f32(slopes[token + i]), f32(bases[token + i]));
                    for (std::size_t r = 0; r < R; ++r)
                        sum[r] = xs::fma(value, f32(weights[r * w.stride + i]), sum[r]);
                }
            }
            for (std::size_t r = 0; r < R; ++r)
                sum[r].store_aligned(sums + (row + r) * sum_stride + channel + k * lanes);
        }
    }
}

template <class Format>
inline void value_sums_fast(const section_view& view, const weight_rows& w, float* sums,
                            std::size_t stride) noexcept {
    std::size_t row = 0;
    for (; row + 4 <= w.rows; row += 4)
        fast_sums<Format, 4>(view, w, row, sums, stride);
    for (; row + 2 <= w.rows; row += 2)
        fast_sums<Format, 2>(view, w, row, sums, stride);
    for (; row < w.rows; ++row)
        fast_sums<Format, 1>(view, w, row, sums, stride);
}

template <class Format>
inline void value_sums_exact(const section_view& view, const weight_rows& w, float* sums,
                             std::size_t stride) noexcept {
    std::size_t row = 0;
    if constexpr (lanes == 16)
        for (; row + 8 <= w.rows; row += 8)
            exact_sums<Format, 8>(view, w, row, sums, stride);
    for (; row + 4 <= w.rows; row += 4)
        exact_sums<Format, 4>(view, w, row, sums, stride);
    for (; row < w.rows; ++row)
        exact_sums<Format, 1>(view, w, row, sums, stride);
}
