// SPDX-License-Identifier: Apache-2.0
#include "error_weights.hpp"

#include <algorithm>
#include <cmath>
#include <span>

namespace kv1_lm {

namespace {

// x^T M y
double form(std::span<const double> x, std::span<const double> m, std::span<const double> y) {
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i)
        for (std::size_t j = 0; j < y.size(); ++j)
            sum += x[i] * m[i * y.size() + j] * y[j];
    return sum;
}

// sums += factor * (x y^T)
void add_product(std::span<double> sums, double factor, std::span<const double> x,
                 std::span<const double> y) {
    for (std::size_t i = 0; i < x.size(); ++i)
        for (std::size_t j = 0; j < y.size(); ++j)
            sums[i * y.size() + j] += factor * x[i] * y[j];
}

// The sums of one KV head and the query heads that share it.
class shared_tokens {
public:
    shared_tokens(kv1::tensor_view queries, kv1::tensor_view keys, kv1::tensor_view values,
                  std::size_t kv_head, std::size_t group, std::span<const double> products)
        : group_(group), dim_(keys.channels()), products_(products) {
        const std::size_t n = keys.tokens();
        keys_.resize(n * dim_);
        norms_.resize(group * group * n);
        probabilities_.resize(group * n);
        outputs_.resize(group * dim_);
        mixed_.resize(dim_);
        const auto append = [&](std::vector<double>& all, kv1::tensor_view x, std::size_t t,
                                std::size_t head) {
            const auto* row = static_cast<const float*>(x.at(t, head));
            all.insert(all.end(), row, row + dim_);
        };
        for (std::size_t t = 0; t < n; ++t) {
            for (std::size_t a = 0; a < group; ++a)
                append(queries_, queries, t, kv_head * group + a);
            append(values_, values, t, kv_head);
            const auto* key = static_cast<const float*>(keys.at(t, kv_head));
            for (std::size_t c = 0; c < dim_; ++c)
                keys_[c * n + t] = static_cast<double>(key[c]);
            for (std::size_t a = 0; a < group; ++a)
                for (std::size_t b = a; b < group; ++b)
                    norms_[(a * group + b) * n + t] = form(value(t), product(a, b), value(t));
        }
    }

    // Adds what query t contributes.
    void add(std::size_t t, std::span<double> key_weights, std::span<double> shares) {
        for (std::size_t a = 0; a < group_; ++a)
            attend(t, a);
        for (std::size_t a = 0; a < group_; ++a)
            for (std::size_t b = a; b < group_; ++b) {
                const pair_cost cost = cost_of(t, a, b);
                shares[a * group_ + b] += cost.share;
                add_product(key_weights, cost.distance, query(t, a), query(t, b));
                if (a == b)
                    continue;
                shares[b * group_ + a] += cost.share;
                add_product(key_weights, cost.distance, query(t, b), query(t, a));
            }
    }

private:
    struct pair_cost {
        double share = 0.0;    // sum of p p' over tokens
        double distance = 0.0; // sum of p p' (v - o)^T W^T W' (v - o')
    };

    [[nodiscard]] std::span<const double> query(std::size_t t, std::size_t a) const {
        return std::span(queries_).subspan((t * group_ + a) * dim_, dim_);
    }
    [[nodiscard]] std::span<const double> value(std::size_t t) const {
        return std::span(values_).subspan(t * dim_, dim_);
    }
    [[nodiscard]] std::span<const double> product(std::size_t a, std::size_t b) const {
        return products_.subspan((a * group_ + b) * dim_ * dim_, dim_ * dim_);
    }
    [[nodiscard]] std::span<const double> output(std::size_t a) const {
        return std::span(outputs_).subspan(a * dim_, dim_);
    }
    [[nodiscard]] std::size_t tokens() const { return values_.size() / dim_; }

    // Computes probabilities and output of query t of head a.
    void attend(std::size_t t, std::size_t a) {
        const std::span<double> p = std::span(probabilities_).subspan(a * tokens(), t + 1);
        const std::span<double> out = std::span(outputs_).subspan(a * dim_, dim_);
        const std::span<const double> q = query(t, a);
        const double scale = 1.0 / std::sqrt(static_cast<double>(dim_));
        std::ranges::fill(p, 0.0);
        for (std::size_t c = 0; c < dim_; ++c) {
            const double factor = q[c] * scale;
            const double* keys = keys_.data() + c * tokens();
            for (std::size_t j = 0; j < p.size(); ++j)
                p[j] += factor * keys[j];
        }
        const double most = *std::ranges::max_element(p);
        double sum = 0.0;
        for (double& x : p)
            sum += x = std::exp(x - most);
        for (double& x : p)
            x /= sum;
        weighted_values(p, out);
    }

