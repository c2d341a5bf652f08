// SPDX-License-Identifier: Apache-2.0
//
// Keys and values in an orthogonal basis (vector_encoding::basis), against the definition. A twin cache without
// bases holds the same vectors, turned by hand: it has to hold the same codes, and to give the same outputs
// once they are turned back.
#include "compare.hpp"
#include "random.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

using kv1::kv_format;
using kv1::kv_side;
using kv1::level_choice;
using kv1_test::generator;
namespace detail = kv1::detail;

namespace {

constexpr std::size_t kv_heads = 2;

// Random orthogonal matrices, [kv_heads][n][n]: normal numbers, made orthogonal row by row.
std::vector<float> random_basis(generator& g, std::size_t n) {
    std::vector<float> all;
    for (std::size_t h = 0; h < kv_heads; ++h) {
        std::vector<double> m(n * n);
        for (double& x : m)
            x = g.normal();
        for (std::size_t i = 0; i < n; ++i) {
            double* row = m.data() + i * n;
            for (int twice = 0; twice < 2; ++twice)
                for (std::size_t k = 0; k < i; ++k) {
                    double dot = 0.0;
                    for (std::size_t j = 0; j < n; ++j)
                        dot += row[j] * m[k * n + j];
                    for (std::size_t j = 0; j < n; ++j)
                        row[j] -= dot * m[k * n + j];
                }
            double norm = 0.0;
            for (std::size_t j = 0; j < n; ++j)
                norm += row[j] * row[j];
            for (std::size_t j = 0; j < n; ++j)
                row[j] /= std::sqrt(norm);
        }
        for (const double x : m)
            all.push_back(static_cast<float>(x));
    }
    return all;
}

std::vector<float> random_weights(generator& g, std::size_t n) {
    kv1::moment_estimator moments(kv_heads, n);
    const std::vector<float> x = kv1_test::normal_values(g, 3 * n * kv_heads * n);
    moments.add({x.data(), 3 * n, kv_heads, n});
    return moments.moments();
}

struct setting {
    kv_format key = kv_format::compact3, value = kv_format::compact2;
    std::size_t key_dim = 64, value_dim = 48, group = 2, tokens = 200, queries = 1, page = 32;
    bool key_basis = true, value_basis = true, hadamard = true, means = true, per_channel = false;
    std::size_t key_group = 0;
    [[nodiscard]] std::size_t heads() const { return kv_heads * group; }
};

setting random_setting(generator& g) {
    setting s;
    const kv_format formats[] = {kv_format::compact3, kv_format::affine2, kv_format::codebook2,
                                 kv_format::affine4,  kv_format::affine8, kv_format::compact4,
                                 kv_format::codebook4};
    const std::size_t dims[] = {24, 32, 64, 80, 128};
    s.key = formats[g.below(std::size(formats))];
    s.value = formats[g.below(std::size(formats))];
    s.key_dim = dims[g.below(std::size(dims))];
    s.value_dim = dims[g.below(std::size(dims))];
    s.group = g.between(1, 5);
    s.tokens = g.chance(0.2) ? g.between(4500, 5000) : g.between(1, 600);
    s.queries = std::min(s.tokens, g.between(1, 5));
    s.key_basis = g.chance(0.8);
    s.value_basis = g.chance(0.8);
    s.hadamard = g.chance(0.5);
    s.means = g.chance(0.5);
    s.per_channel = s.key != kv_format::affine8 && g.chance(0.2);
    s.key_group = !s.per_channel && s.key_dim % 32 == 0 && g.chance(0.2) ? 32 : 0;
    return s;
}

std::string text(const setting& s) {
    return std::string(to_string(s.key)) + " " + std::to_string(s.key_dim) +
           (s.key_basis ? " in a basis, " : ", ") + std::string(to_string(s.value)) + " " +
           std::to_string(s.value_dim) + (s.value_basis ? " in a basis, " : ", ") + "group " +
           std::to_string(s.group) + ", " + std::to_string(s.tokens) + " tokens, " +
           std::to_string(s.queries) + " queries" + (s.hadamard ? ", had" : "") + (s.means ? ", mean" : "") +
           (s.per_channel ? ", channel" : "") + (s.key_group != 0 ? ", g32" : "");
}

kv1::cache_description description(const setting& s, generator g) {
    kv1::layer_description l{kv_heads, s.key_dim, s.value_dim, s.key, s.value};
    l.key_group = s.key_group;
    l.key_axis = s.per_channel ? kv1::quantization_axis::per_channel : kv1::quantization_axis::per_token;
    for (const bool keys : {true, false}) {
        kv1::vector_encoding& e = keys ? l.key_encoding : l.value_encoding;
        const std::size_t n = keys ? s.key_dim : s.value_dim;
        e.levels = level_choice::least_squares;
        e.hadamard = s.hadamard ? kv1::rotation_width(n) : 0;
        if (s.means)
            e.means = kv1_test::normal_values(g, kv_heads * n, 2.0f);
        if (keys ? s.key_basis : s.value_basis)
            e.basis = random_basis(g, n);
    }
    return kv1::uniform_cache(1, l, s.tokens + 64, s.page);
}

kv1::cache_description twin_of(kv1::cache_description d) {
    for (kv1::vector_encoding* e : {&d.layers[0].key_encoding, &d.layers[0].value_encoding}) {
        e->basis.clear();
        e->means.clear();
        e->hadamard = 0;
    }
    return d;
}

// A vector as it is stored, by the definition.
void store(std::vector<float>& x, const kv1::vector_encoding& e, std::size_t heads, std::size_t n) {
    detail::basis_matrices bases;
    if (!e.basis.empty())
        REQUIRE(bases.assign(e.basis, n));
    const std::size_t group = heads / kv_heads;
    for (std::size_t i = 0; i < x.size() / n; ++i) {
        const std::size_t head = i % heads / group;
        const std::span<float> row(x.data() + i * n, n);
        if (!e.means.empty())
            for (std::size_t c = 0; c < n; ++c)
                row[c] -= e.means[head * n + c];
        if (const detail::basis_view b = bases.of(head)) {
            const std::vector<float> before(row.begin(), row.end());
            detail::to_basis(b, before.data(), row.data());
        }
        if (e.hadamard != 0)
            kv1::hadamard_transform(row, e.hadamard);
    }
}

struct tokens {
    std::vector<float> k, v, q;
};
tokens some_tokens(generator& g, const setting& s) {
    return {kv1_test::normal_values(g, s.tokens * kv_heads * s.key_dim, 1.0f, 1.0f),
            kv1_test::normal_values(g, s.tokens * kv_heads * s.value_dim),
            kv1_test::normal_values(g, s.queries * s.heads() * s.key_dim)};
}

void append(kv1::kv_cache& cache, kv1::sequence_id id, const setting& s, const tokens& t,
            std::size_t first = 0, std::size_t count = ~std::size_t{0}) {
    count = std::min(count, s.tokens - first);
    cache.append(id, 0, {t.k.data() + first * kv_heads * s.key_dim, count, kv_heads, s.key_dim},
                 {t.v.data() + first * kv_heads * s.value_dim, count, kv_heads, s.value_dim});
}

struct answer {
    std::vector<float> out, lse;
};
answer attend(const kv1::kv_cache& cache, kv1::sequence_id id, const setting& s, const std::vector<float>& q,
              kv1::attention_options options) {
    answer a{std::vector<float>(s.queries * s.heads() * s.value_dim),
             std::vector<float>(s.queries * s.heads())};
    options.log_sum_exp = a.lse;
    cache.attend(id, 0, {q.data(), s.queries, s.heads(), s.key_dim},
                 {a.out.data(), s.queries, s.heads(), s.value_dim}, options);
    return a;
}

} // namespace

