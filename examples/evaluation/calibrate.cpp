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

kv1::calibration calibrate(const model& m, std::span<const std::int32_t> tokens, std::size_t chunk,
                           const cache_policy& policy, const kv1::model_fingerprint& name,
                           thread_pool& pool) {
    kv1::cache_description shape = m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, chunk);
    for (kv1::layer_description& layer : shape.layers)
        layer.rotary = rotary_of(m.config());
    kv1::calibrator found(policy, shape, {.model = name});
    for (std::size_t i = 0; i < shape.layers.size(); ++i)
        found.set_output_projection(i, m.output_projection(i), pool);
    kv1::kv_cache cache(shape);
    thread_pool alone(1); // the model's results do not depend on the number of threads
    for (; !tokens.empty(); tokens = tokens.subspan(std::min(chunk, tokens.size()))) {
        const kv1::sequence_id sequence = cache.create_sequence();
        static_cast<void>(m.forward(tokens.first(std::min(chunk, tokens.size())), cache, sequence,
                                    kv1::precision::exact, alone,
                                    [&](std::size_t layer, kv1::tensor_view q, kv1::tensor_view k,
                                        kv1::tensor_view v) { found.add(layer, q, k, v, 0, pool); }));
        cache.destroy_sequence(sequence);
    }
    return found.finish(pool);
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
    const model m = model::read(options.model);
    const model_config& c = m.config();
    std::vector<std::int32_t> tokens =
        tokenizer::read(options.model / "tokenizer.json").encode(read_text_file(options.text));
    tokens.resize(std::min(tokens.size(), options.tokens));
    if (tokens.empty())
        throw input_error(options.text.string(), "no tokens to calibrate on");
    thread_pool pool(options.threads);
    const kv1::calibration found =
        calibrate(m, tokens, c.max_positions, policy, fingerprint_of_model(options.model), pool);
    if (const kv1::status s = kv1::try_save_calibration(found, options.model / calibration_file); !s)
        throw input_error((options.model / calibration_file).string(), s.message());
    document.value["kv1"]["policy"] = to_string(policy);
    output_file(config_file).commit(document.value.dump(2) + "\n");
    out << "error weights from " << tokens.size() << " tokens; the model's cache is now "
        << to_string(choose_cache(options.model, c, {}).policy) << '\n';
}

} // namespace kv1_lm
