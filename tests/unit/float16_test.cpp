// SPDX-License-Identifier: Apache-2.0
//
// float16 and bfloat16 against an oracle in double, which shares no code with them.
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/convert.hpp>
#include <kv1/float16.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

using kv1::bfloat16;
using kv1::float16;
using kv1_test::bits_of;
using kv1_test::tally;

namespace {

// What the two formats are made of.
template <class T>
struct parameters;
template <>
struct parameters<float16> {
    static constexpr int mantissa_bits = 10, smallest_exponent = -14, bias = 15;
    static constexpr std::uint16_t infinity = 0x7c00;
};
template <>
struct parameters<bfloat16> {
    static constexpr int mantissa_bits = 7, smallest_exponent = -126, bias = 127;
    static constexpr std::uint16_t infinity = 0x7f80;
};

// The exact value of a finite pattern, from the definition: mantissa * 2^exponent.
template <class T>
double value_of(std::uint16_t bits) {
    using p = parameters<T>;
    const int exponent = (bits & 0x7fff) >> p::mantissa_bits;
    const int mantissa = bits & ((1 << p::mantissa_bits) - 1);
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, p::smallest_exponent - p::mantissa_bits)
                      : std::ldexp((1 << p::mantissa_bits) + mantissa, exponent - p::bias - p::mantissa_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Round to nearest even by the definition: the quantum of x's binade, the nearest multiple of it. Everything
// here is exact in double.
template <class T>
std::uint16_t rounded(double x) {
    using p = parameters<T>;
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(x);
    if (std::isinf(magnitude))
        return static_cast<std::uint16_t>(sign | p::infinity);
    const int exponent =
        magnitude == 0.0 ? p::smallest_exponent : std::max(std::ilogb(magnitude), p::smallest_exponent);
    const double scaled = std::ldexp(magnitude, p::mantissa_bits - exponent);
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    if (rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) == 1.0))
        whole += 1.0;
    // whole counts quanta: patterns of one sign are consecutive across binades, so a carry needs no care
    const auto pattern =
        static_cast<long>(whole) + static_cast<long>(exponent + p::bias - 1) * (1 << p::mantissa_bits);
    return static_cast<std::uint16_t>(sign | std::min(pattern, static_cast<long>(p::infinity)));
}

bool is_nan(float16 x) { return (x.bits() & 0x7fff) > 0x7c00; }
bool is_nan(bfloat16 x) { return (x.bits() & 0x7fff) > 0x7f80; }
bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

// Floats around everything that can go wrong: each pattern's value, the midpoint to the next one, one float
// below and above both.
template <class T>
std::vector<float> boundaries() {
    std::vector<float> x;
    const float infinity = std::numeric_limits<float>::infinity();
    for (unsigned bits = 0; bits < parameters<T>::infinity; ++bits) {
        const double here = value_of<T>(static_cast<std::uint16_t>(bits));
        const double next = bits + 1u == parameters<T>::infinity
                                ? 2 * here - value_of<T>(static_cast<std::uint16_t>(bits - 1))
                                : value_of<T>(static_cast<std::uint16_t>(bits + 1));
        for (const double at : {here, (here + next) / 2}) {
            const auto f = static_cast<float>(at);
            for (const float v : {f, std::nextafter(f, -infinity), std::nextafter(f, infinity)}) {
                x.push_back(v);
                x.push_back(-v);
            }
        }
    }
    return x;
}

bool same_or_both_nan(float a, float b) { return is_nan(a) ? is_nan(b) : bits_of(a) == bits_of(b); }

} // namespace

TEMPLATE_TEST_CASE("every 16-bit pattern widens to its value and comes back", "[float16]", float16,
                   bfloat16) {
    tally t;
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        const TestType x = TestType::from_bits(static_cast<std::uint16_t>(bits));
        const float wide = x;
        if (is_nan(x)) {
            // quiet, with the sign and the payload that there was
            const unsigned quiet = bits | (std::is_same_v<TestType, float16> ? 0x200u : 0x40u);
            t.expect(is_nan(wide) && TestType(wide).bits() == quiet, bits);
        } else if ((bits & 0x7fffu) == parameters<TestType>::infinity) {
            t.expect(std::isinf(wide) && std::signbit(wide) == (bits >= 0x8000u) &&
                         TestType(wide).bits() == bits,
                     bits);
        } else {
            t.expect(static_cast<double>(wide) == value_of<TestType>(static_cast<std::uint16_t>(bits)) &&
                         std::signbit(wide) == (bits >= 0x8000u) && TestType(wide).bits() == bits,
                     bits);
        }
    }
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(t.seen() == 65536);
}

