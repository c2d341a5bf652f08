// SPDX-License-Identifier: Apache-2.0
//
// Cache policies (kv1/cache_policy.hpp) for models of this program: errors that name the text, and a model's
// calibration by layer.
#pragma once

#include <kv1/cache_policy.hpp>
#include <kv1/calibration.hpp>

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace kv1_lm {

using kv1::cache_policy;
using kv1::layer_policy;

struct model_config;

/// `what` is put before the text in the input_error for what is no policy, and the place that is wrong after
/// it.
[[nodiscard]] cache_policy parse_policy(std::string_view text, std::string_view what = "policy");

/// The calibrated parts of a model, [layer], as vector_encoding takes them.
struct calibration {
    std::vector<std::vector<float>> key_means, value_means;           ///< [kv_heads][head_dim]
    std::vector<std::vector<float>> key_weights, value_weights;       ///< [kv_heads][head_dim][head_dim]
    std::vector<std::vector<float>> key_basis = {}, value_basis = {}; ///< [kv_heads][head_dim][head_dim]
    bool means_turn = false; ///< whether the means of keys are those before RoPE
};

/// How the keys of a model turn with their position.
[[nodiscard]] kv1::rotary_embedding rotary_of(const model_config& config);

/// The parts of a calibration, which are empty where it does not have them.
[[nodiscard]] calibration parts_of(const kv1::calibration& found);

/// The cache of a policy. Throws input_error for a layer the model does not have, for calibrated parts that
/// are missing, and for what no cache takes.
[[nodiscard]] kv1::cache_description describe(const model_config& config, const cache_policy& policy,
                                              const calibration& c, std::size_t tokens);

/// The bytes of a vector, averaged over K and V, layers, and the tokens of a sequence of `tokens`. It counts
/// pages with their metadata, fp16 copies, fp16 keys of the open page, and the means in fp16 as if each
/// sequence had its own.
[[nodiscard]] double bytes_per_vector(const kv1::cache_description& d, std::size_t tokens);

} // namespace kv1_lm
