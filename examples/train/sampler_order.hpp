// SPDX-License-Identifier: Apache-2.0
//
// Says which window of the training text is the n-th sample of a run. It is a pure function of (seed, n), so
// nothing has to be saved to go on, and any number of ranks draws the same samples.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kv1_train {

/// SplitMix64's mixing of a counter under a key.
[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t key, std::uint64_t n) noexcept {
    std::uint64_t z = key + (n + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/// A permutation of [0, count) by key: a Feistel network over the next even power of two, walked until it
/// lands inside. Four steps on average at most.
[[nodiscard]] constexpr std::uint64_t permute(std::uint64_t key, std::uint64_t n,
                                              std::uint64_t count) noexcept {
    const int half = (static_cast<int>(std::bit_width(count > 1 ? count - 1 : 1u)) + 1) / 2;
    const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
    do {
        std::uint64_t left = n >> half, right = n & mask;
        for (std::uint64_t round = 0; round < 4; ++round) {
            const std::uint64_t next = left ^ (mix(key + round, right) & mask);
            left = right;
            right = next;
        }
        n = left << half | right;
    } while (n >= count);
    return n;
}

/// Windows of `length` tokens of a text of `tokens`: every epoch visits each once, in an order and with an
/// offset of its own. The token after the window is read too, as the last target.
struct sample_order {
    std::uint64_t seed = 0;
    std::size_t tokens = 0;
    std::size_t length = 0;

    /// Windows of an epoch; 0 where the text is too short for one.
    [[nodiscard]] constexpr std::uint64_t windows() const noexcept {
        // one window is given up for the offset, where there are several
        const std::uint64_t all = tokens == 0 ? 0 : (tokens - 1) / length;
        return all > 1 ? all - 1 : all;
    }
    /// First token of sample n. Precondition: windows() > 0.
    [[nodiscard]] constexpr std::size_t start(std::uint64_t n) const noexcept {
        const std::uint64_t count = windows(), epoch = n / count;
        const std::uint64_t room = tokens - 1 - count * length; // what an epoch leaves unread
        const std::uint64_t offset = mix(~seed, epoch) % (room + 1);
        return static_cast<std::size_t>(offset + permute(mix(seed, epoch), n % count, count) * length);
    }
};

} // namespace kv1_train