    // out = sum of weights[j] v_j
    void weighted_values(std::span<const double> weights, std::span<double> out) const {
        std::ranges::fill(out, 0.0);
        for (std::size_t j = 0; j < weights.size(); ++j)
            for (std::size_t c = 0; c < out.size(); ++c)
                out[c] += weights[j] * values_[j * dim_ + c];
    }

    [[nodiscard]] pair_cost cost_of(std::size_t t, std::size_t a, std::size_t b) {
        joint_.resize(t + 1);
        const double *pa = probabilities_.data() + a * tokens(), *pb = probabilities_.data() + b * tokens(),
                     *norms = norms_.data() + (a * group_ + b) * tokens();
        double share = 0.0, distance = 0.0;
        for (std::size_t j = 0; j <= t; ++j) {
            joint_[j] = pa[j] * pb[j];
            share += joint_[j];
            distance += joint_[j] * norms[j];
        }
        weighted_values(joint_, mixed_);
        const std::span<const double> w = product(a, b);
        distance +=
            share * form(output(a), w, output(b)) - form(mixed_, w, output(b)) - form(output(a), w, mixed_);
        return {share, distance};
    }

    // In double: if one token has nearly all of the probability, v - o is a small difference of large
    // numbers.
    std::size_t group_, dim_;
    std::span<const double> products_;  // [group][group][dim][dim]: W^T W'
    std::vector<double> queries_;       // [tokens][group][dim]
    std::vector<double> keys_;          // [dim][tokens]
    std::vector<double> values_;        // [tokens][dim]
    std::vector<double> norms_;         // [group][group][tokens]: v^T W^T W' v
    std::vector<double> probabilities_; // [group][tokens], of one query
    std::vector<double> outputs_;       // [group][dim]
    std::vector<double> mixed_, joint_;
};

// Divides matrices [dim][dim] by a count, and makes them symmetric to the last bit, which the sums are not.
std::vector<float> averaged(std::span<const double> sums, std::size_t dim, double count) {
    std::vector<float> means(sums.size());
    for (std::size_t i = 0; i < sums.size() && count > 0.0; ++i) {
        const std::size_t row = i / dim % dim, column = i % dim;
        const double mirrored = sums[i - row * dim - column + column * dim + row];
        means[i] = static_cast<float>(0.5 * (sums[i] + mirrored) / count);
    }
    return means;
}

} // namespace

error_weight_estimator::error_weight_estimator(const model& m)
    : kv_heads_(m.config().kv_heads), group_(m.config().heads / kv_heads_), dim_(m.config().head_dim) {
    for (std::size_t layer = 0; layer < m.config().layers; ++layer)
        layers_.push_back({.products = m.output_products(layer),
                           .key_weights = std::vector<double>(kv_heads_ * dim_ * dim_),
                           .shares = std::vector<double>(kv_heads_ * group_ * group_)});
}

void error_weight_estimator::add(std::size_t layer, kv1::tensor_view queries, kv1::tensor_view keys,
                                 kv1::tensor_view values) {
    const std::size_t pairs = group_ * group_, square = dim_ * dim_;
    layer_sums& sums = layers_[layer];
    for (std::size_t kv = 0; kv < kv_heads_; ++kv) {
        shared_tokens tokens(queries, keys, values, kv, group_,
                             std::span(sums.products).subspan(kv * pairs * square, pairs * square));
        for (std::size_t t = 0; t < queries.tokens(); ++t)
            tokens.add(t, std::span(sums.key_weights).subspan(kv * square, square),
                       std::span(sums.shares).subspan(kv * pairs, pairs));
    }
    sums.queries += queries.tokens();
}

std::vector<float> error_weight_estimator::key_weights(std::size_t layer) const {
    // the square of the softmax's scale
    const layer_sums& sums = layers_[layer];
    return averaged(sums.key_weights, dim_, static_cast<double>(sums.queries * dim_));
}

std::vector<float> error_weight_estimator::value_weights(std::size_t layer) const {
    const layer_sums& sums = layers_[layer];
    const std::size_t pairs = group_ * group_, square = dim_ * dim_;
    std::vector<double> weights(kv_heads_ * square);
    for (std::size_t pair = 0; pair < sums.shares.size(); ++pair)
        for (std::size_t i = 0; i < square; ++i)
            weights[pair / pairs * square + i] += sums.shares[pair] * sums.products[pair * square + i];
    return averaged(weights, dim_, static_cast<double>(sums.queries));
}

} // namespace kv1_lm
