// SPDX-License-Identifier: Apache-2.0
//
// Fake quantization: the vector that a cache gives back, in floating point and with a gradient, to train a
// model under the cache that it will run with. The two calls take and give spans; an autograd function of any
// framework can wrap them.
//
//   forward   y = restore(Q(transform(x)))    Q: quantize and dequantize; the transforms are options
//   backward  dx from dy, by one of two rules:
//     straight_through  dx = dy. Rounding, clamping and metadata count as the identity. Models are trained with
//                       this rule, the reference's too. With min/max it is the exact derivative of the forward
//                       pass without rounding: lo + (x - lo) / s * s = x for any lo and s.
//     fixed_codes       the derivative of the forward pass for fixed codes: dx reaches x through minimum, scale
//                       and mean magnitude. It is defined where no code, minimum or maximum is about to change.
//                       Rounding to fp16 counts as the identity. It is not defined for clip_search, nor under
//                       error weights.
//
// With round_metadata the forward pass gives what a cache with that format and encoding gives back, bit for
// bit (encoding.hpp). Without it scale and minimum stay in fp32, as the KV1 reference trains, and a compact
// format's offset is any number between its ends.
//
// Values that lie in keys (multi-head latent attention) are no vectors of their own: quantize the keys, and
// take the first channels of the result.
//
// The functions work on arrays of vectors, `channels` values each: x[v * channels + c] is channel c of vector
// v. They take O(values) (with Hadamard: times log channels; under error weights: times channels), allocate
// nothing, and are thread-safe. An error names the vector as where().token; vectors before it are written.
#pragma once

#include <kv1/detail/encode_reference.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/detail/turning_means.hpp>
#include <kv1/format.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/quantizers/all.hpp>
#include <kv1/rotary_embedding.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

namespace kv1::inline KV1_ABI {

/// How vectors are quantized, and what the gradient is.
struct fake_quantize_options {
    /// The rule of the backward pass; the head of this file defines both.
    enum class gradient_rule : std::uint8_t { straight_through, fixed_codes };

    level_choice levels = level_choice::min_max;              ///< affine and compact formats have a choice
    gradient_rule gradient = gradient_rule::straight_through; ///< of the backward pass
    bool round_metadata = true;                               ///< as a cache stores it
    /// Rotate vectors by a Hadamard transform before quantizing, and back afterwards; rotation_width(channels)
    /// channels are rotated together.
    bool hadamard = false;
    /// Means, [channels]: taken off before quantizing and added afterwards; empty: none. A constant to the
    /// gradient. Keys whose means turn with their position (layer_description::rotary) have another one at
    /// each: call once a position, with what turn_mean() gives.
    std::span<const float> centre{};
    /// An orthogonal matrix, [channels][channels], as a KV head of vector_encoding::basis has it: a vector less
    /// its mean becomes its products with the rows, before the Hadamard matrix. Empty: none. Not checked.
    std::span<const float> basis{};
    /// What errors cost, [channels][channels], as try_factor_error_weights() makes it of a KV head of
    /// vector_encoding::error_weights. Codes are chosen one channel after the other, and each makes up for the errors
    /// before it. Empty: all errors cost the same. For least squares and a clip search, with the straight-through
    /// gradient. Not checked but for its size.
    std::span<const float> error_factors{};
};

namespace detail {

// fake_quantize_options::error_factors, [channels][channels] (encode_reference.hpp). What channel i does to channel
// j < i is F_ji, in row i and column j. D_j is on the diagonal, and right of it channel j has its unit and its sum, or
// neither: the last channel has no factors, and the sum of the one before it needs no room.
struct factor_matrix {
    const float* rows;
    std::size_t channels;

    [[nodiscard]] std::int32_t factor(std::size_t j, std::size_t i) const noexcept {
        return static_cast<std::int32_t>(rows[i * channels + j]);
    }
    [[nodiscard]] float unit(std::size_t j) const noexcept {
        return j + 1 < channels ? rows[j * channels + j + 1] : 0.0f;
    }
    [[nodiscard]] float sum(std::size_t j) const noexcept;
    [[nodiscard]] float cost(std::size_t j) const noexcept { return rows[j * channels + j]; }

