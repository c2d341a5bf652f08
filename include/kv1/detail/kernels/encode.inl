// SPDX-License-Identifier: Apache-2.0
//
// Encodes up to 16 vectors at once, bit for bit as detail/encode_reference.hpp defines. Parsed once per target.
//
// A lane is a vector, and a register is one channel of `lanes` vectors. Every lane does what the definition does, in
// the same order, and nothing is summed across lanes. Vectors are transposed first, codes are transposed at the end.
//
// Operations per channel of `lanes` vectors: log2(lanes) shuffles, log2(width) + 1 for the rotation, 4 for the range,
// 3 rounds of 11 for least squares, 8 for the errors of each candidate, 6 for codes. At 32 channels that is about 70,
// or 4 a value on 16 lanes. weigh.inl has what error weights add.
//
// One function serves all evenly spaced levels, two others the codebooks. What they call is inlined, except for the
// functions of error weights (weigh.inl). Otherwise a function whose only floats are batches would take over the flags
// of the translation unit from xsimd's functions (quantize.inl). tests/flags tests all of them.

#include <kv1/detail/precise_math_begin.inl>

// a * b, rounded; see product_of() of floats.
KV1_LAZY KV1_INLINE f32 product_of(f32 a, f32 b) {
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

// The bits of numbers. On NEON g++ calls xsimd's cast, and spills registers around the call.
KV1_LAZY KV1_INLINE u32 bits_of(f32 x) {
#if defined(__GNUC__) && defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_FEATURE_SVE)
    return u32(vreinterpretq_u32_f32(f32::register_type(x)));
#else
    return xs::bitwise_cast<std::uint32_t>(x);
#endif
}

KV1_LAZY KV1_INLINE f32 nearest_code(f32 steps, f32 max_code) {
    return nearest(xs::min(xs::max(steps, f32(0.0f)), max_code));
}

// The levels of each lane, as they are read back from their metadata.
using lane_mask = xs::batch_bool<float, arch>;
struct lane_levels {
    f32 scale, base;
    u32 scale_bits, minimum_bits;
    lane_mask fits;
};

// How a format stores levels: its level_format at run time.
template <code_levels Codebook>
struct lane_format {
    f32 max_code;
    float top; // level
    bool compact;
    // the share of the range over which levels that are fitted begin
    static constexpr float fit_start =
        Codebook == code_levels::codebook4 ? detail::fit_start<codebook4> : detail::fit_start<codebook2>;
};

// code_rule of a format: nearest codes, and levels of codes.
template <code_levels Codebook>
struct lane_rule {
    f32 inverse, base, max_code;

    KV1_INLINE lane_rule(f32 scale, f32 level_base, const lane_format<Codebook>& format)
        : inverse(scale), base(level_base), max_code(format.max_code) {
        if constexpr (Codebook == code_levels::codebook2) {
            inverse = product_of(scale, f32(codebook_step));
            base = sum_of(level_base, product_of(scale, f32(codebook_lead)));
        } else if constexpr (Codebook == code_levels::codebook4) {
            inverse = product_of(scale, f32(codebook4_step));
            base = sum_of(level_base, product_of(scale, f32(codebook4_lead)));
        }
        inverse = quotient_of(f32(1.0f), inverse);
    }
    KV1_INLINE f32 code(f32 x) const { return nearest_code(steps(x), max_code); }
    // What is rounded to a code.
    KV1_INLINE f32 steps(f32 x) const {
        const f32 u = difference_of(x, base) * inverse;
        if constexpr (Codebook == code_levels::codebook4) {
            const f32 sloping = product_of(u, f32(codebook4_slope));
            return xs::min(xs::max(u, sum_of(sloping, f32(codebook4_low))),
                           sum_of(sloping, f32(codebook4_high)));
        }
        return u;
    }
    KV1_INLINE static f32 level(f32 code) {
        if constexpr (Codebook == code_levels::codebook2) {
            code = code * f32(5.0f) - xs::select(code >= f32(2.0f), f32(1.0f), f32(0.0f)); // small integers
        } else if constexpr (Codebook == code_levels::codebook4) {
            const f32 four = code * f32(4.0f), two = four * f32(0.5f) + f32(3.0f); // small integers
            code = xs::max(xs::min(two, four), four - f32(24.0f));
        }
        return code;
    }
};

KV1_LAZY KV1_INLINE u32 half_bits(f32 x) {
    alignas(64) std::uint16_t bits[lanes];
    store_half(x, bits);
    return load_u16(bits);
}
KV1_LAZY KV1_INLINE lane_mask is_finite_half(u32 bits) {
    return xs::batch_bool_cast<float>((bits & u32(0x7c00u)) != u32(0x7c00u));
}

template <code_levels Codebook>
KV1_INLINE void round_scale(f32 scale, const lane_format<Codebook>& format, lane_levels& l) {
    u32 bits = half_bits(xs::max(scale, f32(smallest_scale)));
    if (format.compact) {
        bits = (bits + u32(0x20u)) & u32(compact_word::scale_mask);
        bits = xs::max(bits, u32(compact_word::smallest_scale));
    }
    l.scale_bits = bits;
    l.scale = half_to_float(bits);
    l.fits = is_finite_half(bits);
}

template <code_levels Codebook>
KV1_INLINE void store_levels(f32 base, const lane_format<Codebook>& format, lane_levels& l) {
    if (format.compact) {
        const f32 steps = product_of(quotient_of(base, l.scale * f32(format.top)), f32(128.0f)) + f32(64.0f);
        const f32 w = nearest(xs::min(xs::max(steps, f32(-63.0f)), f32(63.0f)));
        const u32 magnitude = xs::bitwise_cast<std::uint32_t>(xs::to_int(xs::abs(w)));
        const u32 sign = xs::select(xs::batch_bool_cast<std::uint32_t>(w < f32(0.0f)), u32(0x8000u), u32(0u));
        l.scale_bits = l.scale_bits | magnitude | sign;
        l.minimum_bits = u32(0u);
        l.base = l.scale * (f32(format.top) * (w - f32(64.0f)) * f32(1.0f / 128.0f));
    } else {
        const u32 bits = half_bits(base);
        l.minimum_bits = xs::select(bits == u32(0x8000u), u32(0u), bits); // plain_zero()
        l.base = half_to_float(l.minimum_bits);
        l.fits = l.fits & is_finite_half(bits);
    }
}

// Computes the squared errors of two choices of levels. x is [n][lanes].
template <code_levels Codebook>
KV1_INLINE void errors_of(const float* x, std::size_t n, const lane_levels (&l)[2],
                          const lane_format<Codebook>& format, f32 (&error)[2]) {
    const lane_rule<Codebook> rule[2] = {{l[0].scale, l[0].base, format}, {l[1].scale, l[1].base, format}};
    f32 sum[2] = {f32(0.0f), f32(0.0f)}; // not `error`, which lies in memory
    for (std::size_t c = 0; c < n; ++c) {
        const f32 v = f32::load_aligned(x + c * lanes);
        KV1_UNROLL for (std::size_t k = 0; k < 2; ++k) {
            const f32 level = rule[k].level(rule[k].code(v));
            const f32 e = difference_of(v, sum_of(level * l[k].scale, l[k].base));
            sum[k] = sum_of(sum[k], product_of(e, e));
        }
    }
    error[0] = sum[0];
    error[1] = sum[1];
}

// refine_levels() of least_squares.hpp. The sum of x is the same in every round, and is given.
template <code_levels Codebook>
KV1_INLINE void refine(const float* x, std::size_t n, f32 lo, f32 hi, const lane_format<Codebook>& format,
                       lane_levels& l) {
    const float top = format.top;
    const f32 count(static_cast<float>(n));
    const f32 middle = f32(0.5f) * lo + f32(0.5f) * hi;
    f32 scale = xs::max(product_of(hi - lo, f32(format.fit_start / top)), f32(smallest_scale));
    f32 base = product_of(scale, f32(-0.5f * top));
    f32 sum_c(0.0f), sum_x(0.0f);
    for (std::size_t c = 0; c < n; ++c)
        sum_x = sum_of(sum_x, difference_of(f32::load_aligned(x + c * lanes), middle));
    for (int round = 0; round < fit_rounds; ++round) {
        const lane_rule<Codebook> rule(scale, base, format);
        f32 sum_cc(0.0f), sum_xc(0.0f);
        sum_c = f32(0.0f);
        for (std::size_t c = 0; c < n; ++c) {
            const f32 v = difference_of(f32::load_aligned(x + c * lanes), middle);
            const f32 level = rule.level(rule.code(v));
            sum_c = sum_of(sum_c, level);
            sum_cc = xs::fma(level, level, sum_cc); // of integers below 2^24: exact
            sum_xc = sum_of(sum_xc, product_of(v, level));
        }
        const f32 variance = product_of(count, sum_cc) - product_of(sum_c, sum_c);
        const f32 covariance = product_of(count, sum_xc) - product_of(sum_x, sum_c);
        const auto varies = variance > f32(0.0f);
        const f32 divisor = xs::select(varies, variance, f32(1.0f));
        scale = xs::select(varies, xs::max(quotient_of(covariance, divisor), f32(smallest_scale)), scale);
        base = quotient_of(sum_x - product_of(scale, sum_c), count);
    }
    round_scale(scale, format, l);
    base = quotient_of(sum_x - product_of(l.scale, sum_c), count);
    store_levels(base + middle, format, l);
}

// clipped_levels() of clip_search.hpp.
template <code_levels Codebook>
KV1_INLINE void clip(f32 lo, f32 hi, float share, const lane_format<Codebook>& format, lane_levels& l) {
    const f32 middle = f32(0.5f) * lo + f32(0.5f) * hi;
    round_scale(quotient_of(product_of(hi - lo, f32(share)), f32(format.top)), format, l);
    store_levels(middle - product_of(l.scale, f32(0.5f * format.top)), format, l);
}

KV1_LAZY KV1_INLINE void take(lane_mask where, const lane_levels& from, lane_levels& l) {
    const auto where_bits = xs::batch_bool_cast<std::uint32_t>(where);
    l.scale = xs::select(where, from.scale, l.scale);
    l.base = xs::select(where, from.base, l.base);
    l.scale_bits = xs::select(where_bits, from.scale_bits, l.scale_bits);
    l.minimum_bits = xs::select(where_bits, from.minimum_bits, l.minimum_bits);
}

// Computes codes and packs those of four channels into a word: words [channels / 4, rounded up][lanes].
KV1_LAZY KV1_INLINE u32 add_code(u32 word, f32 code) {
    return (word << 8) | xs::bitwise_cast<std::uint32_t>(xs::to_int(code));
}

template <code_levels Codebook>
KV1_INLINE void nearest_words(const float* x, std::size_t n, const lane_levels& l,
                              const lane_format<Codebook>& format, std::uint32_t* words) {
    const lane_rule<Codebook> rule(l.scale, l.base, format);
    for (std::size_t end = n; end > 0;) {
        const std::size_t first = (end - 1) / 4 * 4;
        u32 word(0u);
        while (end > first) {
            const f32 v = f32::load_aligned(x + --end * lanes);
            word = add_code(word, rule.code(v));
        }
        word.store_aligned(words + first / 4 * lanes);
    }
}

// Candidate k > 0 of weighted_levels() of encode_reference.hpp, from levels whose middle is given.
template <code_levels Codebook>
KV1_INLINE void weighted_candidate(int k, const lane_levels& from, f32 middle,
                                   const lane_format<Codebook>& format, lane_levels& l) {
    const f32 step = product_of(from.scale, quotient_of(f32(format.top), format.max_code));
    const bool moves = k >= scales_tried;
    round_scale(moves ? from.scale : product_of(from.scale, f32(weighted_scales[k])), format, l);
    const f32 base = moves ? sum_of(from.base, product_of(step, f32(weighted_moves[k - scales_tried])))
                           : difference_of(middle, product_of(l.scale, f32(0.5f * format.top)));
    store_levels(base, format, l);
}

// Rotates vectors, x is [n][lanes]. Two steps of the transform are done at a time if two are left; the last one
// multiplies by the norm.
KV1_LAZY KV1_INLINE void rotate_lanes(float* x, std::size_t n, std::size_t width) {
    const f32 norm(hadamard_norm(width));
    if (width == 1) // the identity
        return;
    std::size_t half = 1;
    for (; 4 * half <= width; half *= 4) {
        const bool last = 4 * half == width;
        for (std::size_t at = 0; at < n; at += 4 * half)
            for (std::size_t i = at; i < at + half; ++i) {
                float *p0 = x + i * lanes, *p1 = p0 + half * lanes, *p2 = p1 + half * lanes,
                      *p3 = p2 + half * lanes;
                const f32 a = f32::load_aligned(p0), b = f32::load_aligned(p1), c = f32::load_aligned(p2),
                          d = f32::load_aligned(p3);
                const f32 ab = a + b, ba = a - b, cd = c + d, dc = c - d;
                f32 y0 = sum_of(ab, cd), y1 = sum_of(ba, dc), y2 = difference_of(ab, cd),
                    y3 = difference_of(ba, dc);
                if (last) {
                    y0 = product_of(y0, norm);
                    y1 = product_of(y1, norm);
                    y2 = product_of(y2, norm);
                    y3 = product_of(y3, norm);
                }
                y0.store_aligned(p0);
                y1.store_aligned(p1);
                y2.store_aligned(p2);
                y3.store_aligned(p3);
            }
    }
    if (half < width)
        for (std::size_t at = 0; at < n; at += 2 * half)
            for (std::size_t i = at; i < at + half; ++i) {
                const f32 a = f32::load_aligned(x + i * lanes), b = f32::load_aligned(x + (i + half) * lanes);
                product_of(a + b, norm).store_aligned(x + i * lanes);
                product_of(a - b, norm).store_aligned(x + (i + half) * lanes);
            }
}

// Rotates one vector whose channels lie side by side.
KV1_LAZY inline void rotate(float* x, std::size_t n, std::size_t width) noexcept {
    for (std::size_t half = 1; half < width; half *= 2)
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
    const float norm = hadamard_norm(width);
    for (std::size_t i = 0; i < n; ++i)
        x[i] *= norm;
}

// Takes the means off vectors and transposes them. Lanes without a vector get zeros. False: a value is beyond fp16, or
// not finite.
KV1_LAZY KV1_INLINE bool load_vectors(const vector_to_encode* rows, std::size_t count, std::size_t n,
                                      float* x) {
    i32 largest(0); // magnitude bits, NaN above infinity
    for (std::size_t c = 0; c < n; c += lanes) {
        const bool whole = c + lanes <= n;
        f32 square[lanes];
        KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i) {
            square[i] = f32(0.0f);
            if (i >= count)
                continue;
            const vector_to_encode& row = rows[i];
            square[i] = whole ? f32::load_unaligned(row.x + c) : load_tail(row.x, n, c);
            largest = xs::max(largest, xs::bitwise_cast<std::int32_t>(square[i]) & i32(0x7fffffff));
            if (row.mean != nullptr)
                square[i] =
                    square[i] - (whole ? f32::load_unaligned(row.mean + c) : load_tail(row.mean, n, c));
        }
        transpose(square);
        for (std::size_t i = 0; i < lanes && c + i < n; ++i)
            square[i].store_aligned(x + (c + i) * lanes);
    }
    return xs::reduce_max(largest) <= std::bit_cast<std::int32_t>(largest_half);
}

