// SPDX-License-Identifier: Apache-2.0
//
// Biases of key projections (Qwen2's have components of a hundred and more). A bias is known from the weights: the
// cache takes it for the keys' mean, and codes are those of keys without it. What a model then loses is what its
// attention makes of the errors of these codes. A bias may draw the attention to fewer tokens, over which less
// averages out; no cache can help that, so it is measured too.
#include "random.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/float16.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/rotary_embedding.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

using kv1_test::generator;

namespace {

constexpr std::size_t dim = 64, kv_heads = 2, heads = 4, group = heads / kv_heads, words = 128, queries = 16;

using channel_values =
    std::vector<std::pair<std::size_t, float>>; // channels of all KV heads, and what is added there

struct biases {
    double theta = 10000.0;      // of RoPE
    channel_values keys = {};    // of the key projection
    channel_values queries = {}; // and of the query projection, for all heads of a KV head
    float limit = 0.0f;          // of queries in pairs with a bias of keys: limit / |bias|; 0: as they come
};

// In a fast pair, in slow ones, and in two heads alike. RoPE turns channels j and 32 + j together.
const channel_values everywhere{{3, 300.0f}, {20, -150.0f}, {40, 60.0f}, {61, 300.0f}, {dim + 30, -300.0f}};
// In slow pairs alone, which turn little within a context: there large components of keys and queries lie in models
// (Jin et al. 2025, "Massive values in self-attention modules").
const channel_values slow{{28, -150.0f}, {30, 200.0f},        {61, 300.0f},
                          {62, -80.0f},  {dim + 29, -300.0f}, {dim + 63, 220.0f}};

// A model of one layer: attention over random keys and values, and random logits of its output.
class tiny_model {
public:
    tiny_model(std::size_t n, const biases& b) : tokens_(n), rotary_{kv1::rotary_frequencies(b.theta, dim)} {
        generator g(1909);
        k_ = kv1_test::normal_values(g, n * kv_heads * dim);
        v_ = kv1_test::normal_values(g, n * kv_heads * dim);
        q_ = kv1_test::normal_values(g, queries * heads * dim);
        out_weights_ = kv1_test::normal_values(g, words * heads * dim);
        for (const auto& [channel, value] : b.keys)
            bias_[channel] = value;
        for (std::size_t i = 0; i < n * kv_heads; ++i) {
            for (std::size_t c = 0; c < dim; ++c)
                k_[i * dim + c] += bias_[i % kv_heads * dim + c];
            turn(k_, i, i / kv_heads);
        }
        for (std::size_t i = 0; i < queries * heads; ++i) {
            const std::size_t head = i % heads / group;
            for (std::size_t j = 0; j < dim / 2; ++j) {
                const float size = std::hypot(bias_[head * dim + j], bias_[head * dim + dim / 2 + j]);
                if (b.limit != 0.0f && size > b.limit)
                    for (const std::size_t c : {j, dim / 2 + j})
                        q_[i * dim + c] *= b.limit / size;
            }
            for (const auto& [channel, value] : b.queries)
                if (channel / dim == head)
                    q_[i * dim + channel % dim] += value;
            turn(q_, i, position(i));
        }
    }

