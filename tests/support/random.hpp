// SPDX-License-Identifier: Apache-2.0
//
// Seeded random test data. It is the same on every platform, since it uses none of <random>'s distributions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kv1_test {

/// SplitMix64.
class generator {
public:
    explicit generator(std::uint64_t seed) noexcept : state_(seed) {}

    std::uint64_t bits() noexcept {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    /// In [0, n).
    std::size_t below(std::size_t n) noexcept { return static_cast<std::size_t>(bits() % n); }
    /// In [low, high].
    std::size_t between(std::size_t low, std::size_t high) noexcept { return low + below(high - low + 1); }
    /// In [0, 1).
    double uniform() noexcept { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    /// Nearly standard normal: the sum of twelve uniforms, less 6.
    float normal() noexcept {
        double sum = -6.0;
        for (int i = 0; i < 12; ++i)
            sum += uniform();
        return static_cast<float>(sum);
    }
    bool chance(double p) noexcept { return uniform() < p; }

private:
    std::uint64_t state_;
};

inline std::vector<float> normal_values(generator& g, std::size_t n, float spread = 1.0f, float mean = 0.0f) {
    std::vector<float> x(n);
    for (float& v : x)
        v = mean + spread * g.normal();
    return x;
}

inline std::vector<std::uint8_t> random_codes(generator& g, std::size_t n, int bits) {
    std::vector<std::uint8_t> codes(n);
    for (auto& c : codes)
        c = static_cast<std::uint8_t>(g.below(std::size_t{1} << bits));
    return codes;
}

} // namespace kv1_test
