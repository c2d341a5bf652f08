// SPDX-License-Identifier: Apache-2.0
//
// The shape of a cache, and what it costs. Plain data; checked when a cache is made from it.
#pragma once

#include <kv1/format.hpp>
#include <kv1/layout.hpp>

#include <cstddef>
#include <string>
#include <vector>

namespace kv1::inline KV1_ABI {

/// One layer: how many KV heads, how wide, how stored. K and V are independent of each other.
struct layer_description {
    std::size_t kv_heads = 0;                    ///< query heads are a multiple of it
    std::size_t key_dim = 0;                     ///< head_dim of keys and queries
    std::size_t value_dim = 0;                   ///< head_dim of values and outputs
    kv_format key_format = kv_format::affine2;   ///< of keys
    kv_format value_format = kv_format::affine2; ///< of values
};

/// A whole cache: its layers, and room for how many tokens.
struct cache_description {
    std::vector<layer_description> layers; ///< one entry per layer
    std::size_t capacity_tokens = 0;       ///< in whole pages, over all sequences
    std::size_t page_tokens = 64;          ///< a multiple of tile_tokens
};

/// The usual case: every layer alike.
[[nodiscard]] inline cache_description uniform_cache(std::size_t layers, const layer_description& layer,
                                                     std::size_t capacity_tokens,
                                                     std::size_t page_tokens = 64) {
    return {std::vector<layer_description>(layers, layer), capacity_tokens, page_tokens};
}

/// Sizes in bytes unless said otherwise.
struct cache_statistics {
    std::size_t sequences = 0;      ///< living ones
    std::size_t tokens = 0;         ///< cached tokens (of the layer that holds most, per sequence)
    std::size_t layers = 0;         ///< of the cache
    std::size_t pages_in_use = 0;   ///< blocks, each page_tokens tokens of every layer
    std::size_t pages_total = 0;    ///< blocks the arenas hold
    std::size_t bytes_reserved = 0; ///< arenas of all layers
    std::size_t bytes_in_use = 0;   ///< pages in use, padding and unfilled tokens included
    std::size_t bytes_stored = 0;   ///< row-format bytes of the cached tokens: values and metadata
    std::size_t bytes_as_fp16 = 0;  ///< the same tokens in fp16

    /// How many times smaller the stored rows are than fp16; 0 for an empty cache.
    [[nodiscard]] double shrink_vs_fp16() const noexcept {
        return bytes_stored == 0 ? 0.0
                                 : static_cast<double>(bytes_as_fp16) / static_cast<double>(bytes_stored);
    }
};

/// Such as "12.50 MiB". Allocates.
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

} // namespace kv1::inline KV1_ABI
