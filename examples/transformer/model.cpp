// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include "error.hpp"
#include "safetensors.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <utility>

namespace kv1_lm {

namespace {

// Takes tensors by name, and says which are missing, of another shape, or left over.
class weight_source {
public:
    explicit weight_source(const safetensors& file) : file_(file) {}

    [[nodiscard]] bool has(const std::string& name) const { return file_.find(name) != nullptr; }

    std::vector<float> take(const std::string& name, const std::vector<std::size_t>& shape) {
        const tensor* found = file_.find(name);
        if (found == nullptr)
            throw input_error(file_.origin() + ": tensor " + name + " is missing");
        if (found->shape != shape)
            throw input_error(file_.origin() + ": tensor " + name + " has shape " + text(found->shape) +
                              ", not " + text(shape));
        taken_.insert(name);
        std::vector<float> values = to_floats(*found);
        if (const auto bad =
                std::find_if_not(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
            bad != values.end())
            throw input_error(file_.origin() + ": tensor " + name + " holds a NaN or an infinity, element " +
                              std::to_string(bad - values.begin()));
        parameters_ += values.size();
        return values;
    }
    linear take_linear(const std::string& name, std::size_t outputs, std::size_t inputs) {
        return {take(name, {outputs, inputs}), outputs, inputs};
    }
    void expect_all_taken() const {
        for (const auto& [name, found] : file_.tensors())
            if (!taken_.contains(name))
                throw input_error(file_.origin() + ": tensor " + name + " is not one of this model's");
    }
    [[nodiscard]] std::size_t parameters() const { return parameters_; }

private:
    static std::string text(const std::vector<std::size_t>& shape) {
        std::string list = "[";
        for (const std::size_t extent : shape)
            list.append(list.size() > 1 ? ", " : "").append(std::to_string(extent));
        return list.append("]");
    }

    const safetensors& file_;
    std::set<std::string, std::less<>> taken_;
    std::size_t parameters_ = 0;
};

void add(std::span<float> x, std::span<const float> y) {
    std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>());
}

} // namespace

model model::read(const std::filesystem::path& folder) {
    return {model_config::read(folder / "config.json"), safetensors::read(folder / "model.safetensors")};
}

model::model(model_config config, const safetensors& file) : config_(std::move(config)) {
    const model_config& c = config_;
    weight_source weights(file);
    embeddings_ = weights.take_linear("embed_tokens.weight", c.vocab_size, c.hidden_size);
    for (std::size_t i = 0; i < c.layers; ++i) {
        const std::string at = "layers." + std::to_string(i) + ".";
        layer l;
        l.attention_norm = weights.take(at + "input_layernorm.weight", {c.hidden_size});
        l.query = weights.take_linear(at + "self_attn.q_proj.weight", c.heads * c.head_dim, c.hidden_size);
        l.key = weights.take_linear(at + "self_attn.k_proj.weight", c.kv_heads * c.head_dim, c.hidden_size);
        l.value = weights.take_linear(at + "self_attn.v_proj.weight", c.kv_heads * c.head_dim, c.hidden_size);
        l.output = weights.take_linear(at + "self_attn.o_proj.weight", c.hidden_size, c.heads * c.head_dim);
        l.mlp_norm = weights.take(at + "post_attention_layernorm.weight", {c.hidden_size});
        l.gate = weights.take_linear(at + "mlp.gate_proj.weight", c.intermediate_size, c.hidden_size);
        l.up = weights.take_linear(at + "mlp.up_proj.weight", c.intermediate_size, c.hidden_size);
        l.down = weights.take_linear(at + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size);
        layers_.push_back(std::move(l));
    }
    final_norm_ = weights.take("norm.weight", {c.hidden_size});
    if (weights.has("lm_head.weight") || !c.tied_embeddings)
        head_ = weights.take_linear("lm_head.weight", c.vocab_size, c.hidden_size);
    weights.expect_all_taken();
    parameters_ = weights.parameters();

    // angles in fp32, as the reference computes them
    const std::size_t pairs = c.head_dim / 2;
    for (std::size_t position = 0; position < c.max_positions; ++position)
        for (std::size_t i = 0; i < pairs; ++i) {
            const float exponent = static_cast<float>(2 * i) / static_cast<float>(c.head_dim);
            const float angle = static_cast<float>(position) * (1.0f / std::pow(c.rope_theta, exponent));
            cosines_.push_back(std::cos(angle));
            sines_.push_back(std::sin(angle));
        }
}

kv1::cache_description model::cache_shape(const kv_formats& formats, std::size_t tokens) const {
    return kv1::uniform_cache(
        config_.layers, {config_.kv_heads, config_.head_dim, config_.head_dim, formats.key, formats.value},
        tokens);
}

std::vector<float> model::forward(std::span<const std::int32_t> tokens, kv1::kv_cache& cache,
                                  kv1::sequence_id sequence, kv1::precision precision,
                                  thread_pool& pool) const {
    return forward(tokens, cache, sequence, precision, pool, {});
}

std::vector<float> model::forward(std::span<const std::int32_t> tokens, kv1::kv_cache& cache,
                                  kv1::sequence_id sequence, kv1::precision precision, thread_pool& pool,
                                  const observer& watch) const {
    const model_config& c = config_;
    const std::size_t n = tokens.size(), first = cache.length(sequence);
    if (n > c.max_positions || first > c.max_positions - n)
        throw input_error("a context of " + std::to_string(first + n) +
                          " tokens is longer than the model's " + std::to_string(c.max_positions));

    std::vector<float> x(n * c.hidden_size);
    for (std::size_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= c.vocab_size)
            throw input_error("token " + std::to_string(tokens[i]) + " at position " +
                              std::to_string(first + i) + " is not in the model's vocabulary of " +
                              std::to_string(c.vocab_size));
        std::ranges::copy(embeddings_.row(static_cast<std::size_t>(tokens[i])),
                          x.begin() + static_cast<std::ptrdiff_t>(i * c.hidden_size));
    }

