// SPDX-License-Identifier: Apache-2.0
//
// How much the integer path adds to the difference that 2-bit quantization itself makes, layer by layer, on
// the keys, values and queries that the shipped model has for a text: RMS over outputs of (fast - exact),
// relative to RMS of (exact - attention over the unquantized keys and values). Needs a forward pass of its
// own, which gives its queries away.
#include "shipped_model.hpp"
#include "targets.hpp"

#include "linear.hpp"
#include "safetensors.hpp"
#include "thread_pool.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <span>
#include <string>
#include <vector>

using kv1::precision;
using kv1_lm::linear;

namespace {

struct layer_vectors {
    std::vector<float> q, k, v; // [token][head][channel], after RoPE
};

std::vector<float> normalized(std::span<const float> x, const std::vector<float>& weight, float epsilon) {
    std::vector<float> out(x.begin(), x.end());
    for (std::size_t at = 0; at < x.size(); at += weight.size()) {
        double squares = 0.0;
        for (std::size_t i = 0; i < weight.size(); ++i)
            squares += std::pow(x[at + i], 2.0);
        const double factor = 1.0 / std::sqrt(squares / static_cast<double>(weight.size()) + epsilon);
        for (std::size_t i = 0; i < weight.size(); ++i)
            out[at + i] = static_cast<float>(x[at + i] * factor) * weight[i];
    }
    return out;
}

void rotate(std::vector<float>& x, std::size_t heads, std::size_t dim, double theta) {
    for (std::size_t row = 0; row < x.size() / dim; ++row)
        for (std::size_t i = 0; i < dim / 2; ++i) {
            const double angle = static_cast<double>(row / heads) *
                                 std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
            const double a = x[row * dim + 2 * i], b = x[row * dim + 2 * i + 1];
            x[row * dim + 2 * i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
            x[row * dim + 2 * i + 1] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
        }
}

std::vector<float> attend(const kv1_lm::model_config& c, const layer_vectors& l, kv1::kv_format format,
                          precision mode) {
    const std::size_t n = l.k.size() / c.kv_heads / c.head_dim;
    kv1::kv_cache cache(kv1::uniform_cache(1, {c.kv_heads, c.head_dim, c.head_dim, format, format}, n));
    const kv1::sequence_id id = cache.create_sequence();
    cache.append(id, 0, {l.k.data(), n, c.kv_heads, c.head_dim}, {l.v.data(), n, c.kv_heads, c.head_dim});
    std::vector<float> out(l.q.size());
    cache.attend(id, 0, {l.q.data(), n, c.heads, c.head_dim}, {out.data(), n, c.heads, c.head_dim},
                 {.mode = mode});
    return out;
}

double rms_of_difference(const std::vector<float>& a, const std::vector<float>& b) {
    double squares = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i)
        squares += std::pow(static_cast<double>(a[i]) - b[i], 2.0);
    return std::sqrt(squares / static_cast<double>(a.size()));
}

// The model over an fp32 cache.
std::vector<layer_vectors> run_model(std::size_t tokens) {
    const kv1_lm::model_config& c = kv1_test::shipped_model().config();
    const kv1_lm::safetensors file =
        kv1_lm::safetensors::read(std::filesystem::path(KV1_LM_MODEL_DIR) / "model.safetensors");
    kv1_lm::thread_pool pool(1);
    const auto weights = [&](const std::string& name) {
        const kv1_lm::tensor* const found = file.find(name);
        REQUIRE(found != nullptr);
        return kv1_lm::to_floats(*found);
    };
    const auto times = [&](const std::string& name, std::size_t outputs, const std::vector<float>& x,
                           std::size_t inputs) {
        std::vector<float> y(x.size() / inputs * outputs);
        linear(weights(name), outputs, inputs)(x, y, pool);
        return y;
    };
    const auto add = [](std::vector<float>& x, const std::vector<float>& y) {
        std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>());
    };

