// SPDX-License-Identifier: Apache-2.0
//
// Reads whole files.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_lm {

/// The bytes of a file, a pipe, or anything else that can be read to an end. Throws input_error.
[[nodiscard]] std::vector<std::byte> read_binary_file(const std::filesystem::path& file);

/// The bytes of a file as characters, with no change of encoding or line endings. Throws input_error.
[[nodiscard]] std::string read_text_file(const std::filesystem::path& file);

} // namespace kv1_lm
