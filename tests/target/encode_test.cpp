// SPDX-License-Identifier: Apache-2.0
//
// Fitted levels, rotations, means and error weights: what they promise of single vectors, on every target.
#include "compare.hpp"
#include "formats.hpp"
#include "random.hpp"
#include "targets.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/detail/encode_reference.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>
#include <vector>

using kv1::affine;
using kv1::clip_search;
using kv1::codebook2;
using kv1::codebook4;
using kv1::compact;
using kv1::least_squares;
using kv1_test::generator;
using kv1_test::tally;

namespace {

std::vector<float> vector_of_kind(generator& g, std::size_t kind, std::size_t n) {
    std::vector<float> x(n);
    const auto scale = static_cast<float>(std::pow(10.0, -7.0 + 11.0 * g.uniform()));
    const float offset = g.chance(0.5) ? scale * 3.0f * g.normal() : 0.0f;
    for (float& v : x)
        switch (kind) {
        case 0:
            v = g.normal();
            break;
        case 1: // any magnitude that fp16 metadata can tell
            v = std::clamp(scale * g.normal() + offset, -60000.0f, 60000.0f);
            break;
        case 2: // outliers
            v = g.chance(0.05) ? 100.0f * g.normal() : g.normal();
            break;
        case 3: // constants
            v = std::clamp(offset, -60000.0f, 60000.0f);
            break;
        case 4: // zeros of both signs
            v = g.chance(0.5) ? 0.0f : -0.0f;
            break;
        case 5: // few distinct values
            v = static_cast<float>(g.below(3));
            break;
        case 6: // heavy on one side
            v = std::exp(2.0f * g.normal());
            break;
        default: // ties
            v = static_cast<float>(g.below(15)) * 0.5f;
        }
    return x;
}

std::vector<std::vector<float>> vectors_of_every_kind(std::uint64_t seed, std::size_t each) {
    generator g(seed);
    std::vector<std::vector<float>> all;
    for (std::size_t kind = 0; kind < 8; ++kind)
        for (std::size_t i = 0; i < each; ++i)
            all.push_back(vector_of_kind(g, kind, i < 40 ? i + 1 : g.between(1, 300)));
    all.push_back(vector_of_kind(g, 0, 4096));
    all.push_back(vector_of_kind(g, 2, 1025)); // past what goes through lanes
    return all;
}

struct measured {
    double error = 0.0;    // sum of squares
    double rounding = 0.0; // by which fp32 may misjudge it
};

template <class Q>
measured measure(const std::vector<float>& x) {
    constexpr double u = kv1_test::unit_roundoff;
    std::vector<std::uint8_t> codes(x.size());
    typename Q::metadata m{};
    REQUIRE(Q::quantize(x, codes, m));
    const double step = static_cast<double>(Q::dequantize(1, m)) - static_cast<double>(Q::dequantize(0, m));
    measured r;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double y = Q::dequantize(codes[i], m), e = static_cast<double>(x[i]) - y;
        r.error += e * e;
        // e is off by a rounding of y and one of itself; a code by a tie that three roundings may decide
        r.rounding += 2 * std::fabs(e) * u * (std::fabs(y) + std::fabs(e)) +
                      8 * u * Q::max_code * step * step +
                      8 * u * std::fabs(step) * (std::fabs(y) + std::fabs(static_cast<double>(x[i])));
    }
    r.rounding += r.error * kv1_test::gamma(static_cast<double>(x.size()) + 4);
    return r;
}

template <class Q>
std::vector<float> decoded(const std::vector<float>& x) {
    std::vector<std::uint8_t> codes(x.size());
    typename Q::metadata m{};
    REQUIRE(Q::quantize(x, codes, m));
    std::vector<float> y;
    for (const std::uint8_t c : codes)
        y.push_back(Q::dequantize(c, m));
    return y;
}

// Factors of one KV head, as the encoder takes them.
kv1::detail::feedback_matrices rounded(const std::vector<float>& factored, std::size_t n) {
    kv1::detail::feedback_matrices m;
    REQUIRE(m.begin(1, n));
    m.set(0, factored.data());
    return m;
}

