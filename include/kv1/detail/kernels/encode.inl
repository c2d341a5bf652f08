// SPDX-License-Identifier: Apache-2.0
//
// Recipes (detail/encode_reference.hpp) for up to 16 vectors at once, bit for bit. Parsed once per target.
//
// A lane is a vector, a register one channel of `lanes` vectors: every lane does what the definition does, in its
// order, and nothing is ever summed across lanes. Vectors are transposed on the way in, codes on the way out.
//
// Cost per channel of `lanes` vectors: log2(block) + 1 for the rotation, 2 for the range, 3 rounds of 12, twice 9 for
// the errors of both candidates, and for feedback 4 per channel that comes after: at 32 channels about 130
// instructions, 8 a value on 16 lanes.

#include <kv1/detail/precise_math_begin.inl>

// a * b, rounded; see product_of() of floats.
KV1_INLINE f32 product_of(f32 a, f32 b) {
    f32 product = a * b;
#if defined(__GNUC__) && defined(__SSE2__)
    f32::register_type r = product;
#if defined(__clang__)
    __asm__("" : "+x"(r));
#else
    if constexpr (lanes == 16)
        __asm__("" : "+v"(r));
    else
        __asm__("" : "+x"(r));
#endif
    product = f32(r);
#elif defined(__GNUC__) && defined(__ARM_NEON) && !defined(__ARM_FEATURE_SVE)
    f32::register_type r = product;
    __asm__("" : "+w"(r));
    product = f32(r);
#endif
    return product;
}

KV1_INLINE f32 nearest_code(f32 steps, f32 max_code) {
    return nearest(xs::min(xs::max(steps, f32(0.0f)), max_code));
}

// Evenly spaced levels of each lane, as they are read back.
struct lane_levels {
    f32 scale, base;
    alignas(64) std::uint16_t scale_bits[lanes], minimum_bits[lanes];
    bool fits[lanes];
};

// level_format<affine>::store and its kind, lane by lane: a few dozen operations a vector.
template <bool Compact>
KV1_INLINE f32 round_scales(f32 scale, std::uint16_t* bits) {
    store_half(Compact ? scale : xs::max(scale, f32(smallest_scale)), bits);
    if constexpr (Compact)
        for (std::size_t i = 0; i < lanes; ++i) {
            const int rounded = (bits[i] + 0x20) & compact_pair::scale_mask;
            bits[i] = static_cast<std::uint16_t>(
                rounded > compact_pair::smallest_scale ? rounded : compact_pair::smallest_scale);
        }
    return load_half(bits);
}

template <bool Compact>
KV1_INLINE void store_levels(f32 base, f32 max_code, lane_levels& l) {
    if constexpr (Compact) {
        const f32 steps = product_of(quotient_of(base, l.scale * max_code), f32(128.0f)) + f32(64.0f);
        const f32 w = nearest(xs::min(xs::max(steps, f32(-63.0f)), f32(63.0f)));
        alignas(64) float offsets[lanes];
        w.store_aligned(offsets);
        for (std::size_t i = 0; i < lanes; ++i) {
            const int offset = l.fits[i] ? static_cast<int>(offsets[i]) : 0;
            l.scale_bits[i] = static_cast<std::uint16_t>(l.scale_bits[i] | (offset < 0 ? 0x8000 | -offset : offset));
            l.minimum_bits[i] = 0;
        }
        l.base = l.scale * (max_code * (w - f32(64.0f)) * f32(1.0f / 128.0f));
    } else {
        store_half(base, l.minimum_bits);
        for (std::size_t i = 0; i < lanes; ++i)
            l.minimum_bits[i] = plain_zero(l.minimum_bits[i]);
        l.base = load_half(l.minimum_bits);
        for (std::size_t i = 0; i < lanes; ++i)
            l.fits[i] = l.fits[i] && (l.minimum_bits[i] & 0x7c00u) != 0x7c00u;
    }
}

template <bool Compact>
KV1_INLINE void round_levels(f32 scale, lane_levels& l) {
    l.scale = round_scales<Compact>(scale, l.scale_bits);
    for (std::size_t i = 0; i < lanes; ++i)
        l.fits[i] = (l.scale_bits[i] & 0x7c00u) != 0x7c00u;
}

