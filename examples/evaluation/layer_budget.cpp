// SPDX-License-Identifier: Apache-2.0
#include "layer_budget.hpp"

#include "error.hpp"
#include "model_config.hpp"

#include <kv1/layer_choice.hpp>

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

namespace kv1_lm {

layer_budget choose_layers(const sweep_options& options, double bytes_per_vector, std::ostream& log) {
    if (options.models.size() != 1)
        throw input_error("--budget is for one model");
    if (options.policies.empty())
        throw input_error("--budget chooses among the policies that --policy names");
    std::vector<cache_policy> ways;
    for (const std::string& text : options.policies) {
        ways.push_back(parse_policy(text));
        if (!ways.back().layers.empty() || ways.back().fp16_sinks != ways[0].fp16_sinks ||
            ways.back().fp16_window != ways[0].fp16_window || ways.back().page_tokens != ways[0].page_tokens)
            throw input_error(
                "policy '" + text + "'",
                "--budget takes policies without layers of their own, with the same fp16 tokens and pages");
    }
    const model_config config = model_config::read(options.models[0] / "config.json");
    const kv1::vector_policy plain{.format = kv1::kv_format::fp32};
    sweep_options alone = options;
    alone.policies.clear();
    std::vector<kv1::layer_option> costs;
    for (std::size_t layer = 0; layer < config.layers; ++layer)
        for (const cache_policy& way : ways) {
            cache_policy p = way;
            p.common = {plain, plain};
            p.layers = {{layer, way.common}};
            alone.policies.push_back(to_string(p));
            costs.push_back({layer, way.common, 0.0});
        }
    const std::vector<sweep_row> rows = measure_sweep(alone, log);
    for (std::size_t i = 0; i < costs.size(); ++i)
        costs[i].cost = rows[i].kld;

    const kv1::cache_description shape =
        kv1::uniform_cache(config.layers, {config.kv_heads, config.head_dim, config.head_dim}, 1);
    const auto vectors = static_cast<double>(2 * config.kv_heads * config.layers);
    auto chosen = kv1::try_choose_layers(shape, costs, bytes_per_vector * vectors);
    if (!chosen)
        throw input_error("--budget", chosen.reason().message());
    layer_budget found{std::move(*chosen)};
    found.policy.fp16_sinks = ways[0].fp16_sinks;
    found.policy.fp16_window = ways[0].fp16_window;
    found.policy.page_tokens = ways[0].page_tokens;
    for (const kv1::layer_option& o : costs)
        found.expected_kld += found.policy.of(o.layer) == o.policy ? o.cost : 0.0;
    return found;
}

} // namespace kv1_lm
