// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm info: a model's shape, and what its cache costs at every width.
#pragma once

#include <filesystem>
#include <iosfwd>

namespace kv1_lm {

/// Throws input_error.
void info(const std::filesystem::path& folder, std::ostream& out);

} // namespace kv1_lm