    // Makes it of what factor_weights() made, in place.
    static void round(float* rows, std::size_t channels) noexcept {
        for (std::size_t j = 0; j < channels; ++j) {
            const rounded_row row = round_factors(rows, channels, j, [&](std::size_t i, int factor) {
                rows[i * channels + j] = static_cast<float>(factor);
            });
            if (j + 1 < channels)
                rows[j * channels + j + 1] = row.unit;
            if (j + 2 < channels)
                rows[j * channels + j + 2] = row.sum;
        }
    }
};

#include <kv1/detail/precise_math_begin.inl>

inline float factor_matrix::sum(std::size_t j) const noexcept {
    if (j + 2 < channels)
        return rows[j * channels + j + 2];
    return j + 1 < channels ? 1.0f + product_of(unit(j), static_cast<float>(factor(j, j + 1))) : 1.0f;
}

#include <kv1/detail/precise_math_end.inl>

} // namespace detail

/// Makes the error weights of a KV head ready for fake_quantize_options::error_factors: of vectors that go through
/// the `basis` and `hadamard` of these options. weights and factors: [channels][channels]; they do not overlap.
///
/// What factors hold, for trainers that choose codes on another device: of W = R^T D R, with R_ji = u_j F_ji and whole
/// numbers F_ji of -127 to 127, row i has F_ji in column j < i and D_i, in units of the mean of W's diagonal, in column
/// i. u_i and 1 + u_i (sum of F_ik, k > i) are in columns i + 1 and i + 2 where there are such.
///
/// O(channels^3), once for a head. Errors: out_of_range unless channels is 1 to 4096; shape_mismatch; non_finite;
/// invalid_argument if the weights are not positive semidefinite, or the basis is not orthogonal; out_of_memory. If it
/// fails, `factors` holds anything.
inline status try_factor_error_weights(std::size_t channels, std::span<const float> weights,
                                       std::span<float> factors,
                                       const fake_quantize_options& options = {}) noexcept {
    if (channels == 0 || channels > max_vector_length)
        return {errc::out_of_range, "a vector has 1 to 4096 channels"};
    if (weights.size() != channels * channels || factors.size() != weights.size() ||
        (!options.basis.empty() && options.basis.size() != weights.size()))
        return {errc::shape_mismatch, "error weights, their factors and a basis are square matrices"};
    for (const std::span<const float> matrix : {weights, options.basis})
        if (detail::first_non_finite(matrix) != matrix.size())
            return {errc::non_finite, "error weights and bases are finite"};
    detail::basis_matrices basis;
    if (!options.basis.empty()) {
        if (!detail::is_orthogonal(options.basis, channels))
            return {errc::invalid_argument, "a basis is an orthogonal matrix, to 0.002 in each number"};
        if (!basis.assign(options.basis, channels))
            return {errc::out_of_memory, "an allocation failed"};
    }
    const status s = detail::factor_weights(
        weights, channels, options.hadamard ? rotation_width(channels) : 0, factors.data(), basis.of(0));
    if (s)
        detail::factor_matrix::round(factors.data(), channels);
    return s;
}

/// The mean of a head's keys at a position, bit for bit as a cache takes it off keys that turn
/// (layer_description::rotary): the `centre` of those keys. mean: before rotary embedding, [channels]; `turned`, as
/// long, gets it, and may be `mean`. Precondition: the channels that turn are among them. O(channels).
inline void turn_mean(const rotary_embedding& rotary, std::span<const float> mean, std::uint64_t position,
                      std::span<float> turned) noexcept {
    if (turned.data() != mean.data())
        std::copy(mean.begin(), mean.end(), turned.begin());
    for (std::size_t j = 0; j < rotary.frequencies.size(); ++j) {
        float &first = turned[rotary.first_of(j)], &second = turned[rotary.second_of(j)];
        const detail::unit_vector angle =
            detail::unit_of(detail::half_turns_of(rotary.frequencies[j]), position);
        if (first != 0.0f || second != 0.0f)
            std::tie(first, second) = detail::turned(first, second, angle);
    }
}

namespace detail {

// Scale and minimum as they multiply codes: rounded to fp16 or not.
struct real_metadata {
    float scale = 1.0f;
    float minimum = 0.0f;
    bool refitted = false; // by least squares
};

constexpr float through_fp16(float x) noexcept { return static_cast<float>(float16(x)); }

#include <kv1/detail/precise_math_begin.inl>

// The nearest level of every channel; x - lo may round, so the quotient is clamped.
inline void round_to_levels(std::span<const float> x, float scale, float minimum, int max_code,
                            std::span<std::uint8_t> codes) noexcept {
    for (std::size_t i = 0; i < x.size(); ++i) {
        const float level = std::nearbyint((x[i] - minimum) / as_written(scale));
        codes[i] = static_cast<std::uint8_t>(std::clamp(level, 0.0f, static_cast<float>(max_code)));
    }
}

// Moments of codes that a refit's derivative needs.
struct code_moments {
    double n = 0.0, c = 0.0, cc = 0.0;

