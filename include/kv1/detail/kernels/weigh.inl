// SPDX-License-Identifier: Apache-2.0
//
// Levels and codes under error weights, bit for bit as detail/encode_reference.hpp defines: the part of encode.inl that
// is made of dot products. Parsed once per target.
//
// A lane is a vector, where vectors share their weights: several tokens of a KV head. Otherwise, as for one token of
// several heads, a lane is a choice of levels for one vector.
//
// Operations per channel of `lanes` vectors of n channels: n / 4 dot products for what all choices of levels share, and
// for each of twelve choices n / 8 dot products and 17 others.

#include <kv1/detail/precise_math_begin.inl>

// Choices of levels that are tried together: for each of several vectors, and for one vector, where a lane is a choice.
inline constexpr std::size_t tried_in_lanes = lanes < scales_tried ? weighted_together : scales_tried;
static_assert(tried_in_lanes >= weighted_together && scales_tried % weighted_together == 0);
struct level_trial {
    lane_levels levels[tried_in_lanes];
    f32 costs[weighted_together]; // of several vectors
};

// Members, so that a target's functions are found before those of the target whose namespace it uses.
template <class = void>
struct weighted_codes {
    // Four factors of a row of feedback, for channels i to i + 3.
    KV1_INLINE static dot_row four_factors(const error_feedback& feedback, std::size_t j, std::size_t i) {
        std::int32_t four;
        std::memcpy(&four, feedback.factors + j * feedback.stride + i, 4);
        return dot_broadcast<false>(four);
    }

