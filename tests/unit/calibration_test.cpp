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
#include <utility>
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

void add_square(std::vector<double>& sums, const float* x, double factor, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            sums[i * n + j] += factor * static_cast<double>(x[i]) * static_cast<double>(x[j]);
}

// Rows are orthonormal, and make m diagonal. Numbers of a basis are rounded to fp32, so sums of products with them are
// off by parts in 2^24 of the largest eigenvalue, n of them.
void check_eigenvectors(std::span<const float> rows, const std::vector<double>& m, std::size_t n) {
    double trace = 0.0;
    for (std::size_t i = 0; i < n; ++i)
        trace += m[i * n + i];
    double before = trace;
    bool orthonormal = true, diagonal = true, descending = true;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) {
            double unit = 0.0, turned = 0.0;
            for (std::size_t a = 0; a < n; ++a) {
                const auto x = static_cast<double>(rows[i * n + a]);
                unit += x * static_cast<double>(rows[j * n + a]);
                for (std::size_t b = 0; b < n; ++b)
                    turned += x * m[a * n + b] * static_cast<double>(rows[j * n + b]);
            }
            const double rounding = 0x1p-23 * std::sqrt(static_cast<double>(n)) + 1e-12;
            orthonormal = orthonormal && std::fabs(unit - (i == j ? 1.0 : 0.0)) <= rounding;
            diagonal = diagonal && (i == j || std::fabs(turned) <= 2.0 * rounding * trace);
            if (i == j) {
                descending = descending && turned <= before + 2.0 * rounding * trace;
                before = turned;
            }
        }
    CHECK(orthonormal);
    CHECK(diagonal);
    CHECK(descending);
}

} // namespace