// weighted_levels() of encode_reference.hpp: levels and codes of least cost, from levels that fit best. For vectors
// with one group of channels, whose smallest and largest numbers are lo and hi. A target's own, since they are made of
// dot products (weigh.inl).
template <code_levels Codebook>
using weigh_function = void(const lane_format<Codebook>& format, const vector_to_encode* rows,
                            std::size_t count, std::size_t n, const f32& lo, const f32& hi,
                            const encode_scratch& scratch, lane_levels& best) noexcept;
struct weigh_functions {
    weigh_function<code_levels::even>* even;
    weigh_function<code_levels::codebook2>* codebook2;
    weigh_function<code_levels::codebook4>* codebook4;
};

// Encodes one group of channels of up to `lanes` vectors into words. False: metadata do not fit.
template <code_levels Codebook>
bool encode_group(const encoding_params& params, const vector_to_encode* rows, std::size_t count,
                  const float* x, std::uint32_t* words, const encode_scratch& scratch, row_metadata* metadata,
                  weigh_function<Codebook>* weigh) noexcept {
    const std::size_t n = params.group;
    const format_traits traits = traits_of(params.format);
    const lane_format<Codebook> format{f32(static_cast<float>((1 << traits.code_bits) - 1)),
                                       static_cast<float>(traits.top_level()),
                                       traits.metadata == metadata_kind::compact};
    f32 lo = f32::load_aligned(x) + f32(0.0f), hi = lo;
    for (std::size_t c = 0; c < n; ++c) {
        const f32 v = f32::load_aligned(x + c * lanes) + f32(0.0f);
        lo = xs::min(v, lo);
        hi = xs::max(v, hi);
    }
    const f32 low = format.compact ? xs::min(lo, f32(0.0f)) : lo,
              high = format.compact ? xs::max(hi, f32(0.0f)) : hi;
    lane_levels l;
    round_scale(quotient_of(high - low, f32(format.top)), format, l);
    store_levels(low, format, l);
    if (!xs::all(l.fits)) // lanes without a vector hold zeros, which fit
        return false;
    f32 best_error(std::numeric_limits<float>::max());
    const int candidates = params.levels == level_choice::min_max         ? 0
                           : params.levels == level_choice::least_squares ? 2
                                                                          : clip_candidates;
    const lane_levels range = l;
    for (int k = 0; k < candidates; k += 2) { // candidate 0 is the whole range
        lane_levels pair[2] = {range, range};
        if (params.levels == level_choice::least_squares)
            refine(x, n, lo, hi, format, pair[1]);
        else
            for (int i = k == 0 ? 1 : 0; i < 2; ++i)
                clip(lo, hi, clip_share(k + i), format, pair[i]);
        f32 errors[2];
        errors_of(x, n, pair, format, errors);
        for (int i = 0; i < 2; ++i) {
            const lane_mask better = (errors[i] < best_error) & pair[i].fits;
            take(better, pair[i], l);
            best_error = xs::select(better, errors[i], best_error);
        }
    }
    std::size_t weighted = 0;
    for (std::size_t i = 0; i < count; ++i)
        weighted += rows[i].feedback != nullptr ? 1 : 0;
    if (weighted < count)
        nearest_words(x, n, l, format, words);
    if (weighted != 0)
        weigh(format, rows, count, n, lo, hi, scratch, l);
    alignas(64) std::uint32_t scale_bits[lanes], minimum_bits[lanes];
    l.scale_bits.store_aligned(scale_bits);
    l.minimum_bits.store_aligned(minimum_bits);
    const std::size_t groups = params.groups();
    for (std::size_t i = 0; i < count; ++i)
        metadata[i * groups] = {static_cast<std::uint16_t>(scale_bits[i]),
                                static_cast<std::uint16_t>(minimum_bits[i])};
    return true;
}

