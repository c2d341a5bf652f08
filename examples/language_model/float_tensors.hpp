// SPDX-License-Identifier: Apache-2.0
//
// Writes floats in the safetensors format.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace kv1_lm {

struct float_tensor {
    std::string name;
    std::vector<std::size_t> shape;
    std::vector<float> values; ///< row-major
};

/// The contents of a file of F32 tensors, in this order.
[[nodiscard]] std::string to_safetensors(std::span<const float_tensor> tensors);

} // namespace kv1_lm
