// SPDX-License-Identifier: Apache-2.0
//
// How much the integer path adds to the difference that quantization itself makes: RMS over outputs of
// (fast - exact), relative to RMS of (exact - attention over the unquantized K and V).
#include "random.hpp"
#include "safetensors_reader.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

using kv1::kv_format;
using kv1::precision;

namespace {

// K and V of one KV head, and the queries of its heads.
struct attention_data {
    std::size_t dim = 0;
    std::vector<float> k, v, q;
};

attention_data gaussian_data(std::size_t tokens, std::size_t dim, std::size_t heads, float query_size,
                             std::uint64_t seed) {
    kv1_test::generator g(seed);
    attention_data d{dim, kv1_test::normal_values(g, tokens * dim), kv1_test::normal_values(g, tokens * dim),
                     kv1_test::normal_values(g, heads * dim, query_size)};
    return d;
}

attention_data peaked_data(std::size_t tokens, std::size_t dim, std::size_t heads, std::uint64_t seed) {
    attention_data d = gaussian_data(tokens, dim, heads, 1.0f, seed);
    for (std::size_t h = 0; h < heads; ++h) // each query is a key, scaled so that the key wins by far
        for (std::size_t c = 0; c < dim; ++c)
            d.q[h * dim + c] = 1.5f * d.k[(h * 97 + 13) % tokens * dim + c];
    return d;
}

attention_data outlier_data(std::size_t tokens, std::size_t dim, std::size_t heads, std::uint64_t seed) {
    attention_data d = gaussian_data(tokens, dim, heads, 1.0f, seed);
    for (std::size_t i = 3; i < d.k.size(); i += dim)
        d.k[i] *= 20.0f;
    for (std::size_t i = 3; i < d.q.size(); i += dim)
        d.q[i] *= 20.0f;
    return d;
}

std::vector<double> reference(const attention_data& d) {
    const std::size_t tokens = d.k.size() / d.dim, heads = d.q.size() / d.dim;
    std::vector<double> out(heads * d.dim, 0.0), s(tokens);
    for (std::size_t h = 0; h < heads; ++h) {
        double top = -1e300, sum = 0.0;
        for (std::size_t t = 0; t < tokens; ++t) {
            s[t] = 0.0;
            for (std::size_t c = 0; c < d.dim; ++c)
                s[t] += static_cast<double>(d.q[h * d.dim + c]) * d.k[t * d.dim + c];
            s[t] /= std::sqrt(static_cast<double>(d.dim));
            top = std::max(top, s[t]);
        }
        for (double& x : s)
            sum += x = std::exp(x - top);
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t c = 0; c < d.dim; ++c)
                out[h * d.dim + c] += s[t] / sum * d.v[t * d.dim + c];
    }
    return out;
}

struct differences {
    double quantization = 0.0; // RMS of exact - unquantized
    double integer = 0.0;      // RMS of fast - exact
    [[nodiscard]] double ratio() const { return integer / quantization; }
};

differences measure(const attention_data& d, kv_format key, kv_format value,
                    const std::vector<double>& truth) {
    const std::size_t tokens = d.k.size() / d.dim, heads = d.q.size() / d.dim;
    kv1::kv2_cache cache(kv1::uniform_cache(1, {1, d.dim, d.dim, key, value}, tokens));
    const kv1::sequence_id id = cache.create_sequence();
    cache.append(id, 0, {d.k.data(), tokens, 1, d.dim}, {d.v.data(), tokens, 1, d.dim});
    std::vector<float> fast(d.q.size()), exact(d.q.size());
    cache.attend(id, 0, {d.q.data(), 1, heads, d.dim}, {fast.data(), 1, heads, d.dim});
    cache.attend(id, 0, {d.q.data(), 1, heads, d.dim}, {exact.data(), 1, heads, d.dim},
                 {.mode = precision::exact});
    differences r;
    for (std::size_t i = 0; i < fast.size(); ++i) {
        r.quantization += std::pow(exact[i] - truth[i], 2.0);
        r.integer += std::pow(static_cast<double>(fast[i]) - exact[i], 2.0);
    }
    r.quantization = std::sqrt(r.quantization / static_cast<double>(fast.size()));
    r.integer = std::sqrt(r.integer / static_cast<double>(fast.size()));
    return r;
}