// Encodes up to `lanes` vectors into scratch.words. False: metadata do not fit.
KV1_LAZY inline bool encode_lanes(const encoding_params& params, const vector_to_encode* rows,
                                  std::size_t count, const encode_scratch& scratch, row_metadata* metadata,
                                  const weigh_functions& weigh) noexcept {
    if (params.hadamard != 0)
        rotate_lanes(scratch.x, params.channels, params.hadamard);
    for (std::size_t g = 0; g < params.groups(); ++g) {
        const std::size_t first = g * params.group;
        const float* x = scratch.x + first * lanes;
        std::uint32_t* words = scratch.words + first / 4 * lanes;
        const auto encode = [&]<code_levels Codebook>(weigh_function<Codebook>* weigh_group) noexcept {
            return encode_group<Codebook>(params, rows, count, x, words, scratch, metadata + g, weigh_group);
        };
        bool fits = false;
        switch (traits_of(params.format).levels) {
        case code_levels::even:
            fits = encode(weigh.even);
            break;
        case code_levels::codebook2:
            fits = encode(weigh.codebook2);
            break;
        case code_levels::codebook4:
            fits = encode(weigh.codebook4);
            break;
        }
        if (!fits)
            return false;
    }
    return true;
}

// Moves codes of `count` vectors from words [Words][lanes] to their places, 4 * Words bytes each.
template <std::size_t Words>
KV1_INLINE void store_square(const std::uint32_t* words, std::size_t count, std::uint8_t* codes,
                             std::size_t stride) {
    f32 square[lanes]; // no arithmetic, so any bits will do
    KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i) {
        square[i] = i < Words ? xs::bitwise_cast<float>(u32::load_aligned(words + i * lanes)) : f32(0.0f);
    }
    transpose(square);
    KV1_UNROLL for (std::size_t i = 0; i < lanes; ++i) {
        const f32::register_type row = square[i];
        if (i < count)
            std::memcpy(codes + i * stride, &row, 4 * Words);
    }
}

