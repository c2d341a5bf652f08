// SPDX-License-Identifier: Apache-2.0
#include "cache_policy.hpp"

#include "error.hpp"
#include "model_config.hpp"

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <span>
#include <utility>

namespace kv1_lm {

namespace {

// A policy may name every layer: 200 bytes tell which one it is.
[[noreturn]] void refuse(std::string_view what, std::string_view text, const kv1::status& why) {
    constexpr std::size_t most = 200;
    throw input_error(
        std::string(what).append(" '").append(text.substr(0, most)).append(text.size() > most ? "...'" : "'"),
        why.message());
}

} // namespace

cache_policy parse_policy(std::string_view text, std::string_view what) {
    kv1::result<cache_policy> policy = kv1::try_parse_policy(text);
    if (!policy)
        refuse(what, text, policy.reason());
    return std::move(*policy);
}

calibration parts_of(const kv1::calibration& found) {
    calibration c;
    for (std::size_t i = 0; i < found.layers(); ++i) {
        c.key_means.push_back(found.means(i, kv1::kv_side::key));
        c.value_means.push_back(found.means(i, kv1::kv_side::value));
        c.key_weights.push_back(found.error_weights(i, kv1::kv_side::key));
        c.value_weights.push_back(found.error_weights(i, kv1::kv_side::value));
        c.key_basis.push_back(found.basis(i, kv1::kv_side::key));
        c.value_basis.push_back(found.basis(i, kv1::kv_side::value));
        c.means_turn = !found.rotary(i).empty();
    }
    return c;
}

kv1::rotary_embedding rotary_of(const model_config& config) {
    return {kv1::rotary_frequencies(static_cast<double>(config.rope_theta), config.head_dim),
            config.rotary_pairs};
}

kv1::cache_description describe(const model_config& config, const cache_policy& policy, const calibration& c,
                                std::size_t tokens) {
    std::vector<kv1::layer_calibration> layers(config.layers);
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const auto part = [i](const std::vector<std::vector<float>>& all) {
            return i < all.size() ? std::span<const float>(all[i]) : std::span<const float>();
        };
        layers[i] = {part(c.key_means),     part(c.value_means), part(c.key_weights),
                     part(c.value_weights), part(c.key_basis),   part(c.value_basis)};
    }
    kv1::layer_description layer{config.kv_heads, config.head_dim, config.head_dim};
    if (c.means_turn)
        layer.rotary = rotary_of(config);
    kv1::result<kv1::cache_description> d =
        kv1::try_describe_cache(policy, kv1::uniform_cache(config.layers, layer, tokens), layers);
    if (!d)
        refuse("policy", to_string(policy), d.reason());
    if (const auto made = kv1::kv_cache::create(*d); !made && made.code() != kv1::errc::out_of_memory)
        refuse("policy", to_string(policy), made.reason());
    return std::move(*d);
}

double bytes_per_vector(const kv1::cache_description& d, std::size_t tokens) {
    double bytes = 0.0, vectors = 0.0;
    const auto n = static_cast<double>(tokens);
    for (const kv1::layer_description& l : d.layers) {
        const kv1::page_layout page = kv1::layout_of(l, d.page_tokens);
        const auto heads = static_cast<double>(l.kv_heads);
        const auto half = static_cast<double>(2 * (l.key_dim + l.value_dim));
        vectors += 2.0 * heads * n;
        bytes += heads * n * static_cast<double>(page.bytes()) / static_cast<double>(d.page_tokens);
        if (l.key_axis == kv1::quantization_axis::per_channel)
            bytes += heads * static_cast<double>(2 * l.key_dim * (tokens % d.page_tokens));
        bytes += 2.0 * static_cast<double>(l.key_encoding.means.size() + l.value_encoding.means.size());
        bytes += heads * half * std::min(n, static_cast<double>(d.fp16_sinks + d.fp16_window));
    }
    return bytes / vectors;
}

} // namespace kv1_lm
