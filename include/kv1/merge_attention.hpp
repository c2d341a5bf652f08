// SPDX-License-Identifier: Apache-2.0
//
// Results of attention over disjoint sets of tokens, joined to the result over all of them.
#pragma once

#include <kv1/detail/vector_sums.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI {

/// Attention over one of several disjoint sets of tokens, for the same query rows: what attend() gives if
/// log_sum_exp is asked for, or what an engine's own kernel gives for tokens that it keeps elsewhere (an fp16
/// tail, a prefix that sequences share).
struct attention_part {
    std::span<const float> outputs;     ///< [rows][channels], each row divided by its denominator
    std::span<const float> log_sum_exp; ///< [rows]; -infinity: the row saw no token
};

/// Joins parts to attention over all of their tokens: out = sum_i e^(l_i - l) out_i, with l = log sum_i
/// e^l_i. outputs is [rows][channels], log_sum_exp [rows] or empty; both may be those of a part. A row that
/// saw no token in any part becomes zeros and -infinity. The order of the parts changes the rounding only.
/// O(parts * rows * channels), no allocation. Errors: invalid_argument for no channels; shape_mismatch.
inline status try_merge_attention(std::span<const attention_part> parts, std::size_t channels,
                                  std::span<float> outputs, std::span<float> log_sum_exp = {}) noexcept {
    if (channels == 0)
        return {errc::invalid_argument, "rows have channels"};
    const std::size_t rows = outputs.size() / channels;
    if (rows * channels != outputs.size() || (!log_sum_exp.empty() && log_sum_exp.size() != rows))
        return {errc::shape_mismatch, "outputs are whole rows, with one log-sum-exp each"};
    for (const attention_part& p : parts)
        if (p.outputs.size() != outputs.size() || p.log_sum_exp.size() != rows)
            return {errc::shape_mismatch, "every part has the same rows"};
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    constexpr std::size_t step = 64; // channels, which are read before they are overwritten
    constexpr std::size_t few = 16;  // parts whose weights are computed once for all channels
    float known[few];
    for (std::size_t r = 0; r < rows; ++r) {
        float maximum = nothing;
        for (const attention_part& p : parts)
            maximum = p.log_sum_exp[r] > maximum ? p.log_sum_exp[r] : maximum;
        const auto weight = [&](std::size_t i) {
            const float l = parts[i].log_sum_exp[r];
            return l == nothing ? 0.0f : std::exp(l - maximum);
        };
        float sum = 0.0f;
        for (std::size_t i = 0; i < parts.size(); ++i) {
            const float w = weight(i);
            if (i < few)
                known[i] = w;
            sum += w;
        }
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        for (std::size_t first = r * channels; first < (r + 1) * channels; first += step) {
            const std::size_t n = (std::min)(step, (r + 1) * channels - first);
            float joined[step] = {};
            for (std::size_t i = 0; i < parts.size(); ++i) {
                const float w = (i < few ? known[i] : weight(i)) * inverse;
                if (w != 0.0f)
                    detail::add_multiple(joined, w, parts[i].outputs.data() + first, n);
            }
            std::copy_n(joined, n, outputs.begin() + static_cast<std::ptrdiff_t>(first));
        }
        if (!log_sum_exp.empty())
            log_sum_exp[r] = sum > 0.0f ? maximum + std::log(sum) : nothing;
    }
    return {};
}
#if KV1_EXCEPTIONS
/// Joins parts to attention over all of their tokens. outputs is [rows][channels], log_sum_exp [rows] or
/// empty; both may be those of a part. Throws kv1::error: invalid_argument for no channels; shape_mismatch.
inline void merge_attention(std::span<const attention_part> parts, std::size_t channels,
                            std::span<float> outputs, std::span<float> log_sum_exp = {}) {
    detail::throw_if_error(try_merge_attention(parts, channels, outputs, log_sum_exp));
}
#endif

} // namespace kv1::inline KV1_ABI
