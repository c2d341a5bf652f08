// SPDX-License-Identifier: Apache-2.0
#include "calibration_run.hpp"

#include "model_parts.hpp"

#include <kv1/calibration_file.hpp>

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>

namespace kv1_ggml {

namespace {

std::mutex run_mutex;
std::weak_ptr<calibration_run> under_way;

std::shared_ptr<calibration_run> refused(const char* what, const kv1::status& why) {
    say(GGML_LOG_LEVEL_ERROR, "%s: %s", what, kv1::to_string(why).c_str());
    return nullptr;
}

bool wants(const kv1::layer_policy& p, bool kv1::vector_policy::*part) {
    return p.key.*part || p.value.*part;
}

// Layers without attention stand between the others as one channel of which nothing is taken.
kv1::cache_policy with_holes(kv1::cache_policy policy, std::size_t layers, std::span<const bool> attends) {
    for (std::size_t i = 0; i < layers; ++i) {
        if (attends[i])
            continue;
        const auto own =
            std::lower_bound(policy.layers.begin(), policy.layers.end(), i,
                             [](const kv1::layer_exception& e, std::size_t n) { return e.layer < n; });
        const kv1::layer_policy plain = kv1::parse_policy("16").common;
        if (own != policy.layers.end() && own->layer == i)
            own->policy = plain;
        else
            policy.layers.insert(own, {i, plain});
    }
    return policy;
}

} // namespace

std::shared_ptr<calibration_run> calibration_run::join(const settings& how,
                                                       std::span<const slot_cache* const> caches,
                                                       std::span<const calibrated_layer> layers,
                                                       const kv1::model_fingerprint& model) {
    const std::lock_guard lock(run_mutex);
    if (std::shared_ptr<calibration_run> run = under_way.lock()) {
        if (std::equal(caches.begin(), caches.end(), run->caches_.begin(), run->caches_.end()))
            return run;
        say(GGML_LOG_LEVEL_ERROR, "KV1_CALIBRATE: one model at a time; another is being calibrated");
        return nullptr;
    }
    const std::size_t count = layers.empty() ? 0 : layers.back().of_model + 1;
    const auto attends = std::make_unique<bool[]>(count);
    kv1::cache_description shape;
    shape.layers.assign(count, {1, 1, 1});
    for (const calibrated_layer& l : layers) {
        attends[l.of_model] = true;
        shape.layers[l.of_model] = l.shape;
    }
    kv1::result<kv1::calibrator> sums =
        kv1::calibrator::create(with_holes(how.policy, count, {attends.get(), count}), shape,
                                {.model = model, .query_stride = how.calibration_stride});
    if (!sums)
        return refused("KV1_CALIBRATE", sums.reason());
    for (const calibrated_layer& l : layers) {
        if (!wants(how.policy.of(l.of_model), &kv1::vector_policy::error_weights))
            continue;
        const ggml_tensor* const w = l.output_projection;
        const std::optional<std::vector<float>> rows = w != nullptr ? as_fp32(w) : std::nullopt;
        if (!rows) {
            say(GGML_LOG_LEVEL_ERROR,
                "KV1_CALIBRATE: layer %zu: error weights (+ew) need the output projection, which is not "
                "found in plain "
                "memory right after attention; --no-repack leaves weights as they are",
                l.of_model);
            return nullptr;
        }
        const std::size_t outputs = size_of(w->ne[1]), dim = l.shape.value_dim;
        const kv1::status s = sums->try_set_output_projection(
            l.of_model, {rows->data(), outputs, size_of(w->ne[0]) / dim, dim});
        if (!s)
            return refused("KV1_CALIBRATE", s);
    }
    say(GGML_LOG_LEVEL_INFO,
        "calibrating %s: %zu layers, every %zu. query; keys and values stay fp32 meanwhile",
        kv1::to_string(how.policy).c_str(), layers.size(), how.calibration_stride);
    const std::shared_ptr<calibration_run> run(
        new calibration_run(std::move(*sums), *how.calibrate, {caches.begin(), caches.end()}));
    run->first_layer_ = layers.front().of_model;
    under_way = run;
    return run;
}

calibration_run::~calibration_run() {
    if (tokens_ == 0) // nothing was computed, so nothing is replaced
        return;
    kv1::result<kv1::calibration> found = sums_.try_finish();
    const kv1::status s = found ? kv1::try_save_calibration(*found, file_) : found.reason();
    if (s)
        say(GGML_LOG_LEVEL_INFO, "a calibration of %zu tokens is in %s", tokens_, file_.c_str());
    else
        say(GGML_LOG_LEVEL_ERROR, "KV1_CALIBRATE=%s: %s", file_.c_str(), kv1::to_string(s).c_str());
}

kv1::status calibration_run::add(std::size_t of_model, const text_part& part, const kv1::tensor_view& queries,
                                 const kv1::tensor_view& keys, const kv1::tensor_view& values,
                                 thread_team& team) {
    if (of_model == first_layer_)
        tokens_ += part.tokens.size();
    if (const kv1::status s = sums_.try_set_sliding_window(of_model, part.window); !s)
        return s;
    return sums_.try_add(of_model, queries, keys, values, part.first_position, team);
}

} // namespace kv1_ggml