    const std::vector<float> embeddings = weights("embed_tokens.weight");
    const std::vector<std::int32_t> ids =
        kv1_test::shipped_tokenizer().encode(kv1_lm::read_text_file(KV1_LM_TEXT_FILE).substr(0, 16 * tokens));
    REQUIRE(ids.size() >= tokens);
    std::vector<float> x;
    for (std::size_t t = 0; t < tokens; ++t) {
        const auto from = embeddings.begin() +
                          static_cast<std::ptrdiff_t>(static_cast<std::size_t>(ids[t]) * c.hidden_size);
        x.insert(x.end(), from, from + static_cast<std::ptrdiff_t>(c.hidden_size));
    }
    std::vector<layer_vectors> layers;
    for (std::size_t i = 0; i < c.layers; ++i) {
        const std::string at = "layers." + std::to_string(i) + ".";
        std::vector<float> y = normalized(x, weights(at + "input_layernorm.weight"), c.rms_norm_eps);
        layer_vectors l{times(at + "self_attn.q_proj.weight", c.heads * c.head_dim, y, c.hidden_size),
                        times(at + "self_attn.k_proj.weight", c.kv_heads * c.head_dim, y, c.hidden_size),
                        times(at + "self_attn.v_proj.weight", c.kv_heads * c.head_dim, y, c.hidden_size)};
        rotate(l.q, c.heads, c.head_dim, static_cast<double>(c.rope_theta));
        rotate(l.k, c.kv_heads, c.head_dim, static_cast<double>(c.rope_theta));
        add(x, times(at + "self_attn.o_proj.weight", c.hidden_size,
                     attend(c, l, kv1::kv_format::fp32, precision::exact), c.heads * c.head_dim));
        y = normalized(x, weights(at + "post_attention_layernorm.weight"), c.rms_norm_eps);
        std::vector<float> gate = times(at + "mlp.gate_proj.weight", c.intermediate_size, y, c.hidden_size);
        const std::vector<float> up = times(at + "mlp.up_proj.weight", c.intermediate_size, y, c.hidden_size);
        for (std::size_t j = 0; j < gate.size(); ++j)
            gate[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j];
        add(x, times(at + "mlp.down_proj.weight", c.hidden_size, gate, c.intermediate_size));
        layers.push_back(std::move(l));
    }
    // that was the model
    kv1::kv_cache cache(
        kv1_test::shipped_model().cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, tokens));
    const std::vector<float> wanted = kv1_test::shipped_model().forward(
        std::span(ids).first(tokens), cache, cache.create_sequence(), precision::exact, pool);
    const std::vector<float> found = normalized(x, weights("norm.weight"), c.rms_norm_eps);
    REQUIRE(rms_of_difference(wanted, found) <
            1e-3 * rms_of_difference(wanted, std::vector<float>(wanted.size())));
    return layers;
}

// report(layer, RMS of exact - unquantized, RMS of fast - exact)
template <class F>
void measure(const std::vector<layer_vectors>& layers, F&& report) {
    const kv1_lm::model_config& c = kv1_test::shipped_model().config();
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const std::vector<float> truth = attend(c, layers[i], kv1::kv_format::fp32, precision::exact);
        const std::vector<float> exact = attend(c, layers[i], kv1::kv_format::affine2, precision::exact);
        const std::vector<float> fast = attend(c, layers[i], kv1::kv_format::affine2, precision::fast);
        report(i, rms_of_difference(exact, truth), rms_of_difference(fast, exact));
    }
}

constexpr std::size_t tokens = 1024;
constexpr double allowed = 0.05; // what the project holds itself to

} // namespace

TEST_CASE("the integer path adds little to what quantization does to the model's own attention",
          "[accuracy]") {
    const std::vector<layer_vectors> layers = run_model(tokens);
    REQUIRE(layers.size() == kv1_test::shipped_model().config().layers);
    kv1_test::for_each_target([&](kv1::target t) {
        if (t != kv1::target::scalar) // rounds as the others do, and takes its time
            measure(layers, [](std::size_t layer, double quantization, double integer) {
                INFO("layer " << layer << ": integer " << integer << ", quantization " << quantization);
                REQUIRE(integer <= allowed * quantization);
                REQUIRE(integer > 0.0); // the paths are two
            });
    });
}

TEST_CASE("table of differences on the model's own attention", "[.][table]") {
    measure(run_model(tokens), [](std::size_t layer, double quantization, double integer) {
        std::printf("layer %zu  quantization %.3e  integer %.3e  ratio %.2f%%\n", layer, quantization,
                    integer, 100 * integer / quantization);
    });
}
