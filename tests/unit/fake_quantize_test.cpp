// SPDX-License-Identifier: Apache-2.0
//
// Fake quantization against what it stands for: the packed path and the cache bit for bit, the formulas
// without rounding, the best possible grid, and finite differences.
#include "compare.hpp"
#include "formats.hpp"
#include "random.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/fake_quantize.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

using kv1::affine;
using kv1::errc;
using kv1::kv_format;
using options = kv1::fake_quantize_options;
using kv1_test::tally;

namespace {

// Ordinary, shifted, with outliers, constant, tiny, with zeros of both signs.
std::vector<float> awkward_vector(kv1_test::generator& g, std::size_t n, std::size_t kind) {
    std::vector<float> x = kv1_test::normal_values(g, n);
    switch (kind % 6) {
    case 1:
        for (float& v : x)
            v = 40.0f + 0.5f * v;
        break;
    case 2:
        x[g.below(n)] = 90.0f;
        x[g.below(n)] = -70.0f;
        break;
    case 3:
        std::fill(x.begin(), x.end(), x[0]);
        break;
    case 4:
        for (float& v : x)
            v *= 1e-7f;
        break;
    case 5:
        for (std::size_t i = 0; i < n; i += 2)
            x[i] = g.chance(0.5) ? 0.0f : -0.0f;
        break;
    default:
        break;
    }
    return x;
}

double squared_error(std::span<const float> x, std::span<const float> y) {
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i)
        sum += (static_cast<double>(y[i]) - x[i]) * (static_cast<double>(y[i]) - x[i]);
    return sum;
}

std::vector<float> quantized(kv_format f, std::span<const float> x, const options& o = {}) {
    std::vector<float> y(x.size());
    kv1::fake_quantize(f, x.size(), x, y, o);
    return y;
}

// The least squared error of any split of the sorted values into at most `levels` runs, consecutive runs on
// consecutive or further levels, with the best affine grid for the split: every assignment of codes that the
// nearest level of some grid can make.
double least_error(std::vector<float> x, int levels) {
    std::sort(x.begin(), x.end());
    std::vector<int> code(x.size(), 0);
    double best = std::numeric_limits<double>::infinity();
    const auto n = static_cast<double>(x.size());
    const auto visit = [&](const auto& self, std::size_t i, int lowest) -> void {
        if (i == x.size()) {
            double c = 0, cc = 0, sx = 0, cx = 0, xx = 0;
            for (std::size_t j = 0; j < x.size(); ++j) {
                c += code[j];
                cc += code[j] * code[j];
                sx += x[j];
                cx += static_cast<double>(code[j]) * x[j];
                xx += static_cast<double>(x[j]) * x[j];
            }
            const double variance = cc - c * c / n, covariance = cx - c * sx / n;
            const double spread = xx - sx * sx / n;
            best = std::min(best, variance > 0 ? spread - covariance * covariance / variance : spread);
            return;
        }
        for (code[i] = lowest; code[i] < levels; ++code[i])
            self(self, i + 1, code[i]);
    };
    visit(visit, 0, 0);
    return best;
}

// The matrix of a reflection, 1 - 2 v v^T: orthogonal, and mixes all channels.
std::vector<float> reflection(kv1_test::generator& g, std::size_t n) {
    const std::vector<float> v = kv1_test::normal_values(g, n);
    double norm = 0.0;
    for (const float x : v)
        norm += static_cast<double>(x) * static_cast<double>(x);
    std::vector<float> matrix(n * n);
    for (std::size_t i = 0; i < n * n; ++i)
        matrix[i] =
            static_cast<float>((i / n == i % n ? 1.0 : 0.0) -
                               2.0 * static_cast<double>(v[i / n]) * static_cast<double>(v[i % n]) / norm);
    return matrix;
}

// Products of a quarter as many directions as channels: errors in most directions cost nothing.
std::vector<float> error_weights(kv1_test::generator& g, std::size_t n) {
    std::vector<float> w(n * n);
    for (std::size_t k = 0; k < (n + 3) / 4; ++k) {
        const std::vector<float> v = kv1_test::normal_values(g, n);
        for (std::size_t i = 0; i < n * n; ++i)
            w[i] += v[i / n] * v[i % n];
    }
    return w;
}