// Moves codes of `count` vectors of n channels from words to their places. It is not inlined, since without optimization
// its registers would take up stack while levels are chosen.
KV1_LAZY KV1_NOINLINE void store_codes(const std::uint32_t* words, std::size_t n, std::size_t count,
                                       std::uint8_t* codes, std::size_t stride) {
    std::size_t c = 0;
    for (; c + 4 * lanes <= n; c += 4 * lanes)
        store_square<lanes>(words + c / 4 * lanes, count, codes + c, stride);
    if (c + 2 * lanes <= n) {
        store_square<lanes / 2>(words + c / 4 * lanes, count, codes + c, stride);
        c += 2 * lanes;
    }
    for (; c < n; c += 4)
        for (std::size_t i = 0; i < count; ++i)
            std::memcpy(codes + i * stride + c, &words[c / 4 * lanes + i], n - c < 4 ? n - c : 4);
}

// Encodes vectors one by one, by the definition: vectors that are too long for scratch, and batches in which one
// vector is refused.
KV1_LAZY inline encode_result encode_one_by_one(const encoding_params& params, const vector_to_encode* rows,
                                                std::size_t count, std::uint8_t* codes, std::size_t stride,
                                                row_metadata* metadata, std::size_t& failed) noexcept {
    for (failed = 0; failed < count; ++failed) {
        const encode_result r = encode_reference(params, rows[failed], codes + failed * stride,
                                                 metadata + failed * params.groups());
        if (r.code != errc::ok)
            return r;
    }
    return {};
}

