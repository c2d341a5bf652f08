// SPDX-License-Identifier: Apache-2.0
//
// The quantizer concept: from one vector to codes and metadata, and back.
//
// A quantizer is a stateless type. quantize() reads `n` channels and writes `n` codes, one byte each, and the
// metadata; it refuses NaN, infinity and metadata that fp16 cannot hold, and then writes nothing. The
// functions here are the plain definition, constant across processors; caches run vectorized ones that give
// the same bytes (kv1/row.hpp).
#pragma once

#include <kv1/float16.hpp>
#include <kv1/format.hpp>
#include <kv1/status.hpp>

#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace kv1::inline KV1_ABI {

/// The largest number of channels of a vector, whatever stores it. Pages of keys per channel, whose channels are
/// vectors of tokens, have no more tokens than this.
inline constexpr std::size_t max_vector_length = 4096;

/// How levels are chosen: from a vector's minimum and maximum, fitted (kv1/quantizers/least_squares.hpp), or
/// by a search over narrower ranges (kv1/quantizers/clip_search.hpp).
enum class level_choice : std::uint8_t { min_max, least_squares, clip_search };

/// Metadata of affine formats: value = scale * code + minimum, both rounded to fp16.
struct affine_metadata {
    float16 scale;   ///< of a step between codes
    float16 minimum; ///< value of code 0
};

/// Metadata of scaled binary.
struct scale_metadata {
    float16 scale; ///< magnitude of every channel
};

/// Binary has no metadata.
struct no_metadata {};

/// A scheme: bits, metadata, quantize() and dequantize(), as the head of this file says.
template <class Q>
concept quantizer = requires(std::span<const float> x, std::span<std::uint8_t> codes, std::uint8_t code,
                             typename Q::metadata metadata) {
    { Q::bits } -> std::convertible_to<int>;
    { Q::quantize(x, codes, metadata) }
    noexcept->std::same_as<status>;
    { Q::dequantize(code, metadata) }
    noexcept->std::same_as<float>;
};

namespace detail {

inline constexpr const char* rule_finite = "K and V must be finite";
inline constexpr const char* rule_fp16_metadata = "scale or minimum overflows fp16";
inline constexpr const char* rule_fp16_value = "the value overflows fp16";

// Comparisons work on bits. With -ffast-math a compiler removes the test for NaN, and a processor that takes
// denormals for zero does so in comparisons too.
constexpr bool is_finite(float x) noexcept {
    return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffu) < 0x7f800000u;
}
constexpr bool is_finite(float16 x) noexcept { return (x.bits() & 0x7fffu) < 0x7c00u; }

// x >= 0 for a finite x; true for -0.
constexpr bool is_non_negative(float x) noexcept { return std::bit_cast<std::uint32_t>(x) <= 0x80000000u; }

// Order-preserving integer image of a finite float, with -0 before +0.
constexpr std::int32_t ordered_bits(float x) noexcept {
    const auto bits = std::bit_cast<std::int32_t>(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Returns x, and hides from the optimizer where it came from; see precise_math_begin.inl.
#if defined(__clang__) && !defined(__x86_64__) && defined(__FAST_MATH__)
constexpr float as_written(float x) noexcept {
    if (!std::is_constant_evaluated())
        __asm__ volatile("" : "+r"(x));
    return x;
}
#else
constexpr float as_written(float x) noexcept { return x; }
#endif

// a * b, rounded. A following addition cannot fuse with it, so sums are the same bits on every processor.
inline float product_of(float a, float b) noexcept {
    float product = a * b;
#if (defined(__GNUC__) || defined(__clang__)) && defined(__SSE2__)
    __asm__("" : "+x"(product));
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__ARM_NEON)
    __asm__("" : "+w"(product));
#elif defined(__GNUC__) || defined(__clang__)
    __asm__("" : "+m"(product));
#endif
    return product;
}

struct value_extremes {
    float low, high;
};
// Minimum and maximum of a vector. -0 counts as +0. Preconditions: not empty, all finite.
inline value_extremes plain_range(std::span<const float> x) noexcept {
    value_extremes r{x[0] + 0.0f, x[0] + 0.0f};
    for (const float value : x) {
        const float v = value + 0.0f;
        r.low = v < r.low ? v : r.low;
        r.high = v > r.high ? v : r.high;
    }
    return r;
}

// The index of the first NaN or infinity; x.size() if there is none.
inline std::size_t first_non_finite(std::span<const float> x) noexcept {
    std::size_t i = 0;
    while (i < x.size() && is_finite(x[i]))
        ++i;
    return i;
}

inline status check_fp16_range(std::span<const float> x) noexcept {
    for (std::size_t i = 0; i < x.size(); ++i)
        if (!(std::fabs(x[i]) <= largest_half))
            return {errc::not_representable, rule_fp16_value, {.channel = static_cast<std::int64_t>(i)}};
    return {};
}

inline status check_vector(std::span<const float> x, std::span<std::uint8_t> codes) noexcept {
    if (codes.size() != x.size())
        return {errc::shape_mismatch, "one code per channel is needed"};
    if (x.empty())
        return {errc::invalid_argument, "a vector has at least one channel"};
    if (const std::size_t bad = first_non_finite(x); bad != x.size())
        return {errc::non_finite, rule_finite, {.channel = static_cast<std::int64_t>(bad)}};
    return {};
}

} // namespace detail

} // namespace kv1::inline KV1_ABI
