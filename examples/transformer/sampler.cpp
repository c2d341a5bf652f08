// SPDX-License-Identifier: Apache-2.0
#include "sampler.hpp"

#include <algorithm>
#include <cmath>

namespace kv1_lm {

void sampler::note(std::span<const std::int32_t> tokens) {
    for (const std::int32_t token : tokens) {
        const auto index = static_cast<std::size_t>(token);
        if (index >= seen_.size())
            seen_.resize(index + 1, 0);
        seen_[index] = 1;
    }
}

std::int32_t sampler::choose(std::span<float> logits) {
    if (how_.repeat_penalty != 1.0f)
        for (std::size_t i = 0; i < logits.size() && i < seen_.size(); ++i)
            if (seen_[i] != 0)
                logits[i] =
                    logits[i] > 0.0f ? logits[i] / how_.repeat_penalty : logits[i] * how_.repeat_penalty;
    const std::int32_t token =
        how_.greedy
            ? static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())
            : draw(logits);
    note({&token, 1});
    return token;
}

std::int32_t sampler::draw(std::span<const float> logits) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    weights_.resize(logits.size());
    double total = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
        weights_[i] = std::exp((logits[i] - largest) / how_.temperature);
        total += static_cast<double>(weights_[i]);
    }
    const double wanted = static_cast<double>(how_.top_p) * total;

    // Collects tokens above a threshold, which is lowered until they have the probability mass. This takes a
    // fraction of the time of sorting all tokens.
    double mass = 0.0;
    for (float threshold = 0x1p-8f; mass <= wanted && candidates_.size() < logits.size();
         threshold *= 0x1p-6f) {
        candidates_.clear();
        mass = 0.0;
        for (std::size_t i = 0; i < logits.size(); ++i)
            if (weights_[i] >= threshold) {
                candidates_.push_back(static_cast<std::int32_t>(i));
                mass += static_cast<double>(weights_[i]);
            }
    }
    const auto weight = [&](std::int32_t token) { return weights_[static_cast<std::size_t>(token)]; };
    std::ranges::sort(candidates_, [&](std::int32_t a, std::int32_t b) {
        return weight(a) != weight(b) ? weight(a) > weight(b) : a < b;
    });
    double kept = 0.0;
    std::size_t count = 0;
    while (count < candidates_.size() && kept <= wanted)
        kept += static_cast<double>(weight(candidates_[count++]));
    candidates_.resize(count);

    // 53 bits of the generator; std::uniform_real_distribution differs between standard libraries
    double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
    std::int32_t chosen = candidates_.back();
    for (const std::int32_t token : candidates_) {
        left -= static_cast<double>(weight(token));
        if (left < 0.0) {
            chosen = token;
            break;
        }
    }
    candidates_.clear();
    return chosen;
}

} // namespace kv1_lm
