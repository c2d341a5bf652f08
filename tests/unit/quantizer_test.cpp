// SPDX-License-Identifier: Apache-2.0
//
// The quantizers' plain definitions: what they promise of errors, ranges and refusals.
#include "compare.hpp"
#include "random.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/quantizers/affine.hpp>
#include <kv1/quantizers/binary.hpp>
#include <kv1/quantizers/scaled_binary.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

using kv1::affine;
using kv1::binary;
using kv1::errc;
using kv1::scaled_binary;
using kv1_test::tally;

namespace {

struct missing_dequantize {
    static constexpr int bits = 2;
    using metadata = kv1::affine_metadata;
    static kv1::status quantize(std::span<const float>, std::span<std::uint8_t>, metadata&) noexcept {
        return {};
    }
};
struct throwing_quantize {
    static constexpr int bits = 2;
    using metadata = kv1::affine_metadata;
    static kv1::status quantize(std::span<const float>, std::span<std::uint8_t>, metadata&) { return {}; }
    static float dequantize(std::uint8_t, metadata) noexcept { return 0.0f; }
};
// A quantizer that is not the library's.
struct constant_zero {
    static constexpr int bits = 1;
    using metadata = kv1::no_metadata;
    static kv1::status quantize(std::span<const float>, std::span<std::uint8_t> codes, metadata&) noexcept {
        std::fill(codes.begin(), codes.end(), std::uint8_t{0});
        return {};
    }
    static float dequantize(std::uint8_t, metadata) noexcept { return 0.0f; }
};

template <class M>
std::array<unsigned, 2> bits_of_metadata(M m) {
    std::array<unsigned, 2> bits{};
    if constexpr (requires { m.scale; })
        bits[0] = m.scale.bits();
    if constexpr (requires { m.minimum; })
        bits[1] = m.minimum.bits();
    return bits;
}

// Metadata that no quantizer makes, to see whether it was written to.
template <class M>
M marked() {
    M m{};
    if constexpr (requires { m.scale; })
        m.scale = kv1::float16::from_bits(0x1234);
    if constexpr (requires { m.minimum; })
        m.minimum = kv1::float16::from_bits(0x4321);
    return m;
}

// Quantizes x into marked outputs and expects a refusal that leaves them alone.
template <class Q>
void require_refusal(std::span<const float> x, errc code, std::int64_t channel) {
    std::vector<std::uint8_t> codes(x.size(), 0xa5);
    auto m = marked<typename Q::metadata>();
    const kv1::status s = Q::quantize(x, codes, m);
    REQUIRE(s.code() == code);
    REQUIRE(s.where().channel == channel);
    REQUIRE(s.where().layer == -1);
    REQUIRE(s.where().token == -1);
    REQUIRE(std::all_of(codes.begin(), codes.end(), [](auto c) { return c == 0xa5; }));
    REQUIRE(bits_of_metadata(m) == bits_of_metadata(marked<typename Q::metadata>()));
}

// Largest error of rounding a positive number to fp16: half a quantum.
double half_quantum(double x) {
    const int exponent = x == 0.0 ? -14 : std::max(std::ilogb(std::fabs(x)), -14);
    return std::ldexp(1.0, exponent - 11);
}

} // namespace

TEMPLATE_TEST_CASE("the library's schemes are quantizers", "[quantizer]", affine<1>, affine<2>, affine<3>,
                   affine<4>, affine<5>, affine<6>, affine<7>, affine<8>, binary, scaled_binary) {
    STATIC_REQUIRE(kv1::quantizer<TestType>);
}

TEST_CASE("the quantizer concept takes strangers and refuses what lacks a part", "[quantizer]") {
    STATIC_REQUIRE(kv1::quantizer<constant_zero>);
    STATIC_REQUIRE_FALSE(kv1::quantizer<missing_dequantize>);
    STATIC_REQUIRE_FALSE(kv1::quantizer<throwing_quantize>);
    STATIC_REQUIRE_FALSE(kv1::quantizer<kv1::plain<float>>);
    STATIC_REQUIRE_FALSE(kv1::quantizer<int>);
}

