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
                                             std::size_t first, std::size_t positions,
                                             std::span<const float> states, thread_pool& pool)
    : vocabulary_(m.config().vocab_size), tokens_(tokens), first_(first), end_(first + positions),
      logits_(positions * vocabulary_) {
    for_each_block(m, states, pool, [&](std::size_t at, std::span<const float> logits) {
        std::ranges::copy(logits, logits_.begin() + static_cast<std::ptrdiff_t>((at - first_) * vocabulary_));
    });
    for (std::size_t i = first_; i < end_; ++i) {
        log_sums_.push_back(log_sum_exp(row(i)));
        likeliest_.push_back(likeliest_of(row(i)));
    }
}

comparison reference_predictions::compare(const model& m, std::span<const float> states,
                                          thread_pool& pool) const {
    comparison sums;
    for_each_block(m, states, pool, [&](std::size_t from, std::span<const float> logits) {
        for (std::size_t at = from; !logits.empty(); ++at, logits = logits.subspan(vocabulary_)) {
            const auto p = row(at), q = logits.first(vocabulary_);
            const double p_norm = log_sums_[at - first_], q_norm = log_sum_exp(q);
            const double kld = divergence(p, p_norm, q, q_norm);
            sums.kld += kld;
            sums.worst_kld = std::max(sums.worst_kld, kld);
            sums.agreed += likeliest_of(q) == likeliest_[at - first_] ? 1 : 0;
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
    return std::span(logits_).subspan((position - first_) * vocabulary_, vocabulary_);
}

// Calls use(first position, logits) for runs of the positions, one after the other. The runs are the same whatever is
// compared, since a BLAS may round a product differently with another number of rows: all tokens of a run of
// rows_at_once are computed, also those that are not compared.
template <class Use>
void reference_predictions::for_each_block(const model& m, std::span<const float> states, thread_pool& pool,
                                           Use use) const {
    const std::size_t hidden = m.config().hidden_size;
    std::vector<float> logits(std::min(tokens_.size(), rows_at_once) * vocabulary_);
    for (std::size_t from = first_ / rows_at_once * rows_at_once; from < end_; from += rows_at_once) {
        const std::size_t count = std::min(rows_at_once, tokens_.size() - from);
        m.logits(states.subspan(from * hidden, count * hidden), std::span(logits).first(count * vocabulary_),
                 pool);
        const std::size_t begin = std::max(from, first_), end = std::min(from + count, end_);
        use(begin, std::span<const float>(logits).subspan((begin - from) * vocabulary_,
                                                          (end - begin) * vocabulary_));
    }
}

} // namespace kv1_lm
