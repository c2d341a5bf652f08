// SPDX-License-Identifier: Apache-2.0
//
// Beam search. Beams are forks of one sequence, so the prompt and every common beginning are stored once.
#include "language_model.hpp"

#include <cmath>
#include <iostream>
#include <numeric>

namespace {

struct beam {
    kv1::sequence_id sequence;
    example::tokens text;
    float log_probability = 0.0f;
    std::vector<float> logits; // after the beam's last token
};

struct candidate {
    std::size_t parent;
    std::int32_t token;
    float log_probability;
};

// The likeliest tokens after a beam.
void propose(const beam& b, std::size_t parent, std::size_t width, std::vector<candidate>& to) {
    const float top = *std::max_element(b.logits.begin(), b.logits.end());
    const float sum = std::accumulate(b.logits.begin(), b.logits.end(), 0.0f,
                                      [&](float s, float x) { return s + std::exp(x - top); });
    example::tokens order(b.logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + static_cast<std::ptrdiff_t>(width), order.end(), [&](auto x, auto y) {
            return b.logits[static_cast<std::size_t>(x)] > b.logits[static_cast<std::size_t>(y)];
        });
    for (std::size_t i = 0; i < width; ++i)
        to.push_back(
            {parent, order[i],
             b.log_probability + b.logits[static_cast<std::size_t>(order[i])] - top - std::log(sum)});
}

} // namespace

int main() {
    constexpr std::size_t width = 4, steps = 24;
    example::language_model lm;
    kv1::kv_cache cache = lm.make_cache(4096);
    const example::tokens prompt = lm.encode("The city was founded in the early 19th century and");

    std::vector<beam> beams(1);
    beams[0].sequence = cache.create_sequence();
    beams[0].logits = lm.run(cache, beams[0].sequence, prompt).back();
    for (std::size_t step = 0; step < steps; ++step) {
        std::vector<candidate> candidates;
        for (std::size_t b = 0; b < beams.size(); ++b)
            propose(beams[b], b, width, candidates);
        std::sort(candidates.begin(), candidates.end(),
                  [](const auto& x, const auto& y) { return x.log_probability > y.log_probability; });
        std::vector<beam> next;
        for (std::size_t i = 0; i < width; ++i) {
            const candidate& c = candidates[i];
            beam b{cache.fork(beams[c.parent].sequence), beams[c.parent].text, c.log_probability, {}};
            b.text.push_back(c.token);
            b.logits = lm.run(cache, b.sequence, {&c.token, 1})[0];
            next.push_back(std::move(b));
        }
        for (const beam& b : beams)
            cache.destroy_sequence(b.sequence);
        beams = std::move(next);
    }

    for (const beam& b : beams)
        std::cout << b.log_probability << "  " << lm.decode(b.text) << '\n';
    std::cout << summary(cache.statistics());
}
