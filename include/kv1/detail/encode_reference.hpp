// SPDX-License-Identifier: Apache-2.0
//
// The definition of what an encoding makes of a vector: take the mean off, rotate, choose levels, choose
// codes. Plain C++. The kernels of all targets give the same bits.
//
// Codes under error weights. Errors e = x - value cost e^T W e. With W = R^T D R, R upper triangular with
// ones on its diagonal and D diagonal, that is
//
//   cost = sum_j D_j (e_j + sum_{i > j} R_ji e_i)^2
//
// Channels are quantized from the last to the first. When channel j's turn comes, the errors e_i of the
// channels after it are known, and the cost is least if e_j = -sum R_ji e_i: channel j is quantized to the
// level nearest to wanted_j = x_j + sum R_ji e_i (Babai's nearest plane; GPTQ does it for weights).
//
// Example: n = 2, R_01 = 0.5, x = {1.0, 2.3}, levels at whole numbers. Channel 1 becomes 2, its error is 0.3.
// Channel 0 should be 1.0 + 0.5 * 0.3 = 1.15, and becomes 1.
//
// R is rounded to 8 bits, R_ji = u_j F_ji with whole numbers F_ji (error_feedback). Level l of a channel has the value
// s l + b. So with any number lo, in units of s,
//
//   (wanted_j - b) / s = 1/s (x_j - lo + u_j sum F_ji (x_i - lo)) - (b - lo)/s (1 + u_j sum F_ji) - u_j sum F_ji l_i
//
// What 1/s multiplies is the same for all levels that are tried, and is computed once, with lo the smallest x and
// x_i - lo in steps of the 65,535th of the range. Sums of F_ji, and of its products with l_i and with these steps, are
// sums of integers. They have the same value in any order, and targets add four products of 8-bit numbers in an
// instruction. Codes so chosen cost what codes cost that R in fp32 chooses (ARCHITECTURE.md has figures).
//
// Levels that fit x best if all errors cost the same need not be the cheapest under W. So other candidates
// are tried: the scale 0.88 to 1.24 times as large about the same middle, then the cheapest of these moved by
// -0.2 to 0.2 steps. The cheapest candidate is taken, the first of equals.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/quantizers/all.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <iterator>
#include <span>