TEMPLATE_TEST_CASE("NaN and infinity are refused with their channel, outputs untouched", "[quantizer]",
                   affine<1>, affine<2>, affine<3>, affine<4>, affine<8>, binary, scaled_binary) {
    const float bad_values[] = {
        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
        std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
    kv1_test::generator g(1);
    for (const std::size_t n : {std::size_t{1}, std::size_t{2}, std::size_t{31}, std::size_t{128}})
        for (const float bad : bad_values)
            for (const std::size_t at : {std::size_t{0}, n / 2, n - 1}) {
                std::vector<float> x = kv1_test::normal_values(g, n);
                x[at] = bad;
                require_refusal<TestType>(x, errc::non_finite, static_cast<std::int64_t>(at));
                x.back() = bad; // the first one is named
                require_refusal<TestType>(x, errc::non_finite, static_cast<std::int64_t>(at));
            }
}

TEMPLATE_TEST_CASE("an affine minimum or scale that fp16 can not hold is refused", "[quantizer]", affine<1>,
                   affine<2>, affine<3>, affine<4>, affine<8>) {
    const auto levels = static_cast<float>(TestType::max_code);
    // minimum: 65520 is the first magnitude that rounds to infinity
    require_refusal<TestType>(std::vector<float>{-65520.0f, -65519.0f}, errc::not_representable, -1);
    require_refusal<TestType>(std::vector<float>{65520.0f, 65520.0f}, errc::not_representable, -1);
    // scale
    require_refusal<TestType>(std::vector<float>{0.0f, 65520.0f * levels}, errc::not_representable, -1);
    require_refusal<TestType>(std::vector<float>{-3e38f, 3e38f}, errc::not_representable,
                              -1); // their difference: inf

    std::array<std::uint8_t, 2> codes{};
    kv1::affine_metadata m{};
    REQUIRE(TestType::quantize(std::array{-65519.0f, -65519.0f}, codes, m));
    REQUIRE(m.minimum == -65504.0f);
    REQUIRE(TestType::quantize(std::array{0.0f, 65519.0f * levels}, codes, m));
    REQUIRE(m.scale == 65504.0f);
}

TEST_CASE("a mean magnitude that fp16 can not hold is refused", "[quantizer]") {
    require_refusal<scaled_binary>(std::vector<float>{65520.0f, -65520.0f}, errc::not_representable, -1);
    require_refusal<scaled_binary>(std::vector<float>{3e38f, 3e38f, 3e38f}, errc::not_representable, -1);
    std::array<std::uint8_t, 2> codes{};
    kv1::scale_metadata m{};
    REQUIRE(scaled_binary::quantize(std::array{65519.0f, -65519.0f}, codes, m));
    REQUIRE(m.scale == 65504.0f);
    REQUIRE(scaled_binary::quantize(std::array{0.0f, 131000.0f}, codes,
                                    m)); // a channel may be larger than the mean
}

TEMPLATE_TEST_CASE("empty vectors and wrong code counts are refused", "[quantizer]", affine<2>, binary,
                   scaled_binary) {
    typename TestType::metadata m{};
    std::array<std::uint8_t, 3> codes{7, 7, 7};
    const std::array<float, 2> x{1.0f, 2.0f};
    REQUIRE(TestType::quantize(x, codes, m).code() == errc::shape_mismatch);
    REQUIRE(TestType::quantize(std::span<const float>{}, std::span<std::uint8_t>{}, m).code() ==
            errc::invalid_argument);
    REQUIRE(codes == std::array<std::uint8_t, 3>{7, 7, 7});
}

// Let lo and s be the unrounded minimum and scale, lo', s' the stored ones, c the code. Before the clamp
// |x - lo - s c| <= s (1/2 + rounding of the two operations), and the clamp only brings c nearer, so
//   |x - (s' c + lo')| <= s/2 + 4 u (hi - lo) + c |s - s'| + |lo - lo'| + u |value|
TEMPLATE_TEST_CASE("a dequantized value is within half a step, plus what fp16 metadata loses", "[quantizer]",
                   affine<1>, affine<2>, affine<3>, affine<4>, affine<5>, affine<6>, affine<7>, affine<8>) {
    kv1_test::generator g(2);
    tally t;
    for (int round = 0; round < 400; ++round) {
        const std::size_t n = g.between(1, 200);
        const auto spread = static_cast<float>(std::pow(10.0, 8.0 * g.uniform() - 4.0));
        const std::vector<float> x = kv1_test::normal_values(g, n, spread, 3.0f * spread * g.normal());
        std::vector<std::uint8_t> codes(n);
        kv1::affine_metadata m{};
        const kv1::status s = TestType::quantize(x, codes, m);
        if (s.code() == errc::not_representable)
            continue;
        REQUIRE(s);
        const auto [lo, hi] = std::minmax_element(x.begin(), x.end());
        const double step = std::max((static_cast<double>(*hi) - *lo) / TestType::max_code, 1e-6);
        for (std::size_t i = 0; i < n; ++i) {
            const double value = TestType::dequantize(codes[i], m);
            const double bound = 0.5 * step + 4 * kv1_test::unit_roundoff * (static_cast<double>(*hi) - *lo) +
                                 codes[i] * (half_quantum(step) * (1 + 1e-6) + 1e-7 * step) +
                                 half_quantum(*lo) + kv1_test::unit_roundoff * std::fabs(value);
            t.expect(codes[i] <= TestType::max_code && std::fabs(value - x[i]) <= bound, round, i, x[i],
                     value, bound);
        }
        // the extremes get the outermost codes
        t.expect(codes[static_cast<std::size_t>(lo - x.begin())] == 0, round);
        if (*hi - *lo >= 1e-6f * static_cast<float>(TestType::max_code))
            t.expect(codes[static_cast<std::size_t>(hi - x.begin())] == TestType::max_code, round);
    }
    KV1_REQUIRE_CLEAN(t);
}

// A vector that the format holds exactly comes back exactly: lo and s have few bits, and both extremes occur,
// so lo, hi - lo and s are computed without error.
TEMPLATE_TEST_CASE("quantizing representable dequantized values changes nothing", "[quantizer]", affine<1>,
                   affine<2>, affine<3>, affine<4>, affine<8>) {
    kv1_test::generator g(3);
    for (int round = 0; round < 200; ++round) {
        const auto lo = static_cast<float>(g.below(512)) / 32.0f - 8.0f;
        const auto scale = static_cast<float>(g.between(1, 127)) / 64.0f;
        std::vector<std::uint8_t> codes = kv1_test::random_codes(g, g.between(2, 70), TestType::bits);
        codes.front() = TestType::max_code;
        codes.back() = 0;
        const kv1::affine_metadata m{kv1::float16(scale), kv1::float16(lo)};
        std::vector<float> x;
        for (const std::uint8_t c : codes)
            x.push_back(TestType::dequantize(c, m));
        std::vector<std::uint8_t> again(codes.size());
        kv1::affine_metadata n{};
        REQUIRE(TestType::quantize(x, again, n));
        REQUIRE(again == codes);
        REQUIRE(bits_of_metadata(n) == bits_of_metadata(m));
    }
}

TEST_CASE("quantizing dequantized signs changes no bit", "[quantizer]") {
    kv1_test::generator g(4);
    for (int round = 0; round < 200; ++round) {
        const std::vector<float> x = kv1_test::normal_values(g, g.between(1, 300), 2.0f);
        std::vector<std::uint8_t> codes(x.size()), again(x.size());
        kv1::no_metadata none;
        REQUIRE(binary::quantize(x, codes, none));
        kv1::scale_metadata m{}, n{};
        REQUIRE(scaled_binary::quantize(x, again, m));
        REQUIRE(again == codes);
        std::vector<float> y;
        for (const std::uint8_t c : codes)
            y.push_back(scaled_binary::dequantize(c, m));
        REQUIRE(scaled_binary::quantize(y, again, n));
        REQUIRE(again == codes);
        REQUIRE(n.scale.bits() == m.scale.bits()); // the mean of equal magnitudes: 16 exact sums of multiples
    }
}

TEMPLATE_TEST_CASE("a constant vector gets code 0, the smallest scale and its value as minimum",
                   "[quantizer]", affine<1>, affine<2>, affine<3>, affine<4>, affine<8>) {
    for (const float value : {0.0f, 1.0f, -2.5f, 65504.0f, -65504.0f, 1e-30f, 1e-8f})
        for (const std::size_t n : {std::size_t{1}, std::size_t{2}, std::size_t{33}, std::size_t{4096}}) {
            const std::vector<float> x(n, value);
            std::vector<std::uint8_t> codes(n, 9);
            kv1::affine_metadata m{};
            REQUIRE(TestType::quantize(x, codes, m));
            REQUIRE(std::all_of(codes.begin(), codes.end(), [](auto c) { return c == 0; }));
            REQUIRE(m.scale.bits() == kv1::float16(1e-6f).bits());
            REQUIRE(m.minimum.bits() == kv1::float16(value).bits());
        }
}

TEST_CASE("the smallest scale of signs is 1e-6", "[quantizer]") {
    std::array<std::uint8_t, 3> codes{};
    kv1::scale_metadata m{};
    REQUIRE(scaled_binary::quantize(std::array{0.0f, -1e-9f, 1e-12f}, codes, m));
    REQUIRE(m.scale.bits() == kv1::float16(1e-6f).bits());
    REQUIRE(codes == std::array<std::uint8_t, 3>{1, 0, 1});
}

TEST_CASE("minus zero is below plus zero in the minimum and not negative in the signs", "[quantizer]") {
    std::array<std::uint8_t, 3> codes{};
    kv1::affine_metadata m{};
    const std::array<std::array<float, 3>, 4> orders{
        {{0.0f, -0.0f, 0.0f}, {-0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, -0.0f}, {-0.0f, -0.0f, -0.0f}}};
    for (const auto& x : orders) {
        REQUIRE(affine<2>::quantize(x, codes, m));
        REQUIRE(m.minimum.bits() == 0x8000);
    }
    REQUIRE(affine<2>::quantize(std::array{0.0f, 0.0f, 0.0f}, codes, m));
    REQUIRE(m.minimum.bits() == 0x0000);
    REQUIRE(affine<2>::quantize(std::array{-0.0f, 3.0f, 0.0f}, codes, m));
    REQUIRE(m.minimum.bits() == 0x8000);
    REQUIRE(codes == std::array<std::uint8_t, 3>{0, 3, 0});

    kv1::no_metadata none;
    REQUIRE(
        binary::quantize(std::array{-0.0f, 0.0f, -std::numeric_limits<float>::denorm_min()}, codes, none));
    REQUIRE(codes == std::array<std::uint8_t, 3>{1, 1, 0});
    kv1::scale_metadata scale{};
    REQUIRE(scaled_binary::quantize(std::array{-0.0f, 0.0f, -1.0f}, codes, scale));
    REQUIRE(codes == std::array<std::uint8_t, 3>{1, 1, 0});
}

TEST_CASE("ties between two codes go to the even one", "[quantizer]") {
    // lo = 0, scale = 1: the channels are at 0.5, 1.5 and 2.5 steps
    std::array<std::uint8_t, 5> codes{};
    kv1::affine_metadata m{};
    REQUIRE(affine<2>::quantize(std::array{0.0f, 3.0f, 0.5f, 1.5f, 2.5f}, codes, m));
    REQUIRE(codes == std::array<std::uint8_t, 5>{0, 3, 0, 2, 2});
}

TEST_CASE("codes come from the unrounded scale and minimum", "[quantizer]") {
    // scale 0.33340 rounds to 0.33350 in fp16: from it, channel 2 would lie below the tie at 1.5 steps
    const std::array<float, 3> x{0.0f, 1.0002f, 0.50015f};
    std::array<std::uint8_t, 3> codes{};
    kv1::affine_metadata m{};
    REQUIRE(affine<2>::quantize(x, codes, m));
    REQUIRE(codes[2] == 2);
    REQUIRE(x[2] / static_cast<float>(m.scale) < 1.5f);
}

TEMPLATE_TEST_CASE("try_quantize agrees with the definition and takes 1 to 4096 channels", "[quantizer]",
                   affine<1>, affine<2>, affine<3>, affine<4>, affine<5>, affine<6>, affine<7>, affine<8>,
                   binary, scaled_binary) {
    kv1_test::generator g(5);
    for (const std::size_t n : {std::size_t{1}, std::size_t{17}, std::size_t{4096}}) {
        const std::vector<float> x = kv1_test::normal_values(g, n);
        std::vector<std::uint8_t> expected(n), codes(n);
        typename TestType::metadata a{}, b{};
        REQUIRE(TestType::quantize(x, expected, a));
        REQUIRE(kv1::try_quantize<TestType>(x, codes, b));
        REQUIRE(codes == expected);
        REQUIRE(bits_of_metadata(a) == bits_of_metadata(b));
    }
    typename TestType::metadata m{};
    const std::vector<float> large(4097, 1.0f);
    std::vector<std::uint8_t> codes(4097);
    REQUIRE(kv1::try_quantize<TestType>(large, codes, m).code() == errc::out_of_range);
    REQUIRE(kv1::try_quantize<TestType>(std::span<const float>{}, std::span<std::uint8_t>{}, m).code() ==
            errc::out_of_range);
    REQUIRE(kv1::try_quantize<TestType>(large, std::span(codes).first(4096), m).code() ==
            errc::shape_mismatch);
}

TEMPLATE_TEST_CASE("a row that is refused leaves bytes and metadata as they were", "[quantizer]", affine<1>,
                   affine<2>, affine<3>, affine<4>, affine<8>, binary, scaled_binary) {
    std::vector<float> x(50, 1.0f);
    x[33] = std::numeric_limits<float>::infinity();
    std::vector<std::byte> packed(kv1::packed_size<TestType::bits>(50), std::byte{0xa5});
    auto m = marked<typename TestType::metadata>();
    const kv1::status s = kv1::try_encode_row<TestType>(x, packed, m);
    REQUIRE(s.code() == errc::non_finite);
    REQUIRE(s.where().channel == 33);
    REQUIRE(std::all_of(packed.begin(), packed.end(), [](auto b) { return b == std::byte{0xa5}; }));
    REQUIRE(bits_of_metadata(m) == bits_of_metadata(marked<typename TestType::metadata>()));
    REQUIRE_THROWS_AS(kv1::encode_row<TestType>(x, packed, m), kv1::error);

    x[33] = 1.0f;
    REQUIRE(kv1::try_encode_row<TestType>(x, std::span(packed).first(packed.size() - 1), m).code() ==
            errc::shape_mismatch);
    REQUIRE(kv1::try_encode_row<TestType>(x, packed, m));
    std::vector<float> y(50);
    REQUIRE(kv1::try_decode_row<TestType>(packed, m, y));
    REQUIRE(kv1::try_decode_row<TestType>(packed, m, std::span(y).first(20)).code() == errc::shape_mismatch);
    for (const float v : y)
        REQUIRE(v ==
                TestType::dequantize(TestType::bits == 1 && !std::is_same_v<TestType, affine<1>> ? 1 : 0, m));
}
