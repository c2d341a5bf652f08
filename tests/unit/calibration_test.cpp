// SPDX-License-Identifier: Apache-2.0
//
// Calibration against its definitions, written down in double: means, error weights over the tokens that a policy
// quantizes, for random shapes, windows and texts cut into calls. What is refused, and what a calibration
// describes.
#include "random.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/calibration.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

using kv1::errc;
using kv1::kv_side;
using kv1::parse_policy;
using kv1_test::generator;

namespace {

// A layer's text, and what reads it.
struct text {
    std::size_t tokens, kv_heads, group, key_dim, value_dim, outputs;
    std::vector<float> q, k, v, projection; // projection: [outputs][query heads][value_dim]

    [[nodiscard]] std::size_t heads() const { return kv_heads * group; }
    [[nodiscard]] kv1::tensor_view w() const { return {projection.data(), outputs, heads(), value_dim}; }
    // The queries first ... end - 1, and keys and values up to end - 1.
    template <class Executor>
    void add(kv1::calibrator& to, std::size_t layer, std::size_t first, std::size_t end,
             Executor&& run) const {
        to.add(layer, {q.data() + first * heads() * key_dim, end - first, heads(), key_dim},
               {k.data(), end, kv_heads, key_dim}, {v.data(), end, kv_heads, value_dim}, 0, run);
    }
};

text random_text(generator& g) {
    text t{g.between(1, 60),
           g.between(1, 3),
           g.between(1, 4),
           g.between(1, 24),
           g.between(1, 24),
           g.between(1, 20),
           {},
           {},
           {},
           {}};
    // some queries look at one token, some at all
    t.q = kv1_test::normal_values(g, t.tokens * t.heads() * t.key_dim, g.chance(0.5) ? 0.3f : 3.0f, 0.5f);
    t.k = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.key_dim, 1.0f, 2.0f);
    t.v = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.value_dim, 1.0f, -0.5f);
    t.projection = kv1_test::normal_values(g, t.outputs * t.heads() * t.value_dim);
    return t;
}

// The definitions of calibration.hpp.
struct definition {
    std::vector<double> key_weights, value_weights; // of one KV head
};

struct visibility {
    std::size_t sinks, window, sliding_window, stride;
    [[nodiscard]] bool seen(std::size_t i, std::size_t j) const {
        return j <= i && (sliding_window == 0 || i - j < sliding_window);
    }
    [[nodiscard]] bool quantized(std::size_t i, std::size_t j) const {
        return sliding_window != 0 || (j >= sinks && i - j >= window);
    }
};

void add_gram(std::vector<double>& sums, const std::vector<double>& m, std::size_t rows, std::size_t n) {
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < n; ++j)
                sums[i * n + j] += m[r * n + i] * m[r * n + j];
}

definition define(const text& t, const visibility& sees, std::size_t kv, double scale) {
    definition d{std::vector<double>(t.key_dim * t.key_dim), std::vector<double>(t.value_dim * t.value_dim)};
    const auto value = [&](std::size_t j, std::size_t c) {
        return static_cast<double>(t.v[(j * t.kv_heads + kv) * t.value_dim + c]);
    };
    std::size_t queries = 0;
    for (std::size_t i = 0; i < t.tokens; ++i) {
        if (i % sees.stride != sees.stride / 2)
            continue;
        ++queries;
        std::vector<std::vector<double>> p(t.group, std::vector<double>(t.tokens)),
            o(t.group, std::vector<double>(t.value_dim));
        const auto query = [&](std::size_t a, std::size_t c) {
            return static_cast<double>(t.q[(i * t.heads() + kv * t.group + a) * t.key_dim + c]);
        };
        for (std::size_t a = 0; a < t.group; ++a) {
            double sum = 0.0, most = -std::numeric_limits<double>::infinity();
            for (std::size_t j = 0; j <= i; ++j) {
                for (std::size_t c = 0; c < t.key_dim; ++c)
                    p[a][j] +=
                        scale * query(a, c) * static_cast<double>(t.k[(j * t.kv_heads + kv) * t.key_dim + c]);
                if (sees.seen(i, j))
                    most = std::max(most, p[a][j]);
            }
            for (std::size_t j = 0; j <= i; ++j)
                sum += p[a][j] = sees.seen(i, j) ? std::exp(p[a][j] - most) : 0.0;
            for (std::size_t j = 0; j <= i; ++j)
                for (std::size_t c = 0; c < t.value_dim; ++c)
                    o[a][c] += (p[a][j] / sum) * value(j, c);
            for (double& x : p[a])
                x /= sum;
        }
        for (std::size_t j = 0; j <= i; ++j) {
            if (!sees.seen(i, j) || !sees.quantized(i, j))
                continue;
            std::vector<double> of_key(t.outputs * t.key_dim), of_value(t.outputs * t.value_dim);
            for (std::size_t a = 0; a < t.group; ++a)
                for (std::size_t r = 0; r < t.outputs; ++r) {
                    double moved = 0.0;
                    for (std::size_t c = 0; c < t.value_dim; ++c) {
                        const double w = static_cast<double>(
                            t.projection[(r * t.heads() + kv * t.group + a) * t.value_dim + c]);
                        moved += w * (value(j, c) - o[a][c]);
                        of_value[r * t.value_dim + c] += p[a][j] * w;
                    }
                    for (std::size_t c = 0; c < t.key_dim; ++c)
                        of_key[r * t.key_dim + c] += p[a][j] * scale * moved * query(a, c);
                }
            add_gram(d.key_weights, of_key, t.outputs, t.key_dim);
            add_gram(d.value_weights, of_value, t.outputs, t.value_dim);
        }
    }
    for (std::vector<double>* all : {&d.key_weights, &d.value_weights})
        for (double& x : *all)
            x /= static_cast<double>(std::max<std::size_t>(queries, 1));
    return d;
}

