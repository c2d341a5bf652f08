// SPDX-License-Identifier: Apache-2.0
//
// Quantizing gives the same codes and metadata on every target, for vectors of every kind.
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/row.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

using kv1::affine;
using kv1_test::generator;
using kv1_test::tally;

namespace {

std::size_t random_length(generator& g) {
    if (g.chance(0.02))
        return 4096;
    return g.chance(0.3) ? g.between(1, 20) : g.between(1, 300);
}

float signed_power(generator& g) { // magnitudes 1e-30 ... 6e4
    const double magnitude = std::pow(10.0, -30.0 + 34.77 * g.uniform());
    return static_cast<float>(g.chance(0.5) ? magnitude : -magnitude);
}

// One of many kinds of vectors that a quantizer must not stumble over.
std::vector<float> awkward_vector(generator& g) {
    std::vector<float> x(random_length(g));
    const std::size_t kind = g.below(9);
    const float scale = std::fabs(signed_power(g)), offset = g.chance(0.3) ? signed_power(g) : 0.0f;
    for (float& v : x)
        switch (kind) {
        case 0: // plain
            v = g.normal();
            break;
        case 1: // any magnitude, one for the vector
            v = scale * g.normal() + offset;
            break;
        case 2: // any magnitude, channel by channel
            v = signed_power(g);
            break;
        case 3: // outliers
            v = g.chance(0.02) ? 1000.0f * g.normal() : g.normal();
            break;
        case 4: // denormals
            v = std::bit_cast<float>(static_cast<std::uint32_t>(g.bits() & 0x807fffffu));
            break;
        case 5: // constants
            v = offset;
            break;
        case 6: // zeros of both signs
            v = g.chance(0.5) ? 0.0f : -0.0f;
            break;
        case 7: // ties between codes: multiples of half a step
            v = static_cast<float>(g.below(15)) * 0.5f;
            break;
        default: // any pattern that is finite and not huge
            v = std::bit_cast<float>(static_cast<std::uint32_t>(g.bits()));
            if (!(std::fabs(v) < 6e4f))
                v = g.normal();
        }
    if (kind == 7 && x.size() > 2) {
        x[g.below(x.size())] = 0.0f;
        x[g.below(x.size())] = 7.0f;
    }
    return x;
}

// Outcome of quantizing, to be compared whole.
struct outcome {
    kv1::errc code{};
    std::int64_t channel = -1;
    std::uint16_t scale = 0, minimum = 0;
    std::vector<std::uint8_t> codes;
    friend bool operator==(const outcome&, const outcome&) = default;
};

template <class Q>
outcome quantized(const std::vector<float>& x) {
    outcome o;
    o.codes.assign(x.size(), 0xee);
    typename Q::metadata m{};
    const kv1::status s = kv1::try_quantize<Q>(x, o.codes, m);
    o.code = s.code();
    o.channel = s.where().channel;
    if constexpr (requires { m.scale; })
        o.scale = m.scale.bits();
    if constexpr (requires { m.minimum; })
        o.minimum = m.minimum.bits();
    return o;
}

template <class Q>
outcome defined(const std::vector<float>& x) {
    outcome o;
    o.codes.assign(x.size(), 0xee);
    typename Q::metadata m{};
    const kv1::status s = Q::quantize(x, o.codes, m);
    o.code = s.code();
    o.channel = s.where().channel;
    if constexpr (requires { m.scale; })
        o.scale = m.scale.bits();
    if constexpr (requires { m.minimum; })
        o.minimum = m.minimum.bits();
    return o;
}

template <class Q>
void check_on_every_target(const std::vector<std::vector<float>>& vectors) {
    std::vector<outcome> expected;
    for (const auto& x : vectors)
        expected.push_back(defined<Q>(x));
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for (std::size_t i = 0; i < vectors.size(); ++i)
            t.expect(quantized<Q>(vectors[i]) == expected[i], "vector", i, "of", vectors[i].size(),
                     "channels");
        KV1_REQUIRE_CLEAN(t);
    });
}

} // namespace

