// SPDX-License-Identifier: Apache-2.0
//
// least_squares<Q>: the format of Q, affine or compact, with scale and base fitted to the vector
// instead of read off its extremes. Same bytes, same decoder, less error: at 2 bits about half the squared
// error of min/max for Gaussian channels, a third with outliers.
//
// Levels begin over the middle 80 % of the range, of codebook4 90 %. Then, three times, each channel gets the code of its
// nearest level, and scale and base become those that minimize the squared error for these codes:
//
//   scale = (n sum xc - sum x sum c) / (n sum cc - (sum c)^2), base = (sum x - scale sum c) / n
//
// with x counted from the middle of the range. Then the scale is rounded as it is stored, the base is
// computed once more for that scale, and codes are those of the nearest stored levels. The other candidate is
// the range itself, as min/max stores it. The candidate with the smaller squared error is taken, so the
// result is never worse than min/max. (Better starts and more rounds gained nothing on the keys and values
// that were measured.)
//
// Sums run channel by channel, and products are rounded before they are added, so codes and metadata are the
// same bits on every target. O(n), no allocation.
#pragma once

#include <kv1/quantizer.hpp>
#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/compact.hpp>

#include <algorithm>
#include <array>
#include <cstring>

namespace kv1::inline KV1_ABI {

namespace detail {

inline constexpr int fit_rounds = 3;

#include <kv1/detail/precise_math_begin.inl>

template <int Bits>
struct level_format<affine<Bits>> : even_levels<(1 << Bits) - 1> {
    static constexpr float low(float lo) noexcept { return lo; }
    static constexpr float high(float hi) noexcept { return hi; }
    static std::uint16_t round_scale(float scale) noexcept {
        return float_to_half(scale > smallest_scale ? scale : smallest_scale);
    }
    static float scale_of(std::uint16_t bits) noexcept { return half_to_float(bits); }
    static stored_levels store(std::uint16_t scale_bits, float base) noexcept {
        stored_levels s;
        s.bits = {scale_bits, plain_zero(float_to_half(base))};
        s.scale = half_to_float(s.bits.scale);
        s.base = half_to_float(s.bits.minimum);
        s.fits = (s.bits.scale & 0x7c00u) != 0x7c00u && (s.bits.minimum & 0x7c00u) != 0x7c00u;
        return s;
    }
};

// The candidate that alternating assignment and refit ends with, and, where asked for, the levels that it was
// last refitted to. Precondition: lo and hi are x's, and finite.
template <class Q>
stored_levels refine_levels(std::span<const float> x, float lo, float hi,
                            std::uint8_t* refit_levels = nullptr) noexcept {
    using format = level_format<Q>;
    const auto n = static_cast<float>(x.size());
    const float middle = 0.5f * lo + 0.5f * hi;
    float scale = (std::max)(product_of(hi - lo, fit_start<Q> / format::top), smallest_scale);
    float base = product_of(scale, -0.5f * format::top);
    float sum_c = 0.0f, sum_x = 0.0f;
    for (int round = 0; round < fit_rounds; ++round) {
        const code_rule<Q> rule(scale, base);
        float sum_cc = 0.0f, sum_xc = 0.0f;
        sum_c = sum_x = 0.0f;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const float v = x[i] - middle;
            const float c = rule.level(rule.code(v));
            sum_x = as_written(sum_x + v);
            sum_c = sum_c + c; // of integers below 2^24: exact
            sum_cc = sum_cc + c * c;
            sum_xc = as_written(sum_xc + product_of(v, c));
            if (refit_levels != nullptr)
                refit_levels[i] = static_cast<std::uint8_t>(c);
        }
        const float variance = product_of(n, sum_cc) - product_of(sum_c, sum_c);
        const float covariance = product_of(n, sum_xc) - product_of(sum_x, sum_c);
        if (variance > 0.0f)
            scale = (std::max)(covariance / as_written(variance), smallest_scale);
        base = (sum_x - product_of(scale, sum_c)) / as_written(n);
    }
    const auto stored = format::round_scale(scale);
    base = (sum_x - product_of(format::scale_of(stored), sum_c)) / as_written(n);
    stored_levels levels = format::store(stored, base + middle);
    levels.refined = true;
    return levels;
}

// As min/max would store the range.
template <class Q>
stored_levels range_levels(float lo, float hi) noexcept {
    using format = level_format<Q>;
    const float low = format::low(lo), high = format::high(hi);
    return format::store(format::round_scale((high - low) / as_written(format::top)), low);
}

// The best candidate so far, with its codes and squared error.
struct level_selection {
    stored_levels levels;
    float error;
    std::uint8_t* codes;