    explicit code_moments(std::span<const std::uint8_t> codes) noexcept
        : n(static_cast<double>(codes.size())) {
        for (const double code : codes) {
            c += code;
            cc += code * code;
        }
    }
    // zero where all codes are one; exact, since codes and counts are small integers
    [[nodiscard]] double determinant() const noexcept { return n * cc - c * c; }
};

inline real_metadata min_max(std::span<const float> x, int max_code) noexcept {
    const auto [lo, hi] = std::minmax_element(x.begin(), x.end(), less_with_signed_zero);
    return {(std::max)((*hi - *lo) / as_written(static_cast<float>(max_code)), smallest_scale), *lo, false};
}

inline float mean_magnitude(std::span<const float> x) noexcept {
    std::array<float, 16> sums{};
    for (std::size_t i = 0; i < x.size(); ++i)
        sums[i % 16] = as_written(sums[i % 16] + std::fabs(x[i]));
    return (std::max)(add_pairwise(sums) / static_cast<float>(x.size()), smallest_scale);
}

// Levels with a scale and a base.
template <class Q>
concept scaled_levels = std::same_as<typename Q::metadata, affine_metadata> ||
    std::same_as<typename Q::metadata, compact_metadata>;

// Whether levels are fitted or a compact format's; else they are those of Q::quantize.
template <quantizer Q>
bool chooses_levels(const fake_quantize_options& o) noexcept {
    if constexpr (scaled_levels<Q>)
        return std::same_as<typename Q::metadata, compact_metadata> || o.levels != level_choice::min_max;
    return false;
}

// Levels of Q that keep their scale and base as they are.
template <scaled_levels Q>
struct unrounded {};

template <class Q>
struct level_format<unrounded<Q>> {
    static constexpr float max_code = level_format<Q>::max_code, top = level_format<Q>::top;
    static constexpr float low(float lo) noexcept { return level_format<Q>::low(lo); }
    static constexpr float high(float hi) noexcept { return level_format<Q>::high(hi); }
    static float round_scale(float scale) noexcept { return (std::max)(scale, smallest_scale); }
    static float scale_of(float scale) noexcept { return scale; }
    static stored_levels store(float scale, float base) noexcept {
        const bool fits = is_finite(float16(scale)) && is_finite(float16(base));
        return {.bits = {}, .scale = scale, .base = base, .fits = fits};
    }
};

template <class Q>
struct code_rule<unrounded<Q>> : code_rule<Q> {
    using code_rule<Q>::code_rule;
};
template <class Q>
inline constexpr float fit_start<unrounded<Q>> = fit_start<Q>;

// Levels and codes, as kernels choose them for least squares and for compact formats. refit_levels: null with error
// factors, whose levels are not those of a refit.
template <class Q>
stored_levels choose_levels(std::span<const float> x, const fake_quantize_options& o, std::uint8_t* codes,
                            std::uint8_t* refit_levels) noexcept {
    if (o.levels == level_choice::least_squares && o.error_factors.empty())
        return fit_levels<Q>(x, codes, refit_levels);
    const factor_matrix factors{o.error_factors.data(), x.size()};
    return encode_group<Q>(o.levels, x, o.error_factors.empty() ? nullptr : &factors, codes);
}

// Its own inverse and, symmetric, its own gradient.
inline void rotate_hadamard(std::span<float> x) noexcept { hadamard_transform(x, rotation_width(x.size())); }

// Codes and metadata of one vector; x is finite and not empty. refit_levels: those of the codes that metadata
// were refitted to, if they were; may be null.
template <quantizer Q>
status quantize_for_training(std::span<const float> x, const fake_quantize_options& o,
                             std::span<std::uint8_t> codes, real_metadata& m,
                             std::uint8_t* refit_levels = nullptr) noexcept {
    if constexpr (scaled_levels<Q>) {
        if (chooses_levels<Q>(o)) {
            const stored_levels levels = o.round_metadata
                                             ? choose_levels<Q>(x, o, codes.data(), refit_levels)
                                             : choose_levels<unrounded<Q>>(x, o, codes.data(), refit_levels);
            m = {levels.scale, levels.base, levels.refined};
            return levels.fits ? status() : status(errc::not_representable, rule_fp16_metadata);
        }
        if constexpr (std::same_as<typename Q::metadata, affine_metadata>) {
            affine_metadata stored{};
            if (const status s = Q::quantize(x, codes, stored); !s)
                return s;
            m = o.round_metadata ? real_metadata{stored.scale, stored.minimum, false}
                                 : min_max(x, Q::max_code);
        }
        return {};
    } else {
        typename Q::metadata stored{};
        if (const status s = Q::quantize(x, codes, stored); !s)
            return s;
        if constexpr (std::same_as<typename Q::metadata, scale_metadata>)
            m.scale = o.round_metadata ? static_cast<float>(stored.scale) : mean_magnitude(x);
        return {};
    }
}

template <quantizer Q>
constexpr float restore(std::uint8_t code, real_metadata m) noexcept {
    if constexpr (scaled_levels<Q>)
        return code_rule<Q>::level(static_cast<float>(code)) * m.scale + m.minimum;
    else if constexpr (std::same_as<typename Q::metadata, scale_metadata>)
        return code != 0 ? m.scale : -m.scale;
    else
        return static_cast<float>(code);
}

// dx = J^T dy of one vector for fixed codes, in the basis that is quantized in. In place.
template <quantizer Q>
void fixed_codes_gradient(std::span<const float> x, std::span<const std::uint8_t> codes, real_metadata m,
                          std::span<const std::uint8_t> refit_levels, std::span<float> g) noexcept {
    const auto n = static_cast<double>(x.size());
    if constexpr (scaled_levels<Q>) {
        double to_scale = 0.0, to_minimum = 0.0; // dL/dscale, dL/dminimum
        for (std::size_t i = 0; i < x.size(); ++i) {
            to_scale += static_cast<double>(g[i]) *
                        static_cast<double>(code_rule<Q>::level(static_cast<float>(codes[i])));
            to_minimum += g[i];
        }
        if (m.refitted) {
            const code_moments sums(refit_levels);
            // a scale at its floor, or of equal codes, was not refitted
            const bool moves = m.scale > smallest_scale && sums.determinant() > 0.0;
            for (std::size_t i = 0; i < x.size(); ++i) {
                const double scale_by_x = moves ? (n * refit_levels[i] - sums.c) / sums.determinant() : 0.0;
                const double minimum_by_x = (1.0 - sums.c * scale_by_x) / n;
                g[i] = static_cast<float>(to_scale * scale_by_x + to_minimum * minimum_by_x);
            }
            return;
        }
        const auto [lo, hi] = std::minmax_element(x.begin(), x.end(), less_with_signed_zero);
        const auto lowest = static_cast<std::size_t>(lo - x.begin());
        const auto highest = static_cast<std::size_t>(hi - x.begin());
        // a compact format's range ends at zero where the vector's does not reach it
        using format = level_format<Q>;
        const float low = format::low(*lo), high = format::high(*hi);
        const bool floored = (high - low) / format::top < smallest_scale;
        const double to_range = floored ? 0.0 : to_scale / static_cast<double>(format::top);
        std::fill(g.begin(), g.end(), 0.0f);
        if (low == *lo)
            g[lowest] += static_cast<float>(to_minimum - to_range);
        if (high == *hi)
            g[highest] += static_cast<float>(to_range);
    } else if constexpr (std::same_as<typename Q::metadata, scale_metadata>) {
        double to_scale = 0.0, magnitudes = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            to_scale += codes[i] != 0 ? g[i] : -g[i];
            magnitudes += std::fabs(static_cast<double>(x[i]));
        }
        const double each = magnitudes / n < smallest_scale ? 0.0 : to_scale / n;
        for (std::size_t i = 0; i < x.size(); ++i)
            g[i] = static_cast<float>(codes[i] != 0 ? each : -each);
    } else {
        std::fill(g.begin(), g.end(), 0.0f);
    }
}

// Products with the rows of a matrix, and with its columns, in place: what a cache computes
// (detail/orthogonal_basis.hpp).
inline void enter_basis(std::span<const float> matrix, std::span<float> x) noexcept {
    std::array<float, max_vector_length> before;
    std::copy(x.begin(), x.end(), before.begin());
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = 0.0f;
        for (std::size_t j = 0; j < x.size(); ++j)
            x[i] = as_written(x[i] + product_of(matrix[i * x.size() + j], before[j]));
    }
}
inline void leave_basis(std::span<const float> matrix, std::span<float> x) noexcept {
    std::array<float, max_vector_length> before;
    std::copy(x.begin(), x.end(), before.begin());
    for (std::size_t j = 0; j < x.size(); ++j) {
        x[j] = 0.0f;
        for (std::size_t i = 0; i < x.size(); ++i)
            x[j] = as_written(x[j] + product_of(matrix[i * x.size() + j], before[i]));
    }
}

