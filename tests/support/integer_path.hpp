// SPDX-License-Identifier: Apache-2.0
//
// Two steps of the integer path in double, as their definitions say: how the log-sum-exp of a range is corrected, and
// how a chunk's weights are rounded. For the attention oracle.
#pragma once

#include "compare.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>

namespace kv1_test::oracle {

// What the log-sum-exp of a range's tokens is corrected by (detail/kernels/correct.inl). Kernels estimate how far it is
// off from the errors (exact score - score) of some tiles; exact_rounding: how far off these exact scores may be. However
// they choose and weigh tiles, the estimate lies between the smallest and the largest error, or 0 if all are on one side
// of it, since a mean is shrunk towards 0. So does what it really is off by. value: that; bound: how far the estimate may
// be from it; rounding: how far it may be outside for that it is computed in fp32.
struct range_correction {
    double value = 0.0, bound = 0.0, rounding = 0.0;
};
inline range_correction correct_range(std::span<const double> exact, std::span<const double> exact_rounding,
                                      std::span<const double> fast, std::span<const double> fast_rounding) {
    const double top = *std::max_element(fast.begin(), fast.end());
    double sum = 0.0, corrected = 0.0, least = 0.0, most = 0.0, wrong = 0.0;
    for (std::size_t k = 0; k < exact.size(); ++k) {
        const double error = exact[k] - fast[k];
        sum += std::exp(fast[k] - top);
        corrected += std::exp(exact[k] - top);
        least = std::min(least, error);
        most = std::max(most, error);
        wrong = std::max(wrong, exact_rounding[k] + fast_rounding[k]);
    }
    const double value = std::log(corrected / sum);
    // sums of fp32 weights, exponentials of scores of either kind
    const double own = 2.0 * wrong + gamma(static_cast<double>(exact.size()) + 32) + 64 * unit_roundoff;
    return {value, std::max(most - value, value - least) + own, own};
}

// A chunk's weights as they are rounded (detail/kernels/weight_codes.hpp: few_codes).
class weight_rounding {
public:
    // total: of the weights, in steps, off by `doubt` of it at most
    weight_rounding(double total, double doubt) : total_(total), doubt_of_total_(doubt) {
        few_ = total < 2048.0;
        unclear_ = std::fabs(total - 2048.0) <= doubt * total + 1e-3;
        for (std::size_t j = 0; few_ && j < 16; ++j)
            lanes_[j].carry = static_cast<double>(2 * (j * 7 % 16) + 1) / 64.0;
    }
    struct code {
        double value;
        bool either; // or the next, and where codes are few another one of the place makes up for it
    };
    // x: a weight in steps, off by `unsure` at most
    code next(std::size_t token, double x, double unsure) {
        lane& l = lanes_[token % 16];
        const double wanted = x + l.carry, rounded = std::nearbyint(wanted);
        const double doubt = unsure + l.doubt + 2e-5;
        const double to_tie = std::fabs(wanted - std::floor(wanted) - 0.5);
        // a place whose code may be another goes on with a carry that is 1/2 off until that is made up for
        const bool either = unclear_ || to_tie <= doubt || (l.open && 0.5 - to_tie <= doubt);
        if (few_) {
            l.open = l.open || either;
            l.carry = 0.5 * (l.carry + (wanted - rounded));
            l.doubt = l.doubt + 0.5 * unsure + 1e-5;
        }
        sum_ += rounded;
        others_ += either ? 1.0 : 0.0;
        return {rounded, either};
    }
    // Of the step: its factor, and how far off that may be, relative to it.
    [[nodiscard]] double factor() const { return sum_ > 0.0 ? total_ / sum_ : 0.0; }
    [[nodiscard]] double doubt() const {
        return sum_ > 0.0 ? others_ / sum_ + doubt_of_total_ + gamma(8) : 0.0;
    }

private:
    struct lane {
        double carry = 0.0, doubt = 0.0;
        bool open = false;
    };
    std::array<lane, 16> lanes_{};
    double total_, doubt_of_total_, sum_ = 0.0, others_ = 0.0;
    bool few_ = false, unclear_ = false;
};

} // namespace kv1_test::oracle
