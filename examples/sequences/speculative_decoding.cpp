// SPDX-License-Identifier: Apache-2.0
//
// Speculative decoding. Several guessed tokens are run in one call, and the sequence is cut after the last
// one that the model agrees with. The guess is what followed the last two tokens where they occurred before
// (prompt lookup).
#include "language_model.hpp"

#include <iostream>

namespace {

example::tokens guess(const example::tokens& text, std::size_t n) {
    for (std::size_t i = text.size() - 2; i-- > 1;)
        if (text[i] == text.back() && text[i - 1] == text[text.size() - 2]) {
            const auto first = text.begin() + static_cast<std::ptrdiff_t>(i + 1);
            return {first, first + static_cast<std::ptrdiff_t>(std::min(n, text.size() - i - 1))};
        }
    return {};
}

} // namespace

int main() {
    constexpr std::size_t wanted = 60, guesses = 4;
    example::language_model lm;
    kv1::kv_cache cache = lm.make_cache(1024);
    example::tokens text =
        lm.encode("The 2010 census recorded a population of 2,451. The 2011 census recorded "
                  "a population of 2,460. The 2012 census recorded");
    const std::size_t prompt = text.size();
    const kv1::sequence_id sequence = cache.create_sequence();
    lm.run(cache, sequence, std::span(text).first(prompt - 1));
    const kv1::sequence_id plain = cache.fork(sequence); // decoded token by token, to compare with
    const example::tokens expected = lm.continue_greedily(cache, plain, text.back(), wanted);

    std::size_t runs = 0, agreed = 0;
    while (text.size() < prompt + wanted) {
        example::tokens next = guess(text, guesses);
        next.insert(next.begin(), text.back());
        const std::size_t length = cache.length(sequence);
        const auto logits = lm.run(cache, sequence, next, next.size());
        ++runs;
        for (std::size_t i = 0; i < next.size(); ++i) {
            text.push_back(example::language_model::best(logits[i]));
            if (i + 1 == next.size() || text.back() != next[i + 1]) {
                // Guesses from here on were wrong, and the step has committed them. A layer with a sliding
                // window would need a window_retention of as many tokens: it keeps the tokens that come back
                // into view.
                cache.truncate(sequence, length + i + 1);
                break;
            }
            ++agreed;
        }
    }
    text.resize(prompt + wanted);
    std::cout << wanted << " tokens in " << runs << " runs, " << agreed << " guesses were right\n"
              << lm.decode(text) << '\n';
    return std::equal(expected.begin(), expected.end(), text.begin() + static_cast<std::ptrdiff_t>(prompt))
               ? 0
               : 1;
}
