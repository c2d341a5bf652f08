// SPDX-License-Identifier: Apache-2.0
#include "model_cache.hpp"

#include "error.hpp"
#include "json_file.hpp"
#include "safetensors.hpp"

#include <kv1/format.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <vector>

namespace kv1_lm {

namespace {

constexpr const char* means_file = "kv1_means.safetensors";

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

bool read_least_squares(const json_view& cache) {
    const auto encoder = cache.find("encoder");
    if (!encoder || encoder->string() == "min_max")
        return false;
    if (encoder->string() != "least_squares")
        encoder->fail(quote(encoder->string()) + " is none of min_max, least_squares");
    return true;
}

// A format with what it has a use for of an encoding: a cache refuses the rest.
side_policy side_of(kv1::kv_format format, const side_policy& wanted) {
    const kv1::detail::format_traits t = kv1::detail::traits_of(format);
    side_policy side{.format = format};
    if (t.code_bits == 0)
        return side;
    side.least_squares =
        wanted.least_squares && (t.metadata == kv1::detail::metadata_kind::scale_and_minimum ||
                                 t.metadata == kv1::detail::metadata_kind::compact);
    side.hadamard = wanted.hadamard;
    side.means = wanted.means;
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

std::vector<float> read_means(const safetensors& file, std::size_t layer, const char* side,
                              const model_config& config) {
    const std::string name = "layers." + std::to_string(layer) + "." + side + "_means";
    const tensor* found = file.find(name);
    if (found == nullptr)
        throw input_error(file.origin() + ": tensor " + name + " is missing");
    if (found->shape != std::vector<std::size_t>{config.kv_heads, config.head_dim})
        throw input_error(found->place, "has another shape than config.json says");
    std::vector<float> means = to_floats(*found);
    if (!std::ranges::all_of(means, [](float m) { return std::isfinite(m); }))
        throw input_error(found->place, "holds a value that is not finite");
    return means;
}

} // namespace

model_cache choose_cache(const std::filesystem::path& folder, const model_config& config,
                         const std::optional<kv_formats>& kv) {
    model_cache choice;
    const auto plainly = [&](const kv_formats& f) {
        choice.policy.common = {{.format = f.key}, {.format = f.value}};
        choice.policy.text = to_string(f);
        return choice;
    };
    if (kv)
        return plainly(*kv);
    const json_document document = read_json_file(folder / "config.json");
    const auto cache = document.root().find("kv1");
    if (!cache)
        return plainly({});

    const side_policy wanted{.least_squares = read_least_squares(*cache),
                             .hadamard = read_flag(*cache, "hadamard"),
                             .means = read_flag(*cache, "centre")};
    layer_policy& common = choice.policy.common;
    common.key = side_of(read_format(cache->member("key_format")), wanted);
    common.value = side_of(read_format(cache->member("value_format")), wanted);
    if (const auto layers = cache->find("layers"))
        read_layers(*layers, config, wanted, choice.policy);
    choice.policy.text = to_string(common);
    for (const auto& [layer, differs] : choice.policy.layers)
        choice.policy.text.append("/").append(std::to_string(layer)).append(":").append(to_string(differs));
    if (!choice.policy.calibrated())
        return choice;
    const safetensors file = safetensors::read(folder / means_file);
    for (std::size_t i = 0; i < config.layers; ++i) {
        choice.means.key_means.push_back(read_means(file, i, "key", config));
        choice.means.value_means.push_back(read_means(file, i, "value", config));
    }
    if (file.tensors().size() != 2 * config.layers)
        throw input_error(file.origin(), "has tensors that are not this model's");
    return choice;
}

} // namespace kv1_lm