namespace kv1::inline KV1_ABI::detail {

#include <kv1/detail/precise_math_begin.inl>

// Candidates in order: the levels themselves and other scales, then moves of the cheapest of these.
inline constexpr float weighted_scales[] = {1.0f, 0.94f, 1.04f, 1.12f, 0.88f, 1.08f, 1.16f, 1.24f};
inline constexpr float weighted_moves[] = {-0.2f, -0.1f, 0.1f, 0.2f};
inline constexpr int scales_tried = static_cast<int>(std::size(weighted_scales)),
                     candidates_tried = scales_tried + static_cast<int>(std::size(weighted_moves));

// What an encoder is told of error weights: R_ji = unit(j) * factor(j, i) for i > j, sum(j) of row j of R with the one
// on its diagonal, and cost(j) = D_j.
template <class F>
concept feedback_factors = requires(const F& f, std::size_t j) {
    { f.factor(j, j) } -> std::same_as<std::int32_t>;
    { f.unit(j) } -> std::same_as<float>;
    { f.sum(j) } -> std::same_as<float>;
    { f.cost(j) } -> std::same_as<float>;
};

// Steps of a range, two bytes, and the smallest.
inline constexpr float range_steps = 65535.0f, smallest_range_step = 1e-30f;

// What 1/s multiplies, [n]. Returns lo. wanted[i] holds the steps of x_i until channel i's turn comes, which needs those
// of the channels after it alone: other room would be more of a small stack.
template <feedback_factors F>
float common_wanted(std::span<const float> x, const F& feedback, float* wanted) noexcept {
    const std::size_t n = x.size();
    const auto [lo, hi] = plain_range(x);
    const float unit = (std::max)((hi - lo) / as_written(range_steps), smallest_range_step);
    const float inverse = 1.0f / as_written(unit);
    for (std::size_t i = 0; i < n; ++i)
        wanted[i] = std::nearbyint(std::clamp((x[i] - lo) * inverse, 0.0f, range_steps));
    for (std::size_t j = 0; j < n; ++j) {
        std::int32_t high = 0, low = 0; // sums over the two bytes of the steps
        for (std::size_t i = j + 1; i < n; ++i) {
            const auto steps = static_cast<std::int32_t>(wanted[i]);
            high += feedback.factor(j, i) * (steps >> 8);
            low += feedback.factor(j, i) * (steps & 255);
        }
        const float sum = 256.0f * static_cast<float>(high) + static_cast<float>(low); // an exact product
        wanted[j] = as_written(x[j] - lo) + product_of(feedback.unit(j), product_of(unit, as_written(sum)));
    }
    return lo;
}

// Chooses the codes of a vector under error weights, for given levels. wanted: common_wanted(). Returns the cost.
template <class Q, feedback_factors F>
float codes_with_feedback(std::size_t n, const stored_levels& levels, const F& feedback, float lo,
                          const float* wanted, std::uint8_t* codes) noexcept {
    const code_rule<Q> rule(1.0f, 0.0f);
    const float inverse = 1.0f / as_written(levels.scale);
    const float shift = product_of(levels.base - lo, inverse);
    const auto level_of = [](std::uint8_t code) noexcept -> std::int32_t {
        if constexpr (level_format<Q>::top == level_format<Q>::max_code) // levels are 0, 1, 2, ...
            return code;
        else
            return static_cast<std::int32_t>(code_rule<Q>::level(static_cast<float>(code)));
    };
    float cost = 0.0f;
    for (std::size_t j = n; j-- > 0;) {
        std::int32_t sum = 0;
        for (std::size_t i = j + 1; i < n; ++i)
            sum += feedback.factor(j, i) * level_of(codes[i]);
        const float both = as_written(product_of(wanted[j], inverse) - product_of(feedback.sum(j), shift));
        const float own = as_written(both - product_of(feedback.unit(j), static_cast<float>(sum)));
        const float code = rule.code(own), rest = own - rule.level(code);
        cost = as_written(cost + product_of(product_of(feedback.cost(j), rest), rest));
        codes[j] = static_cast<std::uint8_t>(code);
    }
    return product_of(cost, product_of(levels.scale, levels.scale));
}

// Chooses levels and codes of least cost among the candidates; `start` are the levels that fit x best. The codes of the
// cheapest are chosen a second time at the end: keeping them would take 4 KiB more of a small stack.
template <class Q, feedback_factors F>
stored_levels weighted_levels(std::span<const float> x, const stored_levels& start, const F& feedback,
                              std::uint8_t* codes) noexcept {
    using format = level_format<Q>;
    constexpr float half_range = 0.5f * format::top, step = format::top / format::max_code;
    const std::size_t n = x.size();
    float wanted[max_vector_length];
    const float lo = common_wanted(x, feedback, wanted);
    const float middle = start.base + product_of(start.scale, half_range);
    stored_levels best = start, from = start;
    float least = codes_with_feedback<Q>(n, start, feedback, lo, wanted, codes);
    bool are_best = true; // the codes
    for (int k = 1; k < candidates_tried; ++k) {
        if (k == scales_tried)
            from = best;
        const bool moves = k >= scales_tried;
        const float wider = moves ? from.scale : product_of(from.scale, weighted_scales[k]);
        const auto scale =
            format::round_scale(wider); // an fp16 number's bits, or as it is (fake_quantize.hpp)
        const float base =
            moves ? from.base + product_of(product_of(from.scale, step), weighted_moves[k - scales_tried])
                  : middle - product_of(format::scale_of(scale), half_range);
        const stored_levels candidate = format::store(scale, base);
        if (!candidate.fits)
            continue;
        const float cost = codes_with_feedback<Q>(n, candidate, feedback, lo, wanted, codes);
        are_best = cost < least;
        if (!are_best)
            continue;
        best = candidate;
        least = cost;
    }
    if (!are_best)
        codes_with_feedback<Q>(n, best, feedback, lo, wanted, codes);
    return best;
}

// Takes the mean off a vector and rotates it. out is [params.channels].
inline void prepare_vector(const encoding_params& params, const vector_to_encode& row, float* out) noexcept {
    for (std::size_t c = 0; c < params.channels; ++c)
        out[c] = row.mean == nullptr ? row.x[c] : row.x[c] - row.mean[c];
    if (params.hadamard != 0)
        hadamard_transform({out, params.channels}, params.hadamard);
}

// Chooses levels and codes of a group of channels. feedback: null, or the group is all channels.
template <class Q, feedback_factors F>
stored_levels encode_group(level_choice choice, std::span<const float> x, const F* feedback,
                           std::uint8_t* codes) noexcept {
    stored_levels levels;
    switch (choice) {
    case level_choice::least_squares:
        levels = fit_levels<Q>(x, codes);
        break;
    case level_choice::clip_search:
        levels = search_levels<Q>(x, codes);
        break;
    case level_choice::min_max: {
        const auto [lo, hi] = plain_range(x);
        levels = range_levels<Q>(lo, hi);
        if (levels.fits)
            nearest_codes<Q>(x, levels, codes);
    }
    }
    return levels.fits && feedback != nullptr ? weighted_levels<Q>(x, levels, *feedback, codes) : levels;
}

template <class Q>
encode_result encode_reference(const encoding_params& params, const vector_to_encode& row,
                               std::uint8_t* codes, row_metadata* metadata) noexcept {
    const std::size_t n = params.channels;
    if (const std::size_t bad = first_non_finite({row.x, n}); bad != n)
        return {errc::non_finite, rule_finite, bad, {}};
    for (std::size_t c = 0; c < n; ++c)
        if (!(std::fabs(row.x[c]) <= largest_half))
            return {errc::not_representable, rule_fp16_value, c, {}};
    float x[max_vector_length];
    prepare_vector(params, row, x);
    for (std::size_t g = 0; g < params.groups(); ++g) {
        const std::size_t first = g * params.group;
        const stored_levels levels =
            encode_group<Q>(params.levels, {x + first, params.group}, row.feedback, codes + first);
        if (!levels.fits)
            return {errc::not_representable, rule_fp16_metadata, no_channel, {}};
        metadata[g] = levels.bits;
    }
    return {errc::ok, "", 0, metadata[0]};
}

#include <kv1/detail/precise_math_end.inl>

// Encodes a vector in the format that `params` names. codes is [channels], metadata [groups]; the result's metadata
// are the first group's. A format whose levels can not be chosen is refused.
inline encode_result encode_reference(const encoding_params& params, const vector_to_encode& row,
                                      std::uint8_t* codes, row_metadata* metadata) noexcept {
    encode_result result{errc::unsupported_format, "the format's levels can not be chosen", no_channel, {}};
    return with_format(all_formats{}, params.format, result, [&]<class Format>() noexcept {
        if constexpr (traits_of(kv_format_of<Format>).fits_levels())
            return encode_reference<Format>(params, row, codes, metadata);
        else
            return result;
    });
}

} // namespace kv1::inline KV1_ABI::detail
