// SPDX-License-Identifier: Apache-2.0
//
// What a cache or a sequence holds and where its memory goes, as numbers and as text.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>
#include <string>

namespace kv1::inline KV1_ABI {

/// What a cache or a sequence holds. Tokens, and bytes that follow from them, count each sequence as if it
/// were alone. Pages and bytes in use count a page that sequences share once.
struct cache_statistics {
    std::size_t sequences = 0; ///< number of sequences
    std::size_t tokens = 0; ///< length (of the layer that holds most, per sequence), dropped tokens included
    std::size_t layers = 0; ///< of the cache
    std::size_t pages_in_use = 0;   ///< each page_tokens tokens of every layer of its group
    std::size_t pages_total = 0;    ///< that the pools have
    std::size_t bytes_reserved = 0; ///< arenas of all layers
    std::size_t bytes_in_use = 0;   ///< pages in use, padding and unfilled tokens included
    std::size_t bytes_stored = 0;   ///< of the tokens held: packed values and metadata, no padding
    std::size_t bytes_as_fp16 = 0;  ///< the same tokens in fp16
    /// Part of bytes_in_use: pages of fp16 sinks and windows, and fp16 keys of open pages.
    std::size_t bytes_fp16_copies = 0;
    /// Part of bytes_in_use: pages behind the sliding windows of committed tokens, which window_retention or
    /// a shared prefix keeps. Each sequence counts as if it were alone.
    std::size_t bytes_retained = 0;
    std::size_t bytes_unfilled = 0; ///< token slots of open pages that hold nothing yet
    /// Of all sequences: what sharing saves. Of one sequence: its pages that others hold too, the prefix
    /// index included.
    std::size_t bytes_shared = 0;
    std::size_t pages_indexed = 0; ///< held by the prefix index, in its first group

    /// How many times smaller the stored rows are than fp16; 0 for an empty cache.
    [[nodiscard]] double shrink_vs_fp16() const noexcept {
        return bytes_stored == 0 ? 0.0
                                 : static_cast<double>(bytes_as_fp16) / static_cast<double>(bytes_stored);
    }
};

/// A number of bytes as text, such as "12.50 MiB". Allocates.
[[nodiscard]] inline std::string human_bytes(std::size_t bytes) {
    constexpr const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    auto size = static_cast<double>(bytes);
    std::size_t unit = 0;
    for (; size >= 1024.0 && unit < 4; ++unit)
        size /= 1024.0;
    const auto hundredths = static_cast<unsigned long long>(size * 100.0 + 0.5);
    std::string text = std::to_string(hundredths / 100);
    if (unit != 0)
        text.append(hundredths % 100 < 10 ? ".0" : ".").append(std::to_string(hundredths % 100));
    return text.append(" ").append(units[unit]);
}

/// One line: tokens, layers, stored size, ratio to fp16, pages.
[[nodiscard]] inline std::string to_string(const cache_statistics& s) {
    const auto ratio = static_cast<unsigned long long>(s.shrink_vs_fp16() * 100.0 + 0.5);
    std::string text = std::to_string(s.tokens) + " tokens x " + std::to_string(s.layers) + " layers in " +
                       human_bytes(s.bytes_stored) + " (fp16: " + human_bytes(s.bytes_as_fp16) + ", " +
                       std::to_string(ratio / 100) + (ratio % 100 < 10 ? ".0" : ".") +
                       std::to_string(ratio % 100) + "x smaller), " + std::to_string(s.pages_in_use) +
                       " of " + std::to_string(s.pages_total) + " pages, " + human_bytes(s.bytes_in_use) +
                       " in use";
    return text;
}

/// Several lines: what to_string() says, then where the memory goes.
[[nodiscard]] inline std::string summary(const cache_statistics& s) {
    std::string text = std::to_string(s.sequences) + " sequences: " + to_string(s) + "\n";
    const auto line = [&](const char* name, std::size_t bytes) {
        text.append("  ").append(name).append(": ").append(human_bytes(bytes)).append("\n");
    };
    line("reserved", s.bytes_reserved);
    line("in use", s.bytes_in_use);
    line("of it fp16 sinks, windows and open keys", s.bytes_fp16_copies);
    line("of it retained behind sliding windows", s.bytes_retained);
    line("unfilled slots of open pages", s.bytes_unfilled);
    line("shared", s.bytes_shared);
    return text;
}

} // namespace kv1::inline KV1_ABI
