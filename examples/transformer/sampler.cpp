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
    candidates_.clear();
    double total = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
        const float weight = std::exp((logits[i] - largest) / how_.temperature);
        total += static_cast<double>(weight);
        candidates_.emplace_back(weight, static_cast<std::int32_t>(i));
    }
    // A heap, since a few of the likeliest are mostly all that is needed; of equals, the lower token comes
    // first.
    const auto after = [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first < b.first : a.second > b.second;
    };
    std::make_heap(candidates_.begin(), candidates_.end(), after);
    double kept = 0.0;
    std::size_t count = 0; // kept candidates, moved to the back, the likeliest last
    while (count < candidates_.size() && kept <= static_cast<double>(how_.top_p) * total) {
        std::pop_heap(candidates_.begin(), candidates_.end() - static_cast<std::ptrdiff_t>(count), after);
        kept += static_cast<double>(candidates_[candidates_.size() - ++count].first);
    }

    // 53 bits of the generator, since what std::uniform_real_distribution makes of them is up to each library
    double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
    std::size_t i = 1;
    for (; i < count; ++i) {
        left -= static_cast<double>(candidates_[candidates_.size() - i].first);
        if (left < 0.0)
            break;
    }
    return candidates_[candidates_.size() - i].second;
}

} // namespace kv1_lm
