// SPDX-License-Identifier: Apache-2.0
//
// Choosing the next token from logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace kv1_lm {

struct sampling {
    bool greedy = false;
    float temperature = 0.8f;    ///< above 0
    float top_p = 0.95f;         ///< above 0, at most 1
    float repeat_penalty = 1.0f; ///< above 0; 1 is none
    std::uint64_t seed = 0;
};

/// One generation's sampler. The same seed gives the same tokens on every platform.
class sampler {
public:
    explicit sampler(const sampling& how) : how_(how), random_(how.seed) {}

    /// Adds tokens that the repetition penalty applies to.
    void note(std::span<const std::int32_t> tokens);

    /// Chooses a token. The penalty is applied first. Then the choice is the largest logit (the first of
    /// equals), or a draw from softmax(logits / temperature) among the likeliest tokens, up to and including
    /// the one at which the cumulative probability passes top_p. The penalty applies to the choice from now
    /// on. Changes the logits.
    [[nodiscard]] std::int32_t choose(std::span<float> logits);

private:
    [[nodiscard]] std::int32_t draw(std::span<const float> logits);

    sampling how_;
    std::mt19937_64 random_;
    std::vector<std::uint8_t> seen_; // by token
    std::vector<float> weights_;
    std::vector<std::int32_t> candidates_; // empty between draws
};

} // namespace kv1_lm