// e^T W e of the error e.
double cost_of(std::span<const float> weights, std::span<const float> x, std::span<const float> y) {
    double cost = 0.0;
    const auto error = [&](std::size_t i) { return static_cast<double>(x[i]) - static_cast<double>(y[i]); };
    for (std::size_t i = 0; i < weights.size(); ++i)
        cost += static_cast<double>(weights[i]) * error(i / x.size()) * error(i % x.size());
    return cost;
}

// What a cache of one head gives back of a vector that it stores as the first key.
std::vector<float> through_a_cache(kv_format f, std::span<const float> x,
                                   const kv1::vector_encoding& encoding,
                                   const kv1::rotary_embedding& rotary = {}, std::size_t position = 0) {
    kv1::cache_description d;
    d.layers = {{.kv_heads = 1,
                 .key_dim = x.size(),
                 .value_dim = x.size(),
                 .key_format = f,
                 .value_format = kv_format::fp32,
                 .key_encoding = encoding,
                 .rotary = rotary}};
    d.capacity_tokens = d.page_tokens;
    d.first_position = position;
    kv1::kv_cache cache(d);
    const kv1::sequence_id sequence = cache.create_sequence();
    const kv1::tensor_view one(x.data(), 1, 1, x.size());
    cache.append(sequence, 0, one, one);
    std::vector<float> y(x.size());
    cache.read(sequence, 0, kv1::kv_side::key, 0, 0, 1, y);
    return y;
}

// What the forward pass is piecewise linear over: where it stays, so does the piece.
struct piece {
    std::vector<std::uint8_t> codes, refit_codes;
    std::size_t lowest = 0, highest = 0;
    bool refitted = false;
    friend bool operator==(const piece&, const piece&) = default;
};

piece piece_of(kv_format f, std::span<const float> x, const options& o) {
    piece p{std::vector<std::uint8_t>(x.size()), std::vector<std::uint8_t>(x.size())};
    std::vector<float> moved(x.size());
    kv1::detail::transform(x, o, moved);
    const auto [lo, hi] = std::minmax_element(moved.begin(), moved.end());
    p.lowest = static_cast<std::size_t>(lo - moved.begin());
    p.highest = static_cast<std::size_t>(hi - moved.begin());
    const kv1::status s = kv1::detail::with_quantizer(f, [&]<class Q>() noexcept {
        kv1::detail::real_metadata m;
        const kv1::status done =
            kv1::detail::quantize_for_training<Q>(moved, o, p.codes, m, p.refit_codes.data());
        p.refitted = m.refitted;
        return done;
    });
    REQUIRE(s);
    if (!p.refitted)
        std::fill(p.refit_codes.begin(), p.refit_codes.end(), std::uint8_t{0});
    return p;
}

} // namespace

