// SPDX-License-Identifier: Apache-2.0
//
// A file that appears whole or not at all.
#pragma once

#include <filesystem>
#include <fstream>
#include <string_view>

namespace kv1_lm {

/// Opened under a temporary name beside its own, so that a place that can not be written to is known before
/// any work is done. Throws input_error.
class output_file {
public:
    explicit output_file(std::filesystem::path file);
    output_file(const output_file&) = delete;
    output_file& operator=(const output_file&) = delete;
    /// Without commit(): nothing is left.
    ~output_file();

    /// Writes the text and gives the file its name, replacing what had it.
    void commit(std::string_view text);

private:
    std::filesystem::path file_, temporary_;
    std::ofstream stream_;
};

} // namespace kv1_lm