    template <class Q>
    void consider(std::span<const float> x, const stored_levels& candidate) noexcept {
        std::array<std::uint8_t, max_vector_length> its_codes;
        if (!candidate.fits)
            return;
        const float its_error = nearest_codes<Q>(x, candidate, its_codes.data());
        if (!(its_error < error))
            return;
        levels = candidate;
        error = its_error;
        std::memcpy(codes, its_codes.data(), x.size());
    }
};

// The levels of the range, as min/max stores them. If they do not fit the metadata, no candidate is taken.
template <class Q>
level_selection range_first(std::span<const float> x, float lo, float hi, std::uint8_t* codes) noexcept {
    const stored_levels range = range_levels<Q>(lo, hi);
    return {range, range.fits ? nearest_codes<Q>(x, range, codes) : 0.0f, codes};
}

// Levels and codes of a vector whose channels are within fp16's range. fits is false where metadata overflow.
// refit_levels: those of the codes that scale and base were refitted to last; may be null.
template <class Q>
stored_levels fit_levels(std::span<const float> x, std::uint8_t* codes, std::uint8_t* refit_levels) noexcept {
    const auto [lo, hi] = plain_range(x);
    level_selection best = range_first<Q>(x, lo, hi, codes);
    best.consider<Q>(x, refine_levels<Q>(x, lo, hi, refit_levels));
    return best.levels;
}

template <class Q>
stored_levels fit_levels(std::span<const float> x, std::uint8_t* codes) noexcept {
    return fit_levels<Q>(x, codes, nullptr);
}

#include <kv1/detail/precise_math_end.inl>

// A quantizer of Q's format whose levels and codes Choose finds, as fit_levels does.
template <class Q, stored_levels (*Choose)(std::span<const float>, std::uint8_t*) noexcept>
struct chosen_levels {
    static constexpr int bits = Q::bits;         ///< of a code
    static constexpr int max_code = Q::max_code; ///< the largest code
    using metadata = typename Q::metadata;       ///< what is kept beside the codes

    /// One code per channel, and the metadata. Errors: shape_mismatch, invalid_argument (no channel, or more
    /// than 4096), non_finite, not_representable (a value beyond fp16, or metadata); outputs are then
    /// untouched.
    static status quantize(std::span<const float> x, std::span<std::uint8_t> codes, metadata& out) noexcept {
        if (const status s = check_vector(x, codes); !s)
            return s;
        if (x.size() > max_vector_length)
            return {errc::invalid_argument, "a vector has at most 4096 channels"};
        if (const status s = check_fp16_range(x); !s)
            return s;
        std::array<std::uint8_t, max_vector_length> found;
        const stored_levels levels = Choose(x, found.data());
        if (!levels.fits)
            return {errc::not_representable, rule_fp16_metadata};
        std::memcpy(codes.data(), found.data(), x.size());
        out.scale = float16::from_bits(levels.bits.scale);
        if constexpr (requires { out.minimum; })
            out.minimum = float16::from_bits(levels.bits.minimum);
        return {};
    }

    /// The value that a code stands for.
    [[nodiscard]] static constexpr float dequantize(std::uint8_t code, metadata m) noexcept {
        return Q::dequantize(code, m);
    }
};

} // namespace detail

/// Q's format, fitted by least squares. Q is affine, of 1 to 8 bits, or compact.
template <class Q>
struct least_squares : detail::chosen_levels<Q, detail::fit_levels<Q>> {};

static_assert(quantizer<least_squares<affine<2>>> && quantizer<least_squares<compact<2>>>);

} // namespace kv1::inline KV1_ABI