TEMPLATE_TEST_CASE("narrowing rounds to nearest even at every boundary", "[float16]", float16, bfloat16) {
    tally t;
    for (const float x : boundaries<TestType>())
        t.expect(TestType(x).bits() == rounded<TestType>(x), x, TestType(x).bits(), rounded<TestType>(x));
    KV1_REQUIRE_CLEAN(t);
}

TEMPLATE_TEST_CASE("narrowing rounds random floats as the oracle does", "[float16]", float16, bfloat16) {
    kv1_test::generator g(1);
    tally t;
    for (int i = 0; i < 200000; ++i) {
        const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(g.bits()));
        if (is_nan(x))
            t.expect(is_nan(TestType(x)) && std::signbit(x) == ((TestType(x).bits() & 0x8000) != 0),
                     bits_of(x));
        else
            t.expect(TestType(x).bits() == rounded<TestType>(x), x);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("float16 overflows to infinity from 65520 on, and not below", "[float16]") {
    STATIC_REQUIRE(float16(65504.0f).bits() == 0x7bff);
    STATIC_REQUIRE(float16(65519.996f).bits() == 0x7bff);
    STATIC_REQUIRE(float16(65520.0f).bits() == 0x7c00);
    STATIC_REQUIRE(float16(-65519.996f).bits() == 0xfbff);
    STATIC_REQUIRE(float16(-65520.0f).bits() == 0xfc00);
    STATIC_REQUIRE(float16(std::numeric_limits<float>::max()).bits() == 0x7c00);
    STATIC_REQUIRE(float16(std::numeric_limits<float>::infinity()).bits() == 0x7c00);
    STATIC_REQUIRE(float16(-std::numeric_limits<float>::infinity()).bits() == 0xfc00);
}

TEST_CASE("float16 keeps subnormals and underflows to a zero of the same sign", "[float16]") {
    STATIC_REQUIRE(float16(0x1p-24f).bits() == 0x0001);
    STATIC_REQUIRE(float16(0x1p-25f).bits() == 0x0000); // a tie goes to the even zero
    STATIC_REQUIRE(float16(0x1.000002p-25f).bits() == 0x0001);
    STATIC_REQUIRE(float16(-0x1p-25f).bits() == 0x8000);
    STATIC_REQUIRE(float16(0x1.ff8p-15f).bits() == 0x03ff);
    STATIC_REQUIRE(float16(0x1.ffcp-15f).bits() == 0x0400); // a tie into the smallest normal
    STATIC_REQUIRE(float16(-0.0f).bits() == 0x8000);
    STATIC_REQUIRE(float16(std::numeric_limits<float>::denorm_min()).bits() == 0x0000);
}

TEST_CASE("bfloat16 overflows to infinity by rounding and keeps infinities", "[float16]") {
    STATIC_REQUIRE(bfloat16(std::numeric_limits<float>::max()).bits() == 0x7f80);
    STATIC_REQUIRE(bfloat16(std::bit_cast<float>(0x7f7f7fffu)).bits() == 0x7f7f);
    STATIC_REQUIRE(bfloat16(std::bit_cast<float>(0x7f7f8000u)).bits() == 0x7f80);
    STATIC_REQUIRE(bfloat16(-std::numeric_limits<float>::infinity()).bits() == 0xff80);
}

TEST_CASE("a NaN whose payload lies in the low bits alone stays a NaN", "[float16]") {
    for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0xffffffffu, 0x7f801fffu}) {
        const auto nan = std::bit_cast<float>(bits);
        REQUIRE(is_nan(float16(nan)));
        REQUIRE(is_nan(bfloat16(nan)));
        REQUIRE((float16(nan).bits() >> 15) == (bits >> 31));
        REQUIRE((bfloat16(nan).bits() >> 15) == (bits >> 31));
        REQUIRE((float16(nan).bits() & 0x3ff) == (0x200u | (bits >> 13 & 0x3ffu)));
        REQUIRE((bfloat16(nan).bits() & 0x7f) == (0x40u | (bits >> 16 & 0x7fu)));
    }
}