TEST_CASE("a vector enters a basis with the definition's bits on every target, and leaves it as it came",
          "[basis]") {
    generator g(2001);
    for (const std::size_t n : {1u, 3u, 16u, 24u, 33u, 64u, 80u, 128u, 200u}) {
        const std::vector<float> matrices = random_basis(g, n);
        REQUIRE(detail::is_orthogonal(std::span(matrices).first(n * n), n));
        detail::basis_matrices bases;
        REQUIRE(bases.assign(matrices, n));
        const detail::basis_view b = bases.of(1);
        for (const std::size_t rows : {1u, 3u, 4u, 9u}) {
            const std::vector<float> x = kv1_test::normal_values(g, rows * n);
            std::vector<float> expected(x.size());
            for (std::size_t r = 0; r < rows; ++r)
                detail::to_basis(b, x.data() + r * n, expected.data() + r * n);
            for (std::size_t i = 0; i < n; ++i) { // the definition itself, in double
                double sum = 0.0, norm = 0.0;
                for (std::size_t j = 0; j < n; ++j) {
                    const double term =
                        static_cast<double>(matrices[(n + i) * n + j]) * static_cast<double>(x[j]);
                    sum += term;
                    norm += std::fabs(term);
                }
                REQUIRE(std::fabs(expected[i] - sum) <= kv1_test::gamma(static_cast<double>(n)) * norm);
            }
            kv1_test::for_each_target([&](kv1::target) {
                std::vector<float> y(x.size()), back(n);
                detail::common_kernels().enter_basis(b, x.data(), rows, y.data());
                REQUIRE(kv1_test::same_bits(y, expected));
                detail::common_kernels().leave_basis(b, y.data(), back.data());
                double length = 0.0;
                for (std::size_t j = 0; j < n; ++j)
                    length += static_cast<double>(x[j]) * static_cast<double>(x[j]);
                // two products with unit vectors in fp32, and what the matrix is off by as it is stored
                for (std::size_t j = 0; j < n; ++j)
                    REQUIRE(std::fabs(back[j] - x[j]) <= kv1_test::gamma(4.0 * static_cast<double>(n)) *
                                                             std::sqrt(static_cast<double>(n) * length));
            });
        }
    }
}