// What is quantized: the vector without its centre, in the basis, rotated.
inline void transform(std::span<const float> x, const fake_quantize_options& o,
                      std::span<float> out) noexcept {
    for (std::size_t i = 0; i < x.size(); ++i)
        out[i] = o.centre.empty() ? x[i] : x[i] - o.centre[i];
    if (!o.basis.empty())
        enter_basis(o.basis, out);
    if (o.hadamard)
        rotate_hadamard(out);
}

// The vector that stands for what is quantized, but for its centre.
inline void turn_back(std::span<float> x, const fake_quantize_options& o) noexcept {
    if (o.hadamard)
        rotate_hadamard(x);
    if (!o.basis.empty())
        leave_basis(o.basis, x);
}

#include <kv1/detail/precise_math_end.inl>

inline status check_rows(std::size_t channels, std::size_t x, std::size_t out,
                         const fake_quantize_options& o) noexcept {
    if (channels == 0 || channels > max_vector_length)
        return {errc::out_of_range, "a vector has 1 to 4096 channels"};
    if (x % channels != 0 || out != x)
        return {errc::shape_mismatch, "values in and out are the same number of whole vectors"};
    if (!o.centre.empty() && o.centre.size() != channels)
        return {errc::shape_mismatch, "the centre has one value per channel"};
    for (const std::span<const float> matrix : {o.basis, o.error_factors})
        if (!matrix.empty() && matrix.size() != channels * channels)
            return {errc::shape_mismatch, "a basis, and factors of error weights, are a square matrix"};
    return {};
}