TEMPLATE_TEST_CASE("bulk widening equals the scalar on every target, whatever the pattern", "[float16]",
                   float16, bfloat16) {
    std::vector<TestType> in;
    for (unsigned bits = 0; bits < 0x10000u; ++bits)
        in.push_back(TestType::from_bits(static_cast<std::uint16_t>(bits)));
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<float> out(in.size());
        REQUIRE(kv1::try_convert(std::span<const TestType>(in), std::span<float>(out)));
        tally t;
        for (std::size_t i = 0; i < in.size(); ++i)
            t.expect(same_or_both_nan(out[i], in[i]), i, out[i]);
        KV1_REQUIRE_CLEAN(t);
    });
}

TEMPLATE_TEST_CASE("bulk narrowing equals the scalar on every target at every boundary", "[float16]", float16,
                   bfloat16) {
    std::vector<float> in = boundaries<TestType>();
    kv1_test::generator g(2);
    for (int i = 0; i < 100000; ++i)
        in.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(g.bits())));
    kv1_test::for_each_target([&](kv1::target) {
        std::vector<TestType> out(in.size());
        REQUIRE(kv1::try_convert(std::span<const float>(in), std::span<TestType>(out)));
        tally t;
        for (std::size_t i = 0; i < in.size(); ++i)
            t.expect(is_nan(in[i]) ? is_nan(out[i]) : out[i].bits() == TestType(in[i]).bits(), in[i],
                     out[i].bits());
        KV1_REQUIRE_CLEAN(t);
    });
}

TEMPLATE_TEST_CASE("bulk conversion writes its span and not a byte more, for any length", "[float16]",
                   float16, bfloat16) {
    kv1_test::generator g(3);
    const std::vector<float> source = kv1_test::normal_values(g, 80);
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for (std::size_t n = 0; n <= 70; ++n) {
            std::vector<TestType> narrow(n + 8, TestType(77.0f));
            REQUIRE(kv1::try_convert(std::span(source).first(n), std::span(narrow).subspan(3, n)));
            std::vector<float> wide(n + 8, 77.0f);
            REQUIRE(kv1::try_convert(std::span<const TestType>(narrow).subspan(3, n),
                                     std::span(wide).subspan(5, n)));
            for (std::size_t i = 0; i < narrow.size(); ++i) {
                const bool inside = i >= 3 && i < n + 3;
                t.expect(narrow[i].bits() == TestType(inside ? source[i - 3] : 77.0f).bits(), n, i);
            }
            for (std::size_t i = 0; i < wide.size(); ++i) {
                const bool inside = i >= 5 && i < n + 5;
                t.expect(wide[i] == (inside ? static_cast<float>(narrow[i - 2]) : 77.0f), n, i);
            }
        }
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("bulk conversion of floats to floats copies, also onto itself", "[float16]") {
    kv1_test::generator g(4);
    const std::vector<float> source = kv1_test::normal_values(g, 70);
    kv1_test::for_each_target([&](kv1::target) {
        for (std::size_t n = 0; n <= source.size(); ++n) {
            std::vector<float> out(n + 1, 77.0f);
            REQUIRE(kv1::try_convert(std::span(source).first(n), std::span(out).first(n)));
            REQUIRE(out.back() == 77.0f);
            REQUIRE(kv1_test::same_bits(std::span(source).first(n), std::span(out).first(n)));
            REQUIRE(kv1::try_convert(std::span<const float>(out), std::span(out)));
        }
    });
}

TEST_CASE("bulk conversion refuses spans of two sizes and writes nothing", "[float16]") {
    const std::array<float, 4> in{1, 2, 3, 4};
    std::array<float16, 3> narrow{float16(9.0f), float16(9.0f), float16(9.0f)};
    std::array<float, 5> wide{9, 9, 9, 9, 9};
    REQUIRE(kv1::try_convert(std::span<const float>(in), std::span<float16>(narrow)).code() ==
            kv1::errc::shape_mismatch);
    REQUIRE(kv1::try_convert(std::span<const float>(in), std::span<float>(wide)).code() ==
            kv1::errc::shape_mismatch);
    REQUIRE_THROWS_AS(kv1::convert(std::span<const float16>(narrow), std::span<float>(wide)), kv1::error);
    for (const float x : narrow)
        REQUIRE(x == 9.0f);
    for (const float x : wide)
        REQUIRE(x == 9.0f);
}

TEST_CASE("bulk conversion of nothing is no work, null or not", "[float16]") {
    kv1_test::for_each_target([](kv1::target) {
        REQUIRE(kv1::try_convert(std::span<const float>(), std::span<float>()));
        REQUIRE(kv1::try_convert(std::span<const float16>(), std::span<float>()));
        REQUIRE(kv1::try_convert(std::span<const float>(), std::span<bfloat16>()));
    });
}