struct outcome {
    kv1::errc code{};
    std::int64_t channel = -1;
    std::uint16_t scale = 0, minimum = 0;
    std::vector<std::uint8_t> codes;
    friend bool operator==(const outcome&, const outcome&) = default;
};

template <class Metadata>
outcome outcome_of(const kv1::status& s, const Metadata& m, std::vector<std::uint8_t> codes) {
    outcome o{s.code(), s.where().channel, m.scale.bits(), 0, std::move(codes)};
    if constexpr (requires { m.minimum; })
        o.minimum = m.minimum.bits();
    return o;
}

} // namespace

// Levels of codebooks, from their definition.
constexpr double sixteen_levels[] = {0.0,  4.0,  7.0,  9.0,  11.0, 13.0, 15.0, 17.0,
                                     19.0, 21.0, 23.0, 25.0, 27.0, 29.0, 32.0, 36.0};
template <class Q>
std::vector<double> levels_of_codebook() {
    if (std::is_same_v<Q, codebook2>)
        return {0.0, 5.0, 9.0, 14.0};
    return {std::begin(sixteen_levels), std::end(sixteen_levels)};
}

template <class F>
using itself = F;
using fitted_types = kv1_test::fitted_types<itself>;
using fitted_types_to_4_bits = kv1_test::fitted_types<itself, 4>;
template <class... Types>
using joined = decltype(std::tuple_cat(Types{}...));
// and compact formats as they are, whose ranges can be chosen, too
using chosen_levels = joined<kv1_test::fitted_types<least_squares>, kv1_test::fitted_types<clip_search>,
                             std::tuple<compact<2>, compact<3>, compact<4>, codebook2, codebook4>>;

