// SPDX-License-Identifier: Apache-2.0
#include "model_cache.hpp"

#include "error.hpp"
#include "json_file.hpp"
#include "safetensors.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

namespace kv1_lm {

namespace {

// Reads the tensor of this name of every layer.
std::vector<std::vector<float>> read_tensors(const safetensors& file, std::size_t layers, const char* name,
                                             const std::vector<std::size_t>& shape) {
    std::vector<std::vector<float>> all;
    for (std::size_t i = 0; i < layers; ++i) {
        const std::string full = "layers." + std::to_string(i) + "." + name;
        const tensor* found = file.find(full);
        if (found == nullptr)
            throw input_error(file.origin() + ": tensor " + full + " is missing");
        if (found->shape != shape)
            throw input_error(found->place, "has another shape than config.json says");
        all.push_back(to_floats(*found));
        if (!std::ranges::all_of(all.back(), [](float x) { return std::isfinite(x); }))
            throw input_error(found->place, "holds a value that is not finite");
    }
    return all;
}

void no_more_than(const safetensors& file, std::size_t tensors) {
    if (file.tensors().size() != tensors)
        throw input_error(file.origin(), "has tensors that are not this model's");
}

// Checks that a matrix can be a sum of squares: it is symmetric, and |w_ij| is at most sqrt(w_ii w_jj).
void check_weights(const safetensors& file, const char* name, std::span<const std::vector<float>> layers,
                   const model_config& config) {
    const std::size_t n = config.head_dim;
    for (std::size_t layer = 0; layer < layers.size(); ++layer)
        for (std::size_t head = 0; head < config.kv_heads; ++head) {
            const auto m = std::span(layers[layer]).subspan(head * n * n, n * n);
            for (std::size_t i = 0; i < n; ++i)
                for (std::size_t j = 0; j <= i; ++j) {
                    const double ii = m[i * n + i], jj = m[j * n + j], ij = m[i * n + j];
                    if (m[j * n + i] != m[i * n + j] || ii < 0.0 || ij * ij > 1.001 * ii * jj)
                        throw input_error(file.origin() + ": layers." + std::to_string(layer) + "." + name +
                                          ", head " + std::to_string(head) + ": is no matrix of costs");
                }
        }
}

// The policy that config.json names; two bits if it names none.
cache_policy read_policy(const std::filesystem::path& folder, const model_config& config) {
    const json_document document = read_json_file(folder / "config.json");
    const auto cache = document.root().find("kv1");
    if (!cache)
        return {};
    const json_view text = cache->member("policy");
    cache_policy policy = parse_policy(text.string(), text.place() + ":");
    if (!policy.layers.empty() && policy.layers.back().layer >= config.layers)
        text.fail("the model has layers 0 to " + std::to_string(config.layers - 1));
    return policy;
}

} // namespace

model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                         const std::optional<cache_policy>& kv) {
    model_cache choice;
    choice.policy = kv ? *kv : read_policy(folder, config);
    if (choice.policy.needs_means()) {
        const safetensors file = safetensors::read(folder / means_file);
        const std::vector<std::size_t> shape{config.kv_heads, config.head_dim};
        choice.calibrated.key_means = read_tensors(file, config.layers, "key_means", shape);
        choice.calibrated.value_means = read_tensors(file, config.layers, "value_means", shape);
        no_more_than(file, 2 * config.layers);
    }
    if (choice.policy.needs_error_weights()) {
        const safetensors file = safetensors::read(folder / error_weights_file);
        const auto read = [&](const char* name) {
            auto weights =
                read_tensors(file, config.layers, name, {config.kv_heads, config.head_dim, config.head_dim});
            check_weights(file, name, weights, config);
            return weights;
        };
        choice.calibrated.key_weights = read("key_weights");
        choice.calibrated.value_weights = read("value_weights");
        no_more_than(file, 2 * config.layers);
    }
    return choice;
}

} // namespace kv1_lm