TEMPLATE_TEST_CASE("With rounded metadata training sees what the packed row gives back, bit for bit",
                   "[fake_quantize]", affine<1>, affine<2>, affine<3>, affine<4>, affine<8>, kv1::compact<2>,
                   kv1::compact<3>, kv1::compact<4>, kv1::codebook2, kv1::codebook4, kv1::scaled_binary,
                   kv1::binary) {
    using Q = TestType;
    kv1_test::generator g(11);
    tally t;
    for (std::size_t n = 1; n <= 256; n += n < 70 ? 1 : 31)
        for (std::size_t kind = 0; kind < 6; ++kind) {
            const std::vector<float> x = awkward_vector(g, n, kind);
            std::vector<std::byte> packed(kv1::packed_size<Q::bits>(n));
            typename Q::metadata m{};
            kv1::encode_row<Q>(x, packed, m);
            std::vector<float> expected(n), y(n);
            kv1::decode_row<Q>(packed, m, expected);
            kv1::fake_quantize<Q>(n, x, y);
            t.expect(kv1_test::same_bits(y, expected), "channels", n, "kind", kind);
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("With rounded metadata training sees what a cache gives back, whatever its encoding",
          "[fake_quantize]") {
    kv1_test::generator g(20);
    tally t;
    for (const kv_format f : kv1_test::fitted_formats())
        for (const kv1::level_choice levels :
             {kv1::level_choice::min_max, kv1::level_choice::least_squares, kv1::level_choice::clip_search})
            for (const bool hadamard : {false, true})
                for (const bool centred : {false, true})
                    for (const std::size_t n : {8u, 24u, 32u, 128u})
                        for (std::size_t kind = 0; kind < 6; ++kind) {
                            const std::vector<float> x = awkward_vector(g, n, kind);
                            const std::vector<float> means = kv1_test::normal_values(g, n);
                            const std::vector<float> basis = reflection(g, n);
                            options o{.levels = levels, .hadamard = hadamard};
                            kv1::vector_encoding e{.levels = levels};
                            e.hadamard = hadamard ? kv1::rotation_width(n) : 0;
                            if (centred) {
                                o.centre = means;
                                e.means = means;
                            }
                            t.expect(kv1_test::same_bits(quantized(f, x, o), through_a_cache(f, x, e)),
                                     to_string(f), static_cast<int>(levels), hadamard, centred, n, kind);
                            o.basis = basis;
                            e.basis = basis;
                            t.expect(kv1_test::same_bits(quantized(f, x, o), through_a_cache(f, x, e)),
                                     to_string(f), static_cast<int>(levels), hadamard, centred, n, kind,
                                     "in a basis");
                        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Training under error weights sees what a cache gives back, bit for bit", "[fake_quantize]") {
    kv1_test::generator g(21);
    tally t;
    for (const kv_format f : kv1_test::fitted_formats())
        for (const kv1::level_choice levels :
             {kv1::level_choice::least_squares, kv1::level_choice::clip_search})
            for (const bool hadamard : {false, true})
                for (const bool turned : {false, true})
                    for (const std::size_t n : {1u, 2u, 8u, 24u, 64u, 128u}) {
                        const std::vector<float> means = kv1_test::normal_values(g, n),
                                                 basis = reflection(g, n), weights = error_weights(g, n);
                        options o{.levels = levels, .hadamard = hadamard, .centre = means};
                        kv1::vector_encoding e{.levels = levels,
                                               .hadamard = hadamard ? kv1::rotation_width(n) : 0,
                                               .means = means,
                                               .error_weights = weights};
                        if (turned)
                            o.basis = e.basis = basis;
                        const std::vector<float> factors = kv1::factor_error_weights(n, weights, o);
                        o.error_factors = factors;
                        for (std::size_t kind = 0; kind < 6; ++kind) {
                            const std::vector<float> x = awkward_vector(g, n, kind);
                            t.expect(kv1_test::same_bits(quantized(f, x, o), through_a_cache(f, x, e)),
                                     to_string(f), static_cast<int>(levels), hadamard, turned, n, kind);
                        }
                    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Under error weights errors cost less, with metadata rounded or not", "[fake_quantize]") {
    kv1_test::generator g(22);
    constexpr std::size_t n = 64;
    const std::vector<float> weights = error_weights(g, n);
    for (const bool rounded : {true, false}) {
        options o{.levels = kv1::level_choice::least_squares, .round_metadata = rounded, .hadamard = true};
        const std::vector<float> factors = kv1::factor_error_weights(n, weights, o);
        double plain = 0.0, weighed = 0.0;
        for (int i = 0; i < 40; ++i) {
            const std::vector<float> x = kv1_test::normal_values(g, n);
            o.error_factors = {};
            plain += cost_of(weights, x, quantized(kv_format::affine2, x, o));
            o.error_factors = factors;
            weighed += cost_of(weights, x, quantized(kv_format::affine2, x, o));
        }
        CAPTURE(rounded, plain, weighed);
        REQUIRE(weighed < 0.8 * plain);
    }
}

TEST_CASE("Error weights that no vector can have are refused", "[fake_quantize]") {
    const std::vector<float> x(8, 1.0f);
    std::vector<float> weights(64, 0.0f), factors(64), y(8), dx(8);
    for (std::size_t i = 0; i < 8; ++i)
        weights[9 * i] = 1.0f;
    const auto factor = [&](const options& o = {}) {
        return kv1::try_factor_error_weights(8, weights, factors, o).code();
    };
    REQUIRE(factor() == errc::ok);
    REQUIRE(kv1::try_factor_error_weights(0, {}, {}).code() == errc::out_of_range);
    REQUIRE(kv1::try_factor_error_weights(8, std::span(weights).first(63), factors).code() ==
            errc::shape_mismatch);
    REQUIRE(factor({.basis = std::span(weights).first(8)}) == errc::shape_mismatch);
    const std::vector<float> twice(64, 2.0f);
    REQUIRE(factor({.basis = twice}) == errc::invalid_argument);
    weights[3] = std::numeric_limits<float>::infinity();
    REQUIRE(factor() == errc::non_finite);
    weights[3] = 0.0f;
    weights[9] = -1.0f;
    REQUIRE(factor() == errc::invalid_argument);

    options o{.error_factors = factors};
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, o).code() == errc::invalid_argument);
    o.levels = kv1::level_choice::least_squares;
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, o));
    REQUIRE(kv1::try_fake_quantize(kv_format::binary, 8, x, y, o).code() == errc::invalid_argument);
    REQUIRE(kv1::try_fake_quantize_gradient(kv_format::affine2, 8, x, y, dx, o));
    o.gradient = options::gradient_rule::fixed_codes;
    REQUIRE(kv1::try_fake_quantize_gradient(kv_format::affine2, 8, x, y, dx, o).code() ==
            errc::invalid_argument);
    o.error_factors = std::span(factors).first(8);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, o).code() == errc::shape_mismatch);
}