TEMPLATE_LIST_TEST_CASE("least squares and clip search are no worse than min/max on any vector", "[encode]",
                        fitted_types) {
    tally t;
    for (const auto& x : vectors_of_every_kind(31, 200)) {
        const measured plain = measure<TestType>(x);
        for (const measured& fitted :
             {measure<least_squares<TestType>>(x), measure<clip_search<TestType>>(x)})
            t.expect(fitted.error <= plain.error + fitted.rounding + plain.rounding, x.size(), "channels",
                     fitted.error, "against", plain.error);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEMPLATE_TEST_CASE("clip search takes the best of its candidates", "[encode]", affine<2>, affine<3>,
                   compact<2>) {
    tally t;
    for (const auto& x : vectors_of_every_kind(41, 60)) {
        if (x.size() < 2)
            continue;
        const measured found = measure<clip_search<TestType>>(x);
        const auto [lo, hi] = std::minmax_element(x.begin(), x.end());
        for (int k = 1; k < 10; ++k) {
            const float share = static_cast<float>(16 - k) / 16.0f;
            const kv1::detail::stored_levels l = kv1::detail::clipped_levels<TestType>(*lo, *hi, k);
            if (!l.fits)
                continue;
            // the candidate is what the formula says, but for what its metadata can hold
            const double step =
                static_cast<double>(*hi - *lo) * static_cast<double>(share) / TestType::max_code;
            if (step > 1e-4)
                t.expect(std::fabs(static_cast<double>(l.scale) - step) <= 0.04 * step, k, l.scale, step);
            double error = 0.0;
            for (const float v : x) {
                const double code =
                    std::clamp(std::nearbyint((static_cast<double>(v) - static_cast<double>(l.base)) /
                                              static_cast<double>(l.scale)),
                               0.0, static_cast<double>(TestType::max_code));
                const double e = static_cast<double>(v) -
                                 (code * static_cast<double>(l.scale) + static_cast<double>(l.base));
                error += e * e;
            }
            t.expect(found.error <= error + 2 * found.rounding + 1e-5 * error, x.size(),
                     "channels, candidate", k, found.error, "against", error);
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE(
    "at 2 bits least squares takes a third off the error of Gaussian channels, two thirds with outliers",
    "[encode]") {
    generator g(32);
    double plain = 0.0, fitted = 0.0, plain_outliers = 0.0, fitted_outliers = 0.0;
    for (int i = 0; i < 400; ++i) {
        std::vector<float> x = kv1_test::normal_values(g, 128);
        plain += measure<affine<2>>(x).error;
        fitted += measure<least_squares<affine<2>>>(x).error;
        x[g.below(128)] = 8.0f;
        x[g.below(128)] = -8.0f;
        plain_outliers += measure<affine<2>>(x).error;
        fitted_outliers += measure<least_squares<affine<2>>>(x).error;
    }
    CAPTURE(plain, fitted, plain_outliers, fitted_outliers);
    REQUIRE(fitted < 0.6667 * plain);
    REQUIRE(fitted_outliers < 0.3333 * plain_outliers);
}

TEMPLATE_LIST_TEST_CASE("what was decoded is encoded to itself where the outer levels are in use", "[encode]",
                        fitted_types_to_4_bits) {
    generator g(33);
    tally t;
    std::size_t seen = 0;
    for (int i = 0; i < 400; ++i) {
        const std::vector<float> once =
            decoded<least_squares<TestType>>(kv1_test::normal_values(g, g.between(8, 200)));
        const auto [lo, hi] = std::minmax_element(once.begin(), once.end());
        std::vector<std::uint8_t> codes(once.size());
        typename TestType::metadata m{};
        REQUIRE(least_squares<TestType>::quantize(once, codes, m));
        if (*std::min_element(codes.begin(), codes.end()) != 0 ||
            *std::max_element(codes.begin(), codes.end()) != TestType::max_code)
            continue;
        ++seen;
        // a step is a fp16 number; the smallest half step that may be confused is far above this
        const std::vector<float> twice = decoded<least_squares<TestType>>(once);
        const double allowed = 1e-3 * (static_cast<double>(*hi) - static_cast<double>(*lo));
        for (std::size_t c = 0; c < once.size(); ++c)
            t.expect(std::fabs(static_cast<double>(once[c]) - static_cast<double>(twice[c])) <= allowed, i, c,
                     once[c], twice[c]);
    }
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(seen > 200);
}

TEMPLATE_TEST_CASE("a codebook's codes are those of the nearest levels", "[encode]", codebook2, codebook4) {
    generator g(40);
    tally t;
    const std::vector<double> levels = levels_of_codebook<TestType>();
    for (int i = 0; i < 300; ++i) {
        const std::vector<float> x = kv1_test::normal_values(g, g.between(1, 140));
        std::vector<std::uint8_t> codes(x.size());
        kv1::compact_metadata m{};
        REQUIRE(
            (i % 2 == 0 ? TestType::quantize(x, codes, m) : least_squares<TestType>::quantize(x, codes, m)));
        const kv1::detail::affine_map p =
            kv1::detail::decode_metadata(kv1::kv_format_of<TestType>, {m.scale.bits(), 0});
        for (std::size_t c = 0; c < x.size(); ++c) {
            const auto at = [&](std::size_t code) {
                return levels[code] * static_cast<double>(p.slope) + static_cast<double>(p.base);
            };
            t.expect(static_cast<double>(TestType::dequantize(codes[c], m)) == at(codes[c]), i, c, "value");
            const double off = std::fabs(static_cast<double>(x[c]) - at(codes[c]));
            for (std::size_t other = 0; other < levels.size(); ++other) // but for what fp32 rounds half-way
                t.expect(off <= std::fabs(static_cast<double>(x[c]) - at(other)) + 1e-5, i, c, x[c], codes[c],
                         other);
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

// Of thousandths over all levels and beyond, and of numbers close to each boundary.
TEMPLATE_TEST_CASE("a codebook's rule gives the nearest level, and its levels are the format's", "[encode]",
                   codebook2, codebook4) {
    const std::vector<double> levels = levels_of_codebook<TestType>();
    const kv1::detail::format_traits& traits = kv1::detail::traits_of(kv1::kv_format_of<TestType>);
    tally t;
    using rule_type = kv1::detail::code_rule<TestType>;
    REQUIRE(levels.size() == std::size_t{1} << traits.code_bits);
    REQUIRE(static_cast<double>(traits.top_level()) == levels.back());
    REQUIRE(static_cast<double>(kv1::detail::level_format<TestType>::top) == levels.back());
    for (std::size_t c = 0; c < levels.size(); ++c) {
        t.expect(static_cast<double>(rule_type::level(static_cast<float>(c))) == levels[c], "rule", c);
        t.expect(static_cast<double>(traits.level(static_cast<std::uint32_t>(c))) == levels[c], "format", c);
    }
    std::vector<float> numbers;
    for (int i = -5000; i <= 45000; ++i)
        numbers.push_back(static_cast<float>(i) / 1000.0f);
    constexpr float away = 1e-5f; // of a boundary; fp32 rounds within a few millionths
    for (std::size_t c = 1; c < levels.size(); ++c)
        for (const float off : {-away, away})
            numbers.push_back(static_cast<float>(0.5 * (levels[c - 1] + levels[c])) + off);
    for (const float scale : {1.0f, 0.0625f, 1536.0f})
        for (const float base : {0.0f, -18.0f}) {
            const rule_type rule(scale, scale * base);
            for (const float x : numbers) {
                const auto code = static_cast<std::size_t>(rule.code(scale * (x + base)));
                const double off = std::fabs(static_cast<double>(x) - levels[code]);
                for (const double other : levels)
                    t.expect(off <= std::fabs(static_cast<double>(x) - other) + 5e-6, scale, base, x, code,
                             other);
            }
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("sixteen uneven levels take a tenth off the error of normal channels that even levels leave",
          "[encode]") {
    generator g(43);
    for (const std::size_t n : {std::size_t{32}, std::size_t{64}, std::size_t{128}}) {
        double even = 0.0, uneven = 0.0;
        for (int i = 0; i < 2000; ++i) {
            const std::vector<float> x = kv1_test::normal_values(g, n);
            even += measure<least_squares<compact<4>>>(x).error;
            uneven += measure<least_squares<codebook4>>(x).error;
        }
        CAPTURE(n, even, uneven);
        REQUIRE(uneven < 0.9 * even);
    }
}

TEST_CASE("a codebook takes a hundredth off the error of normal channels that even levels leave",
          "[encode]") {
    generator g(42);
    for (const std::size_t n : {std::size_t{32}, std::size_t{128}}) {
        double even = 0.0, uneven = 0.0;
        for (int i = 0; i < 4000; ++i) {
            const std::vector<float> x = kv1_test::normal_values(g, n);
            even += measure<least_squares<compact<2>>>(x).error;
            uneven += measure<least_squares<codebook2>>(x).error;
        }
        CAPTURE(n, even, uneven);
        REQUIRE(uneven < even);
        REQUIRE((n != 32 || uneven < 0.99 * even));
    }
}

TEST_CASE("decoding a compact code rounds nothing", "[encode]") {
    tally t;
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        if ((bits & 0x7c00u) == 0x7c00u || (bits & 0x7fc0u) == 0)
            continue;
        const kv1::compact_metadata m{kv1::float16::from_bits(static_cast<std::uint16_t>(bits))};
        const double scale =
            static_cast<float>(kv1::float16::from_bits(static_cast<std::uint16_t>(bits & 0x7fc0u)));
        const double w =
            (bits & 0x8000u) != 0 ? -static_cast<double>(bits & 63u) : static_cast<double>(bits & 63u);
        for (const unsigned code : {0u, 1u, 7u})
            t.expect(static_cast<double>(compact<3>::dequantize(static_cast<std::uint8_t>(code), m)) ==
                         scale * (code + 7.0 * (w - 64.0) / 128.0),
                     bits, code);
        for (const unsigned code : {0u, 1u, 2u, 8u, 13u, 14u, 15u})
            t.expect(static_cast<double>(codebook4::dequantize(static_cast<std::uint8_t>(code), m)) ==
                         scale * (sixteen_levels[code] + 36.0 * (w - 64.0) / 128.0),
                     bits, code);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEMPLATE_LIST_TEST_CASE("every target fits the same levels and codes, bit for bit", "[encode]",
                        chosen_levels) {
    auto vectors = vectors_of_every_kind(34, 90);
    generator g(35);
    for (int i = 0; i < 60; ++i) { // what is refused
        vectors.push_back(kv1_test::normal_values(g, g.between(1, 70)));
        constexpr std::uint32_t bad[] = {0x7fc00000u, 0xff800000u, 0x477ff000u, 0xc7800000u, 0x7f7fffffu};
        vectors.back()[g.below(vectors.back().size())] = std::bit_cast<float>(bad[g.below(5)]);
    }
    std::vector<outcome> expected;
    for (const auto& x : vectors) {
        std::vector<std::uint8_t> codes(x.size(), 0xee);
        typename TestType::metadata m{};
        const kv1::status s = TestType::quantize(x, codes, m);
        expected.push_back(outcome_of(s, m, codes));
    }
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for (std::size_t i = 0; i < vectors.size(); ++i) {
            std::vector<std::uint8_t> codes(vectors[i].size(), 0xee);
            typename TestType::metadata m{};
            const kv1::status s = kv1::try_quantize<TestType>(vectors[i], codes, m);
            t.expect(outcome_of(s, m, codes) == expected[i], "vector", i, "of", vectors[i].size(),
                     "channels");
        }
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("every target encodes alike with means, rotations and error weights, for any number of vectors",
          "[encode]") {
    using kv1::kv_format;
    generator g(36);
    const auto scratch = std::make_unique<kv1::detail::append_scratch>();
    for (const kv_format f : kv1_test::fitted_formats())
        for (const std::size_t n :
             {std::size_t{1}, std::size_t{24}, std::size_t{30}, std::size_t{96}, std::size_t{128}}) {
            const std::vector<float> mean = kv1_test::normal_values(g, n);
            std::vector<float> feedback(n * n);
            for (std::size_t j = 0; j < n; ++j)
                for (std::size_t i = j; i < n; ++i)
                    feedback[i * n + j] = i == j ? static_cast<float>(0.1 + g.uniform()) : 0.2f * g.normal();
            const kv1::detail::feedback_matrices factors = rounded(feedback, n);
            for (const int variant : {0, 1, 2}) {
                const kv1::level_choice levels =
                    variant == 2 ? kv1::level_choice::clip_search : kv1::level_choice::least_squares;
                const bool rotated = variant != 0;
                for (const int weights : {0, 1, 2}) { // none, common to the vectors, of some vectors
                    const kv1::detail::encoding_params params{f, levels, n, n,
                                                              rotated ? kv1::rotation_width(n) : 0};
                    std::vector<std::vector<float>> x;
                    std::vector<kv1::detail::vector_to_encode> rows;
                    for (std::size_t i = 0; i < 16; ++i)
                        x.push_back(kv1_test::normal_values(g, n));
                    for (std::size_t i = 0; i < 16; ++i)
                        rows.push_back(
                            {x[i].data(), i % 3 == 0 ? nullptr : mean.data(),
                             weights == 1 || (weights == 2 && i % 2 == 0) ? factors.of(0) : nullptr});
                    const std::size_t stride = n + 3;
                    std::vector<std::uint8_t> expected(16 * stride, 0xee);
                    std::vector<kv1::detail::row_metadata> metadata(16);
                    for (std::size_t i = 0; i < 16; ++i)
                        REQUIRE(kv1::detail::encode_reference(params, rows[i], expected.data() + i * stride,
                                                              &metadata[i])
                                    .code == kv1::errc::ok);
                    kv1_test::for_each_target([&](kv1::target) {
                        tally t;
                        for (std::size_t count = 1; count <= 16; ++count) {
                            std::vector<std::uint8_t> codes(16 * stride, 0xee);
                            std::vector<kv1::detail::row_metadata> found(16);
                            std::size_t failed = 0;
                            const auto r = kv1::detail::common_kernels().encode_vectors(
                                params, rows.data(), count, codes.data(), stride, found.data(), failed,
                                scratch->encoder());
                            t.expect(r.code == kv1::errc::ok, "refused");
                            for (std::size_t i = 0; i < count; ++i)
                                t.expect(
                                    found[i].scale == metadata[i].scale &&
                                        found[i].minimum == metadata[i].minimum &&
                                        std::equal(
                                            codes.begin() + static_cast<std::ptrdiff_t>(i * stride),
                                            codes.begin() + static_cast<std::ptrdiff_t>((i + 1) * stride),
                                            expected.begin() + static_cast<std::ptrdiff_t>(i * stride)),
                                    to_string(f), n, static_cast<int>(levels), rotated, weights, count, i);
                        }
                        KV1_REQUIRE_CLEAN(t);
                    });
                }
            }
        }
}

TEST_CASE("a group of channels is encoded as a vector of its own, on every target", "[encode]") {
    using kv1::kv_format;
    generator g(39);
    const auto scratch = std::make_unique<kv1::detail::append_scratch>();
    for (const kv_format f : kv1_test::fitted_formats())
        for (const auto& size : {std::pair{64u, 32u}, {128u, 64u}, {96u, 32u}, {2048u, 512u}})
            for (const kv1::level_choice levels :
                 {kv1::level_choice::min_max, kv1::level_choice::least_squares,
                  kv1::level_choice::clip_search}) {
                const std::size_t n = size.first, group = size.second, groups = n / group;
                const std::vector<float> mean = kv1_test::normal_values(g, n);
                std::vector<std::vector<float>> x, prepared;
                std::vector<kv1::detail::vector_to_encode> rows;
                const kv1::detail::encoding_params params{f, levels, n, group, kv1::rotation_width(n)};
                for (std::size_t i = 0; i < 5; ++i) {
                    x.push_back(kv1_test::normal_values(g, n));
                    x[i][i] *= 30.0f;
                    prepared.emplace_back(n);
                }
                for (std::size_t i = 0; i < 5; ++i) {
                    rows.push_back({x[i].data(), mean.data(), nullptr});
                    kv1::detail::prepare_vector(params, rows[i], prepared[i].data());
                }
                kv1_test::for_each_target([&](kv1::target) {
                    tally t;
                    std::vector<std::uint8_t> codes(5 * n), own(group);
                    std::vector<kv1::detail::row_metadata> found(5 * groups);
                    std::size_t failed = 0;
                    const auto r = kv1::detail::common_kernels().encode_vectors(
                        params, rows.data(), 5, codes.data(), n, found.data(), failed, scratch->encoder());
                    REQUIRE(r.code == kv1::errc::ok);
                    for (std::size_t i = 0; i < 5; ++i)
                        for (std::size_t k = 0; k < groups; ++k) {
                            kv1::detail::row_metadata m;
                            const float* part = prepared[i].data() + k * group;
                            REQUIRE(kv1::detail::encode_reference({f, levels, group, group, 0},
                                                                  {part, nullptr, nullptr}, own.data(), &m)
                                        .code == kv1::errc::ok);
                            const auto& its = found[i * groups + k];
                            t.expect(m.scale == its.scale && m.minimum == its.minimum &&
                                         std::equal(own.begin(), own.end(),
                                                    codes.begin() +
                                                        static_cast<std::ptrdiff_t>(i * n + k * group)),
                                     to_string(f), n, group, static_cast<int>(levels), i, k);
                        }
                    KV1_REQUIRE_CLEAN(t);
                });
            }
}

TEST_CASE("the Hadamard transform keeps lengths, undoes itself and is the same on every target", "[encode]") {
    generator g(37);
    for (const std::size_t block : {1u, 2u, 4u, 8u, 16u, 32u, 64u, 128u}) {
        const std::vector<float> x = kv1_test::normal_values(g, 3 * block);
        std::vector<float> y = x;
        kv1::hadamard_transform(y, block);
        double length = 0.0, rotated = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            length += static_cast<double>(x[i]) * static_cast<double>(x[i]);
            rotated += static_cast<double>(y[i]) * static_cast<double>(y[i]);
        }
        // log2(block) additions and the norm, itself rounded, on each of up to `block` terms
        const double roundings = std::log2(static_cast<double>(block)) + 2;
        REQUIRE(std::fabs(length - rotated) <=
                2 * kv1_test::gamma(roundings) * length * std::sqrt(static_cast<double>(block)));
        std::vector<float> back = y;
        kv1::hadamard_transform(back, block);
        double worst = 0.0, largest = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            worst = std::max(worst, std::fabs(static_cast<double>(back[i]) - static_cast<double>(x[i])));
            largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
        }
        REQUIRE(worst <= 2 * kv1_test::gamma(2 * roundings) * largest * static_cast<double>(block));
        kv1_test::for_each_target([&](kv1::target) {
            std::vector<float> z = x;
            kv1::detail::common_kernels().rotate(z.data(), z.size(), block);
            REQUIRE(z == y);
        });
    }
}

TEST_CASE("error weights take cost off codes: less of it than nearest levels leave", "[encode]") {
    constexpr std::size_t n = 32;
    generator g(38);
    // W = A^T A, far from a multiple of the identity
    const std::vector<float> a = kv1_test::normal_values(g, 8 * n);
    std::vector<float> w(n * n);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            for (std::size_t k = 0; k < 8; ++k)
                w[i * n + j] += a[k * n + i] * a[k * n + j];
    for (const std::size_t block : {std::size_t{0}, n}) {
        std::vector<float> feedback(n * n);
        REQUIRE(kv1::detail::factor_weights(w, n, block, feedback.data()));
        const kv1::detail::feedback_matrices factors = rounded(feedback, n);
        double nearest = 0.0, weighted = 0.0;
        for (int i = 0; i < 100; ++i) {
            const std::vector<float> x = kv1_test::normal_values(g, n);
            for (const kv1::detail::error_feedback* with :
                 {static_cast<const kv1::detail::error_feedback*>(nullptr), factors.of(0)}) {
                const kv1::detail::encoding_params params{kv1::kv_format::compact3,
                                                          kv1::level_choice::least_squares, n, n, block};
                std::vector<std::uint8_t> codes(n);
                kv1::detail::row_metadata stored;
                const auto r =
                    kv1::detail::encode_reference(params, {x.data(), nullptr, with}, codes.data(), &stored);
                REQUIRE(r.code == kv1::errc::ok);
                std::vector<float> y(n);
                for (std::size_t c = 0; c < n; ++c)
                    y[c] = compact<3>::dequantize(codes[c], {kv1::float16::from_bits(stored.scale)});
                if (block != 0)
                    kv1::hadamard_transform(y, block);
                double cost = 0.0;
                for (std::size_t p = 0; p < n; ++p)
                    for (std::size_t q = 0; q < n; ++q)
                        cost += static_cast<double>(w[p * n + q]) * static_cast<double>(x[p] - y[p]) *
                                static_cast<double>(x[q] - y[q]);
                (with == nullptr ? nearest : weighted) += cost;
            }
        }
        CAPTURE(block, nearest, weighted);
        REQUIRE(weighted < 0.5 * nearest);
    }
}

TEST_CASE("of all candidates' levels and codes the cheapest are taken", "[encode]") {
    constexpr std::size_t n = 32;
    generator g(42);
    const std::vector<float> a = kv1_test::normal_values(g, 8 * n);
    std::vector<float> w(n * n), feedback(n * n);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            for (std::size_t k = 0; k < 8; ++k)
                w[i * n + j] += a[k * n + i] * a[k * n + j];
    REQUIRE(kv1::detail::factor_weights(w, n, 0, feedback.data()));
    const kv1::detail::feedback_matrices factors = rounded(feedback, n);
    // what errors cost under the rounded factors, and by how much the encoder may misjudge it
    struct judged {
        double cost = 0.0, slack = 0.0;
    };
    const auto cost = [&](const std::vector<float>& x, const kv1::detail::stored_levels& l,
                          const std::vector<std::uint8_t>& codes) {
        const kv1::detail::error_feedback& f = *factors.of(0);
        const auto [lo, hi] = std::minmax_element(x.begin(), x.end());
        const double range = static_cast<double>(*hi) - static_cast<double>(*lo);
        const double widest = range + std::fabs(static_cast<double>(l.base) - static_cast<double>(*lo)) +
                              3.0 * static_cast<double>(l.scale);
        judged sum;
        for (std::size_t j = 0; j < n; ++j) {
            double rest = 0.0, row = 0.0;
            for (std::size_t i = j; i < n; ++i) {
                const double factor =
                    i == j ? 1.0 : static_cast<double>(f.units[j]) * f.factors[j * f.stride + i];
                rest += factor * (static_cast<double>(x[i]) -
                                  (codes[i] * static_cast<double>(l.scale) + static_cast<double>(l.base)));
                row += std::fabs(factor);
            }
            // x is rounded to steps of its range; sums and products of numbers up to `widest` round a few times
            const double off = row * (0.5 / 65535.0 * range + kv1_test::gamma(8.0) * widest);
            sum.cost += static_cast<double>(f.costs[j]) * rest * rest;
            sum.slack += static_cast<double>(f.costs[j]) * (2.0 * std::fabs(rest) * off + off * off);
        }
        sum.slack += kv1_test::gamma(n + 4.0) * sum.cost;
        return sum;
    };
    double fitted = 0.0, taken = 0.0;
    tally t;
    for (int i = 0; i < 200; ++i) {
        const std::vector<float> x = kv1_test::normal_values(g, n);
        std::vector<std::uint8_t> codes(n);
        const kv1::detail::stored_levels start = kv1::detail::fit_levels<compact<2>>(x, codes.data());
        std::vector<float> wanted(n);
        const float lo = kv1::detail::common_wanted(std::span<const float>(x), *factors.of(0), wanted.data());
        kv1::detail::codes_with_feedback<compact<2>>(n, start, *factors.of(0), lo, wanted.data(),
                                                     codes.data());
        const judged before = cost(x, start, codes);
        const kv1::detail::stored_levels best =
            kv1::detail::weighted_levels<compact<2>>(x, start, *factors.of(0), codes.data());
        const judged after = cost(x, best, codes);
        t.expect(after.cost <= before.cost + before.slack + after.slack, i, before.cost, after.cost);
        fitted += before.cost;
        taken += after.cost;
    }
    KV1_REQUIRE_CLEAN(t);
    CAPTURE(fitted, taken);
    REQUIRE(taken < 0.8 * fitted);
}

TEST_CASE("factors of error weights are rounded to half of a 127th of their row's largest", "[encode]") {
    generator g(43);
    tally t;
    for (const std::size_t n : {std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{64}}) {
        std::vector<float> factored(n *
                                    n); // [i][j]: what channel i does to channel j, and costs on the diagonal
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j)
                factored[i * n + j] = j % 5 == 4 && i != j ? 0.0f : std::exp(3.0f * g.normal()) * g.normal();
        const kv1::detail::feedback_matrices rounded_factors = rounded(factored, n);
        const kv1::detail::error_feedback& f = *rounded_factors.of(0);
        for (std::size_t j = 0; j < n; ++j) {
            int largest = 0, sum = 0;
            for (std::size_t i = 0; i < f.stride; ++i) {
                const int factor = f.factors[j * f.stride + i];
                const double given = i > j && i < n ? static_cast<double>(factored[i * n + j]) : 0.0;
                t.expect(std::fabs(given - static_cast<double>(f.units[j]) * factor) <=
                             0.5 * (1.0 + 256 * kv1_test::unit_roundoff) * static_cast<double>(f.units[j]),
                         n, j, i, given, factor);
                largest = std::max(largest, std::abs(factor));
                sum += factor;
            }
            t.expect(largest == (f.units[j] == 0.0f ? 0 : 127), n, j, "largest", largest);
            const double whole = 1.0 + static_cast<double>(f.units[j]) * sum;
            t.expect(std::fabs(static_cast<double>(f.sums[j]) - whole) <=
                         kv1_test::gamma(2.0) * (1.0 + std::fabs(whole - 1.0)),
                     n, j, "sum", f.sums[j], whole);
            t.expect(f.costs[j] == factored[j * n + j], n, j, "cost");
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("weights that are not positive semidefinite are found out", "[encode]") {
    std::vector<float> feedback(4);
    REQUIRE(kv1::detail::factor_weights(std::vector<float>{2.0f, 0.0f, 0.0f, 0.0f}, 2, 0, feedback.data()));
    REQUIRE(kv1::detail::factor_weights(std::vector<float>(4), 2, 2, feedback.data()));
    REQUIRE_FALSE(
        kv1::detail::factor_weights(std::vector<float>{1.0f, 2.0f, 2.0f, 1.0f}, 2, 0, feedback.data()));
    REQUIRE_FALSE(
        kv1::detail::factor_weights(std::vector<float>{-1.0f, 0.0f, 0.0f, -1.0f}, 2, 0, feedback.data()));
}