// Error weights are kept as factors in fp16: an element is off by up to 2^-10 of the root of its row's and its
// column's diagonal elements. A tenth is added for sums and products in fp32.
bool same_weights(std::span<const float> found, std::span<const double> exact, std::size_t n) {
    bool same = true;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) {
            const double most = std::sqrt(exact[i * n + i] * exact[j * n + j]);
            same = same && std::fabs(static_cast<double>(found[i * n + j]) - exact[i * n + j]) <=
                               1.1 * 0x1p-10 * most + 1e-30;
        }
    return same;
}

kv1::cache_description shape_of(const text& t, std::size_t layers, std::size_t sliding_window = 0) {
    kv1::layer_description l{t.kv_heads, t.key_dim, t.value_dim};
    l.sliding_window = sliding_window;
    return kv1::uniform_cache(layers, l, 256);
}

std::string policy_text(std::size_t sinks, std::size_t window) {
    return "c3+ls+mean+ew,c2+ls+mean+ew@" + std::to_string(sinks) + ":" + std::to_string(window);
}

bool same_parts(const kv1::calibration& a, const kv1::calibration& b) {
    bool same = a.layers() == b.layers();
    for (std::size_t layer = 0; same && layer < a.layers(); ++layer)
        for (const kv_side side : {kv_side::key, kv_side::value})
            same = same && a.means(layer, side) == b.means(layer, side) &&
                   a.error_weights(layer, side) == b.error_weights(layer, side);
    return same;
}

} // namespace

TEST_CASE("calibration takes means and error weights as they are defined", "[calibration]") {
    generator g(1);
    for (int trial = 0; trial < 60; ++trial) {
        const text t = random_text(g);
        const visibility sees{g.below(6), g.below(12), g.chance(0.3) ? g.between(1, 30) : 0,
                              g.chance(0.3) ? g.between(1, 4) : 1};
        kv1::calibration_options options{.query_stride = sees.stride};
        const double scale = g.chance(0.3) ? 0.25 : 1.0 / std::sqrt(static_cast<double>(t.key_dim));
        options.scale = scale == 0.25 ? 0.25f : 0.0f;
        kv1::calibrator c(parse_policy(policy_text(sees.sinks, sees.window)),
                          shape_of(t, 1, sees.sliding_window), options);
        c.set_output_projection(0, t.w());
        for (std::size_t first = 0; first < t.tokens;) { // in several calls
            const std::size_t end = std::min(t.tokens, first + g.between(1, 40));
            t.add(c, 0, first, end, kv1::inline_executor());
            first = end;
        }
        const kv1::calibration found = c.finish();
        const std::vector<float> keys = found.error_weights(0, kv_side::key),
                                 values = found.error_weights(0, kv_side::value);
        REQUIRE(keys.size() == t.kv_heads * t.key_dim * t.key_dim);
        REQUIRE(values.size() == t.kv_heads * t.value_dim * t.value_dim);
        INFO("trial " << trial);
        for (std::size_t kv = 0; kv < t.kv_heads; ++kv) {
            const definition d = define(t, sees, kv, scale);
            CHECK(same_weights(std::span(keys).subspan(kv * t.key_dim * t.key_dim, t.key_dim * t.key_dim),
                               d.key_weights, t.key_dim));
            CHECK(same_weights(
                std::span(values).subspan(kv * t.value_dim * t.value_dim, t.value_dim * t.value_dim),
                d.value_weights, t.value_dim));
        }
        kv1::mean_estimator key_means(t.kv_heads, t.key_dim), value_means(t.kv_heads, t.value_dim);
        key_means.add({t.k.data(), t.tokens, t.kv_heads, t.key_dim});
        value_means.add({t.v.data(), t.tokens, t.kv_heads, t.value_dim});
        const auto near = [](const std::vector<float>& a, const std::vector<float>& b) {
            return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
                return std::fabs(x - y) <= 0x1p-10f * std::fabs(x); // where sums round otherwise
            });
        };
        CHECK(near(found.means(0, kv_side::key), key_means.means()));
        CHECK(near(found.means(0, kv_side::value), value_means.means()));
    }
}

