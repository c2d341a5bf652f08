// SPDX-License-Identifier: Apache-2.0
//
// How much the integer path adds to the difference that quantization itself makes: RMS over outputs of
// (fast - exact), relative to RMS of (exact - attention over the unquantized K and V); and how far the
// log-sum-exp is off, which decides what a part weighs that is joined to others.
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

// An offset that all keys share, in one channel (a key bias, of Qwen2.5's size) or in all.
attention_data offset_keys(attention_data d, float offset, std::size_t first, std::size_t step) {
    for (std::size_t i = first; i < d.k.size(); i += step)
        d.k[i] += offset;
    return d;
}
attention_data offset_values(attention_data d, float offset) {
    for (float& x : d.v)
        x += offset;
    return d;
}

// One key channel 20 times larger, and four first tokens that take most of every query's weight and have
// small values: attention sinks. Their keys lie along a direction that all queries share.
attention_data sink_data(std::size_t tokens, std::size_t dim, std::size_t heads, std::uint64_t seed) {
    constexpr std::size_t sinks = 4, large = 3;
    attention_data d = gaussian_data(tokens, dim, heads, 1.0f, seed);
    kv1_test::generator g(seed + 100);
    std::vector<float> direction(dim);
    for (std::size_t c = 0; c < dim; ++c)
        direction[c] = c == large ? 0.0f : g.chance(0.5) ? 1.0f : -1.0f;
    for (std::size_t i = 0; i < d.q.size(); ++i)
        d.q[i] += 0.5f * direction[i % dim];
    for (std::size_t i = large; i < d.k.size(); i += dim)
        d.k[i] *= 20.0f;
    for (std::size_t i = 0; i < sinks * dim; ++i) {
        d.k[i] = i % dim == large ? 0.0f : 0.1f * d.k[i] + 3.0f * direction[i % dim];
        d.v[i] *= 0.1f;
    }
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
    double log_sum_exp = 0.0;  // the largest of |fast - exact|, in nats
    [[nodiscard]] double ratio() const { return integer / quantization; }
};

// How a cache keeps the data.
struct storage {
    const char* name;
    bool encoded = false; // levels by least squares, rotated
    bool joined = false;  // to 4 sinks and a window of 32 tokens in fp16
    std::size_t group = 0;
    kv1::quantization_axis key_axis = kv1::quantization_axis::per_token;
};
constexpr storage plain{"plain"};
constexpr storage all_storages[] = {
    plain, {"ls+had", true}, {"joined", false, true}, {"joined ls+had", true, true}};

differences measure(const attention_data& d, kv_format key, kv_format value, const std::vector<double>& truth,
                    const storage& how = plain) {
    const std::size_t tokens = d.k.size() / d.dim, heads = d.q.size() / d.dim;
    kv1::layer_description layer{1, d.dim, d.dim, key, value};
    layer.key_axis = how.key_axis;
    layer.value_group = how.group;
    if (how.key_axis == kv1::quantization_axis::per_token)
        layer.key_group = how.group;
    if (how.encoded)
        for (kv1::vector_encoding* e : {&layer.key_encoding, &layer.value_encoding}) {
            e->levels = kv1::level_choice::least_squares;
            e->hadamard = d.dim;
        }
    kv1::cache_description description = kv1::uniform_cache(1, layer, tokens);
    if (how.joined) {
        description.fp16_sinks = 4;
        description.fp16_window = 32;
    }
    kv1::kv_cache cache(description);
    const kv1::sequence_id id = cache.create_sequence();
    cache.append(id, 0, {d.k.data(), tokens, 1, d.dim}, {d.v.data(), tokens, 1, d.dim});
    std::vector<float> fast(d.q.size()), exact(d.q.size()), fast_lse(heads), exact_lse(heads);
    const auto attend = [&](precision mode, std::vector<float>& out, std::vector<float>& lse) {
        kv1::attention_options options;
        options.mode = mode;
        options.log_sum_exp = lse;
        cache.attend(id, 0, {d.q.data(), 1, heads, d.dim}, {out.data(), 1, heads, d.dim}, options);
    };
    attend(precision::fast, fast, fast_lse);
    attend(precision::exact, exact, exact_lse);
    differences r;
    for (std::size_t i = 0; i < fast.size(); ++i) {
        r.quantization += std::pow(exact[i] - truth[i], 2.0);
        r.integer += std::pow(static_cast<double>(fast[i]) - exact[i], 2.0);
    }
    for (std::size_t h = 0; h < heads; ++h)
        r.log_sum_exp = std::max(r.log_sum_exp, std::fabs(static_cast<double>(fast_lse[h]) - exact_lse[h]));
    r.quantization = std::sqrt(r.quantization / static_cast<double>(fast.size()));
    r.integer = std::sqrt(r.integer / static_cast<double>(fast.size()));
    return r;
}

// What the project holds itself to.
constexpr double allowed = 0.05;
constexpr double allowed_log_sum_exp = 0.02;

