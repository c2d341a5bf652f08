// SPDX-License-Identifier: Apache-2.0
//
// How the integer path rounds softmax weights to 8 bits. Every target does the same.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

// Softmax weights are rounded to 0 ... this on the integer path, and one more where a carry rounds the
// largest up. They are not negative and codes below 128 are signed bytes too, so weights may have all of an
// unsigned byte.
constexpr int top_weight_code(int code_bits) noexcept { return code_bits == 8 ? 126 : 254; }

// A component that all values share is weighted by what a chunk's weights add up to. So the codes are worth
// what the weights were: their step is the sum of the weights (times slopes) over the sum of the codes. Where
// codes add up to little, a few large ones stand among many that would be rounded to zero; there a code's
// rounding passes on what it left, at each place j of the tiles apart (x: a weight in steps, i: its code):
//
//   i = round(x + carry), carry = (carry + (x + carry - i)) / 2
//
// Half of it: all of it would make independent values' errors larger by sqrt(2) instead of 1.15. With weights
// far below a step a carry moves between 0 and 1/2, where it begins, in even distances. |carry| <= 1/2
// whatever the roundings, so a token that is not seen has no weight.
inline constexpr float few_codes = 2048.0f;
struct first_carries {
    alignas(64) float at[16]; // by place in a tile
};
inline constexpr first_carries weight_carries = [] {
    first_carries c{};
    for (int j = 0; j < 16; ++j)
        c.at[j] = static_cast<float>(2 * (j * 7 % 16) + 1) / 64.0f;
    return c;
}();

} // namespace kv1::inline KV1_ABI::detail
