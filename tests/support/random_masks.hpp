// SPDX-License-Identifier: Apache-2.0
//
// Random explicit masks of every kind, and the tokens that queries see under them.
#pragma once

#include "cache_model.hpp"
#include "random.hpp"

#include <kv1/attention.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kv1_test {

/// A random mask [queries][keys]: a token tree, bidirectional blocks, or any bytes.
inline std::vector<std::uint8_t> random_visibility(generator& g, std::size_t queries, std::size_t keys) {
    const std::size_t kind = queries == keys ? g.below(3) : 2;
    if (kind == 0) { // whose branches part early and late
        std::vector<std::int32_t> parents(keys);
        for (std::size_t i = 0; i < keys; ++i)
            parents[i] = static_cast<std::int32_t>(i - g.below(std::min<std::size_t>(i, 3) + 1)) - 1;
        return kv1::tree_mask(parents);
    }
    if (kind == 1) {
        std::vector<std::int32_t> blocks(keys);
        for (std::size_t i = 0; i < keys; ++i)
            blocks[i] = i / 7 % 2 == 0 ? -1 : static_cast<std::int32_t>(i / 7);
        return kv1::block_mask(blocks);
    }
    std::vector<std::uint8_t> visible(queries * keys);
    const std::size_t share = 1 + g.below(5);
    for (std::uint8_t& v : visible) // 255 says yes, as 1 does
        v = static_cast<std::uint8_t>(g.below(share) == 0 ? g.below(2) * 255 : 1);
    return visible;
}

/// A mask over some of a sequence's newest tokens; `visible` outlives it.
inline kv1::attention_mask random_mask(generator& g, std::size_t queries, std::size_t length,
                                       std::vector<std::uint8_t>& visible) {
    const std::size_t keys = g.below(2) == 0 ? queries : g.below(length + 1);
    visible = random_visibility(g, queries, keys);
    return kv1::attention_mask::explicit_for_last(keys, visible);
}

/// Of query r of so many: one past the last token that its mask lets it see, and what it asks for.
inline std::pair<std::size_t, row_request> sight(const kv1::attention_mask& mask, std::size_t r,
                                                 std::size_t queries, std::size_t length) {
    const std::size_t own = mask.first_position() ? *mask.first_position() + r + 1 : length - queries + r + 1;
    row_request asked;
    asked.own = std::min(length, own);
    if (!mask.visible().empty())
        asked.shows = [visible = mask.visible(), keys = mask.explicit_keys(), length, r](std::size_t t) {
            return t < length - keys || visible[r * keys + t - (length - keys)] != 0;
        };
    return {mask.is_causal() ? *asked.own : length, asked};
}

} // namespace kv1_test
