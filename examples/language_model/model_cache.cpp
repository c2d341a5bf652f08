// SPDX-License-Identifier: Apache-2.0
#include "model_cache.hpp"

#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "safetensors.hpp"

#include <kv1/calibration_file.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <system_error>
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

// The calibration in a model's folder, for a model of this shape.
calibration read_calibration(const std::filesystem::path& folder, const model_config& config) {
    const std::filesystem::path file = folder / calibration_file;
    auto found = kv1::try_load_calibration(file, fingerprint_of_model(folder));
    if (!found)
        throw input_error(file.string(), found.reason().message());
    found->set_policy({}); // which takes no parts: shapes alone are compared
    kv1::layer_description layer{config.kv_heads, config.head_dim, config.head_dim};
    layer.rotary = rotary_of(config);
    const auto same = kv1::try_describe_cache(*found, kv1::uniform_cache(config.layers, layer, 1));
    if (!same)
        throw input_error(file.string(), same.reason().message());
    return parts_of(*found);
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

bool means_turn(const safetensors& means) {
    const auto found = means.metadata().find(means_that_turn.first);
    if (found == means.metadata().end())
        return false;
    if (found->second != means_that_turn.second)
        throw input_error(means.origin(), "key_means: \"before rotary embedding\" is what it may say");
    return true;
}

nlohmann::json reference_bits(const cache_policy& policy) {
    const auto plain = [](const kv1::vector_policy& side) {
        return kv1::info_of(side.format).code_bits == 0;
    };
    const layer_policy& common = policy.common;
    if (policy.layers.empty() && plain(common.key) && plain(common.value))
        return 0;
    const kv1::vector_policy key{.format = common.key.format}, value{.format = common.value.format};
    const std::string text = key == value ? to_string(key) : to_string(layer_policy{key, value});
    return text.find_first_of(",c") == std::string::npos ? nlohmann::json::parse(text) : nlohmann::json(text);
}

kv1::model_fingerprint fingerprint_of_model(const std::filesystem::path& folder) {
    const std::vector<std::byte> weights = read_binary_file(folder / "model.safetensors");
    return kv1::fingerprint_of(weights);
}

model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                         const std::optional<cache_policy>& kv) {
    model_cache choice;
    choice.policy = kv ? *kv : read_policy(folder, config);
    const auto exists = [&](const char* file) {
        std::error_code unknown;
        return std::filesystem::exists(folder / file, unknown);
    };
    const bool trained = choice.policy.needs_means() && (exists(means_file) || !exists(calibration_file));
    if (choice.policy.needs_error_weights() || choice.policy.needs_basis() ||
        (choice.policy.needs_means() && !trained))
        choice.calibrated = read_calibration(folder, config);
    if (trained) {
        const safetensors file = safetensors::read(folder / means_file);
        const std::vector<std::size_t> shape{config.kv_heads, config.head_dim};
        choice.calibrated.key_means = read_tensors(file, config.layers, "key_means", shape);
        choice.calibrated.value_means = read_tensors(file, config.layers, "value_means", shape);
        choice.calibrated.means_turn = means_turn(file);
        no_more_than(file, 2 * config.layers);
    }
    return choice;
}

} // namespace kv1_lm
