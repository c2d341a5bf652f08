// SPDX-License-Identifier: Apache-2.0
//
// Caches whose vectors are centred, rotated and fitted: attention, reading, sharing and saving are what they
// would be of a cache that holds the same values as they are.
#include "compare.hpp"
#include "random.hpp"
#include "recording_allocator.hpp"
#include "targets.hpp"
#include "thread_executor.hpp"

#include <kv1/cache_io.hpp>
#include <kv1/encoding.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>

#include <cmath>
#include <cstring>
#include <span>
#include <vector>

using kv1::kv_format;
using kv1::level_choice;
using kv1_test::generator;

namespace {

constexpr std::size_t kv_heads = 2, heads = 4, key_dim = 32, value_dim = 48, page_tokens = 32;

struct shape {
    kv_format key = kv_format::compact3, value = kv_format::compact2;
    bool means = true, rotations = true, weights = false;
};

std::vector<float> some_means(std::size_t dim, std::uint64_t seed) {
    generator g(seed);
    return kv1_test::normal_values(g, kv_heads * dim, 2.0f);
}

std::vector<float> some_weights(std::size_t dim, std::uint64_t seed) {
    generator g(seed);
    kv1::moment_estimator moments(kv_heads, dim);
    const std::vector<float> x = kv1_test::normal_values(g, 64 * heads * dim);
    moments.add({x.data(), 64, heads, dim});
    return moments.moments();
}

kv1::vector_encoding encoding(const shape& s, std::size_t dim, std::uint64_t seed) {
    kv1::vector_encoding e;
    e.levels = level_choice::least_squares;
    e.hadamard = s.rotations ? kv1::rotation_width(dim) : 0;
    if (s.means)
        e.means = some_means(dim, seed);
    if (s.weights)
        e.error_weights = some_weights(dim, seed + 1);
    return e;
}

kv1::cache_description described(const shape& s, std::size_t capacity = 4096) {
    kv1::layer_description l{kv_heads, key_dim, value_dim, s.key, s.value};
    l.key_encoding = encoding(s, key_dim, 71);
    l.value_encoding = encoding(s, value_dim, 73);
    return kv1::uniform_cache(1, l, capacity, page_tokens);
}

// The cache that stores what the other one prepares: same codes, nothing to undo.
kv1::cache_description plain_twin(const shape& s, std::size_t capacity = 4096) {
    kv1::cache_description d = described(s, capacity);
    for (kv1::vector_encoding* e : {&d.layers[0].key_encoding, &d.layers[0].value_encoding}) {
        e->hadamard = 0;
        e->means.clear();
    }
    return d;
}

// What attention has to undo, done by hand.
void prepare(std::vector<float>& x, const kv1::vector_encoding& e, std::size_t dim) {
    for (std::size_t i = 0; i < x.size(); ++i)
        if (!e.means.empty())
            x[i] -= e.means[i % (kv_heads * dim)];
    if (e.hadamard != 0)
        kv1::hadamard_transform(x, e.hadamard);
}

struct tokens {
    std::vector<float> k, v, q;
    std::size_t count;
};
tokens some_tokens(std::size_t n, std::uint64_t seed) {
    generator g(seed);
    return {kv1_test::normal_values(g, n * kv_heads * key_dim, 1.0f, 1.0f),
            kv1_test::normal_values(g, n * kv_heads * value_dim),
            kv1_test::normal_values(g, n * heads * key_dim), n};
}

struct answer {
    std::vector<float> out, lse;
};
template <class Cache>
answer attend(const Cache& cache, kv1::sequence_id id, const std::vector<float>& q, std::size_t queries,
              kv1::attention_options options = {}) {
    answer a{std::vector<float>(queries * heads * value_dim), std::vector<float>(queries * heads)};
    options.log_sum_exp = a.lse;
    cache.attend(id, 0, {q.data(), queries, heads, key_dim}, {a.out.data(), queries, heads, value_dim},
                 options);
    return a;
}

template <class Cache>
void append(Cache& cache, kv1::sequence_id id, const std::vector<float>& k, const std::vector<float>& v) {
    const std::size_t n = k.size() / (kv_heads * key_dim);
    cache.append(id, 0, {k.data(), n, kv_heads, key_dim}, {v.data(), n, kv_heads, value_dim});
}

double dot(const float* a, const float* b, std::size_t n) {
    double sum = 0.0;
    for (std::size_t i = 0; i < n; ++i)
        sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
}

} // namespace