    // KL divergence of a cache's predictions from those of an fp32 cache, the mean of the queries.
    [[nodiscard]] double divergence(const kv1::cache_description& d,
                                    kv1::precision mode = kv1::precision::fast) const {
        return divergence(attend(d, mode));
    }
    // The preset that needs no calibration, told of the bias or not.
    [[nodiscard]] kv1::cache_description safe(bool told) const {
        kv1::cache_description d = kv1::describe_cache(
            kv1::parse_policy("safe"), kv1::uniform_cache(1, {kv_heads, dim, dim}, tokens_ + 64));
        if (told) {
            d.layers[0].rotary = rotary_;
            d.layers[0].key_encoding.means.assign(bias_, bias_ + kv_heads * dim);
        }
        return d;
    }
    // What the codes of `safe` cost: attention in double to the keys and values that they stand for, sinks and window as
    // fp16 holds them. And the squares of keys' errors.
    struct cost {
        double divergence = 0.0, key_errors = 0.0;
    };
    [[nodiscard]] cost cost_of_codes(bool told) const {
        const kv1::cache_description d = safe(told);
        kv1::kv_cache cache(d);
        const auto id = cache.create_sequence();
        cache.append(id, 0, {k_.data(), tokens_, kv_heads, dim}, {v_.data(), tokens_, kv_heads, dim});
        cost sum;
        std::vector<double> out(queries * heads * dim);
        std::vector<float> keys(tokens_ * dim), values(keys.size());
        for (std::size_t h = 0; h < kv_heads; ++h) {
            cache.read(id, 0, kv1::kv_side::key, h, 0, tokens_, keys);
            cache.read(id, 0, kv1::kv_side::value, h, 0, tokens_, values);
            for (std::size_t i = 0; i < keys.size(); ++i) {
                const float error = keys[i] - k_[(i / dim * kv_heads + h) * dim + i % dim];
                sum.key_errors += static_cast<double>(error) * static_cast<double>(error);
            }
            for (std::size_t i = 0; i < queries * heads; ++i)
                if (i % heads / group == h)
                    attend_to(i, keys, values, d, std::span(out).subspan(i * dim, dim));
        }
        sum.divergence = divergence(out);
        return sum;
    }

private:
    [[nodiscard]] std::size_t position(std::size_t query) const { return tokens_ - queries + query / heads; }
    void turn(std::vector<float>& x, std::size_t row, std::size_t at) const {
        kv1::apply_rotary(rotary_, std::span<float>(x.data() + row * dim, dim),
                          static_cast<std::int64_t>(at));
    }
    [[nodiscard]] std::vector<double> attend(const kv1::cache_description& d, kv1::precision mode) const {
        kv1::kv_cache cache(d);
        const auto id = cache.create_sequence();
        cache.append(id, 0, {k_.data(), tokens_, kv_heads, dim}, {v_.data(), tokens_, kv_heads, dim});
        std::vector<float> out(queries * heads * dim);
        cache.attend(id, 0, {q_.data(), queries, heads, dim}, {out.data(), queries, heads, dim},
                     {.mode = mode});
        return {out.begin(), out.end()};
    }
    // In double; keys and values are those of the query's KV head, [tokens][dim].
    void attend_to(std::size_t query, std::span<const float> keys, std::span<const float> values,
                   const kv1::cache_description& d, std::span<double> out) const {
        const std::size_t last = position(query), h = query % heads / group;
        std::vector<double> weights(last + 1);
        std::vector<std::span<const float>> seen(last + 1);
        for (std::size_t t = 0; t <= last; ++t) {
            const bool plain = t < d.fp16_sinks || last - t < d.fp16_window;
            const std::size_t row = (t * kv_heads + h) * dim;
            const float* const key = plain ? k_.data() + row : keys.data() + t * dim;
            const float* const value = plain ? v_.data() + row : values.data() + t * dim;
            for (std::size_t c = 0; c < dim; ++c) {
                const float x = plain ? static_cast<float>(kv1::float16(key[c])) : key[c];
                weights[t] += static_cast<double>(q_[query * dim + c]) * static_cast<double>(x);
            }
            seen[t] = {value, dim};
        }
        const double most = *std::ranges::max_element(weights);
        double sum = 0.0;
        for (double& w : weights)
            sum += w = std::exp((w - most) / std::sqrt(static_cast<double>(dim)));
        for (std::size_t t = 0; t <= last; ++t)
            for (std::size_t c = 0; c < dim; ++c)
                out[c] += weights[t] / sum * static_cast<double>(seen[t][c]);
    }
    [[nodiscard]] double divergence(const std::vector<double>& outputs) const {
        const std::vector<double> a = logits(attend(
                                      kv1::uniform_cache(
                                          1, {kv_heads, dim, dim, kv1::kv_format::fp32, kv1::kv_format::fp32},
                                          tokens_),
                                      kv1::precision::exact)),
                                  b = logits(outputs);
        double sum = 0.0;
        for (std::size_t i = 0; i < queries; ++i) {
            double of_a = 0.0, of_b = 0.0, mean = 0.0;
            for (std::size_t w = i * words; w < (i + 1) * words; ++w) {
                of_a += std::exp(a[w]);
                of_b += std::exp(b[w]);
            }
            for (std::size_t w = i * words; w < (i + 1) * words; ++w)
                mean += std::exp(a[w]) / of_a * (a[w] - b[w] - std::log(of_a / of_b));
            sum += mean;
        }
        return sum / static_cast<double>(queries);
    }
    [[nodiscard]] std::vector<double> logits(const std::vector<double>& outputs) const {
        std::vector<double> all(queries * words);
        for (std::size_t i = 0; i < queries; ++i)
            for (std::size_t w = 0; w < words; ++w)
                for (std::size_t c = 0; c < heads * dim; ++c)
                    all[i * words + w] +=
                        outputs[i * heads * dim + c] * static_cast<double>(out_weights_[w * heads * dim + c]);
        return all;
    }