void require_accurate(const attention_data& d) {
    const std::vector<double> truth = reference(d);
    kv1_test::for_each_target([&](kv1::target) {
        const differences r = measure(d, kv_format::affine2, kv_format::affine2, truth);
        INFO("integer " << r.integer << ", quantization " << r.quantization);
        REQUIRE(r.ratio() <= allowed);
        REQUIRE(r.integer > 0.0); // the paths are two
    });
}

// The same, and the log-sum-exp, with 2-bit formats however they are stored.
void require_accurate_sums(const attention_data& d, std::span<const storage> storages = all_storages) {
    const std::vector<double> truth = reference(d);
    kv1_test::for_each_target([&](kv1::target) {
        for (const kv_format format : {kv_format::affine2, kv_format::compact2, kv_format::codebook2})
            for (const storage& how : storages) {
                if (how.key_axis == kv1::quantization_axis::per_channel && format != kv_format::affine2)
                    continue; // a compact minimum is a multiple of its scale, too coarse for large offsets
                const differences r = measure(d, format, format, truth, how);
                INFO(to_string(format) << ", " << how.name << ": integer " << r.integer << ", quantization "
                                       << r.quantization << ", log-sum-exp " << r.log_sum_exp);
                REQUIRE(r.ratio() <= allowed);
                REQUIRE(r.log_sum_exp <= allowed_log_sum_exp);
                REQUIRE(r.integer > 0.0);
            }
    });
}

