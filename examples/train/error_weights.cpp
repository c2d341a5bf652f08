// SPDX-License-Identifier: Apache-2.0
#include "error_weights.hpp"

#include "error.hpp"
#include "file.hpp"
#include "model_cache.hpp"
#include "model_config.hpp"

#include <kv1/calibration_file.hpp>
#include <kv1/fake_quantize.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

namespace kv1_train {

namespace {

using kv1_lm::input_error;

std::filesystem::path calibration_in(std::span<const std::filesystem::path> folders) {
    for (const std::filesystem::path& folder : folders) {
        std::error_code unknown;
        if (std::filesystem::exists(folder / kv1_lm::calibration_file, unknown))
            return folder / kv1_lm::calibration_file;
    }
    throw input_error((folders.back() / kv1_lm::calibration_file).string(),
                      "a policy with +ew needs it: `kv1-lm calibrate` makes it");
}

// Of all KV heads of a side.
torch::Tensor factor(const std::vector<float>& weights, const kv1_lm::model_config& config, bool hadamard,
                     torch::Device device) {
    const std::size_t dim = config.head_dim, square = dim * dim;
    std::vector<float> factors;
    for (std::size_t at = 0; at < weights.size(); at += square) {
        const std::vector<float> head =
            kv1::factor_error_weights(dim, std::span(weights).subspan(at, square), {.hadamard = hadamard});
        factors.insert(factors.end(), head.begin(), head.end());
    }
    const auto n = static_cast<std::int64_t>(dim);
    return torch::tensor(factors).view({-1, n, n}).to(device);
}

} // namespace

calibrated_weights read_error_weights(std::span<const std::filesystem::path> folders,
                                      const std::filesystem::path& base, const kv1_lm::model_config& config,
                                      const training_policy& kv, torch::Device device) {
    const std::filesystem::path file = calibration_in(folders);
    calibrated_weights read;
    read.file = kv1_lm::read_binary_file(file);
    read.model = kv1_lm::fingerprint_of_model(base);
    const auto found = kv1::try_load_calibration(kv1::memory_source(read.file), read.model);
    if (!found)
        throw input_error(file.string(), found.reason().message());
    if (found->layers() != config.layers)
        throw input_error(file.string(), "is of a model of " + std::to_string(found->layers()) + " layers");
    for (std::size_t i = 0; i < config.layers; ++i) {
        std::array<torch::Tensor, 2>& layer = read.factors.emplace_back();
        for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
            const bool is_key = side == kv1::kv_side::key;
            const kv1::vector_policy policy = is_key ? kv.key(i).policy : kv.value(i).policy;
            if (!policy.error_weights)
                continue;
            const std::vector<float> weights = found->error_weights(i, side);
            if (weights.size() != config.kv_heads * config.head_dim * config.head_dim)
                throw input_error(file.string(),
                                  "has no error weights for layer " + std::to_string(i) + " of this model");
            layer[is_key ? 0 : 1] = factor(weights, config, policy.hadamard, device);
        }
    }
    return read;
}

std::vector<std::byte> calibration_of(const calibrated_weights& weights, std::span<const std::byte> model,
                                      const training_policy& kv) {
    kv1::calibration found =
        kv1::try_load_calibration(kv1::memory_source(weights.file), weights.model).value();
    found.set_model(kv1::fingerprint_of(model));
    found.set_policy(kv.cache);
    std::vector<std::byte> file;
    const kv1::status saved = kv1::try_save_calibration(found, [&file](std::span<const std::byte> bytes) {
        file.insert(file.end(), bytes.begin(), bytes.end());
        return true;
    });
    if (!saved)
        throw input_error(kv1_lm::calibration_file, saved.message());
    return file;
}

} // namespace kv1_train
