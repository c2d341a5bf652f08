// SPDX-License-Identifier: Apache-2.0
//
// Measures on a text what errors in stored keys and values cost a model. The result are the matrices that
// encodings take as error_weights (kv1/encoding.hpp).
//
// A query head gives token j the probability p_j. Its output is o = sum p_j v_j, and its columns W of the
// output projection take o to the hidden state. To first order, an error e of key j changes the hidden state
// by p_j (q . e) / sqrt(D) W (v_j - o), and an error f of value j changes it by p_j W f. The query heads that
// share a KV head meet the same error, so their changes are added before they are squared:
//
//   key    weights = sum over queries and tokens of B^T B, B = sum over heads of p_j W (v_j - o) q^T / sqrt(D)
//   value  weights = sum over queries and tokens of A^T A, A = sum over heads of p_j W
//
// Plain second moments of queries and of W's columns do not know which queries and heads spread errors, and
// which of them tell few tokens apart. These matrices do.
#pragma once

#include "model.hpp"

#include <kv1/tensor.hpp>

#include <cstddef>
#include <vector>

namespace kv1_lm {

class error_weight_estimator {
public:
    explicit error_weight_estimator(const model& m);

    /// Adds causal attention over the first tokens of a run, as model::observer gives them: queries
    /// [tokens][heads][dim], keys and values [tokens][kv_heads][dim], fp32. O(tokens^2 * heads * dim *
    /// group), group being the query heads of a KV head.
    void add(std::size_t layer, kv1::tensor_view queries, kv1::tensor_view keys, kv1::tensor_view values);

    /// The matrices, [kv_heads][dim][dim], averaged over queries; zeros if nothing was added.
    /// @{
    [[nodiscard]] std::vector<float> key_weights(std::size_t layer) const;
    [[nodiscard]] std::vector<float> value_weights(std::size_t layer) const;
    /// @}

private:
    struct layer_sums {
        std::vector<double> products;    // [kv_heads][heads a KV head]^2[dim]^2: W^T W'
        std::vector<double> key_weights; // [kv_heads][dim][dim]
        std::vector<double> shares;      // [kv_heads][heads a KV head]^2: sums of p_j p'_j
        std::size_t queries = 0;
    };

    std::size_t kv_heads_, group_, dim_;
    std::vector<layer_sums> layers_;
};

} // namespace kv1_lm