TEST_CASE("calibration is the same for every executor, and for heads and tokens of any type and stride",
          "[calibration]") {
    generator g(2);
    text t = random_text(g);
    t = {700, 2, 3, 16, 8, 12, {}, {}, {}, {}}; // several parts
    t.q = kv1_test::normal_values(g, t.tokens * t.heads() * t.key_dim);
    t.k = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.key_dim);
    t.v = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.value_dim);
    t.projection = kv1_test::normal_values(g, t.outputs * t.heads() * t.value_dim);
    for (std::vector<float>* all : {&t.q, &t.k, &t.v})
        for (float& x : *all)
            x = kv1::float16(x);
    const auto with = [&](auto&& run) {
        kv1::calibrator c(parse_policy(policy_text(4, 32)), shape_of(t, 1));
        c.set_output_projection(0, t.w());
        t.add(c, 0, 0, t.tokens, run);
        return c.finish(run);
    };
    const kv1::calibration alone = with(kv1::inline_executor());
    kv1_test::thread_executor four(4);
    CHECK(same_parts(alone, with(four)));
    CHECK(four.tasks() > 8);

    // the same numbers in fp16, heads before tokens
    const auto turned = [&](const std::vector<float>& x, std::size_t heads, std::size_t dim) {
        std::vector<kv1::float16> out(x.size());
        for (std::size_t i = 0; i < x.size(); ++i)
            out[(i / dim % heads * t.tokens + i / dim / heads) * dim + i % dim] = kv1::float16(x[i]);
        return out;
    };
    const auto view = [&](const std::vector<kv1::float16>& x, std::size_t heads, std::size_t dim) {
        return kv1::tensor_view(x.data(), t.tokens, heads, dim, static_cast<std::ptrdiff_t>(dim),
                                static_cast<std::ptrdiff_t>(t.tokens * dim));
    };
    const auto q = turned(t.q, t.heads(), t.key_dim), k = turned(t.k, t.kv_heads, t.key_dim),
               v = turned(t.v, t.kv_heads, t.value_dim);
    kv1::calibrator c(parse_policy(policy_text(4, 32)), shape_of(t, 1));
    // and the projection as products, which are exact sums of few terms up to fp32
    std::vector<float> products;
    for (std::size_t h = 0; h < t.kv_heads; ++h)
        for (std::size_t a = 0; a < t.group; ++a)
            for (std::size_t b = 0; b < t.group; ++b)
                for (std::size_t i = 0; i < t.value_dim; ++i)
                    for (std::size_t j = 0; j < t.value_dim; ++j) {
                        double sum = 0.0;
                        for (std::size_t o = 0; o < t.outputs; ++o)
                            sum += static_cast<double>(
                                       t.projection[(o * t.heads() + h * t.group + a) * t.value_dim + i]) *
                                   static_cast<double>(
                                       t.projection[(o * t.heads() + h * t.group + b) * t.value_dim + j]);
                        products.push_back(static_cast<float>(sum));
                    }
    c.set_output_products(0, products);
    c.add(0, view(q, t.heads(), t.key_dim), view(k, t.kv_heads, t.key_dim), view(v, t.kv_heads, t.value_dim));
    CHECK(same_parts(alone, c.finish()));
}
