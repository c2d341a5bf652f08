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
// feedback[i][j] holds R_ji, and feedback[j][j] holds D_j (prepared_encoding.hpp).
//
// Example: n = 2, R_01 = 0.5, x = {1.0, 2.3}, levels at whole numbers. Channel 1 becomes 2, its error is 0.3.
// Channel 0 should be 1.0 + 0.5 * 0.3 = 1.15, and becomes 1.
//
// Levels that fit x best if all errors cost the same need not be the cheapest under W. So other candidates
// are tried: the scale 0.92 to 1.24 times as large about the same middle, then the cheapest of these moved by
// -0.3 to 0.3 steps. The cheapest candidate is taken, the first of equals.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/quantizers/all.hpp>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <span>

namespace kv1::inline KV1_ABI::detail {

#include <kv1/detail/precise_math_begin.inl>

// Candidates in order: the levels themselves, four scales, four moves.
inline constexpr float weighted_scales[] = {0.92f, 1.08f, 1.16f, 1.24f};
inline constexpr float weighted_moves[] = {-0.3f, -0.15f, 0.15f, 0.3f};
inline constexpr int first_move = 1 + static_cast<int>(std::size(weighted_scales));
inline constexpr int weighted_candidates = first_move + static_cast<int>(std::size(weighted_moves));

// Chooses the codes of a vector under error weights, for given levels. feedback is [n][n]. Returns the cost.
template <class Q>
float codes_with_feedback(std::span<const float> x, const stored_levels& levels, const float* feedback,
                          std::uint8_t* codes) noexcept {
    const std::size_t n = x.size();
    const code_rule<Q> rule(levels.scale, levels.base);
    float wanted[max_vector_length];
    std::copy(x.begin(), x.end(), wanted);
    float cost = 0.0f;
    for (std::size_t i = n; i-- > 0;) {
        const float code = rule.code(wanted[i]);
        const float value = rule.level(code) * levels.scale + levels.base; // an exact product
        const float error = x[i] - value, rest = wanted[i] - value;
        cost = as_written(cost + product_of(product_of(feedback[i * n + i], rest), rest));
        for (std::size_t j = 0; j < i; ++j)
            wanted[j] = as_written(wanted[j] + product_of(feedback[i * n + j], error));
        codes[i] = static_cast<std::uint8_t>(code);
    }
    return cost;
}

// Chooses levels and codes of least cost among the candidates; `start` are the levels that fit x best. The codes of the
// cheapest are chosen a second time at the end: keeping them would take 4 KiB more of a small stack.
template <class Q>
stored_levels weighted_levels(std::span<const float> x, const stored_levels& start, const float* feedback,
                              std::uint8_t* codes) noexcept {
    using format = level_format<Q>;
    constexpr float half_range = 0.5f * format::top, step = format::top / format::max_code;
    const float middle = start.base + product_of(start.scale, half_range);
    stored_levels best = start, from = start;
    float least = codes_with_feedback<Q>(x, start, feedback, codes);
    bool are_best = true; // the codes
    for (int k = 1; k < weighted_candidates; ++k) {
        if (k == first_move)
            from = best;
        const bool moves = k >= first_move;
        const float wider = moves ? from.scale : product_of(from.scale, weighted_scales[k - 1]);
        const auto scale =
            format::round_scale(wider); // an fp16 number's bits, or as it is (fake_quantize.hpp)
        const float base =
            moves ? from.base + product_of(product_of(from.scale, step), weighted_moves[k - first_move])
                  : middle - product_of(format::scale_of(scale), half_range);
        const stored_levels candidate = format::store(scale, base);
        if (!candidate.fits)
            continue;
        const float cost = codes_with_feedback<Q>(x, candidate, feedback, codes);
        are_best = cost < least;
        if (!are_best)
            continue;
        best = candidate;
        least = cost;
    }
    if (!are_best)
        codes_with_feedback<Q>(x, best, feedback, codes);
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
template <class Q>
stored_levels encode_group(level_choice choice, std::span<const float> x, const float* feedback,
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
    return levels.fits && feedback != nullptr ? weighted_levels<Q>(x, levels, feedback, codes) : levels;
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
