// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (RoPE; Su et al. 2021) as data. At position p a pair of channels (x, y) with the
// frequency t becomes
//
//   (x cos(t p) - y sin(t p),  x sin(t p) + y cos(t p))
//
// so keys turn with their position, and a dot product of a query and a key sees the distance of the two alone.
//
// The library never turns keys or queries: it gets them turned. It wants to know how they turn for one purpose.
// Keys before RoPE have a large mean, which a projection's bias may be a part of (Qwen2). After RoPE that mean
// points elsewhere at every position, so what is taken off a key has to turn with it
// (layer_description::rotary, vector_encoding::means).
//
// Caches take it with all formats, groups of channels, keys per channel, bases, sliding windows, fp16 sinks and windows,
// prefixes, forks and saved sequences. Slot stores take it with the positions that keys are written with
// (slot_store.hpp). These refuse it, with errc::invalid_argument:
//
//   a layer whose frequencies are more than half of key_dim's channels, or reach past its last channel
//   values in keys (layer_description::values_in_keys) of which channels turn
//   context_parallel of the examples: round-robin pages and ALiBi, where means turn
//
// Frequencies are data: those that Llama 3 and YaRN scale are handed in as scaled. (YaRN also multiplies turned
// keys by a number; the means are then those of keys times that number.)
#pragma once

#include <kv1/detail/config.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Which channels make a pair.
enum class rotary_pairs : std::uint8_t {
    half_split, ///< pair j of n: channels j and n + j (GPT-NeoX; Llama and Qwen as Transformers stores them)
    interleaved ///< pair j: channels 2 j and 2 j + 1 (GPT-J; Llama as Meta and llama.cpp store it)
};

/// How keys and queries of a layer turn with their position. Empty: they do not. Where it is partial, the
/// channels first_channel ... first_channel + channels() - 1 turn, and the others stand still.
struct rotary_embedding {
    std::vector<float> frequencies = {};           ///< of each pair, in radians a position
    rotary_pairs pairs = rotary_pairs::half_split; ///< which channels make a pair
    std::size_t first_channel = 0;                 ///< the first channel that turns

    /// Whether nothing turns.
    [[nodiscard]] bool empty() const noexcept { return frequencies.empty(); }
    /// The number of channels that turn.
    [[nodiscard]] std::size_t channels() const noexcept { return 2 * frequencies.size(); }
    /// The two channels of a pair.
    /// @{
    [[nodiscard]] std::size_t first_of(std::size_t pair) const noexcept {
        return first_channel + (pairs == rotary_pairs::interleaved ? 2 * pair : pair);
    }
    [[nodiscard]] std::size_t second_of(std::size_t pair) const noexcept {
        return first_of(pair) + (pairs == rotary_pairs::interleaved ? 1 : frequencies.size());
    }
    /// @}
    /// Whether all fields are the same.
    friend bool operator==(const rotary_embedding&, const rotary_embedding&) = default;
};

/// The frequency of a pair in plain RoPE over so many channels: theta^(-2 pair / channels).
[[nodiscard]] inline float rotary_frequency(double theta, std::size_t channels, std::size_t pair) noexcept {
    return static_cast<float>(
        std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(channels)));
}

/// The frequencies of plain RoPE over so many channels, an even number. Throws std::bad_alloc.
[[nodiscard]] inline std::vector<float> rotary_frequencies(double theta, std::size_t channels) {
    std::vector<float> f(channels / 2);
    for (std::size_t j = 0; j < f.size(); ++j)
        f[j] = rotary_frequency(theta, channels, j);
    return f;
}

/// Turns a vector as RoPE does at a position, in place; -position turns it back. Angles are computed in double.
/// Precondition: the vector has at least first_channel + channels() channels. O(channels).
template <std::floating_point T>
void apply_rotary(const rotary_embedding& rotary, std::span<T> x, std::int64_t position) noexcept {
    for (std::size_t j = 0; j < rotary.frequencies.size(); ++j) {
        const double angle = static_cast<double>(rotary.frequencies[j]) * static_cast<double>(position);
        const double c = std::cos(angle), s = std::sin(angle);
        T &first = x[rotary.first_of(j)], &second = x[rotary.second_of(j)];
        const auto a = static_cast<double>(first), b = static_cast<double>(second);
        first = static_cast<T>(a * c - b * s);
        second = static_cast<T>(a * s + b * c);
    }
}

} // namespace kv1::inline KV1_ABI