// The rows of ARCHITECTURE's table that need no model.
struct table_case {
    std::string name;
    attention_data data;
    // long ones are attended to plainly only
    [[nodiscard]] bool is_long() const { return data.q.size() / data.dim * data.k.size() >= 8u << 20; }
    [[nodiscard]] std::span<const storage> storages() const {
        return std::span(all_storages).first(is_long() ? 1 : std::size(all_storages));
    }
};
std::vector<table_case> table_cases() {
    std::vector<table_case> cases;
    cases.push_back({"flat, 100000 tokens, d128", gaussian_data(100000, 128, 8, 0.05f, 1)});
    cases.push_back({"unit queries, 100000 tokens, d128", gaussian_data(100000, 128, 8, 1.0f, 2)});
    cases.push_back({"flat, 4096 tokens, d32", gaussian_data(4096, 32, 8, 0.05f, 3)});
    cases.push_back({"peaked, 4096 tokens, d128", peaked_data(4096, 128, 8, 4)});
    cases.push_back({"peaked, 100000 tokens, d128", peaked_data(100000, 128, 8, 5)});
    cases.push_back({"one channel 20x, 4096 tokens, d128", outlier_data(4096, 128, 8, 6)});
    cases.push_back({"key bias 300", offset_keys(gaussian_data(4096, 128, 8, 1.0f, 7), 300.0f, 5, 128)});
    cases.push_back({"keys + 3", offset_keys(gaussian_data(4096, 128, 8, 1.0f, 8), 3.0f, 0, 1)});
    cases.push_back({"values + 3", offset_values(gaussian_data(4096, 128, 8, 1.0f, 9), 3.0f)});
    cases.push_back({"values + 3, queries 3", offset_values(gaussian_data(4096, 128, 8, 3.0f, 10), 3.0f)});
    cases.push_back({"one key channel 20x, sinks", sink_data(4096, 128, 8, 11)});
    return cases;
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
TEST_CASE("the integer path is accurate where keys share an offset", "[accuracy]") {
    require_accurate_sums(offset_keys(gaussian_data(1500, 64, 4, 1.0f, 5), 300.0f, 5, 64));
    require_accurate_sums(offset_keys(gaussian_data(1500, 64, 4, 1.0f, 6), 3.0f, 0, 1));
}
TEST_CASE("the integer path is accurate where values share an offset", "[accuracy]") {
    require_accurate_sums(offset_values(gaussian_data(1500, 64, 4, 1.0f, 7), 3.0f));
    require_accurate_sums(offset_values(gaussian_data(1500, 64, 4, 2.0f, 8), 3.0f)); // few weights are large
}
TEST_CASE("the integer path is accurate where one key channel is large and sinks take the weight",
          "[accuracy]") {
    require_accurate_sums(sink_data(4096, 128, 4, 9));
}
TEST_CASE("offsets meet groups of channels and keys per channel", "[accuracy]") {
    constexpr storage others[] = {
        {"groups", false, false, 32},
        {"groups, joined", false, true, 32},
        {"per channel", false, false, 0, kv1::quantization_axis::per_channel},
        {"per channel, joined", true, true, 0, kv1::quantization_axis::per_channel}};
    require_accurate_sums(offset_keys(gaussian_data(1500, 64, 4, 1.0f, 10), 300.0f, 5, 64), others);
    require_accurate_sums(offset_values(offset_keys(gaussian_data(1500, 64, 4, 1.0f, 11), 3.0f, 0, 1), 3.0f),
                          others);
}

// What shifts all scores of a row by its rounding must not show in ranges that are joined.
TEST_CASE("ranges of a sequence with a key bias join to the whole", "[accuracy]") {
    constexpr std::size_t tokens = 1200, dim = 64, heads = 4;
    attention_data d = offset_keys(gaussian_data(tokens, dim, heads, 1.0f, 12), 300.0f, 5, dim);
    for (std::size_t i = (tokens - 100) * dim; i < d.v.size(); ++i)
        d.v[i] += 2.0f; // so that the parts' outputs differ
    kv1_test::for_each_target([&](kv1::target) {
        kv1::kv2_cache cache(kv1::uniform_cache(1, {1, dim, dim}, tokens));
        const kv1::sequence_id id = cache.create_sequence();
        cache.append(id, 0, {d.k.data(), tokens, 1, dim}, {d.v.data(), tokens, 1, dim});
        struct rows {
            std::vector<float> out = std::vector<float>(heads * dim), lse = std::vector<float>(heads);
        };
        const auto attend = [&](precision mode, kv1::token_range range) {
            rows r;
            kv1::attention_options options;
            options.mode = mode;
            options.range = range;
            options.log_sum_exp = r.lse;
            cache.attend(id, 0, {d.q.data(), 1, heads, dim}, {r.out.data(), 1, heads, dim}, options);
            return r;
        };
        const rows whole = attend(precision::exact, {}), fast = attend(precision::fast, {0, tokens - 100}),
                   exact = attend(precision::exact, {tokens - 100, tokens});
        const kv1::attention_part parts[] = {{fast.out, fast.lse}, {exact.out, exact.lse}};
        rows joined;
        kv1::merge_attention(parts, dim, joined.out, joined.lse);
        for (std::size_t h = 0; h < heads; ++h)
            REQUIRE(std::fabs(joined.lse[h] - whole.lse[h]) <= allowed_log_sum_exp);
        double off = 0.0, all = 0.0;
        for (std::size_t i = 0; i < whole.out.size(); ++i) {
            off += std::pow(static_cast<double>(joined.out[i]) - whole.out[i], 2.0);
            all += std::pow(static_cast<double>(whole.out[i]), 2.0);
        }
        INFO(off << " of " << all);
        REQUIRE(std::sqrt(off / all) <= allowed_log_sum_exp); // a part's share moves by as much
    });
}

TEST_CASE("the integer path is accurate in every row of the table", "[accuracy]") {
    for (const table_case& c : table_cases()) {
        const std::vector<double> truth = reference(c.data);
        kv1_test::for_each_target([&](kv1::target t) {
            if (c.is_long() && t == kv1::target::scalar)
                return; // slow, and it corrects by the exact scores of all tokens
            for (const storage& how : c.storages()) {
                const differences r = measure(c.data, kv_format::affine2, kv_format::affine2, truth, how);
                INFO(c.name << ", " << how.name << ": integer " << r.integer << ", quantization "
                            << r.quantization << ", log-sum-exp " << r.log_sum_exp);
                REQUIRE(r.ratio() <= allowed);
                REQUIRE(r.log_sum_exp <= allowed_log_sum_exp);
            }
        });
    }
}
// Of many queries, some meet keys and roundings that go badly together.
TEST_CASE("the log-sum-exp of many queries is accurate", "[accuracy]") {
    for (const std::size_t tokens : {std::size_t{600}, std::size_t{2100}})
        for (const attention_data& d :
             {outlier_data(tokens, 128, 16, 20), gaussian_data(tokens, 128, 16, 3.0f, 21),
              peaked_data(tokens, 128, 16, 22), sink_data(tokens, 128, 16, 23)}) {
            const std::vector<double> truth = reference(d);
            kv1_test::for_each_target([&](kv1::target t) {
                if (t == kv1::target::scalar)
                    return; // slow, and it corrects by the exact scores of all tokens
                for (const kv_format format : {kv_format::affine2, kv_format::codebook2})
                    for (const storage& how : all_storages) {
                        const differences r = measure(d, format, format, truth, how);
                        INFO(tokens << " tokens, " << to_string(format) << ", " << how.name
                                    << ": log-sum-exp " << r.log_sum_exp);
                        CHECK(r.log_sum_exp <= allowed_log_sum_exp);
                    }
            });
        }
}

// Prints the table. KV1_KV_DUMP names a file with layer<i>.k and .v, [KV heads][tokens][32] in fp16; its own
// later keys, scaled, stand for queries.
TEST_CASE("table of differences", "[.][table]") {
    std::vector<table_case> cases = table_cases();
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
            cases.push_back({"dump, layer " + std::to_string(layer), std::move(d)});
        }
    }
    for (const table_case& c : cases) {
        const std::vector<double> truth = reference(c.data);
        for (const storage& how : c.storages()) {
            const differences r = measure(c.data, kv_format::affine2, kv_format::affine2, truth, how);
            std::printf("%-36s %-14s quantization %.3e  integer %.3e  ratio %.2f%%  log-sum-exp %.4f\n",
                        c.name.c_str(), how.name, r.quantization, r.integer, 100 * r.ratio(), r.log_sum_exp);
        }
    }
}