// Whether Q knows the error weights that are asked for.
template <quantizer Q>
status check_error_weights(const fake_quantize_options& o) noexcept {
    if (!o.error_factors.empty() && (!scaled_levels<Q> || o.levels == level_choice::min_max))
        return {errc::invalid_argument, "error weights need least squares or a clip search"};
    return {};
}

inline status in_row(const status& s, std::size_t row) noexcept {
    return {s.code(), s.rule(), {.token = static_cast<std::int64_t>(row), .channel = s.where().channel}};
}

// What a cache asks of a vector before it looks at it closely.
template <quantizer Q>
status check_values(std::span<const float> x, const fake_quantize_options& o) noexcept {
    if (const std::size_t bad = first_non_finite(x); bad != x.size())
        return {errc::non_finite, rule_finite, {.channel = static_cast<std::int64_t>(bad)}};
    return chooses_levels<Q>(o) ? check_fp16_range(x) : status();
}

} // namespace detail

/// Forward pass: y gets what a cache gives back of the vectors x. x and y have the same size, a multiple of
/// channels; y may be x. Errors: out_of_range unless channels is 1 to 4096; shape_mismatch; non_finite;
/// not_representable if metadata, or a value of a fitted or compact format, do not fit fp16, whether metadata
/// are rounded or not; invalid_argument for error factors without a choice of levels.
template <quantizer Q>
status try_fake_quantize(std::size_t channels, std::span<const float> x, std::span<float> y,
                         const fake_quantize_options& options = {}) noexcept {
    if (const status s = detail::check_rows(channels, x.size(), y.size(), options); !s)
        return s;
    if (const status s = detail::check_error_weights<Q>(options); !s)
        return s;
    std::array<float, max_vector_length> values;
    std::array<std::uint8_t, max_vector_length> code_values;
    const std::span<float> moved(values.data(), channels);
    const std::span<std::uint8_t> codes(code_values.data(), channels);
    for (std::size_t at = 0; at < x.size(); at += channels) {
        const auto in = x.subspan(at, channels);
        if (const status s = detail::check_values<Q>(in, options); !s)
            return detail::in_row(s, at / channels);
        detail::transform(in, options, moved);
        detail::real_metadata m;
        if (const status s = detail::quantize_for_training<Q>(moved, options, codes, m); !s)
            return detail::in_row(s, at / channels);
        for (std::size_t i = 0; i < channels; ++i)
            moved[i] = detail::restore<Q>(codes[i], m);
        detail::turn_back(moved, options);
        for (std::size_t i = 0; i < channels; ++i)
            y[at + i] = options.centre.empty() ? moved[i] : moved[i] + options.centre[i];
    }
    return {};
}