TEST_CASE("A mean that turns is the cache's at every position, bit for bit", "[fake_quantize]") {
    kv1_test::generator g(21);
    tally t;
    for (const kv1::rotary_pairs pairs : {kv1::rotary_pairs::half_split, kv1::rotary_pairs::interleaved})
        for (const std::size_t n : {32u, 96u})
            for (const std::size_t turning : {n, n / 2})
                for (const std::size_t position : {0u, 1u, 77u, 8191u, 1000003u}) {
                    const kv1::rotary_embedding rotary{kv1::rotary_frequencies(1e5, turning), pairs,
                                                       n - turning};
                    std::vector<float> mean = kv1_test::normal_values(g, n);
                    mean[rotary.first_of(1)] = mean[rotary.second_of(1)] = 0.0f; // a pair without a mean
                    std::vector<float> exact = mean, at(n);
                    kv1::apply_rotary(rotary, std::span(exact), static_cast<std::int64_t>(position));
                    kv1::turn_mean(rotary, mean, position, at);
                    for (std::size_t i = 0; i < n; ++i)
                        t.expect(std::fabs(at[i] - exact[i]) < 1e-6f, n, turning, position, i);
                    std::vector<float> x = kv1_test::normal_values(g, n);
                    for (std::size_t i = 0; i < n; ++i)
                        x[i] += at[i];
                    kv1::vector_encoding e{.levels = kv1::level_choice::least_squares};
                    e.hadamard = kv1::rotation_width(n);
                    e.means = mean;
                    const options o{.levels = e.levels, .hadamard = true, .centre = at};
                    t.expect(
                        kv1_test::same_bits(quantized(kv_format::compact2, x, o),
                                            through_a_cache(kv_format::compact2, x, e, rotary, position)),
                        n, turning, position);
                    kv1::turn_mean(rotary, mean, position, mean);
                    t.expect(kv1_test::same_bits(mean, at), "in place", n, turning, position);
                }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Without rounding scale and minimum stay in fp32, as the reference trains", "[fake_quantize]") {
    kv1_test::generator g(12);
    tally t;
    for (std::size_t n = 1; n <= 128; ++n)
        for (std::size_t kind = 0; kind < 6; ++kind) {
            const std::vector<float> x = awkward_vector(g, n, kind);
            const float lo = *std::min_element(x.begin(), x.end());
            const float hi = *std::max_element(x.begin(), x.end());
            const float scale = std::max((hi - lo) / 3.0f, 1e-6f);
            const std::vector<float> y = quantized(kv_format::affine2, x, {.round_metadata = false});
            for (std::size_t i = 0; i < n; ++i) {
                const float code = std::clamp(std::nearbyint((x[i] - lo) / scale), 0.0f, 3.0f);
                t.expect(y[i] == code * scale + lo, "channels", n, "kind", kind, "at", i);
            }
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Rows are vectors of their own, and the output may be the input", "[fake_quantize]") {
    kv1_test::generator g(13);
    std::vector<float> x = kv1_test::normal_values(g, 5 * 24), rows(x.size());
    for (const kv_format f : kv1_test::coded_formats()) {
        kv1::fake_quantize(f, 24, x, rows);
        for (std::size_t r = 0; r < 5; ++r) {
            const auto row = std::span<const float>(x).subspan(24 * r, 24);
            REQUIRE(kv1_test::same_bits(quantized(f, row), std::span(rows).subspan(24 * r, 24)));
        }
        std::vector<float> in_place = x;
        kv1::fake_quantize(f, 24, in_place, in_place);
        REQUIRE(kv1_test::same_bits(in_place, rows));
    }
}

TEST_CASE("Fitted levels are never worse than the ends of the range", "[fake_quantize]") {
    kv1_test::generator g(14);
    tally t;
    for (const kv_format f : kv1_test::fitted_formats())
        for (const bool rounded : {true, false})
            for (std::size_t n = 1; n <= 256; n += n < 40 ? 1 : 27)
                for (std::size_t kind = 0; kind < 6; ++kind) {
                    const std::vector<float> x = awkward_vector(g, n, kind);
                    options o{.round_metadata = rounded};
                    const double ends = squared_error(x, quantized(f, x, o));
                    o.levels = kv1::level_choice::least_squares;
                    const double fitted = squared_error(x, quantized(f, x, o));
                    t.expect(fitted <= ends, to_string(f), n, kind, fitted, ends);
                    o.levels = kv1::level_choice::clip_search;
                    const double clipped = squared_error(x, quantized(f, x, o));
                    t.expect(clipped <= ends, to_string(f), n, kind, clipped, ends);
                }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Least squares goes most of the way from the ends of the range to the best of all grids",
          "[fake_quantize]") {
    kv1_test::generator g(15);
    double found = 0.0, best = 0.0, ends = 0.0;
    tally t;
    for (int i = 0; i < 300; ++i) {
        const std::vector<float> x = kv1_test::normal_values(g, 9);
        const double least = least_error(x, 4);
        const double error = squared_error(
            x, quantized(kv_format::affine2, x,
                         {.levels = kv1::level_choice::least_squares, .round_metadata = false}));
        // values of the size of 1 to 4, computed in fp32
        t.expect(error >= least - 9 * 16 * 1e-6, error, least);
        found += error;
        ends += squared_error(x, quantized(kv_format::affine2, x, {.round_metadata = false}));
        best += least;
    }
    KV1_REQUIRE_CLEAN(t);
    INFO("errors: " << found << ", at best " << best << ", of the ends " << ends);
    REQUIRE(ends - found > 0.75 * (ends - best));
}

TEST_CASE("A Hadamard rotation is undone, and spreads an outlier", "[fake_quantize]") {
    kv1_test::generator g(16);
    for (const std::size_t n : {1u, 2u, 3u, 12u, 32u, 40u, 128u}) {
        std::vector<float> x = kv1_test::normal_values(g, n);
        const std::vector<float> before = x;
        kv1::detail::rotate_hadamard(x);
        if (n == 32) {
            double energy = 0.0, expected = 0.0;
            for (std::size_t i = 0; i < n; ++i) {
                energy += static_cast<double>(x[i]) * x[i];
                expected += static_cast<double>(before[i]) * before[i];
            }
            REQUIRE(kv1_test::relative_error(energy, expected) < 1e-5);
        }
        kv1::detail::rotate_hadamard(x);
        for (std::size_t i = 0; i < n; ++i)
            REQUIRE(std::fabs(x[i] - before[i]) < 2e-5); // 2 log2(128) + 2 roundings of numbers below 50
    }
    options plain{.levels = kv1::level_choice::least_squares}, rotated = plain;
    rotated.hadamard = true;
    double with = 0.0, without = 0.0;
    for (int i = 0; i < 100; ++i) {
        std::vector<float> x = kv1_test::normal_values(g, 32);
        x[g.below(16)] = 8.0f;
        x[16 + g.below(16)] = -6.0f;
        without += squared_error(x, quantized(kv_format::affine2, x, plain));
        with += squared_error(x, quantized(kv_format::affine2, x, rotated));
    }
    REQUIRE(with < 0.75 * without);
}

TEST_CASE("A centre is taken off before and added after", "[fake_quantize]") {
    kv1_test::generator g(17);
    const std::vector<float> x = kv1_test::normal_values(g, 32), centre = kv1_test::normal_values(g, 32);
    std::vector<float> moved(32);
    for (std::size_t i = 0; i < 32; ++i)
        moved[i] = x[i] - centre[i];
    std::vector<float> expected = quantized(kv_format::affine2, moved);
    for (std::size_t i = 0; i < 32; ++i)
        expected[i] += centre[i];
    REQUIRE(kv1_test::same_bits(quantized(kv_format::affine2, x, {.centre = centre}), expected));
}

TEST_CASE("Straight through, the gradient passes as it is", "[fake_quantize]") {
    kv1_test::generator g(18);
    const std::vector<float> x = kv1_test::normal_values(g, 64), dy = kv1_test::normal_values(g, 64);
    for (const kv_format f : kv1::all_kv_formats) {
        std::vector<float> dx(64);
        kv1::fake_quantize_gradient(f, 32, x, dy, dx, {.hadamard = true});
        REQUIRE(kv1_test::same_bits(dx, dy));
    }
}

// The derivative along a random direction, of a random linear loss. The forward pass is piecewise linear in
// x, so a difference is exact up to rounding where all of the way lies on one piece.
TEST_CASE("With fixed codes the gradient is the forward pass's, by finite differences", "[fake_quantize]") {
    using policy = kv1::level_choice;
    kv1_test::generator g(19);
    tally t;
    std::size_t skipped = 0;
    for (const kv_format f : kv1_test::coded_formats())
        for (const policy encoder : {policy::min_max, policy::least_squares})
            for (const bool hadamard : {false, true})
                for (int repeat = 0; repeat < 40; ++repeat) {
                    const bool in_basis = repeat % 2 != 0;
                    const std::size_t n = g.between(2, 64);
                    const std::vector<float> x = kv1_test::normal_values(g, n),
                                             dy = kv1_test::normal_values(g, n),
                                             way = kv1_test::normal_values(g, n),
                                             centre = kv1_test::normal_values(g, n, 0.3f),
                                             basis = in_basis ? reflection(g, n) : std::vector<float>();
                    const options o{.levels = encoder,
                                    .gradient = options::gradient_rule::fixed_codes,
                                    .round_metadata = false,
                                    .hadamard = hadamard,
                                    .centre = centre,
                                    .basis = basis};
                    const auto point = [&](double step) {
                        std::vector<float> moved(n);
                        for (std::size_t i = 0; i < n; ++i)
                            moved[i] = static_cast<float>(x[i] + step * way[i]);
                        return moved;
                    };
                    const auto loss = [&](double step) {
                        const std::vector<float> y = quantized(f, point(step), o);
                        double sum = 0.0;
                        for (std::size_t i = 0; i < n; ++i)
                            sum += static_cast<double>(y[i]) * dy[i];
                        return sum;
                    };
                    constexpr double h = 0x1p-12;
                    const double slope = (loss(4 * h) - loss(-4 * h)) / (8 * h);
                    const piece here = piece_of(f, x, o);
                    bool one_piece = true;
                    for (int i = -4; i <= 4; ++i)
                        one_piece &= piece_of(f, point(h * i), o) == here;
                    if (!one_piece) {
                        ++skipped;
                        continue;
                    }
                    std::vector<float> dx(n);
                    kv1::fake_quantize_gradient(f, n, x, dy, dx, o);
                    double expected = 0.0, size = 0.0;
                    for (std::size_t i = 0; i < n; ++i) {
                        expected += static_cast<double>(dx[i]) * way[i];
                        size += 6.0 * std::fabs(static_cast<double>(dy[i])); // |y| is below 6
                    }
                    // each y is some 12 roundings (2 log2 64 of them the rotations', 4 n more of a basis, there
                    // and back) of a number below 6
                    const double noise = (12.0 + (in_basis ? 4.0 * static_cast<double>(n) : 0.0)) *
                                         kv1_test::unit_roundoff * size;
                    t.expect(std::fabs(expected - slope) <= 2 * noise / (8 * h), to_string(f),
                             static_cast<int>(encoder), hadamard, n, expected, slope);
                }
    KV1_REQUIRE_CLEAN(t);
    REQUIRE(skipped < t.seen());
}

TEST_CASE("A clip search has the straight-through gradient, and no other", "[fake_quantize]") {
    const std::vector<float> x{1, 2, 3, 4, 5, 6, 7, 80}, dy{1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<float> dx(8);
    options o{.levels = kv1::level_choice::clip_search};
    REQUIRE(kv1::try_fake_quantize_gradient(kv_format::affine2, 8, x, dy, dx, o));
    REQUIRE(dx == dy);
    o.gradient = options::gradient_rule::fixed_codes;
    std::vector<float> kept(8, 3.0f);
    REQUIRE(kv1::try_fake_quantize_gradient(kv_format::affine2, 8, x, dy, kept, o).code() ==
            errc::invalid_argument);
    REQUIRE(kept == std::vector<float>(8, 3.0f));
}

TEST_CASE("Constant vectors have a gradient too", "[fake_quantize]") {
    const std::vector<float> x(8, 2.5f), dy{1, 2, 3, 4, 5, 6, 7, 8};
    for (const auto encoder : {kv1::level_choice::min_max, kv1::level_choice::least_squares}) {
        const options o{.levels = encoder, .gradient = options::gradient_rule::fixed_codes};
        REQUIRE(quantized(kv_format::affine2, x, o) == x);
        std::vector<float> dx(8);
        kv1::fake_quantize_gradient(kv_format::affine2, 8, x, dy, dx, o);
        double sum = 0.0;
        for (const float v : dx)
            sum += v;
        REQUIRE(sum == 36.0); // moved together, values follow
    }
}

TEST_CASE("Fake quantization refuses what a cache refuses, and says which row", "[fake_quantize]") {
    std::vector<float> x(3 * 8, 1.0f), y(x.size());
    const auto refusal = [&](kv_format f) { return kv1::try_fake_quantize(f, 8, x, y); };

    x[2 * 8 + 5] = std::numeric_limits<float>::quiet_NaN();
    for (const kv_format f : kv1::all_kv_formats) {
        const kv1::status s = refusal(f);
        REQUIRE(s.code() == errc::non_finite);
        REQUIRE(s.where().token == 2);
        REQUIRE(s.where().channel == 5);
    }
    x[2 * 8 + 5] = 1e6f;
    REQUIRE(refusal(kv_format::affine2).code() == errc::not_representable);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, {.round_metadata = false}).code() ==
            errc::not_representable);
    for (const kv_format f : {kv_format::fp16, kv_format::compact2}) {
        REQUIRE(refusal(f).code() == errc::not_representable);
        REQUIRE(refusal(f).where().token == 2);
        REQUIRE(refusal(f).where().channel == 5);
    }
    for (const bool rounded : {true, false}) {
        const options fitted{.levels = kv1::level_choice::least_squares, .round_metadata = rounded};
        REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, fitted).code() ==
                errc::not_representable);
    }
    REQUIRE(refusal(kv_format::fp32));

    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 0, x, y).code() == errc::out_of_range);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 4097, x, y).code() == errc::out_of_range);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 7, x, y).code() == errc::shape_mismatch);
    const std::vector<float> centre(7);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, {.centre = centre}).code() ==
            errc::shape_mismatch);
    REQUIRE(kv1::try_fake_quantize(kv_format::affine2, 8, x, y, {.basis = centre}).code() ==
            errc::shape_mismatch);
    REQUIRE(kv1::try_fake_quantize_gradient(kv_format::affine2, 8, x, std::span(y).first(8), y).code() ==
            errc::shape_mismatch);
}
