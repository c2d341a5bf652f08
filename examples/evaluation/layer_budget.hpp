// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm sweep --budget: how each layer of a model is kept so that a vector takes so many bytes on average
// (kv1/layer_choice.hpp). Each layer alone is kept in each of the policies, the others in fp32, and what that costs
// is measured.
#pragma once

#include "cache_policy.hpp"
#include "sweep.hpp"

#include <iosfwd>

namespace kv1_lm {

struct layer_budget {
    cache_policy policy;
    double expected_kld = 0.0; ///< the sum of what its layers cost alone
};

/// Chooses among options.policies, which name no layers of their own and leave the same tokens in fp16; these take no
/// part in the budget. One model. Runs as many policies as it has layers for each of the options. Throws input_error.
[[nodiscard]] layer_budget choose_layers(const sweep_options& options, double bytes_per_vector,
                                         std::ostream& log);

} // namespace kv1_lm
