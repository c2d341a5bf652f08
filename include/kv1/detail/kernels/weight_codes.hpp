// SPDX-License-Identifier: Apache-2.0
//
// How the integer path rounds softmax weights to 8 bits. Every target does the same.
#pragma once

#include <kv1/detail/config.hpp>

#include <cstddef>

namespace kv1::inline KV1_ABI::detail {

// The largest number that a softmax weight is rounded to on the integer path; a carry may add one. Integer dot
// products take unsigned bytes and signed ones. Codes below 128 can be the signed ones, which leaves weights the
// unsigned ones: 0 ... 255. Beside codes of 8 bits weights are the signed ones: 0 ... 127.
constexpr int top_weight_code(int code_bits) noexcept { return code_bits == 8 ? 126 : 254; }

// A component that all values share is multiplied by the sum of a chunk's weights. So the codes of a chunk keep
// that sum: their step is the sum of the weights (times slopes) over the sum of the codes. Codes that add up to
// less than few_codes are a few large ones, among many weights that would be rounded to zero. There a code
// passes on what its rounding left, from tile to tile, each of the 16 places of a tile by itself. With x a
// weight in steps, and i its code:
//
//   i = round(x + carry), carry = (carry + (x + carry - i)) / 2
//
// Example: x = 0.3 in every tile, and a carry that begins at 0.25. Codes are 1, 0, 0, 0, 1, 0, 0, 1, ...:
// their mean is 0.3. Half of the rest is passed on: all of it would make errors of independent values larger
// by sqrt(2), half makes them larger by 1.15. Where weights are far below a step a carry moves between 0 and
// 1/2; carries begin there, at even distances. |carry| <= 1/2 whatever the roundings, so a token that is not
// seen has no weight.
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
