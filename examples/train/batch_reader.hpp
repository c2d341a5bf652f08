// SPDX-License-Identifier: Apache-2.0
//
// Copies windows of a text to a device.
#pragma once

#include "token_file.hpp"

#include <torch/types.h>

#include <cstdint>

namespace kv1_train {

struct sequences {
    torch::Tensor inputs;  ///< [batch][length], int64
    torch::Tensor targets; ///< [batch * length]: each input's next token
};

class batch_reader {
public:
    /// The text has to outlive the reader.
    batch_reader(const token_file& text, std::int64_t length, torch::Device device)
        : text_(text), length_(length), device_(device) {}

    /// Reads `count` windows of length tokens. start_of(i) is the first token of window i. The token after a
    /// window is read too, as its last target.
    template <class StartOf>
    [[nodiscard]] sequences read(std::int64_t count, StartOf&& start_of) const {
        // Pinned memory: from other memory the copy would wait for the device.
        torch::Tensor ids =
            torch::empty({count, length_ + 1}, torch::dtype(torch::kInt64).pinned_memory(device_.is_cuda()));
        const auto width = static_cast<std::size_t>(length_ + 1);
        for (std::int64_t i = 0; i < count; ++i)
            text_.read(start_of(i),
                       {ids.data_ptr<std::int64_t>() + static_cast<std::size_t>(i) * width, width});
        ids = ids.to(device_, /*non_blocking=*/true);
        return {ids.narrow(1, 0, length_).contiguous(), ids.narrow(1, 1, length_).reshape({-1})};
    }

private:
    const token_file& text_;
    std::int64_t length_;
    torch::Device device_;
};

} // namespace kv1_train
