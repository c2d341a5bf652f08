// SPDX-License-Identifier: Apache-2.0
//
// Rotary positions (Su et al. 2021): a vector at position p has its pair i of channels turned by the angle
// p / theta^(2i / head_dim). At position 3 with theta 10,000 and 4 channels, pair 0 is turned by 3, pair 1 by
// 0.03. kv1/rotary_embedding.hpp says which channels make a pair.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace kv1_lm {

/// Cosines and sines of the angles, [positions][head_dim / 2] each.
struct rotary_angles {
    std::vector<float> cosines, sines;
};

/// Angles are computed in fp32, as the reference computes them. head_dim is even.
[[nodiscard]] inline rotary_angles make_rotary_angles(std::size_t positions, std::size_t head_dim,
                                                      float theta) {
    rotary_angles angles;
    for (std::size_t position = 0; position < positions; ++position)
        for (std::size_t i = 0; i < head_dim / 2; ++i) {
            const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
            const float angle = static_cast<float>(position) * (1.0f / std::pow(theta, exponent));
            angles.cosines.push_back(std::cos(angle));
            angles.sines.push_back(std::sin(angle));
        }
    return angles;
}

} // namespace kv1_lm
