// SPDX-License-Identifier: Apache-2.0
//
// The processes that train together. One process alone needs nothing; several are started with RANK,
// WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as torchrun sets them, and speak NCCL on CUDA,
// Gloo on the CPU. One that hears nothing of another for KV1_RANK_TIMEOUT seconds (300) fails, instead of
// waiting for what has died.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>

namespace kv1_train {

class ranks {
public:
    /// Meets the others, if the environment names any. Throws input_error for an environment that makes no
    /// sense, and for a build without torch.distributed.
    [[nodiscard]] static ranks from_environment(torch::Device device);
    /// LOCAL_RANK, or 0: the GPU of this process.
    [[nodiscard]] static std::int64_t local_rank();

    [[nodiscard]] std::int64_t rank() const noexcept { return rank_; }
    [[nodiscard]] std::int64_t size() const noexcept { return size_; }
    /// Sums a tensor over all ranks, in place.
    void sum(torch::Tensor& x) const;
    /// Whether any rank says so; every rank has to ask.
    [[nodiscard]] bool any(bool here, torch::Device device) const;

private:
    struct group;
    std::int64_t rank_ = 0, size_ = 1;
    std::shared_ptr<group> group_;
};

} // namespace kv1_train
