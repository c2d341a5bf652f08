// SPDX-License-Identifier: Apache-2.0
#include "calibrate.hpp"

#include "error.hpp"
#include "error_weights.hpp"
#include "file.hpp"
#include "float_tensors.hpp"
#include "json_file.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "output_file.hpp"
#include "tokenizer.hpp"

#include <kv1/encoding.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace kv1_lm {

namespace {

void add_layers(std::vector<float_tensor>& file, const char* name, const std::vector<std::size_t>& shape,
                const std::vector<std::vector<float>>& layers) {
    for (std::size_t i = 0; i < layers.size(); ++i)
        file.push_back({"layers." + std::to_string(i) + "." + name, shape, layers[i]});
}

// Error weights where they can be: beside fitted levels, one scale to a vector.
void weigh_errors(layer_policy& layer) {
    for (kv1::vector_policy* side : {&layer.key, &layer.value})
        side->error_weights = side->levels != kv1::level_choice::min_max && side->group == 0 &&
                              kv1::info_of(side->format).fits_levels;
}

} // namespace

calibration calibrate(const model& m, std::vector<std::int32_t> tokens, std::size_t chunk,
                      bool error_weights) {
    const model_config& c = m.config();
    std::vector<kv1::mean_estimator> keys(c.layers, kv1::mean_estimator(c.kv_heads, c.head_dim)),
        values = keys;
    std::optional<error_weight_estimator> weights;
    if (error_weights)
        weights.emplace(m);
    kv1::kv_cache cache(m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, chunk));
    thread_pool pool(1);
    for (std::size_t at = 0; at < tokens.size(); at += chunk) {
        const kv1::sequence_id sequence = cache.create_sequence();
        static_cast<void>(
            m.forward(std::span(tokens).subspan(at, std::min(chunk, tokens.size() - at)), cache, sequence,
                      kv1::precision::exact, pool,
                      [&](std::size_t layer, kv1::tensor_view q, kv1::tensor_view k, kv1::tensor_view v) {
                          if (weights)
                              weights->add(layer, q, k, v);
                          keys[layer].add(k);
                          values[layer].add(v);
                      }));
        cache.destroy_sequence(sequence);
    }
    calibration result;
    for (std::size_t i = 0; i < c.layers; ++i) {
        result.key_means.push_back(keys[i].means());
        result.value_means.push_back(values[i].means());
        if (!weights)
            continue;
        result.key_weights.push_back(weights->key_weights(i));
        result.value_weights.push_back(weights->value_weights(i));
    }
    return result;
}

void calibrate_folder(const calibrate_options& options, std::ostream& out) {
    const std::filesystem::path config_file = options.model / "config.json";
    json_document document = read_json_file(config_file);
    const auto cache = document.root().find("kv1");
    if (!cache)
        throw input_error(config_file.string(), "kv1 names no cache that weights could be added to");
    const json_view text = cache->member("policy");
    cache_policy policy = parse_policy(text.string(), text.place() + ":");
    weigh_errors(policy.common);
    for (kv1::layer_exception& differs : policy.layers)
        weigh_errors(differs.policy);
    if (!policy.needs_error_weights())
        text.fail(
            "error weights are for levels by least squares or a clip search (+ls, +cs), of whole vectors");
    std::error_code unreadable;
    const bool lacks_means =
        policy.needs_means() && !std::filesystem::exists(options.model / means_file, unreadable);

    const model m = model::read(options.model);
    const model_config& c = m.config();
    std::vector<std::int32_t> tokens =
        tokenizer::read(options.model / "tokenizer.json").encode(read_text_file(options.text));
    tokens.resize(std::min(tokens.size(), options.tokens));
    if (tokens.empty())
        throw input_error(options.text.string(), "no tokens to calibrate on");
    const std::size_t used = tokens.size();
    const calibration found = calibrate(m, std::move(tokens), c.max_positions, true);

    std::vector<float_tensor> weights, means;
    add_layers(weights, "key_weights", {c.kv_heads, c.head_dim, c.head_dim}, found.key_weights);
    add_layers(weights, "value_weights", {c.kv_heads, c.head_dim, c.head_dim}, found.value_weights);
    output_file(options.model / error_weights_file).commit(to_safetensors(weights));
    if (lacks_means) {
        add_layers(means, "key_means", {c.kv_heads, c.head_dim}, found.key_means);
        add_layers(means, "value_means", {c.kv_heads, c.head_dim}, found.value_means);
        output_file(options.model / means_file).commit(to_safetensors(means));
    }
    document.value["kv1"]["policy"] = to_string(policy);
    output_file(config_file).commit(document.value.dump(2) + "\n");
    out << "error weights from " << used << " tokens; the model's cache is now "
        << to_string(choose_cache(options.model, c, {}).policy) << '\n';
}

} // namespace kv1_lm
