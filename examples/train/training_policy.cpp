// SPDX-License-Identifier: Apache-2.0
#include "training_policy.hpp"

#include "error.hpp"

#include <kv1/format.hpp>

#include <utility>

namespace kv1_train {

namespace {

// Why training does not know a layer's policy, or none.
const char* untrained(const kv1::layer_policy& layer) {
    for (const kv1::vector_policy* side : {&layer.key, &layer.value}) {
        const kv1::format_info info = kv1::info_of(side->format);
        if (side->basis || side->group != 0 || side->axis != kv1::quantization_axis::per_token)
            return "training has no +basis, +channel and +g";
        if (info.code_bits == 0 && *side != kv1::vector_policy{.format = side->format})
            return "16 and 32 take no options";
        if (side->levels != kv1::level_choice::min_max && !info.fits_levels)
            return "1 and 1.5 take no +ls and +cs";
    }
    return nullptr;
}

} // namespace

training_policy parse_policy(std::string_view text, std::string_view option) {
    const std::string place = std::string(option).append(" '").append(text).append("'");
    kv1::result<kv1::cache_policy> parsed = kv1::try_parse_policy(text);
    if (!parsed)
        throw kv1_lm::input_error(place, parsed.reason().message());
    training_policy p;
    p.cache = std::move(*parsed);
    const char* why = untrained(p.cache.common);
    for (const kv1::layer_exception& differs : p.cache.layers)
        why = why != nullptr ? why : untrained(differs.policy);
    if (why != nullptr)
        throw kv1_lm::input_error(place, why);
    if (p.cache.page_tokens != 0)
        throw kv1_lm::input_error(place, "training has no pages (#)");
    return p;
}

void check_layers(const training_policy& p, std::size_t layers, std::string_view option) {
    if (!p.cache.layers.empty() && p.cache.layers.back().layer >= layers)
        throw kv1_lm::input_error(std::string(option),
                                  "layer " + std::to_string(p.cache.layers.back().layer) +
                                      ": the model has layers 0 to " + std::to_string(layers - 1));
}

std::string to_string(const training_policy& p) {
    return to_string(p.cache) + (p.round_metadata ? " round_metadata" : "");
}

} // namespace kv1_train
