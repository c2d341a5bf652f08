// SPDX-License-Identifier: Apache-2.0
//
// The run's log: a CSV file, one line for every logged step, flushed as it is written. Fields that a step
// does not have are empty.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>

namespace kv1_train {

struct log_entry {
    std::int64_t step = 0, tokens = 0;
    double seconds = 0.0, learning_rate = 0.0;
    std::optional<double> loss, divergence, gradient_norm, tokens_per_second;
    std::optional<double> validation_plain, validation_kv, validation_divergence; ///< nats
};

class training_log {
public:
    /// Opens the log. An existing file is kept up to step `done`. Throws input_error.
    training_log(const std::filesystem::path& file, std::int64_t done);
    void write(const log_entry& entry);

private:
    std::ofstream out_;
};

} // namespace kv1_train