// Squared errors of the nearest levels; x: [n][lanes].
KV1_INLINE f32 errors_of(const float* x, std::size_t n, const lane_levels& l, f32 max_code) {
    const f32 inverse = quotient_of(f32(1.0f), l.scale);
    f32 error(0.0f);
    for (std::size_t c = 0; c < n; ++c) {
        const f32 v = f32::load_aligned(x + c * lanes);
        const f32 code = nearest_code((v - l.base) * inverse, max_code);
        const f32 e = v - (code * l.scale + l.base);
        error = sum_of(error, product_of(e, e));
    }
    return error;
}

template <bool Compact>
KV1_INLINE void refine(const float* x, std::size_t n, f32 lo, f32 hi, float top, lane_levels& l) {
    const f32 max_code(top), count(static_cast<float>(n));
    const f32 middle = f32(0.5f) * lo + f32(0.5f) * hi;
    f32 scale = xs::max(product_of(hi - lo, f32(fit_start / top)), f32(smallest_scale));
    f32 base = product_of(scale, f32(-0.5f * top));
    f32 sum_c(0.0f), sum_x(0.0f);
    for (int round = 0; round < fit_rounds; ++round) {
        const f32 inverse = quotient_of(f32(1.0f), scale);
        f32 sum_cc(0.0f), sum_xc(0.0f);
        sum_c = sum_x = f32(0.0f);
        for (std::size_t c = 0; c < n; ++c) {
            const f32 v = f32::load_aligned(x + c * lanes) - middle;
            const f32 code = nearest_code((v - base) * inverse, max_code);
            sum_x = sum_of(sum_x, v);
            sum_c = sum_of(sum_c, code);
            sum_cc = sum_of(sum_cc, code * code);
            sum_xc = sum_of(sum_xc, product_of(v, code));
        }
        const f32 variance = product_of(count, sum_cc) - product_of(sum_c, sum_c);
        const f32 covariance = product_of(count, sum_xc) - product_of(sum_x, sum_c);
        const auto varies = variance > f32(0.0f);
        const f32 divisor = xs::select(varies, variance, f32(1.0f));
        scale = xs::select(varies, xs::max(quotient_of(covariance, divisor), f32(smallest_scale)), scale);
        base = quotient_of(sum_x - product_of(scale, sum_c), count);
    }
    round_levels<Compact>(scale, l);
    base = quotient_of(sum_x - product_of(l.scale, sum_c), count);
    store_levels<Compact>(base + middle, max_code, l);
}

// Codes to [n][lanes] bytes; with feedback, common to the lanes, by way of `wanted`, [n][lanes].
KV1_INLINE void choose_codes(const float* x, std::size_t n, const lane_levels& l, f32 max_code, const float* feedback,
                             float* wanted, std::uint8_t* codes) {
    const f32 inverse = quotient_of(f32(1.0f), l.scale);
    if (feedback != nullptr)
        std::memcpy(wanted, x, n * lanes * sizeof(float));
    const float* given = feedback != nullptr ? wanted : x;
    for (std::size_t i = n; i-- > 0;) {
        const f32 code = nearest_code((f32::load_aligned(given + i * lanes) - l.base) * inverse, max_code);
        store_u8(xs::bitwise_cast<std::uint32_t>(xs::to_int(code)), codes + i * lanes);
        if (feedback == nullptr)
            continue;
        const f32 error = f32::load_aligned(x + i * lanes) - (code * l.scale + l.base);
        const float* factors = feedback + i * n;
        for (std::size_t j = 0; j < i; ++j) {
            float* at = wanted + j * lanes;
            sum_of(f32::load_aligned(at), product_of(f32(factors[j]), error)).store_aligned(at);
        }
    }
}

