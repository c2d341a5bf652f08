// SPDX-License-Identifier: Apache-2.0
//
// Chooses how each layer is kept, under a budget of bytes. Layers differ in what a bit is worth. On SmolLM2-135M-Instruct,
// of 30 layers, two-bit keys cost up to 100 times as much in one layer as in another, and a choice for each layer has a KL
// divergence of 0.0090 nats where `balanced` with +basis has 0.0143 at the same bytes (examples/real_model).
//
//   std::vector<kv1::layer_option> options;
//   for (layer ...)
//       for (const char* text : {"c2+ls+had+mean+ew", "c3+ls+had+mean+ew", "c4+ls+had+mean+ew"})
//           options.push_back({layer, kv1::parse_policy(text).common, cost of that layer kept so, the others plain});
//   kv1::cache_policy policy = kv1::choose_layers(shape, options, 11.5 * vectors_a_token);
//   calibration.set_policy(policy); // with its fp16 tokens; calibration.hpp took the parts that options name
//
// Costs are the caller's, in a unit that adds up over layers. The best is the KL divergence of the model's predictions
// with one layer kept so and the others plain, on a few thousand tokens: errors of layers hardly correlate, so such
// costs add up as long as they are small. As many runs as there are options are needed.
#pragma once

#include <kv1/cache_policy.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/layout.hpp>
#include <kv1/status.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI {

/// A way to keep a layer.
struct layer_option {
    std::size_t layer = 0;    ///< from 0
    layer_policy policy = {}; ///< how it is kept
    double cost = 0.0;        ///< what that costs, in any unit that adds up over layers
};

/// The bytes that a layer takes for a token when it is kept so, metadata included; fp16 tokens are not. O(1).
/// Precondition: a layer that a cache can have.
[[nodiscard]] double bytes_per_token(const layer_description& layer, const layer_policy& policy,
                                     std::size_t page_tokens = 64) noexcept;

/// Chooses one of the options for each layer of `shape`, within `budget` bytes a token over all layers. It begins
/// with the fewest bytes for each layer. Then it takes the step that saves most cost for a byte, again and again, as
/// long as one fits. A step goes to any wider option of a layer, so none hides behind another. The sum of costs is
/// at most one such step above the least there is. The common policy is that of most layers; fp16 tokens and pages
/// are left at their defaults. O(layers options). Errors: invalid_argument for a layer without options, for one without
/// heads or channels, and where even the fewest bytes do not fit; out_of_range for a layer that the shape does not have;
/// non_finite for a cost or a budget; out_of_memory.
[[nodiscard]] result<cache_policy> try_choose_layers(const cache_description& shape,
                                                     std::span<const layer_option> options,
                                                     double budget) noexcept;

#if KV1_EXCEPTIONS
/// Chooses one of the options for each layer of `shape`, within `budget` bytes a token over all layers, at a low sum
/// of costs. Throws kv1::error for a layer without options, and where even the fewest bytes do not fit.
[[nodiscard]] inline cache_policy choose_layers(const cache_description& shape,
                                                std::span<const layer_option> options, double budget) {
    return try_choose_layers(shape, options, budget).value();
}
#endif

inline double bytes_per_token(const layer_description& layer, const layer_policy& policy,
                              std::size_t page_tokens) noexcept {
    layer_description l;
    l.kv_heads = layer.kv_heads;
    l.key_dim = layer.key_dim;
    l.value_dim = layer.value_dim;
    l.values_in_keys = layer.values_in_keys;
    l.key_format = policy.key.format;
    l.key_group = policy.key.group;
    l.key_axis = policy.key.axis;
    l.value_format = l.values_in_keys ? policy.key.format : policy.value.format;
    l.value_group = l.values_in_keys ? policy.key.group : policy.value.group;
    return static_cast<double>(l.kv_heads * layout_of(l, page_tokens).bytes()) /
           static_cast<double>(page_tokens);
}

inline result<cache_policy> try_choose_layers(const cache_description& shape,
                                              std::span<const layer_option> options, double budget) noexcept {
    constexpr std::size_t none = SIZE_MAX;
    const status no_memory(errc::out_of_memory, "an allocation failed");
    detail::buffer<double> bytes;
    detail::buffer<std::size_t> chosen; // of each layer
    if (!bytes.resize(options.size()) || !chosen.resize(shape.layers.size(), none))
        return no_memory;
    if (!std::isfinite(budget))
        return status(errc::non_finite, "a budget is a number of bytes");
    // ties go to the lower cost, then to the earlier option
    const auto fewer = [&](std::size_t i, std::size_t j) {
        return bytes[i] != bytes[j] ? bytes[i] < bytes[j] : options[i].cost < options[j].cost;
    };
    for (std::size_t i = 0; i < options.size(); ++i) {
        const error_location where{.layer = static_cast<std::int64_t>(options[i].layer)};
        if (options[i].layer >= shape.layers.size())
            return status(errc::out_of_range, "an option is for a layer that the shape does not have", where);
        if (!std::isfinite(options[i].cost))
            return status(errc::non_finite, "a cost is a number", where);
        const layer_description& l = shape.layers[options[i].layer];
        if (l.kv_heads == 0 || l.key_dim == 0 || l.value_dim == 0)
            return status(errc::invalid_argument, "a layer has KV heads and channels", where);
        bytes[i] = bytes_per_token(l, options[i].policy, shape.page_tokens);
        std::size_t& own = chosen[options[i].layer];
        if (own == none || fewer(i, own))
            own = i;
    }
    double left = budget;
    for (std::size_t l = 0; l < chosen.size(); ++l) {
        if (chosen[l] == none)
            return status(errc::invalid_argument, "every layer has an option",
                          {.layer = static_cast<std::int64_t>(l)});
        left -= bytes[chosen[l]];
    }
    if (left < 0.0)
        return status(errc::invalid_argument,
                      "the budget is less than the options with the fewest bytes take");
    for (;;) {
        std::size_t best = none;
        double most = 0.0;
        for (std::size_t i = 0; i < options.size(); ++i) {
            const std::size_t now = chosen[options[i].layer];
            const double more = bytes[i] - bytes[now], saved = options[now].cost - options[i].cost;
            if (saved <= 0.0 || more > left)
                continue;
            const double worth = more <= 0.0 ? HUGE_VAL : saved / more;
            if (worth > most) {
                most = worth;
                best = i;
            }
        }
        if (best == none)
            break;
        left -= bytes[best] - bytes[chosen[options[best].layer]];
        chosen[options[best].layer] = best;
    }

    cache_policy policy;
    std::size_t most = 0;
    for (std::size_t l = 0; l < chosen.size(); ++l) {
        std::size_t alike = 0;
        for (const std::size_t other : chosen)
            alike += options[other].policy == options[chosen[l]].policy ? 1 : 0;
        if (alike > most) {
            most = alike;
            policy.common = options[chosen[l]].policy;
        }
    }
    if (const status s = detail::seek_memory((chosen.size() - most) * sizeof(layer_exception)); !s)
        return s;
    if (const status s = detail::guarded([&] { policy.layers.reserve(chosen.size() - most); }); !s)
        return s;
    for (std::size_t l = 0; l < chosen.size(); ++l)
        if (options[chosen[l]].policy != policy.common)
            policy.layers.push_back({l, options[chosen[l]].policy});
    return result<cache_policy>(std::move(policy));
}

} // namespace kv1::inline KV1_ABI
