// SPDX-License-Identifier: Apache-2.0
#include "calibrate.hpp"

#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "output_file.hpp"
#include "thread_pool.hpp"
#include "tokenizer.hpp"

#include <kv1/calibration_file.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <ostream>
#include <span>
#include <vector>

namespace kv1_lm {

namespace {

// Error weights where they can be: beside fitted levels, one scale to a vector.
void weigh_errors(layer_policy& layer) {
    for (kv1::vector_policy* side : {&layer.key, &layer.value})
        side->error_weights = side->levels != kv1::level_choice::min_max && side->group == 0 &&
                              kv1::info_of(side->format).fits_levels;
}

} // namespace

kv1::calibration calibrate(const model& m, std::span<const std::int32_t> tokens,
                           const std::vector<std::size_t>& lengths, const cache_policy& policy,
                           const kv1::model_fingerprint& name, thread_pool& pool, std::size_t query_stride) {
    kv1::cache_description shape =
        m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, *std::ranges::max_element(lengths));
    for (kv1::layer_description& layer : shape.layers)
        layer.rotary = rotary_of(m.config());
    kv1::calibrator found(policy, shape, {.model = name, .query_stride = query_stride});
    for (std::size_t i = 0; i < shape.layers.size(); ++i)
        found.set_output_projection(i, m.output_projection(i), pool);
    kv1::kv_cache cache(shape);
    thread_pool alone(1); // the model's results do not depend on the number of threads
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        std::span<const std::int32_t> share = tokens.first(tokens.size() / (lengths.size() - i));
        tokens = tokens.subspan(share.size());
        for (; !share.empty(); share = share.subspan(std::min(lengths[i], share.size()))) {
            const kv1::sequence_id sequence = cache.create_sequence();
            static_cast<void>(m.forward(share.first(std::min(lengths[i], share.size())), cache, sequence,
                                        kv1::precision::exact, alone,
                                        [&](std::size_t layer, kv1::tensor_view q, kv1::tensor_view k,
                                            kv1::tensor_view v) { found.add(layer, q, k, v, 0, pool); }));
            cache.destroy_sequence(sequence);
        }
    }
    return found.finish(pool);
}

namespace {

// The policy that config.json names, with error weights added.
cache_policy weighed_policy(const json_document& document, const std::filesystem::path& file) {
    const auto cache = document.root().find("kv1");
    if (!cache)
        throw input_error(file.string(),
                          "kv1 names no cache that weights could be added to; --policy names one");
    const json_view text = cache->member("policy");
    cache_policy policy = parse_policy(text.string(), text.place() + ":");
    weigh_errors(policy.common);
    for (kv1::layer_exception& differs : policy.layers)
        weigh_errors(differs.policy);
    if (!policy.needs_error_weights())
        text.fail(
            "error weights are for levels by least squares or a clip search (+ls, +cs), of whole vectors");
    return policy;
}

// Refuses a policy that this model has no use for.
void check_policy(const cache_policy& policy, const model_config& config) {
    if (!policy.needs_means() && !policy.needs_error_weights() && !policy.needs_basis())
        throw input_error("policy " + to_string(policy), "takes nothing from a text");
    if (!policy.layers.empty() && policy.layers.back().layer >= config.layers)
        throw input_error("policy " + to_string(policy),
                          "the model has layers 0 to " + std::to_string(config.layers - 1));
}

} // namespace

void calibrate_folder(const calibrate_options& options, std::ostream& out) {
    const std::filesystem::path config_file = options.model / "config.json";
    json_document document = read_json_file(config_file);
    const cache_policy policy = options.policy ? *options.policy : weighed_policy(document, config_file);
    const model m = model::read(options.model);
    const model_config& c = m.config();
    check_policy(policy, c);
    if (options.query_stride == 0)
        throw input_error("--query-stride 0: at least every query counts, a stride of 1");
    std::vector<std::size_t> lengths = options.chunk_tokens;
    if (lengths.empty())
        lengths.push_back(c.max_positions);
    for (const std::size_t n : lengths)
        if (n == 0 || n > c.max_positions)
            throw input_error("--seq-len " + std::to_string(n) + ": the model takes 1 to " +
                              std::to_string(c.max_positions) + " tokens");
    std::vector<std::int32_t> tokens =
        tokenizer::read(options.model / "tokenizer.json").encode(read_text_file(options.text));
    tokens.resize(std::min(tokens.size(), options.tokens));
    if (tokens.empty())
        throw input_error(options.text.string(), "no tokens to calibrate on");
    thread_pool pool(options.threads);
    const kv1::calibration found = calibrate(m, tokens, lengths, policy, fingerprint_of_model(options.model),
                                             pool, options.query_stride);
    if (const kv1::status s = kv1::try_save_calibration(found, options.model / calibration_file); !s)
        throw input_error((options.model / calibration_file).string(), s.message());
    document.value["kv1"]["policy"] = to_string(policy);
    output_file(config_file).commit(document.value.dump(2) + "\n");
    out << "calibrated on " << tokens.size() << " tokens; the model's cache is now "
        << to_string(choose_cache(options.model, c, {}).policy) << '\n';
}

} // namespace kv1_lm
