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
    void take(const std::string& name, const std::vector<std::size_t>& shape, std::vector<float>& place) {
        place = take(name, shape);
    }
    void take(const std::string& name, const std::vector<std::size_t>& shape, linear& place) {
        place = {take(name, shape), shape[0], shape[1]};
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

// Adds a bias to every row; none where it is empty.
void add_to_rows(std::span<float> rows, std::span<const float> bias) {
    if (!bias.empty())
        for (std::size_t at = 0; at < rows.size(); at += bias.size())
            add(rows.subspan(at, bias.size()), bias);
}

} // namespace

model model::read(const std::filesystem::path& folder) {
    return {model_config::read(folder / "config.json"), safetensors::read(folder / "model.safetensors")};
}

model::model(model_config config, const safetensors& file) : config_(std::move(config)) {
    weight_source source(file);
    const bool own_head = source.has("lm_head.weight") || !config_.tied_embeddings;
    for_each_weight(config_, own_head, weights_,
                    [&](const std::string& name, const std::vector<std::size_t>& shape, auto& place) {
                        source.take(name, shape, place);
                    });
    source.expect_all_taken();
    parameters_ = source.parameters();
    angles_ = make_rotary_angles(config_.max_positions, config_.head_dim, config_.rope_theta);
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
    const attention attend = [&](std::size_t layer, kv1::tensor_view queries, kv1::tensor_view keys,
                                 kv1::tensor_view values, kv1::mutable_tensor_view outputs) {
        if (watch)
            watch(layer, queries, keys, values);
        // all that there is to kv1: quantize and store what is new, attend to what is stored
        cache.append(sequence, layer, keys, values, pool);
        cache.attend(sequence, layer, queries, outputs, {.mode = precision}, pool);
    };
    std::vector<float> states = forward(tokens, cache.length(sequence), attend, pool);
    cache.commit(sequence); // a step that fails is undone by rollback()
    return states;
}

std::vector<float> model::forward(std::span<const std::int32_t> tokens, std::size_t first,
                                  const attention& attend, thread_pool& pool) const {
    const model_config& c = config_;
    const std::size_t n = tokens.size();
    if (n > c.max_positions || first > c.max_positions - n)
        throw input_error("a context of " + std::to_string(first + n) +
                          " tokens is longer than the model's " + std::to_string(c.max_positions));

    std::vector<float> x(n * c.hidden_size);
    for (std::size_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= c.vocab_size)
            throw input_error("token " + std::to_string(tokens[i]) + " at position " +
                              std::to_string(first + i) + " is not in the model's vocabulary of " +
                              std::to_string(c.vocab_size));
        std::ranges::copy(weights_.embeddings.row(static_cast<std::size_t>(tokens[i])),
                          x.begin() + static_cast<std::ptrdiff_t>(i * c.hidden_size));
    }

    std::vector<float> normed(x.size()), sum(x.size());
    std::vector<float> q(n * c.heads * c.head_dim), k(n * c.kv_heads * c.head_dim), v(k.size()),
        attended(q.size());
    std::vector<float> gate(n * c.intermediate_size), up(gate.size());
    for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
        const auto& l = weights_.layers[i];
        normalize(x, l.attention_norm, normed);
        l.query(normed, q, pool);
        l.key(normed, k, pool);
        l.value(normed, v, pool);
        add_to_rows(q, l.query_bias);
        add_to_rows(k, l.key_bias);
        add_to_rows(v, l.value_bias);
        if (c.normalized_qk) { // each head by itself
            normalize(q, l.query_norm, q);
            normalize(k, l.key_norm, k);
        }
        rotate(q, c.heads, first);
        rotate(k, c.kv_heads, first);

        attend(i, {q.data(), n, c.heads, c.head_dim}, {k.data(), n, c.kv_heads, c.head_dim},
               {v.data(), n, c.kv_heads, c.head_dim}, {attended.data(), n, c.heads, c.head_dim});

        l.output(attended, sum, pool);
        add_to_rows(sum, l.output_bias);
        add(x, sum);
        normalize(x, l.mlp_norm, normed);
        l.gate(normed, gate, pool);
        l.up(normed, up, pool);
        for (std::size_t j = 0; j < gate.size(); ++j)
            gate[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j]; // SwiGLU
        l.down(gate, sum, pool);
        add(x, sum);
    }
    normalize(x, weights_.final_norm, normed);
    return normed;
}

kv1::tensor_view model::output_projection(std::size_t index) const noexcept {
    return {weights_.layers[index].output.row(0).data(), config_.hidden_size, config_.heads,
            config_.head_dim};
}

void model::logits(std::span<const float> hidden, std::span<float> out, thread_pool& pool) const {
    (weights_.head.outputs() != 0 ? weights_.head : weights_.embeddings)(hidden, out, pool);
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

void model::rotate(std::span<float> vectors, std::size_t heads, std::size_t first_position) const {
    const std::size_t pairs = config_.head_dim / 2;
    const bool interleaved = config_.rotary_pairs == kv1::rotary_pairs::interleaved;
    const std::size_t step = interleaved ? 2 : 1,
                      apart = interleaved ? 1 : pairs; // of pairs; of a pair's two
    for (std::size_t at = 0, row = 0; at < vectors.size(); at += config_.head_dim, ++row) {
        const std::size_t angles = (first_position + row / heads) * pairs;
        for (std::size_t i = 0; i < pairs; ++i) {
            float& a = vectors[at + step * i];
            float& b = vectors[at + step * i + apart];
            const float cosine = angles_.cosines[angles + i], sine = angles_.sines[angles + i];
            const float turned = a * cosine - b * sine;
            b = a * sine + b * cosine;
            a = turned;
        }
    }
}

} // namespace kv1_lm
