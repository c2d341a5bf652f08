// SPDX-License-Identifier: Apache-2.0
//
// Matrix products with a model's weights. Products with many rows go to the BLAS, one thread each. Decoding
// multiplies a single row by every weight of the model, once a token. Memory limits that, so it has a product
// of its own on fp16 weights, if fp16 holds the weights exactly. Other weights go to the BLAS as a matrix and a vector.
#pragma once

#include "thread_pool.hpp"

#include <kv1/float16.hpp>

#include <cstddef>
#include <span>
#include <vector>

namespace kv1_lm {

/// y = W x for every row x; W is [outputs][inputs].
class linear {
public:
    linear() = default;
    linear(std::vector<float> weights, std::size_t outputs, std::size_t inputs);

    [[nodiscard]] std::size_t outputs() const noexcept { return outputs_; }
    [[nodiscard]] std::size_t inputs() const noexcept { return inputs_; }
    /// The weights of one output: a row of a table of embeddings.
    [[nodiscard]] std::span<const float> row(std::size_t output) const noexcept {
        return std::span(weights_).subspan(output * inputs_, inputs_);
    }

    /// x is [rows][inputs], y is [rows][outputs].
    void operator()(std::span<const float> x, std::span<float> y, thread_pool& pool) const;

private:
    std::vector<float> weights_;
    std::vector<kv1::float16> halves_; // the weights in fp16; empty if one of them is not exact in fp16
    std::size_t outputs_ = 0, inputs_ = 0;
};

/// Keeps a BLAS that has threads of its own from using them.
void use_one_blas_thread();

} // namespace kv1_lm