// The same of one lane with feedback of its own: channels side by side.
KV1_INLINE void choose_codes_of_lane(const float* x, std::size_t n, std::size_t lane, float scale, float base,
                                     f32 max_code, const float* feedback, float* wanted, std::uint8_t* codes) {
    const f32 s(scale), b(base), inverse = quotient_of(f32(1.0f), s);
    for (std::size_t c = 0; c < round_up(n, lanes); ++c)
        wanted[c] = c < n ? x[c * lanes + lane] : 0.0f;
    alignas(64) float errors[lanes];
    for (std::size_t i = n; i-- > 0;) {
        const f32 code = nearest_code((f32(wanted[i]) - b) * inverse, max_code);
        const f32 error = f32(x[i * lanes + lane]) - (code * s + b);
        const float* factors = feedback + i * n;
        std::size_t j = 0;
        for (; j + lanes <= i; j += lanes)
            sum_of(f32::load_aligned(wanted + j), product_of(f32::load_unaligned(factors + j), error))
                .store_aligned(wanted + j);
        if (j < i) { // the rest of a register: past channel i factors are zero, past the vector none are read
            alignas(64) float rest[lanes] = {};
            for (std::size_t k = j; k < i; ++k)
                rest[k - j] = factors[k];
            sum_of(f32::load_aligned(wanted + j), product_of(f32::load_aligned(rest), error))
                .store_aligned(wanted + j);
        }
        code.store_aligned(errors);
        codes[i * lanes + lane] = static_cast<std::uint8_t>(errors[0]);
    }
}

// x: [n][lanes], transformed block by block.
KV1_INLINE void rotate_lanes(float* x, std::size_t n, std::size_t block) {
    for (std::size_t half = 1; half < block; half *= 2)
        for (std::size_t at = 0; at < n; at += 2 * half)
            for (std::size_t i = at; i < at + half; ++i) {
                const f32 a = f32::load_aligned(x + i * lanes), b = f32::load_aligned(x + (i + half) * lanes);
                (a + b).store_aligned(x + i * lanes);
                (a - b).store_aligned(x + (i + half) * lanes);
            }
    const f32 norm(hadamard_norm(block));
    for (std::size_t i = 0; i < n; ++i)
        product_of(f32::load_aligned(x + i * lanes), norm).store_aligned(x + i * lanes);
}