KV1_LAZY inline encode_result encode_vectors_by(const weigh_functions& weigh, const encoding_params& params,
                                                const vector_to_encode* rows, std::size_t count,
                                                std::uint8_t* codes, std::size_t stride,
                                                row_metadata* metadata, std::size_t& failed,
                                                const encode_scratch& scratch) noexcept {
    const std::size_t n = params.channels;
    if (n > scratch.channels)
        return encode_one_by_one(params, rows, count, codes, stride, metadata, failed);
    for (std::size_t first = 0; first < count; first += lanes) {
        const std::size_t some = count - first < lanes ? count - first : lanes;
        if (!load_vectors(rows + first, some, n, scratch.x) ||
            !encode_lanes(params, rows + first, some, scratch, metadata + first * params.groups(), weigh))
            return encode_one_by_one(params, rows, count, codes, stride, metadata, failed);
        store_codes(scratch.words, n, some, codes + first * stride, stride);
    }
    return {};
}

KV1_LAZY inline void add_multiples(float* y, std::size_t stride, const float* factors, std::size_t rows,
                                   const float* x, std::size_t n) noexcept {
    for (std::size_t r = 0; r < rows; ++r, y += stride) {
        const f32 factor(factors[r]);
        for (std::size_t i = 0; i < n; i += lanes)
            sum_of(f32::load_unaligned(y + i), product_of(factor, f32::load_unaligned(x + i)))
                .store_unaligned(y + i);
    }
}

#include <kv1/detail/precise_math_end.inl>
