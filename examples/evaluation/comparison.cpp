// SPDX-License-Identifier: Apache-2.0
#include "comparison.hpp"

#include "model.hpp"

#include <algorithm>
#include <cmath>

namespace kv1_lm {

namespace {

// The number of tokens whose logits are computed in one product.
constexpr std::size_t rows_at_once = 128;

// log(sum(exp(x)))
double log_sum_exp(std::span<const float> x) {
    const float largest = *std::max_element(x.begin(), x.end());
    double sum = 0.0;
    for (const float v : x)
        sum += static_cast<double>(std::exp(v - largest));
    return static_cast<double>(largest) + std::log(sum);
}

// KL(P || Q) of two distributions, given as logits and their log_sum_exp.
double divergence(std::span<const float> p, double p_norm, std::span<const float> q, double q_norm) {
    double sum = 0.0;
    const auto p_offset = static_cast<float>(p_norm);
    const double norms = q_norm - p_norm;
    for (std::size_t i = 0; i < p.size(); ++i)
        sum += static_cast<double>(std::exp(p[i] - p_offset)) * (static_cast<double>(p[i] - q[i]) + norms);
    return std::max(sum, 0.0); // rounding may leave it a hair below
}

std::size_t likeliest_of(std::span<const float> logits) {
    return static_cast<std::size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

} // namespace

reference_predictions::reference_predictions(const model& m, std::span<const std::int32_t> tokens,
                                             std::size_t positions, std::span<const float> states,
                                             thread_pool& pool)
    : model_(m), tokens_(tokens), logits_(tokens.size() * m.config().vocab_size) {
    const std::size_t vocabulary = m.config().vocab_size;
    for_each_block(states, pool, [&](std::size_t first, std::span<const float> logits) {
        std::ranges::copy(logits, logits_.begin() + static_cast<std::ptrdiff_t>(first * vocabulary));
    });
    for (std::size_t i = 0; i < positions; ++i) {
        log_sums_.push_back(log_sum_exp(row(i)));
        likeliest_.push_back(likeliest_of(row(i)));
    }
}

comparison reference_predictions::compare(std::span<const float> states, thread_pool& pool) const {
    const std::size_t vocabulary = model_.config().vocab_size, positions = log_sums_.size();
    comparison sums;
    for_each_block(states, pool, [&](std::size_t first, std::span<const float> logits) {
        for (std::size_t at = first; at < std::min(first + rows_at_once, positions); ++at) {
            const auto p = row(at), q = logits.subspan((at - first) * vocabulary, vocabulary);
            const double p_norm = log_sums_[at], q_norm = log_sum_exp(q);
            const double kld = divergence(p, p_norm, q, q_norm);
            sums.kld += kld;
            sums.worst_kld = std::max(sums.worst_kld, kld);
            sums.agreed += likeliest_of(q) == likeliest_[at] ? 1 : 0;
            ++sums.positions;
            if (at + 1 < tokens_.size()) {
                const auto target = static_cast<std::size_t>(tokens_[at + 1]);
                sums.reference_nll += p_norm - static_cast<double>(p[target]);
                sums.nll += q_norm - static_cast<double>(q[target]);
                ++sums.targets;
            }
        }
    });
    return sums;
}

std::span<const float> reference_predictions::row(std::size_t position) const {
    const std::size_t vocabulary = model_.config().vocab_size;
    return std::span(logits_).subspan(position * vocabulary, vocabulary);
}

// Calls use(first token, logits) for runs of tokens, one after the other. The runs are the same whatever is
// compared, since a BLAS may round a product differently with another number of rows.
template <class Use>
void reference_predictions::for_each_block(std::span<const float> states, thread_pool& pool, Use use) const {
    const std::size_t vocabulary = model_.config().vocab_size, hidden = model_.config().hidden_size;
    std::vector<float> logits(std::min(tokens_.size(), rows_at_once) * vocabulary);
    for (std::size_t first = 0; first < tokens_.size(); first += rows_at_once) {
        const std::size_t count = std::min(rows_at_once, tokens_.size() - first);
        const auto block = std::span(logits).first(count * vocabulary);
        model_.logits(states.subspan(first * hidden, count * hidden), block, pool);
        use(first, block);
    }
}

} // namespace kv1_lm
