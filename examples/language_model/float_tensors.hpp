// SPDX-License-Identifier: Apache-2.0
//
// Writes the safetensors format, which safetensors.hpp reads.
#pragma once

#include <nlohmann/json_fwd.hpp>

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

/// How a file begins: what stands before the tensors' bytes. `header` has an entry for each tensor.
[[nodiscard]] std::string safetensors_head(const nlohmann::json& header);

} // namespace kv1_lm
