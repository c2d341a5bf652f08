// SPDX-License-Identifier: Apache-2.0
//
// Writes a file that appears whole or not at all.
#pragma once

#include <filesystem>
#include <fstream>
#include <string_view>

namespace kv1_lm {

/// A file that is written under a temporary name in its folder. The constructor opens it, so that a folder
/// that cannot be written to is found before any work is done. Throws input_error.
class output_file {
public:
    explicit output_file(std::filesystem::path file);
    output_file(const output_file&) = delete;
    output_file& operator=(const output_file&) = delete;
    /// Removes the temporary file, unless commit() was called.
    ~output_file();

    /// Writes the text and renames the file to its name, replacing a file of that name.
    void commit(std::string_view text);

private:
    std::filesystem::path file_, temporary_;
    std::ofstream stream_;
};

} // namespace kv1_lm
