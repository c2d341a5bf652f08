// SPDX-License-Identifier: Apache-2.0
//
// Writes tensors of LibTorch in the safetensors format.
#pragma once

#include <torch/types.h>

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace kv1_train {

/// A file's bytes: fp32, fp16 or bf16 tensors, on any device, and string metadata.
[[nodiscard]] std::vector<std::byte>
to_safetensors(const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
               const std::map<std::string, std::string>& metadata);

} // namespace kv1_train
