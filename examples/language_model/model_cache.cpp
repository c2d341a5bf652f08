// SPDX-License-Identifier: Apache-2.0
#include "model_cache.hpp"

#include "error.hpp"
#include "json_file.hpp"
#include "safetensors.hpp"

#include <kv1/format.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <span>
#include <string>
#include <vector>

namespace kv1_lm {

namespace {

kv1::kv_format read_format(const json_view& name) {
    for (const kv1::kv_format f : kv1::all_kv_formats)
        if (name.string() == to_string(f))
            return f;
    name.fail(quote(name.string()) + " is no format of a cache");
}

bool read_flag(const json_view& cache, std::string_view key) {
    const auto flag = cache.find(key);
    return flag && flag->boolean();
}

// Whether a key names the other of two choices; none stands for the usual one.
bool read_other(const json_view& cache, std::string_view key, std::string_view usual,
                std::string_view other) {
    const auto choice = cache.find(key);
    if (!choice || choice->string() == usual)
        return false;
    if (choice->string() != other)
        choice->fail(quote(choice->string()) + " is none of " +
                     std::string(usual).append(", ").append(other));
    return true;
}

// A format with those options of an encoding that it takes, since a cache refuses the others.
side_policy side_of(kv1::kv_format format, const side_policy& wanted) {
    const kv1::format_info info = kv1::info_of(format);
    side_policy side{.format = format};
    if (info.code_bits == 0)
        return side;
    side.least_squares = wanted.least_squares && info.fits_levels;
    side.hadamard = wanted.hadamard;
    side.means = wanted.means;
    side.error_weights = wanted.error_weights && side.least_squares;
    return side;
}

void read_layers(const json_view& layers, const model_config& config, const side_policy& wanted,
                 cache_policy& policy) {
    for (const auto& [name, unused] : layers.object()) {
        const json_view own = layers.member(name);
        std::size_t layer = 0;
        const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
        if (error != std::errc() || end != name.data() + name.size() || layer >= config.layers)
            own.fail("the model has layers 0 to " + std::to_string(config.layers - 1));
        layer_policy differs = policy.common;
        if (const auto key = own.find("key_format"))
            differs.key = side_of(read_format(*key), wanted);
        if (const auto value = own.find("value_format"))
            differs.value = side_of(read_format(*value), wanted);
        policy.layers[layer] = differs;
    }
}

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
        return parse_policy("2");
    const side_policy wanted{.least_squares = read_other(*cache, "encoder", "min_max", "least_squares"),
                             .hadamard = read_flag(*cache, "hadamard"),
                             .means = read_flag(*cache, "centre"),
                             .error_weights = read_flag(*cache, "error_weights")};
    if (wanted.error_weights && !wanted.least_squares)
        cache->member("error_weights").fail("is for levels by least_squares");
    cache_policy policy;
    policy.common.key = side_of(read_format(cache->member("key_format")), wanted);
    policy.common.value = side_of(read_format(cache->member("value_format")), wanted);
    if (const auto layers = cache->find("layers"))
        read_layers(*layers, config, wanted, policy);
    if (read_other(*cache, "key_axis", "per_token", "per_channel")) {
        policy.common.key.per_channel = true;
        for (auto& [layer, differs] : policy.layers)
            differs.key.per_channel = true;
    }
    policy.text = to_string(policy.common);
    for (const auto& [layer, differs] : policy.layers)
        policy.text.append("/").append(std::to_string(layer)).append(":").append(to_string(differs));
    return policy;
}

} // namespace

model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                         const std::optional<cache_policy>& kv) {
    model_cache choice;
    choice.policy = kv ? *kv : read_policy(folder, config);
    if (choice.policy.centred()) {
        const safetensors file = safetensors::read(folder / means_file);
        const std::vector<std::size_t> shape{config.kv_heads, config.head_dim};
        choice.calibrated.key_means = read_tensors(file, config.layers, "key_means", shape);
        choice.calibrated.value_means = read_tensors(file, config.layers, "value_means", shape);
        no_more_than(file, 2 * config.layers);
    }
    if (choice.policy.weighted()) {
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