#define KV1_ALL_QUANTIZERS                                                                                   \
    affine<1>, affine<2>, affine<3>, affine<4>, affine<5>, affine<6>, affine<7>, affine<8>, kv1::binary,     \
        kv1::scaled_binary

TEMPLATE_TEST_CASE("every target gives the definition's codes and metadata, byte for byte", "[quantizer]",
                   KV1_ALL_QUANTIZERS) {
    generator g(11);
    std::vector<std::vector<float>> vectors;
    for (int i = 0; i < 600; ++i)
        vectors.push_back(awkward_vector(g));
    for (std::size_t n = 1; n <= 100; ++n) // every tail of every register width
        vectors.push_back(kv1_test::normal_values(g, n));
    check_on_every_target<TestType>(vectors);
}

TEMPLATE_TEST_CASE("every target refuses NaN and infinity wherever they are and names the first",
                   "[quantizer]", KV1_ALL_QUANTIZERS) {
    generator g(12);
    constexpr std::uint32_t bad[] = {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff800001u,
                                     0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff800000u};
    std::vector<std::vector<float>> vectors;
    for (int i = 0; i < 400; ++i) {
        std::vector<float> x = kv1_test::normal_values(g, random_length(g));
        for (std::size_t k = g.between(1, 3); k != 0; --k)
            x[g.below(x.size())] = std::bit_cast<float>(bad[g.below(8)]);
        vectors.push_back(std::move(x));
    }
    for (std::size_t at = 0; at < 67; ++at)
        for (const std::uint32_t bits : {0x7fc00000u, 0xff800000u}) {
            std::vector<float> x(67, 1.0f);
            x[at] = std::bit_cast<float>(bits);
            vectors.push_back(std::move(x));
        }
    for (const auto& x : vectors)
        REQUIRE(defined<TestType>(x).code == kv1::errc::non_finite);
    check_on_every_target<TestType>(vectors);
}

TEMPLATE_TEST_CASE("every target refuses the same metadata that overflows fp16", "[quantizer]",
                   KV1_ALL_QUANTIZERS) {
    generator g(13);
    std::vector<std::vector<float>> vectors;
    for (int i = 0; i < 300; ++i) {
        std::vector<float> x = kv1_test::normal_values(g, random_length(g), 20000.0f);
        if (g.chance(0.5))
            x[g.below(x.size())] *= 1e30f;
        vectors.push_back(std::move(x));
    }
    for (const float edge : {65519.0f, 65519.996f, 65520.0f, 65504.0f})
        for (const std::size_t n : {std::size_t{1}, std::size_t{16}, std::size_t{45}}) {
            vectors.emplace_back(n, edge);
            vectors.emplace_back(n, -edge);
        }
    check_on_every_target<TestType>(vectors);
}

TEMPLATE_TEST_CASE("every target packs the same rows", "[quantizer]", affine<1>, affine<2>, affine<3>,
                   affine<4>, affine<8>, kv1::binary, kv1::scaled_binary) {
    generator g(14);
    std::vector<std::vector<float>> vectors;
    for (int i = 0; i < 200; ++i)
        vectors.push_back(awkward_vector(g));
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for (std::size_t i = 0; i < vectors.size(); ++i) {
            const outcome expected = defined<TestType>(vectors[i]);
            if (expected.code != kv1::errc::ok)
                continue;
            const std::size_t n = vectors[i].size();
            std::vector<std::byte> packed(kv1::packed_size<TestType::bits>(n), std::byte{0xff});
            typename TestType::metadata m{};
            REQUIRE(kv1::try_encode_row<TestType>(vectors[i], packed, m));
            std::vector<std::byte> naive(packed.size());
            for (std::size_t c = 0; c < n; ++c)
                for (int b = 0; b < TestType::bits; ++b)
                    if ((expected.codes[c] >> b & 1) != 0) {
                        const std::size_t at =
                            c * static_cast<std::size_t>(TestType::bits) + static_cast<std::size_t>(b);
                        naive[at / 8] |= std::byte{1} << (at % 8);
                    }
            t.expect(packed == naive, i, n);
        }
        KV1_REQUIRE_CLEAN(t);
    });
}
