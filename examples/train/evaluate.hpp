// SPDX-License-Identifier: Apache-2.0
//
// `kv1-train evaluate`: measures what a cache format costs a model, with training's fake quantization. kv1-lm
// kld measures it with a real cache. This command is for machines with a GPU, and for formats under trial.
#pragma once

#include "training_policy.hpp"

#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <string>

namespace kv1_train {

struct evaluate_options {
    std::filesystem::path data;    ///< folder that `pack` made
    std::filesystem::path model;   ///< folder of the model
    std::filesystem::path adapter; ///< PEFT folder of an adapter for it; empty: none
    /// Folder of the model to compare with, such as the one that this one was trained from; empty: this one.
    std::filesystem::path original;
    training_policy kv;
    std::int64_t length = 1024; ///< tokens of a chunk; its last has no target, as in kv1-lm kld
    std::int64_t skip = 0;      ///< positions at each chunk's start that are not counted
    std::int64_t batch = 16;    ///< chunks at a time
    std::string device = "auto", type = "fp32";
};

/// Prints perplexity with plain keys and values, perplexity through the cache, and KL(P_plain || P_kv), over
/// the whole chunks of the text. With an adapter, plain is the model without it; with an original, that one. Throws
/// input_error.
void evaluate(const evaluate_options& options, std::ostream& out);

} // namespace kv1_train
