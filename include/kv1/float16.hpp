// SPDX-License-Identifier: Apache-2.0
//
// float16 (IEEE 754 binary16) and bfloat16 as storage scalars: two bytes that widen to float exactly and are
// made from float with round-to-nearest-even. Overflow gives infinity, underflow gives subnormals and zero,
// NaN stays NaN (quiet, sign and upper payload bits kept), as the F16C and ARMv8 instructions do it.
// Arithmetic is done in float. All functions are constexpr and noexcept; bulk conversion is in convert.hpp.
#pragma once

#include <kv1/detail/config.hpp>

#include <bit>
#include <concepts>
#include <cstdint>

namespace kv1::inline KV1_ABI {

namespace detail {

constexpr std::uint16_t float_to_half(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t half = 0;
    if (magnitude > 0x7f800000u) { // NaN: quiet it, keep the payload's upper bits
        half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) { // 65520 and more round to infinity
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) { // normal half: re-bias the exponent, round at bit 13
        half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else if (magnitude > 0x33000000u) { // subnormal half: a multiple of 2^-24
        const std::uint32_t shift = 126u - (magnitude >> 23);
        const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        half = mantissa >> shift;
        const std::uint32_t rest = mantissa & ((1u << shift) - 1u);
        const std::uint32_t tie = 1u << (shift - 1u);
        half += (rest > tie || (rest == tie && (half & 1u) != 0u)) ? 1u : 0u;
    }
    return static_cast<std::uint16_t>(sign | half);
}

constexpr float half_to_float(std::uint16_t half) noexcept {
    const std::uint32_t sign = (static_cast<std::uint32_t>(half) & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 0x1fu;
    const std::uint32_t mantissa = half & 0x3ffu;
    std::uint32_t bits = 0;
    if (exponent == 0x1fu) {
        bits = 0x7f800000u | (mantissa << 13) | (mantissa != 0u ? 0x400000u : 0u);
    } else if (exponent != 0u) {
        bits = ((exponent + 112u) << 23) | (mantissa << 13);
    } else if (mantissa != 0u) { // subnormal: shift the leading one into the implicit place
        const auto shift = static_cast<std::uint32_t>(std::countl_zero(mantissa)) - 21u;
        bits = ((113u - shift) << 23) | (((mantissa << shift) & 0x3ffu) << 13);
    }
    return std::bit_cast<float>(sign | bits);
}

constexpr std::uint16_t float_to_bfloat(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float bfloat_to_float(std::uint16_t bits) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline constexpr float largest_half = 65504.0f;
inline constexpr float largest_bfloat = bfloat_to_float(0x7f7f);

// The nearest number of magnitude `largest` at most; NaN stays NaN.
constexpr float saturated(float value, float largest) noexcept {
    return value > largest ? largest : value < -largest ? -largest : value;
}

} // namespace detail

/// IEEE 754 binary16: 1 sign, 5 exponent, 10 mantissa bits; largest finite value 65504.
class float16 {
public:
    /// Not initialized, as a float is not.
    float16() = default;
    /// Rounds to nearest, ties to even.
    constexpr explicit float16(float value) noexcept : bits_(detail::float_to_half(value)) {}
    /// The number with these bits.
    [[nodiscard]] static constexpr float16 from_bits(std::uint16_t bits) noexcept {
        float16 result(0.0f);
        result.bits_ = bits;
        return result;
    }
    /// Sign, exponent and mantissa, from the high bit down.
    [[nodiscard]] constexpr std::uint16_t bits() const noexcept { return bits_; }
    /// Exact.
    constexpr operator float() const noexcept { return detail::half_to_float(bits_); }

private:
    std::uint16_t bits_;
};

/// bfloat16: the upper half of a float.
class bfloat16 {
public:
    /// Not initialized, as a float is not.
    bfloat16() = default;
    /// Rounds to nearest, ties to even.
    constexpr explicit bfloat16(float value) noexcept : bits_(detail::float_to_bfloat(value)) {}
    /// The number with these bits.
    [[nodiscard]] static constexpr bfloat16 from_bits(std::uint16_t bits) noexcept {
        bfloat16 result(0.0f);
        result.bits_ = bits;
        return result;
    }
    /// Sign, exponent and mantissa, from the high bit down.
    [[nodiscard]] constexpr std::uint16_t bits() const noexcept { return bits_; }
    /// Exact.
    constexpr operator float() const noexcept { return detail::bfloat_to_float(bits_); }

private:
    std::uint16_t bits_;
};

static_assert(sizeof(float16) == 2 && sizeof(bfloat16) == 2);

/// The element types that keys, values, queries and outputs may have.
template <class T>
concept scalar = std::same_as<T, float> || std::same_as<T, float16> || std::same_as<T, bfloat16>;

/// The same choice at run time.
enum class scalar_type : std::uint8_t { fp32, fp16, bf16 };

/// From the type to the run-time choice.
template <scalar T>
inline constexpr scalar_type scalar_type_of = std::same_as<T, float>     ? scalar_type::fp32
                                              : std::same_as<T, float16> ? scalar_type::fp16
                                                                         : scalar_type::bf16;

} // namespace kv1::inline KV1_ABI