// What the project holds itself to.
constexpr double allowed = 0.05;

void require_accurate(const attention_data& d) {
    const std::vector<double> truth = reference(d);
    kv1_test::for_each_target([&](kv1::target) {
        const differences r = measure(d, kv_format::affine2, kv_format::affine2, truth);
        INFO("integer " << r.integer << ", quantization " << r.quantization);
        REQUIRE(r.ratio() <= allowed);
        REQUIRE(r.integer > 0.0); // the paths are two
    });
}

} // namespace

TEST_CASE("the integer path is accurate on flat attention", "[accuracy]") {
    require_accurate(gaussian_data(3000, 64, 4, 0.05f, 1));
    require_accurate(gaussian_data(3000, 64, 4, 1.0f, 2));
}
TEST_CASE("the integer path is accurate on sharply peaked attention", "[accuracy]") {
    require_accurate(peaked_data(3000, 64, 4, 3));
}
TEST_CASE("the integer path is accurate where one channel is much larger than the rest", "[accuracy]") {
    require_accurate(outlier_data(3000, 64, 4, 4));
}

// Prints the table. KV1_KV_DUMP names a file with layer<i>.k and .v, [KV heads][tokens][32] in fp16; its own
// later keys, scaled, stand for queries.
TEST_CASE("table of differences", "[.][table]") {
    std::vector<std::pair<std::string, attention_data>> cases;
    cases.emplace_back("flat, 100000 tokens, d128", gaussian_data(100000, 128, 8, 0.05f, 1));
    cases.emplace_back("unit queries, 100000 tokens, d128", gaussian_data(100000, 128, 8, 1.0f, 2));
    cases.emplace_back("flat, 4096 tokens, d32", gaussian_data(4096, 32, 8, 0.05f, 3));
    cases.emplace_back("peaked, 4096 tokens, d128", peaked_data(4096, 128, 8, 4));
    cases.emplace_back("peaked, 100000 tokens, d128", peaked_data(100000, 128, 8, 5));
    cases.emplace_back("one channel 20x, 4096 tokens, d128", outlier_data(4096, 128, 8, 6));
    if (const char* dump = std::getenv("KV1_KV_DUMP")) {
        const kv1_test::safetensors_file file(dump);
        for (int layer = 0; file.contains("layer" + std::to_string(layer) + ".k"); ++layer) {
            const auto widen = [&](const char* side) {
                const auto& t = file.at("layer" + std::to_string(layer) + side);
                std::vector<float> x(t.bytes.size() / 2 / 2); // the first of two heads
                for (std::size_t i = 0; i < x.size(); ++i) {
                    std::uint16_t half = 0;
                    std::memcpy(&half, t.bytes.data() + 2 * i, 2);
                    x[i] = static_cast<float>(kv1::float16::from_bits(half));
                }
                return x;
            };
            attention_data d{32, widen(".k"), widen(".v"), {}};
            for (std::size_t h = 0; h < 16; ++h) {
                const auto from = d.k.end() - static_cast<std::ptrdiff_t>(32 * (1 + h * 7));
                d.q.insert(d.q.end(), from, from + 32);
            }
            cases.emplace_back("dump, layer " + std::to_string(layer), std::move(d));
        }
    }
    for (const auto& [name, d] : cases) {
        const std::vector<double> truth = reference(d);
        const differences r = measure(d, kv_format::affine2, kv_format::affine2, truth);
        std::printf("%-36s quantization %.3e  integer %.3e  ratio %.2f%%\n", name.c_str(), r.quantization,
                    r.integer, 100 * r.ratio());
    }
}