/// Backward pass: dx gets the gradient at x of a loss whose gradient at y is dy. All have the same size; dx
/// may be dy. Errors: those of the forward pass. The straight-through rule does not read x, and refuses
/// shapes only.
template <quantizer Q>
status try_fake_quantize_gradient(std::size_t channels, std::span<const float> x, std::span<const float> dy,
                                  std::span<float> dx, const fake_quantize_options& options = {}) noexcept {
    if (const status s = detail::check_rows(channels, x.size(), dx.size(), options); !s)
        return s;
    if (dy.size() != dx.size())
        return {errc::shape_mismatch, "the two gradients have the same size"};
    if ((options.levels == level_choice::clip_search || !options.error_factors.empty()) &&
        options.gradient == fake_quantize_options::gradient_rule::fixed_codes)
        return {errc::invalid_argument,
                "a clip search and error weights have the straight-through gradient alone"};
    if (options.gradient == fake_quantize_options::gradient_rule::straight_through) {
        if (dx.data() != dy.data())
            std::copy(dy.begin(), dy.end(), dx.begin());
        return {};
    }
    std::array<float, max_vector_length> values;
    std::array<std::uint8_t, max_vector_length> code_values, refit_values;
    const std::span<float> moved(values.data(), channels);
    const std::span<std::uint8_t> codes(code_values.data(), channels), refit(refit_values.data(), channels);
    for (std::size_t at = 0; at < x.size(); at += channels) {
        const auto in = x.subspan(at, channels);
        if (const status s = detail::check_values<Q>(in, options); !s)
            return detail::in_row(s, at / channels);
        detail::transform(in, options, moved);
        detail::real_metadata m;
        if (const status s = detail::quantize_for_training<Q>(moved, options, codes, m, refit.data()); !s)
            return detail::in_row(s, at / channels);
        const auto g = dx.subspan(at, channels);
        if (dx.data() != dy.data())
            std::copy_n(dy.begin() + static_cast<std::ptrdiff_t>(at), channels, g.begin());
        if (!options.basis.empty())
            detail::enter_basis(options.basis, g);
        if (options.hadamard)
            detail::rotate_hadamard(g);
        detail::fixed_codes_gradient<Q>(moved, codes, m, refit, g);
        detail::turn_back(g, options);
    }
    return {};
}

namespace detail {

// Calls f with the quantizer of a coded format.
template <class F>
status with_quantizer(kv_format format, F&& f) noexcept {
    const status refusal{errc::unsupported_format, "not a coded format"};
    return with_format(all_formats{}, format, refusal, [&]<class Format>() noexcept {
        if constexpr (traits_of(kv_format_of<Format>).code_bits != 0)
            return f.template operator()<Format>();
        else
            return refusal;
    });
}

} // namespace detail

