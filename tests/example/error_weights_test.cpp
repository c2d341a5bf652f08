// SPDX-License-Identifier: Apache-2.0
//
// Error weights say what small errors of a key or value change in the hidden states, squared: keys and values
// of the shipped model are changed one at a time and attention over them is computed again, in double.
#include "error_weights.hpp"

#include "random.hpp"
#include "safetensors.hpp"
#include "shipped_model.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using Catch::Matchers::WithinRel;

namespace {

constexpr std::size_t layer = 3, kv_head = 1, group = 4, kv_heads = 2, heads = 8, dim = 32, hidden = 256;

std::vector<double> as_doubles(kv1::tensor_view x) {
    const auto* first = static_cast<const float*>(x.data());
    return {first, first + x.tokens() * x.heads() * x.channels()};
}

// What a layer attends with, [tokens][heads][dim], and its output projection, [hidden][heads][dim].
struct attended_layer {
    std::size_t tokens = 0;
    std::vector<double> q = {}, k = {}, v = {}, projection = {};

    // One KV head's share of the hidden states, [tokens][hidden].
    [[nodiscard]] std::vector<double> hidden_states() const {
        std::vector<double> states(tokens * hidden);
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
                std::vector<double> weights(t + 1), out(dim);
                for (std::size_t j = 0; j <= t; ++j) {
                    double score = 0.0;
                    for (std::size_t c = 0; c < dim; ++c)
                        score += q[(t * heads + h) * dim + c] * k[(j * kv_heads + kv_head) * dim + c];
                    weights[j] = score / std::sqrt(static_cast<double>(dim));
                }
                const double most = *std::ranges::max_element(weights);
                double sum = 0.0;
                for (double& weight : weights)
                    sum += weight = std::exp(weight - most);
                for (std::size_t j = 0; j <= t; ++j)
                    for (std::size_t c = 0; c < dim; ++c)
                        out[c] += weights[j] / sum * v[(j * kv_heads + kv_head) * dim + c];
                for (std::size_t o = 0; o < hidden; ++o)
                    for (std::size_t c = 0; c < dim; ++c)
                        states[t * hidden + o] += projection[(o * heads + h) * dim + c] * out[c];
            }
        return states;
    }
};

attended_layer first_tokens(std::size_t n, kv1_lm::error_weight_estimator& weights) {
    const kv1_lm::model& m = kv1_test::shipped_model();
    std::vector<std::int32_t> tokens;
    for (std::size_t i = 0; i < n; ++i)
        tokens.push_back(static_cast<std::int32_t>(100 + 37 * i));
    kv1::kv_cache cache(m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, n));
    kv1_lm::thread_pool pool(1);
    attended_layer seen{.tokens = n};
    static_cast<void>(
        m.forward(tokens, cache, cache.create_sequence(), kv1::precision::exact, pool,
                  [&](std::size_t i, kv1::tensor_view q, kv1::tensor_view k, kv1::tensor_view v) {
                      if (i != layer)
                          return;
                      weights.add(layer, q, k, v);
                      seen.q = as_doubles(q);
                      seen.k = as_doubles(k);
                      seen.v = as_doubles(v);
                  }));
    const auto file =
        kv1_lm::safetensors::read(std::filesystem::path(KV1_LM_MODEL_DIR) / "model.safetensors");
    const std::vector<float> projection = to_floats(*file.find("layers.3.self_attn.o_proj.weight"));
    seen.projection.assign(projection.begin(), projection.end());
    return seen;
}

// The mean over queries of what an error of each token's vector in turn changes, squared.
double cost_by_trial(attended_layer& l, std::vector<double> attended_layer::*side,
                     std::span<const double> error) {
    constexpr double step = 1e-4; // central differences: what is left out is of its square
    double sum = 0.0;
    for (std::size_t j = 0; j < l.tokens; ++j) {
        const auto shift = [&](double by) {
            for (std::size_t c = 0; c < dim; ++c)
                (l.*side)[(j * kv_heads + kv_head) * dim + c] += by * error[c];
        };
        shift(step);
        const std::vector<double> above = l.hidden_states();
        shift(-2.0 * step);
        const std::vector<double> below = l.hidden_states();
        shift(step);
        for (std::size_t i = 0; i < above.size(); ++i) {
            const double slope = (above[i] - below[i]) / (2.0 * step);
            sum += slope * slope;
        }
    }
    return sum / static_cast<double>(l.tokens);
}

double cost_by_weights(std::span<const float> weights, std::span<const double> error) {
    double sum = 0.0;
    for (std::size_t i = 0; i < dim; ++i)
        for (std::size_t j = 0; j < dim; ++j)
            sum += error[i] * static_cast<double>(weights[(kv_head * dim + i) * dim + j]) * error[j];
    return sum;
}

} // namespace

TEST_CASE("error weights cost what small errors do", "[error_weights]") {
    kv1_lm::error_weight_estimator weights(kv1_test::shipped_model());
    attended_layer l = first_tokens(24, weights);
    kv1_test::generator g(7);
    for (int trial = 0; trial < 3; ++trial) {
        const std::vector<float> random = kv1_test::normal_values(g, dim);
        const std::vector<double> error(random.begin(), random.end());
        // distances of values from outputs are differences of fp32 sums
        CHECK_THAT(cost_by_weights(weights.key_weights(layer), error),
                   WithinRel(cost_by_trial(l, &attended_layer::k, error), 1e-3));
        CHECK_THAT(cost_by_weights(weights.value_weights(layer), error),
                   WithinRel(cost_by_trial(l, &attended_layer::v, error), 1e-4));
    }
}

TEST_CASE("error weights of two runs are the mean over their queries", "[error_weights]") {
    kv1_lm::error_weight_estimator one(kv1_test::shipped_model()), other = one, both = one;
    CHECK(std::ranges::all_of(one.key_weights(layer), [](float x) { return x == 0.0f; }));
    static_cast<void>(first_tokens(5, one));
    static_cast<void>(first_tokens(15, other));
    static_cast<void>(first_tokens(5, both));
    static_cast<void>(first_tokens(15, both));
    for (const auto of :
         {&kv1_lm::error_weight_estimator::key_weights, &kv1_lm::error_weight_estimator::value_weights}) {
        const std::vector<float> a = (one.*of)(layer), b = (other.*of)(layer), c = (both.*of)(layer);
        REQUIRE(c.size() == kv_heads * dim * dim);
        for (std::size_t i = 0; i < c.size(); ++i) {
            const float mean = 0.25f * a[i] + 0.75f * b[i];
            // three roundings to fp32
            CHECK(std::fabs(c[i] - mean) <= 3e-7f * (0.25f * std::fabs(a[i]) + 0.75f * std::fabs(b[i])));
            CHECK(c[i] == c[i - i % (dim * dim) + i % dim * dim + i / dim % dim]); // symmetric
        }
    }
}