    std::vector<float> normed(x.size()), sum(x.size());
    std::vector<float> q(n * c.heads * c.head_dim), k(n * c.kv_heads * c.head_dim), v(k.size()),
        attended(q.size());
    std::vector<float> gate(n * c.intermediate_size), up(gate.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const layer& l = layers_[i];
        normalize(x, l.attention_norm, normed);
        l.query(normed, q, pool);
        l.key(normed, k, pool);
        l.value(normed, v, pool);
        rotate(q, c.heads, first);
        rotate(k, c.kv_heads, first);

        if (watch)
            watch(i, {q.data(), n, c.heads, c.head_dim}, {k.data(), n, c.kv_heads, c.head_dim},
                  {v.data(), n, c.kv_heads, c.head_dim});

        // all that there is to kv1: quantize and store what is new, attend to what is stored
        cache.append(sequence, i, {k.data(), n, c.kv_heads, c.head_dim},
                     {v.data(), n, c.kv_heads, c.head_dim}, pool);
        cache.attend(sequence, i, {q.data(), n, c.heads, c.head_dim},
                     {attended.data(), n, c.heads, c.head_dim}, {.mode = precision}, pool);

        l.output(attended, sum, pool);
        add(x, sum);
        normalize(x, l.mlp_norm, normed);
        l.gate(normed, gate, pool);
        l.up(normed, up, pool);
        for (std::size_t j = 0; j < gate.size(); ++j)
            gate[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j]; // SwiGLU
        l.down(gate, sum, pool);
        add(x, sum);
    }
    normalize(x, final_norm_, normed);
    return normed;
}

std::vector<double> model::output_products(std::size_t index) const {
    const std::size_t d = config_.head_dim, group = config_.heads / config_.kv_heads;
    std::vector<double> sums(config_.heads * group * d * d);
    for (std::size_t o = 0; o < config_.hidden_size; ++o) {
        const std::span<const float> row = layers_[index].output.row(o);
        std::size_t at = 0;
        for (std::size_t a = 0; a < config_.heads; ++a)
            for (std::size_t b = a / group * group; b < (a / group + 1) * group; ++b)
                for (std::size_t i = 0; i < d; ++i)
                    for (std::size_t j = 0; j < d; ++j)
                        sums[at++] +=
                            static_cast<double>(row[a * d + i]) * static_cast<double>(row[b * d + j]);
    }
    return sums;
}

void model::logits(std::span<const float> hidden, std::span<float> out, thread_pool& pool) const {
    (head_.outputs() != 0 ? head_ : embeddings_)(hidden, out, pool);
}

void model::normalize(std::span<const float> x, std::span<const float> weight, std::span<float> out) const {
    const std::size_t width = weight.size();
    for (std::size_t at = 0; at < x.size(); at += width) {
        float squares = 0.0f;
        for (std::size_t i = 0; i < width; ++i)
            squares += x[at + i] * x[at + i];
        const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + config_.rms_norm_eps);
        for (std::size_t i = 0; i < width; ++i)
            out[at + i] = x[at + i] * factor * weight[i];
    }
}

// Rotary positions on interleaved pairs of channels (2i, 2i + 1).
void model::rotate(std::span<float> vectors, std::size_t heads, std::size_t first_position) const {
    const std::size_t pairs = config_.head_dim / 2;
    for (std::size_t at = 0, row = 0; at < vectors.size(); at += config_.head_dim, ++row) {
        const std::size_t angles = (first_position + row / heads) * pairs;
        for (std::size_t i = 0; i < pairs; ++i) {
            float& a = vectors[at + 2 * i];
            float& b = vectors[at + 2 * i + 1];
            const float cosine = cosines_[angles + i], sine = sines_[angles + i];
            const float turned = a * cosine - b * sine;
            b = a * sine + b * cosine;
            a = turned;
        }
    }
}

} // namespace kv1_lm