/// Forward and backward pass for a format chosen at run time. Plain formats give x back, rounded to the type
/// that they store; transforms and options do not affect them. Errors: those of the calls with a quantizer.
/// @{
inline status try_fake_quantize(kv_format format, std::size_t channels, std::span<const float> x,
                                std::span<float> y, const fake_quantize_options& options = {}) noexcept {
    if (format != kv_format::fp32 && format != kv_format::fp16)
        return detail::with_quantizer(
            format, [&]<class Q>() noexcept { return try_fake_quantize<Q>(channels, x, y, options); });
    if (const status s = detail::check_rows(channels, x.size(), y.size(), options); !s)
        return s;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const error_location where{.token = static_cast<std::int64_t>(i / channels),
                                   .channel = static_cast<std::int64_t>(i % channels)};
        if (!detail::is_finite(x[i]))
            return {errc::non_finite, detail::rule_finite, where};
        y[i] = format == kv_format::fp32 ? x[i] : detail::through_fp16(x[i]);
        if (!detail::is_finite(y[i]))
            return {errc::not_representable, detail::rule_fp16_value, where};
    }
    return {};
}

inline status try_fake_quantize_gradient(kv_format format, std::size_t channels, std::span<const float> x,
                                         std::span<const float> dy, std::span<float> dx,
                                         const fake_quantize_options& options = {}) noexcept {
    if (format != kv_format::fp32 && format != kv_format::fp16)
        return detail::with_quantizer(format, [&]<class Q>() noexcept {
            return try_fake_quantize_gradient<Q>(channels, x, dy, dx, options);
        });
    fake_quantize_options plain = options;
    plain.gradient = fake_quantize_options::gradient_rule::straight_through;
    return try_fake_quantize_gradient<binary>(channels, x, dy, dx, plain);
}
/// @}

#if KV1_EXCEPTIONS
/// The factors of a KV head's error weights, [channels][channels], for fake_quantize_options::error_factors. Throws
/// kv1::error, for the reasons that try_factor_error_weights() gives.
[[nodiscard]] inline std::vector<float> factor_error_weights(std::size_t channels,
                                                             std::span<const float> weights,
                                                             const fake_quantize_options& options = {}) {
    std::vector<float> factors(weights.size());
    detail::throw_if_error(try_factor_error_weights(channels, weights, factors, options));
    return factors;
}

/// Forward pass: y gets what a cache gives back of the vectors x, `channels` values each. x and y have the
/// same size; y may be x. Throws kv1::error: out_of_range unless channels is 1 to 4096; shape_mismatch;
/// non_finite; not_representable; invalid_argument.
/// @{
template <quantizer Q>
void fake_quantize(std::size_t channels, std::span<const float> x, std::span<float> y,
                   const fake_quantize_options& options = {}) {
    detail::throw_if_error(try_fake_quantize<Q>(channels, x, y, options));
}
inline void fake_quantize(kv_format format, std::size_t channels, std::span<const float> x,
                          std::span<float> y, const fake_quantize_options& options = {}) {
    detail::throw_if_error(try_fake_quantize(format, channels, x, y, options));
}
/// @}

/// Backward pass: dx gets the gradient at x of a loss whose gradient at y is dy. All have the same size; dx
/// may be dy. Throws kv1::error: as fake_quantize(); the straight-through rule refuses shapes only.
/// @{
template <quantizer Q>
void fake_quantize_gradient(std::size_t channels, std::span<const float> x, std::span<const float> dy,
                            std::span<float> dx, const fake_quantize_options& options = {}) {
    detail::throw_if_error(try_fake_quantize_gradient<Q>(channels, x, dy, dx, options));
}
inline void fake_quantize_gradient(kv_format format, std::size_t channels, std::span<const float> x,
                                   std::span<const float> dy, std::span<float> dx,
                                   const fake_quantize_options& options = {}) {
    detail::throw_if_error(try_fake_quantize_gradient(format, channels, x, dy, dx, options));
}
/// @}
#endif

} // namespace kv1::inline KV1_ABI
