// SPDX-License-Identifier: Apache-2.0
//
// The processes that train together. A single process needs no setting. Several are started with RANK,
// WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as torchrun sets them. They use NCCL on CUDA and
// Gloo on the CPU. A process that hears nothing of another for KV1_RANK_TIMEOUT seconds (300) fails, instead
// of waiting for a dead one.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>

namespace kv1_train {

class ranks {
public:
    /// Connects to the other processes, if the environment names any. Throws input_error for an environment
    /// that contradicts itself, and for a build without torch.distributed.
    [[nodiscard]] static ranks from_environment(torch::Device device);
    /// LOCAL_RANK, or 0: the GPU of this process.
    [[nodiscard]] static std::int64_t local_rank();

    [[nodiscard]] std::int64_t rank() const noexcept { return rank_; }
    [[nodiscard]] std::int64_t size() const noexcept { return size_; }
    /// Sums a tensor over all ranks, in place.
    void sum(torch::Tensor& x) const;
    /// Whether any rank passes true. Every rank has to call it.
    [[nodiscard]] bool any(bool here, torch::Device device) const;

private:
    struct group;
    std::int64_t rank_ = 0, size_ = 1;
    std::shared_ptr<group> group_;
};

} // namespace kv1_train