TEST_CASE("a basis is undone in attention, on every target, path and length", "[basis]") {
    generator g(2002);
    for (int round = 0; round < 40; ++round) {
        const setting s = random_setting(g);
        CAPTURE(text(s));
        const kv1::cache_description d = description(s, g);
        const kv1::layer_description& l = d.layers[0];
        const tokens t = some_tokens(g, s);
        tokens bare = t;
        store(bare.k, l.key_encoding, kv_heads, s.key_dim);
        store(bare.v, l.value_encoding, kv_heads, s.value_dim);
        kv1::vector_encoding of_queries = l.key_encoding;
        of_queries.means.clear();
        store(bare.q, of_queries, s.heads(), s.key_dim);
        detail::basis_matrices bases;
        if (s.value_basis)
            REQUIRE(bases.assign(l.value_encoding.basis, s.value_dim));
        kv1_test::for_each_target([&](kv1::target target) {
            if (target == kv1::target::scalar && (round % 4 != 0 || s.tokens > 600))
                return;
            kv1::kv_cache cache(d), twin(twin_of(d));
            const auto id = cache.create_sequence(), other = twin.create_sequence();
            append(cache, id, s, t);
            append(twin, other, s, bare);
            for (const auto mode : {kv1::precision::exact, kv1::precision::fast}) {
                kv1::attention_options options{.mask = kv1::attention_mask::causal(), .mode = mode};
                const answer a = attend(cache, id, s, t.q, options),
                             b = attend(twin, other, s, bare.q, options);
                for (std::size_t r = 0; r < s.queries * s.heads(); ++r) {
                    const std::size_t head = r % s.heads() / s.group;
                    std::vector<float> expected(b.out.begin() + static_cast<std::ptrdiff_t>(r * s.value_dim),
                                                b.out.begin() +
                                                    static_cast<std::ptrdiff_t>((r + 1) * s.value_dim));
                    if (l.value_encoding.hadamard != 0)
                        kv1::hadamard_transform(expected, l.value_encoding.hadamard);
                    double norm = 0.0;
                    for (const float x : expected)
                        norm += static_cast<double>(x) * static_cast<double>(x);
                    if (const detail::basis_view view = bases.of(head)) {
                        const std::vector<float> inside = expected;
                        detail::from_basis(view, inside.data(), expected.data());
                    }
                    for (std::size_t c = 0; c < s.value_dim; ++c) {
                        const double mean = s.means ? l.value_encoding.means[head * s.value_dim + c] : 0.0;
                        // the sums of the way back have another order
                        REQUIRE(std::fabs(a.out[r * s.value_dim + c] - (expected[c] + mean)) <=
                                kv1_test::gamma(2.0 * static_cast<double>(s.value_dim) + 4.0) *
                                    (std::sqrt(norm) + std::fabs(mean)));
                    }
                    if (!s.means)
                        REQUIRE(a.lse[r] == b.lse[r]);
                }
            }
        });
    }
}

