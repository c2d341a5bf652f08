// SPDX-License-Identifier: Apache-2.0
//
// Error weights of the shipped model (kv1/calibration.hpp) say what small errors of a key or value change in the
// hidden states, squared: its keys and values are changed one at a time, and attention over them is computed again, in
// double.
#include "random.hpp"
#include "safetensors.hpp"
#include "shipped_model.hpp"

#include <kv1/calibration.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using Catch::Matchers::WithinAbs;

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

kv1::calibrator calibrator_of_model(const char* policy) {
    const kv1_lm::model& m = kv1_test::shipped_model();
    kv1::calibrator c(kv1::parse_policy(policy),
                      m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, 64));
    for (std::size_t i = 0; i < m.config().layers; ++i)
        c.set_output_projection(i, m.output_projection(i));
    return c;
}

attended_layer first_tokens(std::size_t n, kv1::calibrator& weights) {
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
                      weights.add(i, q, k, v);
                      if (i != layer)
                          return;
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

// The mean over queries of what an error of each token's vector in turn changes, squared. A query is spared that of the
// first tokens, and of its window.
double cost_by_trial(attended_layer& l, std::vector<double> attended_layer::*side,
                     std::span<const double> error, std::size_t sinks, std::size_t window) {
    constexpr double step = 1e-4; // central differences: what is left out is of its square
    double sum = 0.0;
    for (std::size_t j = sinks; j < l.tokens; ++j) {
        const auto shift = [&](double by) {
            for (std::size_t c = 0; c < dim; ++c)
                (l.*side)[(j * kv_heads + kv_head) * dim + c] += by * error[c];
        };
        shift(step);
        const std::vector<double> above = l.hidden_states();
        shift(-2.0 * step);
        const std::vector<double> below = l.hidden_states();
        shift(step);
        for (std::size_t i = std::min(l.tokens, j + window) * hidden; i < above.size(); ++i) {
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

// W = L L^T, and each number of L is in fp16, off by a part in 2^11: e^T W e by up to 2^-10 sum |e_i L_ik L_jk e_j|, and
// the rows of L have the lengths sqrt(W_ii).
double rounding_of(std::span<const float> weights, std::span<const double> error) {
    double sum = 0.0;
    for (std::size_t i = 0; i < dim; ++i)
        sum += std::sqrt(static_cast<double>(weights[(kv_head * dim + i) * dim + i])) * std::fabs(error[i]);
    return 0x1p-10 * sum * sum;
}

} // namespace

TEST_CASE("error weights cost what small errors do, of tokens that are quantized", "[calibration]") {
    for (const std::size_t spared : {0u, 3u}) {
        kv1::calibrator weights = calibrator_of_model(spared == 0 ? "c2+ls+ew" : "c2+ls+ew@3:3");
        attended_layer l = first_tokens(24, weights);
        const kv1::calibration found = weights.finish();
        const std::vector<float> keys = found.error_weights(layer, kv1::kv_side::key),
                                 values = found.error_weights(layer, kv1::kv_side::value);
        kv1_test::generator g(7);
        for (int trial = 0; trial < 3; ++trial) {
            const std::vector<float> random = kv1_test::normal_values(g, dim);
            const std::vector<double> error(random.begin(), random.end());
            const double key = cost_by_trial(l, &attended_layer::k, error, spared, spared),
                         value = cost_by_trial(l, &attended_layer::v, error, spared, spared);
            // a step of 1e-4 leaves out terms of its square
            CHECK_THAT(cost_by_weights(keys, error), WithinAbs(key, rounding_of(keys, error) + 1e-6 * key));
            CHECK_THAT(cost_by_weights(values, error),
                       WithinAbs(value, rounding_of(values, error) + 1e-6 * value));
        }
    }
}
