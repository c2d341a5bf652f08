// SPDX-License-Identifier: Apache-2.0
//
// A batch's mask as texts: which tokens belong together, in which order, and what each of them sees. Calibration wants
// this, since an additive mask is all that llama.cpp tells about its sequences.
//
//   tokens of a batch      0 1 2 3       slots seen
//   0                      x . . .       5
//   1                      x x . .       5 6           a text of tokens 0 1 3 in slots 5 6 8,
//   2                      . . x .       7             and one of token 2 in slot 7
//   3                      x x . x       5 6 8
#pragma once

#include "step_book.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1_ggml {

// Queries of a batch that follow each other, and the tokens that they see: theirs are the last of these.
struct text_part {
    std::vector<std::uint32_t> slots;  // of the tokens, by position
    std::vector<std::uint32_t> tokens; // of the batch, by position
    std::size_t first_position = 0;    // of the first slot's token
    std::size_t window = 0;            // how many tokens each sees; 0: all of them up to its own
};

// Texts of the tokens whose slots are own[i], of slots begin ... end - 1 that sees(i, slot). False: a token sees others
// than those before it, or not all of them, so that no text is found.
template <class Sees>
bool find_texts(const step_book& book, std::span<const std::uint32_t> own, std::uint32_t begin,
                std::uint32_t end, Sees&& sees, std::vector<text_part>& found) {
    const auto precedes = [&](std::uint32_t a, std::uint32_t b) {
        const std::int32_t x = book.position(a), y = book.position(b);
        return x != step_book::unknown && y != step_book::unknown && x != y ? x < y
                                                                            : book.order(a) < book.order(b);
    };
    std::vector<bool> taken(own.size(), false);
    for (std::size_t last = own.size(); last-- > 0;) {
        if (taken[last])
            continue;
        // Backwards from a text's last token: those that one of its tokens sees.
        std::vector<std::uint32_t> tokens;
        for (std::size_t i = last + 1; i-- > 0;) {
            bool member = i == last;
            for (std::size_t k = tokens.size(); !member && k-- > 0;)
                member = sees(tokens[k], own[i]);
            if (member) {
                tokens.push_back(static_cast<std::uint32_t>(i));
                taken[i] = true;
            }
        }
        std::sort(tokens.begin(), tokens.end(),
                  [&](std::uint32_t a, std::uint32_t b) { return precedes(own[a], own[b]); });
        text_part all;
        for (std::uint32_t slot = begin; slot < end; ++slot)
            if (book.written(slot) &&
                std::any_of(tokens.begin(), tokens.end(), [&](std::uint32_t i) { return sees(i, slot); }))
                all.slots.push_back(slot);
        std::sort(all.slots.begin(), all.slots.end(), precedes);
        const std::size_t n = all.slots.size(), m = tokens.size();
        if (m > n)
            return false;
        for (std::size_t j = 1; j < n; ++j) {
            const std::int32_t before = book.position(all.slots[j - 1]), at = book.position(all.slots[j]);
            if (before != step_book::unknown && at != step_book::unknown && at != before + 1)
                return false;
        }
        const std::int32_t start = book.position(all.slots[0]);
        all.first_position = start == step_book::unknown ? 0 : static_cast<std::size_t>(start);
        // The first slot that each token sees; it sees all from there to its own, and no more.
        std::vector<std::size_t> first(m);
        std::size_t window = 0;
        for (std::size_t i = 0; i < m; ++i) {
            const std::size_t at = n - m + i;
            if (all.slots[at] != own[tokens[i]])
                return false;
            std::size_t count = 0;
            for (std::size_t j = n; j-- > 0;)
                if (sees(tokens[i], all.slots[j])) {
                    first[i] = j;
                    ++count;
                }
            if (count != at + 1 - first[i] || first[i] > at)
                return false;
            window = std::max(window, count);
        }
        bool slides = false;
        for (std::size_t i = 0; i < m; ++i)
            slides = slides || first[i] != 0;
        for (std::size_t i = 0; slides && i < m; ++i) {
            const std::size_t at = n - m + i;
            slides = first[i] == (at + 1 > window ? at + 1 - window : 0);
        }
        if (slides) {
            all.tokens = std::move(tokens);
            all.window = window;
            found.push_back(std::move(all));
            continue;
        }
        // In chunks: tokens with the same beginning are a text without what lies before it.
        for (std::size_t i = 0; i < m;) {
            std::size_t next = i + 1;
            while (next < m && first[next] == first[i])
                ++next;
            text_part part;
            part.slots.assign(all.slots.begin() + static_cast<std::ptrdiff_t>(first[i]),
                              all.slots.begin() + static_cast<std::ptrdiff_t>(n - m + next));
            part.tokens.assign(tokens.begin() + static_cast<std::ptrdiff_t>(i),
                               tokens.begin() + static_cast<std::ptrdiff_t>(next));
            part.first_position = all.first_position + first[i];
            found.push_back(std::move(part));
            i = next;
        }
    }
    return true;
}

} // namespace kv1_ggml