TEST_CASE("vectors in a basis are stored alike however they are appended, and are read as they came",
          "[basis]") {
    generator g(2003);
    for (int round = 0; round < 25; ++round) {
        setting s = random_setting(g);
        s.tokens = g.between(1, 150);
        CAPTURE(text(s));
        const kv1::cache_description d = description(s, g);
        const tokens t = some_tokens(g, s);
        tokens bare = t;
        store(bare.k, d.layers[0].key_encoding, kv_heads, s.key_dim);
        store(bare.v, d.layers[0].value_encoding, kv_heads, s.value_dim);
        kv1_test::for_each_target([&](kv1::target) {
            kv1::kv_cache cache(d), twin(twin_of(d)), pieces(d);
            const auto id = cache.create_sequence(), other = twin.create_sequence(),
                       third = pieces.create_sequence();
            append(cache, id, s, t);
            append(twin, other, s, bare);
            for (std::size_t at = 0; at < s.tokens;) {
                const std::size_t n = g.chance(0.5) ? 1 : g.between(1, 30);
                append(pieces, third, s, t, at, n);
                at += n;
            }
            for (const kv_side side : {kv_side::key, kv_side::value}) {
                const std::size_t n = side == kv_side::key ? s.key_dim : s.value_dim;
                const kv1::vector_encoding& e =
                    side == kv_side::key ? d.layers[0].key_encoding : d.layers[0].value_encoding;
                detail::basis_matrices bases;
                if (!e.basis.empty())
                    REQUIRE(bases.assign(e.basis, n));
                for (std::size_t h = 0; h < kv_heads; ++h) {
                    std::vector<float> a(s.tokens * n), b(a.size()), c(a.size());
                    cache.read(id, 0, side, h, 0, s.tokens, a);
                    twin.read(other, 0, side, h, 0, s.tokens, b);
                    pieces.read(third, 0, side, h, 0, s.tokens, c);
                    REQUIRE(kv1_test::same_bits(a, c));
                    for (std::size_t i = 0; i < s.tokens; ++i) {
                        const std::span<float> row(b.data() + i * n, n);
                        if (e.hadamard != 0)
                            kv1::hadamard_transform(row, e.hadamard);
                        if (const detail::basis_view view = bases.of(h)) {
                            const std::vector<float> inside(row.begin(), row.end());
                            detail::from_basis(view, inside.data(), row.data());
                        }
                        for (std::size_t k = 0; k < n && s.means; ++k)
                            row[k] += e.means[h * n + k];
                    }
                    REQUIRE(kv1_test::same_bits(a, b));
                }
            }
        });
    }
}

TEST_CASE("error weights are those of vectors outside the basis", "[basis]") {
    // errors cost least under the weights that count, more under weights that are taken for those inside the
    // basis, and under none
    generator g(2004);
    const setting s{.means = false};
    const kv1::cache_description d = description(s, g);
    const std::vector<float>& basis = d.layers[0].key_encoding.basis;
    const tokens t = some_tokens(g, s);
    const std::size_t n = s.key_dim;
    std::vector<float> steep = random_weights(g, n); // few directions count
    for (std::size_t i = 0; i < kv_heads * n * n; ++i)
        steep[i] *= (i / n % n < 8 ? 4.0f : 0.25f) * (i % n < 8 ? 4.0f : 0.25f);
    std::vector<float> inside(steep.size()); // B^T W B: in the basis it is what W is outside
    for (std::size_t h = 0; h < kv_heads; ++h) {
        const float *b = basis.data() + h * n * n, *w = steep.data() + h * n * n;
        std::vector<double> half(n * n);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t k = 0; k < n; ++k)
                for (std::size_t j = 0; j < n; ++j)
                    half[i * n + j] += static_cast<double>(w[i * n + k]) * static_cast<double>(b[k * n + j]);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j) {
                double sum = 0.0;
                for (std::size_t k = 0; k < n; ++k)
                    sum += static_cast<double>(b[k * n + i]) * half[k * n + j];
                inside[(h * n + i) * n + j] = inside[(h * n + j) * n + i] = static_cast<float>(sum);
            }
    }
    const auto cost = [&](const std::vector<float>& weights) {
        kv1::cache_description own = d;
        own.layers[0].key_encoding.error_weights = weights;
        kv1::kv_cache cache(own);
        const auto id = cache.create_sequence();
        append(cache, id, s, t);
        double total = 0.0;
        for (std::size_t h = 0; h < kv_heads; ++h) {
            std::vector<float> rows(s.tokens * n);
            cache.read(id, 0, kv_side::key, h, 0, s.tokens, rows);
            for (std::size_t i = 0; i < s.tokens; ++i) {
                std::vector<double> error(n);
                for (std::size_t c = 0; c < n; ++c)
                    error[c] = static_cast<double>(rows[i * n + c]) -
                               static_cast<double>(t.k[(i * kv_heads + h) * n + c]);
                for (std::size_t a = 0; a < n; ++a)
                    for (std::size_t b = 0; b < n; ++b)
                        total += error[a] * error[b] * static_cast<double>(steep[(h * n + a) * n + b]);
            }
        }
        return total;
    };
    const double with = cost(steep), elsewhere = cost(inside), without = cost({});
    CAPTURE(with, elsewhere, without);
    REQUIRE(with < 0.7 * elsewhere);
    REQUIRE(with < 0.7 * without);
}