// The same for one vector, channels side by side.
inline void rotate(float* x, std::size_t n, std::size_t block) noexcept {
    for (std::size_t half = 1; half < block; half *= 2)
        for (std::size_t at = 0; at < n; at += 2 * half) {
            std::size_t i = at;
            for (; half >= lanes && i < at + half; i += lanes) {
                const f32 a = f32::load_unaligned(x + i), b = f32::load_unaligned(x + i + half);
                (a + b).store_unaligned(x + i);
                (a - b).store_unaligned(x + i + half);
            }
            for (; i < at + half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
        }
    const float norm = hadamard_norm(block);
    for (std::size_t i = 0; i < n; ++i)
        x[i] *= norm;
}

// Vectors of more channels than this do not fit the scratch and go by the definition.
inline constexpr std::size_t lane_scratch_channels = 1024;

template <bool Compact>
inline std::size_t encode_lanes(const encode_recipe& recipe, const encode_row* rows, std::size_t count, float* x,
                                float* wanted, std::uint8_t* lane_codes, row_metadata* metadata) noexcept {
    const std::size_t n = recipe.channels;
    const auto top = static_cast<float>((1 << traits_of(recipe.format).code_bits) - 1);
    const f32 max_code(top);
    if (recipe.hadamard != 0)
        rotate_lanes(x, n, recipe.hadamard);
    f32 lo = f32::load_aligned(x) + f32(0.0f), hi = lo;
    for (std::size_t c = 0; c < n; ++c) {
        const f32 v = f32::load_aligned(x + c * lanes) + f32(0.0f);
        lo = xs::min(v, lo);
        hi = xs::max(v, hi);
    }
    const f32 low = Compact ? xs::min(lo, f32(0.0f)) : lo, high = Compact ? xs::max(hi, f32(0.0f)) : hi;
    lane_levels l;
    round_levels<Compact>(quotient_of(high - low, max_code), l);
    store_levels<Compact>(low, max_code, l);
    for (std::size_t i = 0; i < count; ++i)
        if (!l.fits[i])
            return i;
    if (recipe.fit) {
        lane_levels refined;
        refine<Compact>(x, n, lo, hi, top, refined);
        const auto better = errors_of(x, n, refined, max_code) < errors_of(x, n, l, max_code);
        const std::uint64_t taken = better.mask();
        alignas(64) float scales[lanes], bases[lanes], fitted_scales[lanes], fitted_bases[lanes];
        l.scale.store_aligned(scales);
        l.base.store_aligned(bases);
        refined.scale.store_aligned(fitted_scales);
        refined.base.store_aligned(fitted_bases);
        for (std::size_t i = 0; i < lanes; ++i)
            if ((taken >> i & 1u) != 0 && refined.fits[i]) {
                scales[i] = fitted_scales[i];
                bases[i] = fitted_bases[i];
                l.scale_bits[i] = refined.scale_bits[i];
                l.minimum_bits[i] = refined.minimum_bits[i];
            }
        l.scale = f32::load_aligned(scales);
        l.base = f32::load_aligned(bases);
    }
    bool alike = true;
    for (std::size_t i = 1; i < count; ++i)
        alike = alike && rows[i].feedback == rows[0].feedback;
    if (alike && (count > 1 || rows[0].feedback == nullptr)) {
        choose_codes(x, n, l, max_code, rows[0].feedback, wanted, lane_codes);
    } else {
        alignas(64) float scales[lanes], bases[lanes];
        l.scale.store_aligned(scales);
        l.base.store_aligned(bases);
        choose_codes(x, n, l, max_code, nullptr, wanted, lane_codes);
        for (std::size_t i = 0; i < count; ++i)
            if (rows[i].feedback != nullptr)
                choose_codes_of_lane(x, n, i, scales[i], bases[i], max_code, rows[i].feedback, wanted, lane_codes);
    }
    for (std::size_t i = 0; i < count; ++i)
        metadata[i] = {l.scale_bits[i], l.minimum_bits[i]};
    return count;
}

inline encode_result encode_rows(const encode_recipe& recipe, const encode_row* rows, std::size_t count,
                                 std::uint8_t* codes, std::size_t stride, row_metadata* metadata,
                                 std::size_t& failed) noexcept {
    const std::size_t n = recipe.channels;
    for (failed = 0; failed < count; ++failed) {
        const value_range range = range_of(rows[failed].x, n);
        if (!range.finite)
            return refuse_non_finite(rows[failed].x, n);
        if (range.low < -largest_half || range.high > largest_half || n > lane_scratch_channels) {
            const encode_result r = encode_reference(recipe, rows[failed], codes + failed * stride);
            if (r.code != errc::ok)
                return r;
            metadata[failed] = r.metadata;
        }
    }
    if (n > lane_scratch_channels)
        return {};
    alignas(64) float x[lane_scratch_channels * lanes];
    alignas(64) float wanted[lane_scratch_channels * lanes];
    alignas(64) std::uint8_t lane_codes[lane_scratch_channels * lanes];
    const bool compact_format = traits_of(recipe.format).metadata == metadata_kind::compact;
    for (std::size_t first = 0; first < count; first += lanes) {
        const std::size_t some = count - first < lanes ? count - first : lanes;
        for (std::size_t i = 0; i < lanes; ++i) {
            if (i >= some) {
                for (std::size_t c = 0; c < n; ++c)
                    x[c * lanes + i] = 0.0f;
                continue;
            }
            const encode_row& row = rows[first + i];
            if (row.mean == nullptr)
                for (std::size_t c = 0; c < n; ++c)
                    x[c * lanes + i] = row.x[c];
            else
                for (std::size_t c = 0; c < n; ++c)
                    x[c * lanes + i] = row.x[c] - row.mean[c];
        }
        const std::size_t done = compact_format
                                     ? encode_lanes<true>(recipe, rows + first, some, x, wanted, lane_codes, metadata + first)
                                     : encode_lanes<false>(recipe, rows + first, some, x, wanted, lane_codes, metadata + first);
        if (done != some) {
            failed = first + done;
            return {errc::not_representable, rule_fp16_metadata, no_channel, {}};
        }
        for (std::size_t i = 0; i < some; ++i)
            for (std::size_t c = 0; c < n; ++c)
                codes[(first + i) * stride + c] = lane_codes[c * lanes + i];
    }
    return {};
}

#include <kv1/detail/precise_math_end.inl>