TEST_CASE("attention undoes rotation and means, bit for bit, on every target, path and length", "[encode]") {
    for (const shape& s : {shape{}, shape{.rotations = false}, shape{.means = false},
                           shape{kv_format::affine4, kv_format::affine2}})
        for (const std::size_t n : {std::size_t{1}, std::size_t{50}, std::size_t{300}, std::size_t{2500}}) {
            const tokens t = some_tokens(n, 80 + n);
            kv1_test::for_each_target([&](kv1::target target) {
                if (n > 300 && target == kv1::target::scalar)
                    return;
                kv1::kv_cache cache(described(s)), twin(plain_twin(s));
                const auto id = cache.create_sequence(), other = twin.create_sequence();
                const kv1::layer_description& l = cache.description().layers[0];
                tokens p = t;
                prepare(p.k, l.key_encoding, key_dim);
                prepare(p.v, l.value_encoding, value_dim);
                append(cache, id, t.k, t.v);
                append(twin, other, p.k, p.v);
                const std::size_t queries = n < 60 ? n : 1; // long ones are split into ranges
                const std::size_t first = (n - queries) * heads * key_dim;
                const std::vector<float> q(t.q.begin() + static_cast<std::ptrdiff_t>(first), t.q.end());
                std::vector<float> turned = q;
                if (l.key_encoding.hadamard != 0)
                    kv1::hadamard_transform(turned, l.key_encoding.hadamard);
                for (const auto mode : {kv1::precision::exact, kv1::precision::fast}) {
                    const answer a = attend(cache, id, q, queries, {.mode = mode});
                    answer b = attend(twin, other, turned, queries, {.mode = mode});
                    if (l.value_encoding.hadamard != 0)
                        kv1::hadamard_transform(b.out, l.value_encoding.hadamard);
                    for (std::size_t i = 0; i < b.out.size() && !l.value_encoding.means.empty(); ++i)
                        b.out[i] +=
                            l.value_encoding.means[i / value_dim % heads / 2 * value_dim + i % value_dim];
                    CAPTURE(n, to_string(s.key), s.means, s.rotations,
                            kv1_test::first_difference(a.out, b.out));
                    REQUIRE(kv1_test::same_bits(a.out, b.out));
                    for (std::size_t i = 0; i < a.lse.size(); ++i) {
                        const float* mean = l.key_encoding.means.empty()
                                                ? nullptr
                                                : l.key_encoding.means.data() + i % heads / 2 * key_dim;
                        const double shift = mean == nullptr ? 0.0
                                                             : dot(q.data() + i * key_dim, mean, key_dim) /
                                                                   std::sqrt(double{key_dim});
                        double magnitude = std::fabs(static_cast<double>(b.lse[i]));
                        for (std::size_t c = 0; mean != nullptr && c < key_dim; ++c)
                            magnitude += std::fabs(static_cast<double>(q[i * key_dim + c] * mean[c]));
                        REQUIRE(std::fabs(static_cast<double>(a.lse[i]) - (b.lse[i] + shift)) <=
                                kv1_test::gamma(key_dim + 8) * magnitude);
                    }
                }
            });
        }
}

