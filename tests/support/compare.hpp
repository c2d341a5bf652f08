// SPDX-License-Identifier: Apache-2.0
//
// Comparing many values with one assertion: Catch2's macros are too slow for millions of them.
#pragma once

#include <catch2/catch_test_macros.hpp>
#include <catch2/catch_tostring.hpp>

#include <kv1/float16.hpp>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <sstream>
#include <string>

namespace kv1_test {

/// Half the distance between 1 and the next float: the largest relative error of one rounding to fp32.
inline constexpr double unit_roundoff = 0x1p-24;

/// gamma(n) = n u / (1 - n u): bounds the relative error of n successive roundings (Higham).
[[nodiscard]] constexpr double gamma(double n) noexcept {
    return n * unit_roundoff / (1.0 - n * unit_roundoff);
}

[[nodiscard]] inline std::uint32_t bits_of(float x) noexcept { return std::bit_cast<std::uint32_t>(x); }
[[nodiscard]] inline std::uint16_t bits_of(kv1::float16 x) noexcept { return x.bits(); }
[[nodiscard]] inline std::uint16_t bits_of(kv1::bfloat16 x) noexcept { return x.bits(); }
[[nodiscard]] inline std::uint8_t bits_of(std::uint8_t x) noexcept { return x; }
[[nodiscard]] inline std::uint8_t bits_of(std::byte x) noexcept { return std::to_integer<std::uint8_t>(x); }

/// |a - b| over |b|; infinite where b alone is zero.
[[nodiscard]] inline double relative_error(double a, double b) noexcept {
    return a == b ? 0.0 : std::fabs(a - b) / std::fabs(b);
}

/// Counts failed comparisons and remembers the first; check it once with REQUIRE(tally.clean()).
class tally {
public:
    template <class... Describe>
    void expect(bool holds, const Describe&... describe) {
        ++seen_;
        if (holds || ++failed_ != 1)
            return;
        std::ostringstream text;
        ((text << describe << ' '), ...);
        first_ = text.str();
    }
    [[nodiscard]] bool clean() const noexcept { return failed_ == 0 && seen_ != 0; }
    [[nodiscard]] std::size_t seen() const noexcept { return seen_; }
    [[nodiscard]] std::string report() const {
        return std::to_string(failed_) + " of " + std::to_string(seen_) + " failed; the first: " + first_;
    }

private:
    std::size_t seen_ = 0, failed_ = 0;
    std::string first_;
};

/// Index of the first element whose bits differ; where there is none, the smaller size.
template <class A, class B>
[[nodiscard]] std::size_t first_difference(const A& a, const B& b) {
    std::size_t i = 0;
    while (i < std::size(a) && i < std::size(b) && bits_of(a[i]) == bits_of(b[i]))
        ++i;
    return i;
}

/// The same size and the same bits.
template <class A, class B>
[[nodiscard]] bool same_bits(const A& a, const B& b) {
    return std::size(a) == std::size(b) && first_difference(a, b) == std::size(a);
}

} // namespace kv1_test

/// Fails with the tally's first case.
#define KV1_REQUIRE_CLEAN(tally_)                                                                            \
    do {                                                                                                     \
        INFO((tally_).report());                                                                             \
        REQUIRE((tally_).clean());                                                                           \
    } while (false)
