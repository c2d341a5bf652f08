// SPDX-License-Identifier: Apache-2.0
//
// `kv1-train train`: the training loop.
#pragma once

#include "lora.hpp"
#include "optimizer.hpp"
#include "training_policy.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

namespace kv1_train {

struct train_options {
    std::filesystem::path data;  ///< folder that `pack` made
    std::filesystem::path model; ///< folder with config.json and the tokenizer; with weights, if `init`
    bool init = false;           ///< start from the model's weights instead of random ones
    std::filesystem::path
        teacher; ///< folder of a model to learn from, run with plain keys and values; empty: none
    /// Learn from the model itself with plain keys and values, which cross entropy trains at the same time.
    /// Both modes get better and stay near each other. A step takes twice the work.
    bool self_teacher = false;
    /// With a rank: trains an adapter and leaves the model's weights as they are. Without another teacher the model
    /// as it was, with plain keys and values, is the teacher.
    lora_options lora;
    std::filesystem::path init_adapter; ///< PEFT folder of an adapter to go on with instead of a new one
    double teacher_weight = 0.5;        ///< of KL(teacher || model); cross entropy has the rest
    std::filesystem::path out;          ///< folder of the run: log.csv and checkpoints

    training_policy kv;
    std::int64_t steps = 1000;
    std::int64_t batch = 64;      ///< sequences of a step, over all ranks
    std::int64_t micro_batch = 0; ///< sequences at a time on a rank; 0: all of a rank's
    /// Tokens of a sequence. Steps take these in turn: they read sequences of the longest, which a batch counts, and
    /// cut them. So every step has as many tokens. Each divides the longest.
    std::vector<std::int64_t> lengths{1024};
    double learning_rate = 1e-3, last_learning_rate = 1e-5;
    std::int64_t warmup = 100;
    adamw_options optimizer;
    double clip = 1.0; ///< largest norm of the gradient; 0: no limit
    std::uint64_t seed = 1;

    std::string device = "auto"; ///< auto, cpu, cuda
    std::string type = "auto";   ///< of matrix products and attention: auto (bf16 on CUDA), fp32, bf16
    std::int64_t held_out = 0;   ///< tokens at the end of the data that are not trained on; 0: a hundredth
    std::int64_t validation_batches = 8;
    std::int64_t validate_every = 500, save_every = 500, log_every = 10; ///< steps; 0: at the end
    std::size_t keep = 2;
    double most_seconds = 0.0; ///< then saves and stops; 0: no limit
    bool resume = false;       ///< go on from the last checkpoint in `out`, if there is one
    bool show_progress = false;
};

/// Runs until the last step, a signal to stop, or the time limit; saves a checkpoint in any case. Throws
/// input_error; std::runtime_error where the loss is not finite, in which case nothing is saved.
void train(const train_options& options, std::ostream& out, std::ostream& err);

} // namespace kv1_train