    std::size_t tokens_;
    kv1::rotary_embedding rotary_;
    float bias_[kv_heads * dim]{};
    std::vector<float> k_, v_, q_, out_weights_;
};

} // namespace

// Two kinds of models whose attention a bias does not concentrate: biases in slow pairs, with queries as they come; and
// biases anywhere, with queries that are small where they are.
TEST_CASE("key biases of 300 cost no more than twice what a cache without calibration costs anyway",
          "[rotary]") {
    for (const std::size_t tokens : {std::size_t{128}, std::size_t{8192}})
        for (const biases& b :
             {biases{.theta = 1e6, .keys = slow}, biases{.keys = everywhere, .limit = 2.0f}}) {
            const tiny_model plain(tokens, {.theta = b.theta}), biased(tokens, b);
            const double without = plain.divergence(plain.safe(false)),
                         with = biased.divergence(biased.safe(true));
            CAPTURE(tokens, b.theta, without, with);
            CHECK(with <= 2.0 * without);
            CHECK(biased.divergence(biased.safe(false)) > 10.0 * with); // a bias that nobody knows of
        }
}

// Queries as large as keys, or with biases of their own, make the attention look at few tokens (at 8,192 tokens at a
// tenth to a hundredth of those that it sees without), and the cost is up to a hundred times as high. It is the cost of
// codes that are as good as ever: the cache adds nothing of its own. Products of queries and biases reach 450 in scores.
TEST_CASE("key biases of 300 cost what codes cost under the same attention", "[rotary]") {
    const channel_values with_queries{{28, 8.0f}, {30, -10.0f},       {61, 12.0f},
                                      {62, 5.0f}, {dim + 29, -10.0f}, {dim + 63, 9.0f}};
    for (const std::size_t tokens : {std::size_t{128}, std::size_t{8192}})
        for (const biases& b : {biases{.keys = everywhere}, biases{.keys = everywhere, .limit = 8.0f},
                                biases{.keys = slow}, biases{.theta = 1e6, .keys = everywhere},
                                biases{.theta = 1e6, .keys = slow, .queries = with_queries}}) {
            const tiny_model m(tokens, b), plain(tokens, {.theta = b.theta});
            const auto codes = m.cost_of_codes(true);
            const double exact = m.divergence(m.safe(true), kv1::precision::exact),
                         fast = m.divergence(m.safe(true));
            CAPTURE(tokens, b.theta, b.limit, codes.divergence, exact, fast);
            CHECK(codes.key_errors <= 1.03 * plain.cost_of_codes(false).key_errors);
            CHECK(exact <= 1.001 * codes.divergence);
            CHECK(fast <= 1.1 * codes.divergence);
        }
}