TEST_CASE("sink logits, soft caps and fp16 windows see scores as they are without encodings", "[encode]") {
    // expected: softmax in double over what read() gives, with fp16 tokens where the window has them
    const tokens t = some_tokens(150, 90);
    for (const std::size_t window : {std::size_t{0}, std::size_t{40}})
        for (const float cap : {0.0f, 5.0f}) {
            kv1::cache_description d = described({});
            d.fp16_window = window;
            d.fp16_sinks = window / 10;
            kv1_test::for_each_target([&](kv1::target) {
                kv1::kv_cache cache(d);
                const auto id = cache.create_sequence();
                append(cache, id, t.k, t.v);
                const std::vector<float> q(t.q.end() - heads * key_dim, t.q.end());
                const std::vector<float> sink_logits{0.5f, -1.0f, 2.0f, 0.0f};
                const answer a =
                    attend(cache, id, q, 1,
                           {.mode = kv1::precision::exact, .soft_cap = cap, .sink_logits = sink_logits});
                for (std::size_t h = 0; h < heads; ++h) {
                    const std::size_t kv = h / 2;
                    std::vector<float> k(t.count * key_dim), v(t.count * value_dim);
                    cache.read(id, 0, kv1::kv_side::key, kv, 0, t.count, k);
                    cache.read(id, 0, kv1::kv_side::value, kv, 0, t.count, v);
                    for (std::size_t i = 0; i < t.count; ++i)
                        if (i < d.fp16_sinks || i + window >= t.count) {
                            for (std::size_t c = 0; c < key_dim; ++c)
                                k[i * key_dim + c] = kv1::float16(t.k[(i * kv_heads + kv) * key_dim + c]);
                            for (std::size_t c = 0; c < value_dim; ++c)
                                v[i * value_dim + c] = kv1::float16(t.v[(i * kv_heads + kv) * value_dim + c]);
                        }
                    double sum = std::exp(static_cast<double>(sink_logits[h]));
                    std::vector<double> out(value_dim);
                    double longest = 0.0;
                    for (std::size_t i = 0; i < t.count; ++i) {
                        double score =
                            dot(&q[h * key_dim], &k[i * key_dim], key_dim) / std::sqrt(double{key_dim});
                        if (cap > 0.0f)
                            score = cap * std::tanh(score / cap);
                        const double w = std::exp(score);
                        longest = std::max(longest, dot(&k[i * key_dim], &k[i * key_dim], key_dim));
                        sum += w;
                        for (std::size_t c = 0; c < value_dim; ++c)
                            out[c] += w * static_cast<double>(v[i * value_dim + c]);
                    }
                    // rotated or not, a score errs by its roundings times |q| |k|, and |q| |mean| is below
                    // that too
                    const double norms =
                        std::sqrt(longest * dot(&q[h * key_dim], &q[h * key_dim], key_dim) / key_dim);
                    const double score_error = kv1_test::gamma(key_dim + 24) * 2.0 * norms;
                    REQUIRE(std::fabs(static_cast<double>(a.lse[h]) - std::log(sum)) <=
                            score_error + kv1_test::gamma(200));
                    for (std::size_t c = 0; c < value_dim; ++c) // values are below 8
                        REQUIRE(std::fabs(static_cast<double>(a.out[h * value_dim + c]) - out[c] / sum) <=
                                8.0 * (2 * score_error + kv1_test::gamma(400)));
                }
            });
        }
}

TEST_CASE("many tokens at once, single tokens and batches of sequences store the same bytes on every target",
          "[encode]") {
    using open_cache = kv1_test::open_cache;
    const tokens t = some_tokens(77, 91);
    for (const shape& s : {shape{}, shape{.weights = true},
                           shape{kv_format::affine3, kv_format::compact4, true, true, true}}) {
        std::vector<std::byte> expected;
        kv1_test::for_each_target([&](kv1::target) {
            for (const std::size_t step : {std::size_t{77}, std::size_t{1}, std::size_t{13}}) {
                kv1_test::allocation_log log;
                open_cache cache(described(s, 128), kv1_test::recording_allocator<std::byte>(log));
                const auto id = cache.create_sequence();
                for (std::size_t at = 0; at < t.count; at += step) {
                    const std::size_t n = std::min(step, t.count - at);
                    const kv1::tensor_view k{t.k.data() + at * kv_heads * key_dim, n, kv_heads, key_dim};
                    const kv1::tensor_view v{t.v.data() + at * kv_heads * value_dim, n, kv_heads, value_dim};
                    if (step == 13) {
                        const std::size_t indptr[] = {0, n};
                        cache.append({&id, 1}, 0, indptr, k, v);
                    } else {
                        cache.append(id, 0, k, v);
                    }
                }
                const std::vector<std::byte> found = kv1_test::arena_bytes(log);
                if (expected.empty())
                    expected = found;
                REQUIRE(found == expected);
            }
        });
    }
}

