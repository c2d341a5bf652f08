// SPDX-License-Identifier: Apache-2.0
//
// Compares a model's predictions with one cache to those with another, position by position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1_lm {

class model;
class thread_pool;

/// Sums over positions, in nats; worst_kld is the largest divergence at one position.
struct comparison {
    std::size_t positions = 0;
    std::size_t agreed = 0;  ///< positions whose likeliest token is the reference's
    std::size_t targets = 0; ///< positions whose next token is known
    double kld = 0.0, worst_kld = 0.0;
    double reference_nll = 0.0, nll = 0.0; ///< over targets
};

/// The predictions of a reference run, which other runs over the same tokens are compared with.
class reference_predictions {
public:
    /// states: the run's final hidden states, [tokens][hidden_size], of which those of `positions` from `first` on
    /// are compared. Takes memory for positions * vocab_size floats. `m` and the tokens must outlive this object.
    reference_predictions(const model& m, std::span<const std::int32_t> tokens, std::size_t first,
                          std::size_t positions, std::span<const float> states, thread_pool& pool);

    /// Compares another run, given its hidden states: KL(reference || other), agreement, likelihoods. The run is
    /// of `m`, which has the same vocabulary.
    [[nodiscard]] comparison compare(const model& m, std::span<const float> states, thread_pool& pool) const;

private:
    [[nodiscard]] std::span<const float> row(std::size_t position) const;
    template <class Use>
    void for_each_block(const model& m, std::span<const float> states, thread_pool& pool, Use use) const;

    std::size_t vocabulary_;
    std::span<const std::int32_t> tokens_;
    std::size_t first_, end_;   // positions
    std::vector<float> logits_; // [positions][vocab_size]
    std::vector<double> log_sums_;
    std::vector<std::size_t> likeliest_;
};

} // namespace kv1_lm
