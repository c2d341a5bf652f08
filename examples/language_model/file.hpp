// SPDX-License-Identifier: Apache-2.0
//
// Reading a file whole.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_lm {

/// The file's bytes. Regular files and anything else that can be read to an end. Throws input_error.
[[nodiscard]] std::vector<std::byte> read_binary_file(const std::filesystem::path& file);

/// The same as characters; no encoding is assumed and no line ending changed.
[[nodiscard]] std::string read_text_file(const std::filesystem::path& file);

} // namespace kv1_lm