TEST_CASE("forks, prefixes and loaded sequences attend as their source does", "[encode]") {
    const tokens t = some_tokens(100, 92);
    kv1::kv_cache cache(described({.weights = true}));
    const auto id = cache.create_sequence();
    append(cache, id, t.k, t.v);
    cache.commit(id);
    const std::vector<float> q(t.q.end() - heads * key_dim, t.q.end());
    const answer expected = attend(cache, id, q, 1);

    REQUIRE(attend(cache, cache.fork(id), q, 1).out == expected.out);
    std::vector<kv1::token_id> words(100);
    for (std::size_t i = 0; i < words.size(); ++i)
        words[i] = static_cast<kv1::token_id>(i);
    cache.store_prefix(id, words, {}, true);
    const kv1::prefix_match match = cache.create_from_prefix(words);
    REQUIRE(match.tokens == 100);
    REQUIRE(attend(cache, match.sequence, q, 1).out == expected.out);

    std::vector<std::byte> memory(kv1::saved_bytes(cache, {&id, 1}));
    kv1::save(cache, {&id, 1}, kv1::memory_sink(memory));
    kv1::kv_cache again(described({})); // other error weights: what is stored reads the same
    kv1::sequence_id loaded;
    REQUIRE(kv1::load(again, kv1::memory_source(memory), {&loaded, 1}) == 1);
    REQUIRE(attend(again, loaded, q, 1).out == expected.out);

    for (const shape& other :
         {shape{.means = false}, shape{.rotations = false}, shape{kv_format::compact4}}) {
        kv1::kv_cache stranger(described(other));
        kv1::sequence_id refused;
        const auto r = kv1::try_load(stranger, kv1::memory_source(memory), {&refused, 1});
        REQUIRE_FALSE(r);
        REQUIRE(r.reason().code() == kv1::errc::different_cache);
        REQUIRE(r.reason().where().layer == 0);
    }
    kv1::cache_description moved = described({});
    moved.layers[0].value_encoding.means[5] += 1.0f;
    kv1::kv_cache stranger(moved);
    kv1::sequence_id refused;
    REQUIRE(kv1::try_load(stranger, kv1::memory_source(memory), {&refused, 1}).reason().code() ==
            kv1::errc::different_cache);
}

TEST_CASE("exported rows of an encoded cache go back in, bit for bit", "[encode]") {
    const tokens t = some_tokens(45, 93);
    kv1::kv_cache cache(described({})), other(described({}));
    const auto id = cache.create_sequence(), copy = other.create_sequence();
    append(cache, id, t.k, t.v);
    std::vector<std::byte> k, v;
    std::vector<kv1::float16> ks, vs;
    for (std::size_t i = 0; i < t.count; ++i)
        for (std::size_t h = 0; h < kv_heads; ++h) {
            std::vector<std::byte> kr(kv1::packed_bytes(kv_format::compact3, key_dim)),
                vr(kv1::packed_bytes(kv_format::compact2, value_dim));
            std::vector<kv1::float16> km(1), vm(1);
            cache.export_rows(id, 0, kv1::kv_side::key, h, i, 1, {kr, km});
            cache.export_rows(id, 0, kv1::kv_side::value, h, i, 1, {vr, vm});
            k.insert(k.end(), kr.begin(), kr.end());
            v.insert(v.end(), vr.begin(), vr.end());
            ks.push_back(km[0]);
            vs.push_back(vm[0]);
        }
    REQUIRE(k.size() + 2 * ks.size() == t.count * kv_heads * 14);
    other.append_rows(copy, 0, t.count, {k, ks}, {v, vs});
    const std::vector<float> q(t.q.begin(), t.q.begin() + heads * key_dim);
    REQUIRE(attend(other, copy, q, 1).out == attend(cache, id, q, 1).out);
}