    // common_wanted() of encode_reference.hpp for each lane. x is [n][lanes], and so is wanted. words: room for twice
    // [channels / 4][lanes], of the high and the low bytes of steps.
    KV1_NOINLINE static void common_wanted(const float* x, std::size_t n, f32 lo, f32 hi,
                                           const error_feedback& feedback, float* wanted,
                                           std::uint32_t* words) {
        const std::size_t word_count = round_up(n, 4) / 4;
        std::uint32_t *const high_bytes = words, *const low_bytes = words + word_count * lanes;
        const f32 unit =
            xs::max(quotient_of(difference_of(hi, lo), f32(range_steps)), f32(smallest_range_step));
        const f32 inverse = quotient_of(f32(1.0f), unit);
        for (std::size_t w = 0; w < word_count; ++w) {
            u32 high(0u), low(0u);
            for (std::size_t k = 4; k-- > 0;) {
                const std::size_t i = 4 * w + k;
                high = high << 8;
                low = low << 8;
                if (i >= n)
                    continue;
                const f32 steps = nearest_code(difference_of(f32::load_aligned(x + i * lanes), lo) * inverse,
                                               f32(range_steps));
                const u32 whole = xs::bitwise_cast<std::uint32_t>(xs::to_int(steps));
                high = high | (whole >> 8);
                low = low | (whole & u32(255u));
            }
            high.store_aligned(high_bytes + w * lanes);
            low.store_aligned(low_bytes + w * lanes);
        }
        constexpr std::size_t at_once = many_registers ? 8 : 4; // rows, of two sums each
        for (std::size_t first = 0; first < n; first += at_once) {
            dot_sum high[at_once], low[at_once];
            KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) { high[k] = low[k] = dot_start(); }
            const std::size_t rows = n - first < at_once ? n - first : at_once;
            for (std::size_t w = first / 4; w < word_count; ++w) {
                const u32 h = u32::load_aligned(high_bytes + w * lanes),
                          l = u32::load_aligned(low_bytes + w * lanes);
                KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) {
                    const dot_row factors = four_factors(feedback, first + (k < rows ? k : 0), 4 * w);
                    high[k] = dot_add<255, false>(high[k], h, factors);
                    low[k] = dot_add<255, false>(low[k], l, factors);
                }
            }
            KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) {
                const std::size_t j = first + k;
                if (j >= n)
                    continue;
                const f32 sum =
                    sum_of(f32(256.0f) * xs::to_float(dot_finish<255, false>(high[k])), // an exact product
                           xs::to_float(dot_finish<255, false>(low[k])));
                sum_of(difference_of(f32::load_aligned(x + j * lanes), lo),
                       product_of(f32(feedback.units[j]), product_of(unit, sum)))
                    .store_aligned(wanted + j * lanes);
            }
        }
    }

    // Codes as the levels that they stand for.
    template <code_levels Codebook>
    KV1_INLINE static u32 levels_of_codes(u32 codes) {
        return Codebook == code_levels::even ? codes : levels_of<Codebook>(codes);
    }

    // sum + the dot product of four levels and factors.
    template <int Top>
    KV1_INLINE static i32 add_dot(i32 sum, u32 four_levels, dot_row factors) {
        if constexpr (dot_sums_are_totals)
            return dot_add<Top, false>(sum, four_levels, factors);
        else
            return sum + dot_finish<Top, false>(dot_add<Top, false>(dot_start(), four_levels, factors));
    }

    // total[k][c] = the dot product of row first + k of the factors and the levels of choice c, over some words, for R
    // rows. All four rows exist where there are words behind theirs.
    template <code_levels Codebook, int Top, std::size_t From, std::size_t R, std::size_t K>
    KV1_INLINE static void add_rows(const error_feedback& feedback, std::size_t first,
                                    const std::uint32_t* words, std::size_t begin, std::size_t end,
                                    i32 (&total)[4][K]) {
        dot_sum sum[R][K];
        KV1_UNROLL for (std::size_t k = 0; k < R; ++k) KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
            sum[k][c] = dot_start();
        }
        for (std::size_t w = end; w-- > begin;) { // the newest codes last, which may not be there yet
            u32 its_levels[K];
            KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                its_levels[c] = levels_of_codes<Codebook>(u32::load_aligned(words + (w * K + c) * lanes));
            }
            KV1_UNROLL for (std::size_t k = 0; k < R; ++k) {
                const dot_row factors = four_factors(feedback, first + From + k, 4 * w);
                KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                    sum[k][c] = dot_add<Top, false>(sum[k][c], its_levels[c], factors);
                }
            }
        }
        KV1_UNROLL for (std::size_t k = 0; k < R; ++k) KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
            total[From + k][c] = dot_finish<Top, false>(sum[k][c]);
        }
    }
    template <code_levels Codebook, int Top, std::size_t K>
    KV1_INLINE static void add_words(const error_feedback& feedback, std::size_t first,
                                     const std::uint32_t* words, std::size_t begin, std::size_t end,
                                     i32 (&total)[4][K]) {
        if constexpr (many_registers || K == 1) { // for the sums of all rows
            add_rows<Codebook, Top, 0, 4>(feedback, first, words, begin, end, total);
        } else {
            add_rows<Codebook, Top, 0, 2>(feedback, first, words, begin, end, total);
            add_rows<Codebook, Top, 2, 2>(feedback, first, words, begin, end, total);
        }
    }

    // codes_with_feedback() of encode_reference.hpp for each lane, with K choices of levels. Channels are taken four at a
    // time: first the sums over all later channels, then the four codes, which need each other. A code of one choice is
    // made while those of the others wait for theirs, so several choices pay even where registers are few. words is
    // [channels / 4][K][lanes]. Top: no level is larger.
    template <code_levels Codebook, int Top, std::size_t K>
    KV1_NOINLINE static void codes_with_feedback(std::size_t n, const lane_levels* levels,
                                                 const lane_format<Codebook>& format,
                                                 const error_feedback& feedback, f32 lo, const float* wanted,
                                                 std::uint32_t* words, f32* cost) {
        const std::size_t word_count = round_up(n, 4) / 4;
        const lane_rule<Codebook> rule(f32(1.0f), f32(0.0f), format);
        const f32 zero(0x1p23f), top = zero + format.max_code; // codes at 2^23
        f32 inverse[K], shift[K], sum_of_costs[K];
        KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
            inverse[c] = quotient_of(f32(1.0f), levels[c].scale);
            shift[c] = product_of(difference_of(levels[c].base, lo), inverse[c]);
            sum_of_costs[c] = f32(0.0f);
        }
        for (std::size_t at = word_count; at-- > 0;) {
            const std::size_t first = 4 * at, rows = n - first < 4 ? n - first : 4;
            i32 total[4][K];
            if constexpr (dot_sums_are_totals) {
                add_words<Codebook, Top, K>(feedback, first, words, at + 1, word_count, total);
            } else {
                constexpr std::size_t fit = dot_limit<Top, false>;
                KV1_UNROLL for (std::size_t k = 0; k < 4; ++k)
                    KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                    total[k][c] = i32(0);
                }
                for (std::size_t w = at + 1, end = 0; w < word_count; w = end) {
                    i32 some[4][K];
                    end = word_count - w < fit ? word_count : w + fit;
                    add_words<Codebook, Top, K>(feedback, first, words, w, end, some);
                    KV1_UNROLL for (std::size_t k = 0; k < 4; ++k)
                        KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                        total[k][c] = total[k][c] + some[k][c];
                    }
                }
            }
            u32 word[K];
            KV1_UNROLL for (std::size_t c = 0; c < K; ++c) { word[c] = u32(0u); }
            KV1_UNROLL for (std::size_t left = 0; left < 4; ++left) {
                const std::size_t k = 3 - left, j = first + k;
                if (k >= rows)
                    continue;
                const dot_row factors = four_factors(feedback, j, first);
                const f32 own = f32::load_aligned(wanted + j * lanes), sums(feedback.sums[j]),
                          unit(feedback.units[j]), its_cost(feedback.costs[j]);
                KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                    i32 sum = total[k][c];
                    if (k < 3)
                        sum = add_dot<Top>(sum, levels_of_codes<Codebook>(word[c]), factors);
                    const f32 both = difference_of(product_of(own, inverse[c]), product_of(sums, shift[c]));
                    const f32 v = difference_of(both, product_of(unit, xs::to_float(sum)));
                    // Floats at 2^23 are whole numbers, so to add 2^23 rounds as nearbyint() does, and leaves the
                    // code in the low bits. Conversions to integers and back would take longer.
                    const f32 steps = Codebook == code_levels::even ? v : rule.steps(v);
                    const f32 rounded = xs::min(xs::max(sum_of(steps, zero), zero), top);
                    const f32 code = difference_of(rounded, zero);
                    const u32 bits = bits_of(rounded);
                    word[c] = word[c] | (k == 0 ? bits & u32(255u) : bits << (8 * static_cast<int>(k)));
                    const f32 rest = difference_of(v, rule.level(code));
                    sum_of_costs[c] = sum_of(sum_of_costs[c], product_of(product_of(its_cost, rest), rest));
                }
            }
            KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
                word[c].store_aligned(words + (at * K + c) * lanes);
            }
        }
        KV1_UNROLL for (std::size_t c = 0; c < K; ++c) {
            cost[c] = product_of(sum_of_costs[c], product_of(levels[c].scale, levels[c].scale));
        }
    }

    // common_wanted() of one lane, in all lanes. Returns its lo.
    KV1_INLINE static f32 wanted_of_lane(std::size_t lane, std::size_t n, f32 lo, f32 hi,
                                         const error_feedback& feedback, const encode_scratch& scratch) {
        alignas(64) float one[lanes];
        common_wanted(scratch.x, n, lo, hi, feedback, scratch.wanted, scratch.candidate_words);
        for (std::size_t j = 0; j < n; ++j)
            f32(scratch.wanted[j * lanes + lane]).store_aligned(scratch.wanted + j * lanes);
        lo.store_aligned(one);
        return f32(one[lane]);
    }

    // Tries `choices` levels on the vector of one lane, a choice a lane. lo: wanted_of_lane(). least: the cost to beat.
    // Gives the choice that has less and the least, the first of equals, copies its codes, and returns it; none: `choices`.
    template <code_levels Codebook, int Top>
    KV1_INLINE static std::size_t
    try_levels_of_lane(std::size_t lane, std::size_t n, const lane_format<Codebook>& format,
                       const error_feedback& feedback, f32 lo, const encode_scratch& scratch,
                       const level_trial& t, std::size_t choices, float& least) {
        static_assert(lanes >= tried_in_lanes);
        alignas(64) float one[lanes], scales[lanes], bases[lanes], costs[lanes];
        alignas(64) std::uint32_t fits[lanes];
        bool fit[tried_in_lanes];
        for (std::size_t c = 0; c < lanes; ++c) { // lanes without a choice of their own have the last one
            const lane_levels& l = t.levels[c < choices ? c : choices - 1];
            l.scale.store_aligned(one);
            scales[c] = one[lane];
            l.base.store_aligned(one);
            bases[c] = one[lane];
            if (c >= choices)
                continue;
            xs::select(xs::batch_bool_cast<std::uint32_t>(l.fits), u32(1u), u32(0u)).store_aligned(fits);
            fit[c] = fits[lane] != 0;
        }
        lane_levels levels;
        levels.scale = f32::load_aligned(scales);
        levels.base = f32::load_aligned(bases);
        f32 cost;
        codes_with_feedback<Codebook, Top, 1>(n, &levels, format, feedback, lo, scratch.wanted,
                                              scratch.candidate_words, &cost);
        cost.store_aligned(costs);
        std::size_t best = choices;
        for (std::size_t c = 0; c < choices; ++c)
            if (costs[c] < least && fit[c]) {
                least = costs[c];
                best = c;
            }
        for (std::size_t w = 0; best < choices && w < round_up(n, 4) / 4; ++w)
            scratch.words[w * lanes + lane] = scratch.candidate_words[w * lanes + best];
        return best;
    }

    // A weigh_function for levels up to Top.
    template <code_levels Codebook, int Top>
    KV1_NOINLINE static void weigh_levels(const lane_format<Codebook>& format, const vector_to_encode* rows,
                                          std::size_t count, std::size_t n, const f32& lo, const f32& hi,
                                          const encode_scratch& scratch, lane_levels& best) noexcept {
        bool together = count > 1;
        for (std::size_t i = 0; i < count; ++i)
            together = together && rows[i].feedback == rows[0].feedback;
        const lane_levels start = best;
        const f32 middle = sum_of(start.base, product_of(start.scale, f32(0.5f * format.top)));
        alignas(64) float least[lanes];
        f32(std::numeric_limits<float>::max()).store_aligned(least);
        level_trial t;
        const auto choose = [&](int first, int choices) { // candidates `first` ...
            for (int c = 0; c < choices; ++c) {
                const lane_levels& from = first < scales_tried ? start : best;
                lane_levels& l = t.levels[c];
                l = from;
                if (first + c > 0)
                    weighted_candidate(first + c, from, middle, format, l);
            }
        };
        if (!together) {
            for (std::size_t i = 0; i < count; ++i) {
                if (rows[i].feedback == nullptr)
                    continue;
                alignas(64) std::uint32_t here[lanes] = {};
                here[i] = 1;
                const f32 its_lo = wanted_of_lane(i, n, lo, hi, *rows[i].feedback, scratch);
                for (int first = 0, choices = 0; first < candidates_tried; first += choices) {
                    choices = candidates_tried - first;
                    if (choices > static_cast<int>(tried_in_lanes))
                        choices = static_cast<int>(tried_in_lanes);
                    choose(first, choices);
                    const auto some = static_cast<std::size_t>(choices);
                    const std::size_t taken = try_levels_of_lane<Codebook, Top>(
                        i, n, format, *rows[i].feedback, its_lo, scratch, t, some, least[i]);
                    if (taken < some)
                        take(xs::batch_bool_cast<float>(u32::load_aligned(here) == u32(1u)), t.levels[taken],
                             best);
                }
            }
            return;
        }
        common_wanted(scratch.x, n, lo, hi, *rows[0].feedback, scratch.wanted, scratch.candidate_words);
        constexpr int choices = static_cast<int>(weighted_together);
        for (int first = 0; first < candidates_tried; first += choices) {
            choose(first, choices);
            codes_with_feedback<Codebook, Top, weighted_together>(
                n, t.levels, format, *rows[0].feedback, lo, scratch.wanted, scratch.candidate_words, t.costs);
            lane_mask better[weighted_together], any(false);
            for (std::size_t c = 0; c < weighted_together; ++c) {
                const f32 so_far = f32::load_aligned(least);
                better[c] = (t.costs[c] < so_far) & t.levels[c].fits;
                any = any | better[c];
                xs::select(better[c], t.costs[c], so_far).store_aligned(least);
                take(better[c], t.levels[c], best);
            }
            if (!xs::any(any))
                continue;
            for (std::size_t w = 0; w < round_up(n, 4) / 4; ++w) {
                const std::uint32_t* its_words = scratch.candidate_words + w * weighted_together * lanes;
                u32 word = u32::load_aligned(scratch.words + w * lanes);
                KV1_UNROLL for (std::size_t c = 0; c < weighted_together; ++c) {
                    word = xs::select(xs::batch_bool_cast<std::uint32_t>(better[c]),
                                      u32::load_aligned(its_words + c * lanes), word);
                }
                word.store_aligned(scratch.words + w * lanes);
            }
        }
    }

    static void even(const lane_format<code_levels::even>& format, const vector_to_encode* rows,
                     std::size_t count, std::size_t n, const f32& lo, const f32& hi,
                     const encode_scratch& scratch, lane_levels& best) noexcept {
        if (format.top <= 15.0f)
            weigh_levels<code_levels::even, 15>(format, rows, count, n, lo, hi, scratch, best);
        else
            weigh_levels<code_levels::even, 255>(format, rows, count, n, lo, hi, scratch, best);
    }
};

KV1_LAZY inline encode_result encode_vectors(const encoding_params& params, const vector_to_encode* rows,
                                             std::size_t count, std::uint8_t* codes, std::size_t stride,
                                             row_metadata* metadata, std::size_t& failed,
                                             const encode_scratch& scratch) noexcept {
    using weigh = weighted_codes<>;
    constexpr weigh_functions functions{weigh::even, weigh::template weigh_levels<code_levels::codebook2, 15>,
                                        weigh::template weigh_levels<code_levels::codebook4, 36>};
    return encode_vectors_by(functions, params, rows, count, codes, stride, metadata, failed, scratch);
}

#include <kv1/detail/precise_math_end.inl>