TEST_CASE("calibration takes means and error weights as they are defined", "[calibration]") {
    generator g(1);
    for (int trial = 0; trial < 60; ++trial) {
        const text t = random_text(g);
        visibility sees{g.below(6), g.below(12), g.chance(0.3) ? g.between(1, 30) : 0,
                        g.chance(0.3) ? g.between(1, 4) : 1};
        const bool told_later = g.chance(0.5);
        if (sees.sliding_window != 0 && told_later)
            sees.sinks = sees.window = 0; // which only a shape without a window leaves out
        kv1::calibration_options options{.query_stride = sees.stride};
        const double scale = g.chance(0.3) ? 0.25 : 1.0 / std::sqrt(static_cast<double>(t.key_dim));
        options.scale = scale == 0.25 ? 0.25f : 0.0f;
        kv1::calibrator c(parse_policy(policy_text(sees.sinks, sees.window)),
                          shape_of(t, 1, told_later ? 0 : sees.sliding_window), options);
        c.set_output_projection(0, t.w());
        if (told_later)
            c.set_sliding_window(0, sees.sliding_window);
        CHECK(c.try_set_sliding_window(1, 0).code() == kv1::errc::out_of_range);
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

TEST_CASE("means of keys that turn are those before they turn, of the largest pairs", "[calibration]") {
    generator g(3);
    for (int trial = 0; trial < 20; ++trial) {
        const std::size_t pairs = g.between(1, 8), key_dim = 2 * pairs + g.below(5),
                          tokens = g.between(20, 60), first_position = g.chance(0.5) ? g.below(5000) : 0,
                          kept = g.between(1, pairs);
        kv1::layer_description l{2, key_dim, 4};
        l.rotary = {kv1::rotary_frequencies(100.0, 2 * pairs),
                    g.chance(0.5) ? kv1::rotary_pairs::half_split : kv1::rotary_pairs::interleaved,
                    g.below(key_dim - 2 * pairs + 1)};
        const std::vector<float> mean = kv1_test::normal_values(g, 2 * key_dim, 3.0f),
                                 v(tokens * 2 * 4, 1.0f);
        std::vector<float> k = kv1_test::normal_values(g, tokens * 2 * key_dim);
        std::vector<double> exact(2 * key_dim);
        for (std::size_t i = 0; i < k.size(); ++i) {
            k[i] += mean[i % mean.size()];
            exact[i % mean.size()] += static_cast<double>(k[i]) / static_cast<double>(tokens);
        }
        for (std::size_t row = 0; row < tokens * 2; ++row)
            kv1::apply_rotary(l.rotary, std::span(k).subspan(row * key_dim, key_dim),
                              static_cast<std::int64_t>(first_position + row / 2));
        kv1::calibrator c(parse_policy("c2+ls+mean,c2"), kv1::uniform_cache(1, l, 64), {.mean_pairs = kept});
        for (std::size_t first = 0; first < tokens; first += 16) {
            const std::size_t end = std::min(tokens, first + 16);
            c.add(0, {k.data() + first * 2 * key_dim, end - first, 2, key_dim}, {k.data(), end, 2, key_dim},
                  {v.data(), end, 2, 4}, first_position);
        }
        const kv1::calibration found = c.finish();
        const std::vector<float> means = found.means(0, kv_side::key);
        CHECK(found.rotary(0) == l.rotary);
        CHECK(found.means(0, kv_side::value).empty());
        for (std::size_t h = 0; h < 2; ++h) {
            const auto own = std::span(means).subspan(h * key_dim, key_dim);
            const double* const wanted = exact.data() + h * key_dim;
            // keys are fp32 before and after they turn, at angles up to 5,060; the mean is fp16
            const auto near = [&](std::size_t i) {
                return std::fabs(static_cast<double>(own[i]) - wanted[i]) <=
                       0x1p-11 * std::fabs(wanted[i]) + 1e-5;
            };
            const auto energy = [&](std::size_t j) {
                return std::hypot(wanted[l.rotary.first_of(j)], wanted[l.rotary.second_of(j)]);
            };
            std::size_t left = 0;
            double smallest_kept = std::numeric_limits<double>::infinity(), largest_dropped = 0.0;
            std::vector<bool> turns(key_dim);
            for (std::size_t j = 0; j < pairs; ++j) {
                const std::size_t a = l.rotary.first_of(j), b = l.rotary.second_of(j);
                turns[a] = turns[b] = true;
                if (own[a] == 0.0f && own[b] == 0.0f) {
                    largest_dropped = std::max(largest_dropped, energy(j));
                    continue;
                }
                ++left;
                CHECK(near(a));
                CHECK(near(b));
                smallest_kept = std::min(smallest_kept, energy(j));
            }
            CHECK(left == kept);
            CHECK(largest_dropped <= smallest_kept);
            for (std::size_t i = 0; i < key_dim; ++i)
                CHECK((turns[i] || near(i)));
        }
    }
}

TEST_CASE("bases are eigenvectors of second moments, in descending order", "[calibration]") {
    generator g(4);
    for (int trial = 0; trial < 20; ++trial) {
        const text t = random_text(g);
        const double scale = 1.0 / std::sqrt(static_cast<double>(t.key_dim));
        kv1::calibrator c(parse_policy("c2+ls+basis"), shape_of(t, 1));
        t.add(c, 0, 0, t.tokens, kv1::inline_executor());
        const kv1::calibration found = c.finish();
        for (std::size_t kv = 0; kv < t.kv_heads; ++kv) {
            std::vector<double> queries(t.key_dim * t.key_dim), values(t.value_dim * t.value_dim);
            for (std::size_t i = 0; i < t.tokens; ++i)
                for (std::size_t a = 0; a < t.group; ++a) {
                    const float* const q = t.q.data() + (i * t.heads() + kv * t.group + a) * t.key_dim;
                    add_square(queries, q, 1.0, t.key_dim);
                    std::vector<double> p(i + 1);
                    double sum = 0.0;
                    for (std::size_t j = 0; j <= i; ++j) {
                        for (std::size_t n = 0; n < t.key_dim; ++n)
                            p[j] += scale * static_cast<double>(q[n]) *
                                    static_cast<double>(t.k[(j * t.kv_heads + kv) * t.key_dim + n]);
                    }
                    const double most = *std::max_element(p.begin(), p.end());
                    for (double& x : p)
                        sum += x = std::exp(x - most);
                    for (std::size_t j = 0; j <= i; ++j)
                        add_square(values, t.v.data() + (j * t.kv_heads + kv) * t.value_dim, p[j] / sum,
                                   t.value_dim);
                }
            const std::vector<float> keys_basis = found.basis(0, kv_side::key),
                                     values_basis = found.basis(0, kv_side::value);
            check_eigenvectors(std::span(keys_basis).subspan(kv * queries.size(), queries.size()), queries,
                               t.key_dim);
            check_eigenvectors(std::span(values_basis).subspan(kv * values.size(), values.size()), values,
                               t.value_dim);
        }
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

TEST_CASE("what a calibrator can not take is refused, and adds nothing", "[calibration]") {
    generator g(6);
    text t{20, 2, 2, 8, 4, 6, {}, {}, {}, {}};
    t.q = kv1_test::normal_values(g, t.tokens * t.heads() * t.key_dim);
    t.k = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.key_dim);
    t.v = kv1_test::normal_values(g, t.tokens * t.kv_heads * t.value_dim);
    t.projection = kv1_test::normal_values(g, t.outputs * t.heads() * t.value_dim);
    const kv1::tensor_view q(t.q.data(), 20, 4, 8), k(t.k.data(), 20, 2, 8), v(t.v.data(), 20, 2, 4);
    const auto policy = [] { return parse_policy("c2+ls+mean+ew,c2+ls+ew/1:16"); };
    kv1::calibrator c(policy(), shape_of(t, 2));

    CHECK(c.try_add(0, q, k, v).code() == errc::invalid_argument); // no output projection yet
    CHECK(c.try_set_output_projection(2, t.w()).code() == errc::out_of_range);
    CHECK(c.try_set_output_projection(0, {t.projection.data(), 6, 3, 4}).code() == errc::shape_mismatch);
    CHECK(c.try_set_output_projection(0, {t.projection.data(), 6, 4, 3}).code() == errc::shape_mismatch);
    CHECK(c.try_set_output_products(0, t.projection).code() == errc::shape_mismatch);
    c.set_output_projection(0, t.w());
    CHECK(c.try_finish().reason().where().layer == 0); // no tokens yet
    CHECK(c.try_add(2, q, k, v).code() == errc::out_of_range);
    CHECK(c.try_add(0, {t.q.data(), 20, 2, 8}, k, v).code() ==
          errc::shape_mismatch); // heads of the projection
    CHECK(c.try_add(0, {t.q.data(), 20, 3, 8}, k, v).code() == errc::shape_mismatch);
    CHECK(c.try_add(0, q, k, {t.v.data(), 19, 2, 4}).code() == errc::shape_mismatch);
    CHECK(c.try_add(0, q, {t.k.data(), 10, 2, 8}, {t.v.data(), 10, 2, 4}).code() == errc::shape_mismatch);
    CHECK(c.try_add(0, {static_cast<const float*>(nullptr), 20, 4, 8}, k, v).code() ==
          errc::invalid_argument);
    CHECK(c.try_add(0, {t.q.data(), -1, 4, 8}, k, v).code() == errc::invalid_argument);
    const float kept = std::exchange(t.k[5 * 16 + 8 + 3], std::numeric_limits<float>::infinity());
    const kv1::status s = c.try_add(0, q, k, v);
    CHECK(s.code() == errc::non_finite);
    CHECK(s.where().layer == 0);
    CHECK(s.where().token == 5);
    CHECK(s.where().kv_head == 1);
    CHECK(s.where().channel == 3);
    t.k[5 * 16 + 8 + 3] = kept;
    c.add(0, q, k, v);
    CHECK(c.try_set_output_projection(0, t.w()).code() == errc::invalid_argument); // after tokens

    kv1::calibrator fresh(policy(), shape_of(t, 2)); // layer 1 is asked for nothing
    fresh.set_output_projection(0, t.w());
    fresh.add(0, q, k, v);
    CHECK(same_parts(c.finish(), fresh.finish()));

    const auto refused = [&](const char* text, auto change, kv1::calibration_options o = {}) {
        kv1::cache_description d = shape_of(t, 2);
        change(d);
        return kv1::calibrator::create(parse_policy(text), d, o).code();
    };
    const auto nothing = [](auto&) {};
    CHECK(refused("c2/2:c4", nothing) == errc::out_of_range);
    CHECK(refused("c2+ls+ew", [](auto& d) { d.layers[1].key_dim = 0; }) == errc::invalid_argument);
    CHECK(refused("c2+ls+ew", [](auto& d) { d.layers[1] = kv1::latent_layer(48, 32); }) ==
          errc::invalid_argument);
    CHECK(refused("c2+ls+mean", [](auto& d) { d.layers[1] = kv1::latent_layer(48, 32); }) == errc::ok);
    CHECK(refused("c2", nothing, {.query_stride = 0}) == errc::invalid_argument);
    CHECK(refused("c2", nothing, {.scale = -1.0f}) == errc::invalid_argument);
}