TEST_CASE("what is read back lies within the levels' reach of what was stored", "[encode]") {
    const tokens t = some_tokens(64, 94);
    kv1::kv_cache cache(described({}));
    const auto id = cache.create_sequence();
    append(cache, id, t.k, t.v);
    double error = 0.0, energy = 0.0;
    for (std::size_t h = 0; h < kv_heads; ++h) {
        std::vector<float> k(t.count * key_dim);
        cache.read(id, 0, kv1::kv_side::key, h, 0, t.count, k);
        for (std::size_t i = 0; i < t.count; ++i)
            for (std::size_t c = 0; c < key_dim; ++c) {
                const auto x = static_cast<double>(t.k[(i * kv_heads + h) * key_dim + c]);
                error += (x - k[i * key_dim + c]) * (x - k[i * key_dim + c]);
                energy += (x - cache.description().layers[0].key_encoding.means[h * key_dim + c]) *
                          (x - cache.description().layers[0].key_encoding.means[h * key_dim + c]);
            }
    }
    REQUIRE(error < 0.05 * energy); // 3 bits of Gaussian channels: 3.7 %
}

TEST_CASE("encodings that no layer can have are refused, naming the layer", "[encode]") {
    const auto refused = [](auto change) {
        kv1::cache_description d = described({});
        change(d.layers[0]);
        const auto r = kv1::kv_cache::create(d);
        REQUIRE_FALSE(r);
        REQUIRE(r.reason().where().layer == 0);
        return r.reason().code();
    };
    using kv1::errc;
    REQUIRE(refused([](auto& l) { l.key_encoding.hadamard = 24; }) == errc::invalid_argument);
    REQUIRE(refused([](auto& l) { l.value_encoding.hadamard = 32; }) == errc::invalid_argument);
    REQUIRE(refused([](auto& l) { l.key_encoding.means.pop_back(); }) == errc::shape_mismatch);
    REQUIRE(refused([](auto& l) { l.key_encoding.error_weights.resize(7); }) == errc::shape_mismatch);
    REQUIRE(refused([](auto& l) { l.value_encoding.means[3] = std::nanf(""); }) == errc::non_finite);
    REQUIRE(refused([](auto& l) { l.key_format = kv_format::fp16; }) == errc::invalid_argument);
    REQUIRE(refused([](auto& l) { l.value_format = kv_format::binary; }) == errc::invalid_argument);
    REQUIRE(refused([](auto& l) {
                l.key_encoding.levels = level_choice::min_max;
                l.key_encoding.error_weights = some_weights(key_dim, 1);
            }) == errc::invalid_argument);
    REQUIRE(refused([](auto& l) {
                l.key_encoding.error_weights.assign(kv_heads * key_dim * key_dim, -1.0f);
            }) == errc::invalid_argument);
}

TEST_CASE("means and moments are those of all tensors that were added", "[encode]") {
    kv1::mean_estimator means(2, 3);
    kv1::moment_estimator moments(1, 3);
    const std::vector<float> x{1, 2, 3, 10, 20, 30, 3, 2, 1, 30, 20, 10};
    means.add({x.data(), 1, 2, 3});
    means.add({x.data() + 6, 1, 2, 3});
    REQUIRE(means.means() == std::vector<float>{2, 2, 2, 20, 20, 20});
    moments.add({x.data(), 2, 2, 3});
    REQUIRE(moments.moments() ==
            std::vector<float>{252.5f, 202.0f, 151.5f, 202.0f, 202.0f, 202.0f, 151.5f, 202.0f, 252.5f});
}
