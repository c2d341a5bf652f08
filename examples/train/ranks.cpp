// SPDX-License-Identifier: Apache-2.0
#include "ranks.hpp"

#include "error.hpp"

// LibTorch's definitions say which backends it has, but the backends' headers may be missing.
#if defined(USE_C10D_GLOO) && __has_include(<gloo/context.h>)
#define KV1_TRAIN_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#endif
#if defined(KV1_TRAIN_CUDA) && defined(USE_C10D_NCCL) && __has_include(<nccl.h>)
#define KV1_TRAIN_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif
#if defined(KV1_TRAIN_GLOO) || defined(KV1_TRAIN_NCCL)
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#endif

#include <charconv>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace kv1_train {

namespace {

std::int64_t number_from(const char* variable, std::int64_t otherwise) {
    const char* text = std::getenv(variable);
    if (text == nullptr)
        return otherwise;
    const std::string value(text);
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < 0)
        throw kv1_lm::input_error(std::string(variable) + " is no number: " + kv1_lm::quote(value));
    return number;
}

using summation = std::function<void(torch::Tensor&)>;

#if defined(KV1_TRAIN_GLOO) || defined(KV1_TRAIN_NCCL)
template <class Group>
summation sum_with(c10::intrusive_ptr<Group> group) {
    return [group = std::move(group)](torch::Tensor& x) {
        std::vector<torch::Tensor> list{x};
        group->allreduce(list)->wait();
    };
}

// Without this a rank waits half an hour for one that hangs.
std::chrono::milliseconds patience() { return std::chrono::seconds(number_from("KV1_RANK_TIMEOUT", 300)); }

c10::intrusive_ptr<c10d::Store> meet(std::int64_t rank, std::int64_t size) {
    const char* address = std::getenv("MASTER_ADDR");
    c10d::TCPStoreOptions options;
    options.port = static_cast<std::uint16_t>(number_from("MASTER_PORT", options.port));
    options.isServer = rank == 0;
    options.numWorkers = static_cast<std::size_t>(size);
    return c10::make_intrusive<c10d::TCPStore>(address != nullptr ? address : "127.0.0.1", options);
}
#endif

summation join([[maybe_unused]] std::int64_t rank, [[maybe_unused]] std::int64_t size, torch::Device device) {
    if (device.is_cuda()) {
#ifdef KV1_TRAIN_NCCL
        const auto options = c10d::ProcessGroupNCCL::Options::create();
        options->timeout = patience();
        return sum_with(c10::make_intrusive<c10d::ProcessGroupNCCL>(meet(rank, size), static_cast<int>(rank),
                                                                    static_cast<int>(size), options));
#else
        throw kv1_lm::input_error("WORLD_SIZE: this kv1-train was built without NCCL");
#endif
    }
#ifdef KV1_TRAIN_GLOO
    const auto options = c10d::ProcessGroupGloo::Options::create();
    options->timeout = patience();
    const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
    options->devices.push_back(interface != nullptr
                                   ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                   : c10d::ProcessGroupGloo::createDefaultDevice());
    return sum_with(c10::make_intrusive<c10d::ProcessGroupGloo>(meet(rank, size), static_cast<int>(rank),
                                                                static_cast<int>(size), options));
#else
    throw kv1_lm::input_error("WORLD_SIZE: this kv1-train was built without Gloo");
#endif
}

} // namespace

struct ranks::group {
    summation sum;
};

ranks ranks::from_environment(torch::Device device) {
    ranks r;
    r.size_ = number_from("WORLD_SIZE", 1);
    r.rank_ = number_from("RANK", 0);
    if (r.rank_ >= r.size_)
        throw kv1_lm::input_error("RANK " + std::to_string(r.rank_) + " is not below WORLD_SIZE " +
                                  std::to_string(r.size_));
    if (r.size_ > 1)
        r.group_ = std::make_shared<group>(group{join(r.rank_, r.size_, device)});
    return r;
}

std::int64_t ranks::local_rank() { return number_from("LOCAL_RANK", 0); }

void ranks::sum(torch::Tensor& x) const {
    if (group_)
        group_->sum(x);
}

bool ranks::any(bool here, torch::Device device) const {
    if (!group_)
        return here;
    torch::Tensor votes = torch::full({1}, here ? 1.0f : 0.0f, torch::dtype(torch::kFloat32).device(device));
    group_->sum(votes);
    return votes.item<float>() > 0.0f;
}

} // namespace kv1_train
