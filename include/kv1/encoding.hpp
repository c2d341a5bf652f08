// SPDX-License-Identifier: Apache-2.0
//
// How a cache turns vectors into codes, beyond their format: what is done to them first, and which levels are
// chosen. Attention undoes all of it, so that in exact arithmetic it is what it would be without.
//
//   means          taken off every vector. A shift common to all keys does not change a softmax, and weights
//                  that sum to one bring the mean of values back.
//   hadamard       rotates vectors in blocks; queries are rotated alike, outputs back.
//   levels         min_max: the range of a vector. least_squares: fitted (quantizers/least_squares.hpp).
//                  clip_search: the best of narrower ranges (quantizers/clip_search.hpp).
//   error_weights  what errors cost: codes are chosen one after the other, each making up for the errors
//                  before it, for several choices of levels, of which the cheapest is taken. Only the
//                  encoder knows of them, and takes several times as long.
//
// Means are a constant of the cache, not of a sequence: forks, shared prefixes and saved sequences need
// nothing more. Take them from a sample of the model's keys and values (mean_estimator, over a few thousand
// tokens of any text), once, and keep them with the model. The mean of a stream's own first page is no good:
// keys of its first tokens lie elsewhere than those that follow.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/float16.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1::inline KV1_ABI {

namespace detail {

inline float element(const tensor_view& x, std::size_t token, std::size_t head,
                     std::size_t channel) noexcept {
    const void* row = x.at(token, head);
    if (x.type() == scalar_type::fp32)
        return static_cast<const float*>(row)[channel];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(row)[channel];
    return x.type() == scalar_type::fp16 ? half_to_float(bits) : bfloat_to_float(bits);
}

} // namespace detail

/// What happens to keys, or values, of a layer before they are stored. The default is the reference's.
struct vector_encoding {
    level_choice levels = level_choice::min_max; ///< how they are chosen
    /// Channels of a block of the Hadamard transform, a power of two that divides the head dim; 0: none.
    std::size_t hadamard = 0;
    /// [kv_heads][dim], or empty.
    std::vector<float> means = {};
    /// [kv_heads][dim][dim], symmetric and positive semidefinite, or empty: an error e costs e^T W e. For
    /// keys the second moment of the queries (moment_estimator), for values that of the output projection's
    /// columns, sum of W_o^T W_o over the heads of a group; better, both with each token and head counting by
    /// what its errors do to the layer's output (examples/evaluation/error_weights.hpp). Not with min_max.
    std::vector<float> error_weights = {};

    /// Whether all fields are the same.
    friend bool operator==(const vector_encoding&, const vector_encoding&) = default;
};

/// Means of the channels of [tokens][heads][dim] tensors.
class mean_estimator {
public:
    /// Throws std::bad_alloc.
    mean_estimator(std::size_t heads, std::size_t dim) : dim_(dim), sums_(heads * dim) {}

    /// Precondition: the tensor has these heads and channels. O(elements).
    void add(const tensor_view& x) {
        for (std::size_t t = 0; t < x.tokens(); ++t)
            for (std::size_t i = 0; i < sums_.size(); ++i)
                sums_[i] += detail::element(x, t, i / dim_, i % dim_);
        count_ += x.tokens();
    }
    /// [heads][dim]; zeros where nothing was added. Rounded to fp16, as they would be kept.
    [[nodiscard]] std::vector<float> means() const {
        std::vector<float> m(sums_.size());
        for (std::size_t i = 0; i < m.size() && count_ != 0; ++i)
            m[i] = float16(static_cast<float>(sums_[i] / static_cast<double>(count_)));
        return m;
    }

private:
    std::size_t dim_, count_ = 0;
    std::vector<double> sums_;
};

/// Second moments x x^T of [tokens][heads][dim] queries, pooled over the heads of each KV head.
class moment_estimator {
public:
    /// Throws std::bad_alloc.
    moment_estimator(std::size_t kv_heads, std::size_t dim)
        : kv_heads_(kv_heads), dim_(dim), sums_(kv_heads * dim * dim) {}

    /// Precondition: a multiple of kv_heads heads of dim channels. O(elements * dim).
    void add(const tensor_view& x) {
        const std::size_t group = x.heads() / kv_heads_;
        std::vector<double> row(dim_);
        for (std::size_t t = 0; t < x.tokens(); ++t)
            for (std::size_t h = 0; h < x.heads(); ++h) {
                for (std::size_t i = 0; i < dim_; ++i)
                    row[i] = detail::element(x, t, h, i);
                double* sums = sums_.data() + h / group * dim_ * dim_;
                for (std::size_t i = 0; i < dim_; ++i)
                    for (std::size_t j = 0; j < dim_; ++j)
                        sums[i * dim_ + j] += row[i] * row[j];
            }
        count_ += x.tokens() * group;
    }
    /// [kv_heads][dim][dim].
    [[nodiscard]] std::vector<float> moments() const {
        std::vector<float> m(sums_.size());
        for (std::size_t i = 0; i < m.size() && count_ != 0; ++i)
            m[i] = static_cast<float>(sums_[i] / static_cast<double>(count_));
        return m;
    }

private:
    std::size_t kv_heads_, dim_, count_ = 0;
    std::vector<double> sums_;
};

} // namespace kv1::inline KV1_ABI
