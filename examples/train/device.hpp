// SPDX-License-Identifier: Apache-2.0
//
// The meaning of the options --device and --type.
#pragma once

#include "error.hpp"
#include "ranks.hpp"

#include <torch/types.h>

#include <ATen/Context.h>

#include <string>

namespace kv1_train {

/// The device of "cpu", "cuda" (this rank's GPU) or "auto" (CUDA if there is any, else the CPU). Throws
/// input_error for "cuda" without a GPU.
[[nodiscard]] inline torch::Device device_of(const std::string& name) {
    const bool cuda = name == "cuda" || (name == "auto" && at::hasCUDA());
    if (cuda && !at::hasCUDA())
        throw kv1_lm::input_error("--device: this LibTorch finds no CUDA device");
    return cuda ? torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(ranks::local_rank()))
                : torch::Device(torch::kCPU);
}

/// The type of "fp32", "bf16" or "auto" (bf16 on CUDA, else fp32).
[[nodiscard]] inline torch::ScalarType type_of(const std::string& name, torch::Device device) {
    return name == "bf16" || (name == "auto" && device.is_cuda()) ? torch::kBFloat16 : torch::kFloat32;
}

} // namespace kv1_train
