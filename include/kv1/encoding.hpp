// SPDX-License-Identifier: Apache-2.0
//
// An encoding: what a cache does to vectors before it makes codes of them, and how it chooses levels.
// Attention undoes means and rotation, so in exact arithmetic its results are those without an encoding.
//
//   means          A mean vector is taken off every vector. Keys: a shift that all keys share does not change a
//                  softmax. Values: weights sum to one, so the output gets the mean back.
//   basis          Vectors are turned into another basis, one for each KV head: channels become their products
//                  with the rows of an orthogonal matrix. Queries are turned alike, and outputs are turned
//                  back.
//   hadamard       Vectors are rotated, this many channels together (hadamard.hpp). Queries are rotated alike,
//                  and outputs are rotated back.
//   levels         min_max: from the minimum to the maximum of a vector. least_squares: fitted to it
//                  (quantizers/least_squares.hpp). clip_search: the best of ten ranges
//                  (quantizers/clip_search.hpp).
//   error_weights  What errors cost. Codes are chosen one channel after the other, and each makes up for the
//                  errors before it. This is done for several choices of levels, and the cheapest is taken
//                  (detail/encode_reference.hpp). Encoding takes several times as long; attention does not
//                  change.
//
// Means belong to the cache, not to a sequence, so forks, prefixes and saved sequences carry none. Take them,
// bases and error weights once from a text, and keep them with the model (calibration.hpp; mean_estimator and
// moment_estimator need less of it). The mean of a sequence's own first page will not do: keys of its first
// tokens lie elsewhere than those that follow.
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

/// The encoding of a layer's keys, or of its values. The default is the reference's: min/max levels alone.
struct vector_encoding {
    level_choice levels = level_choice::min_max; ///< how scale and minimum are chosen
    /// Channels that are rotated together, a power of two that divides the head dim (rotation_width() gives
    /// the largest); 0: no rotation.
    std::size_t hadamard = 0;
    /// [kv_heads][dim]; empty: no means. Of keys that turn with their position: as they are before they turn
    /// (layer_description::rotary).
    std::vector<float> means = {};
    /// [kv_heads][dim][dim], each matrix W symmetric and positive semidefinite: an error e of a vector costs
    /// e^T W e. Empty: all errors cost the same. Not with min_max. calibration.hpp takes those that measured best.
    /// Plain second moments of queries (moment_estimator), and for values the sum of W_o^T W_o over the query heads
    /// that share the KV head, W_o being a head's columns of the output projection, cost 3 to 6 % more.
    std::vector<float> error_weights = {};
    /// [kv_heads][dim][dim], each matrix B orthogonal: B B^T is the unit matrix to 0.002 in each number, which
    /// rounding to fp16 leaves it. A vector less its mean becomes B x, and is then rotated (hadamard). The
    /// eigenvectors of what errors cost are a good choice: of the queries' second moment for keys, of the
    /// values' weighted by scores for values. Empty: none. An engine that folds the values' matrix into its
    /// projections leaves it empty. A call of attend takes dim^2 products more a query and an output, and a
    /// stored vector dim^2. Not for values that lie in keys.
    std::vector<float> basis = {};

    /// Whether all fields are the same.
    friend bool operator==(const vector_encoding&, const vector_encoding&) = default;
};

/// Computes the means of channels over many [tokens][heads][dim] tensors, for vector_encoding::means.
class mean_estimator {
public:
    /// Throws std::bad_alloc.
    mean_estimator(std::size_t heads, std::size_t dim) : dim_(dim), sums_(heads * dim) {}

    /// Adds the tokens of a tensor. Precondition: it has `heads` heads and `dim` channels. O(elements).
    void add(const tensor_view& x) {
        for (std::size_t t = 0; t < x.tokens(); ++t)
            for (std::size_t i = 0; i < sums_.size(); ++i)
                sums_[i] += detail::element(x, t, i / dim_, i % dim_);
        count_ += x.tokens();
    }
    /// The means, [heads][dim], rounded to fp16, in which they would be kept; zeros if nothing was added.
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

/// Computes the second moments x x^T of queries, averaged over the query heads that share a KV head, for
/// vector_encoding::error_weights of keys.
class moment_estimator {
public:
    /// Throws std::bad_alloc.
    moment_estimator(std::size_t kv_heads, std::size_t dim)
        : kv_heads_(kv_heads), dim_(dim), sums_(kv_heads * dim * dim) {}

    /// Adds the queries [tokens][query_heads][dim] of a tensor. Precondition: query_heads is a multiple of
    /// kv_heads. O(elements * dim).
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
    /// The moments, [kv_heads][dim][dim]; zeros if nothing was added.
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
