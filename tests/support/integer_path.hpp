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
#include <limits>
#include <optional>
#include <span>

namespace kv1_test::oracle {

// What the log-sum-exp of a range's tokens is corrected by (detail/kernels/softmax.hpp: sum_correction),
// where tokens first ... last - 1 of those seen are the range's. of: places of the tokens; counted: how many
// might be seen.
struct range_correction {
    double value = 0.0, bound = 0.0;
};
inline range_correction correct_range(std::span<const std::size_t> of, std::span<const double> exact,
                                      std::span<const double> exact_rounding, std::span<const double> fast,
                                      std::span<const double> fast_rounding, double counted) {
    const std::size_t n = of.size();
    const double top = *std::max_element(fast.begin(), fast.end());
    double sum = 0.0, wrong = 0.0;
    for (std::size_t k = 0; k < n; ++k) {
        sum += std::exp(fast[k] - top);
        wrong = std::max(wrong, fast_rounding[k]);
    }
    const auto by_tile = [&](std::size_t first, std::size_t last) {
        double inside = 0.0, corrected = 0.0, count = 0.0, shares = 0.0, mean = 0.0, squares = 0.0,
               largest = 0.0, rounding = 0.0;
        for (std::size_t k = first; k < last; ++k) {
            const double error = exact[k] - fast[k], weight = std::exp(fast[k] - top);
            const double share = sum / counted / (sum / counted + weight);
            inside += weight;
            corrected += weight * std::exp(error);
            count += share;
            shares += share * share;
            mean += share * error;
            squares += share * error * error;
            largest = std::max(largest, std::fabs(error));
            rounding = std::max(rounding, exact_rounding[k] + fast_rounding[k]);
        }
        mean /= count;
        const double others = count * count / shares - 1.0;
        const double square = std::max(0.0, squares / count - mean * mean) / others;
        const double alone = count > 0.25 ? mean : 0.0; // one token, of ordinary weight
        mean = others <= 0.01 ? alone : mean * mean > 9.0 * square ? mean - 9.0 * square / mean : 0.0;
        // the shrunk mean moves by at most 8 of what errors do; weights count by how errors differ
        return range_correction{std::log((corrected + (sum - inside) * std::exp(mean)) / sum),
                                10.0 * rounding + 20.0 * std::expm1(wrong) * std::expm1(largest) +
                                    200.0 * unit_roundoff * (1.0 + std::expm1(largest))};
    };
    // The tile of the largest score, or one that rounding may take for it. Where that score has little of the
    // weight it may be the tile of another row of the call, of which this row may see nothing: there any tile
    // will do.
    std::optional<range_correction> chosen;
    range_correction all;
    const auto best = static_cast<std::size_t>(std::max_element(fast.begin(), fast.end()) - fast.begin());
    const bool own = 1.0 / sum > (1.0 + 4 * std::expm1(wrong)) / 32.0;
    for (const bool first_choice : {true, false})
        for (std::size_t first = 0, last = 0; first < n; first = last) {
            double largest = -std::numeric_limits<double>::infinity();
            for (; last < n && of[last] / 16 == of[first] / 16; ++last)
                largest = std::max(largest, fast[last] + fast_rounding[last]);
            const bool has_best = first <= best && best < last;
            if (first_choice ? !has_best : has_best || (own && largest < fast[best] - fast_rounding[best]))
                continue;
            const range_correction c = by_tile(first, last);
            if (!chosen)
                chosen = all = c;
            else
                all.bound = std::max(all.bound, std::fabs(c.value - all.value) + c.bound);
        }
    if (!own)
        all.bound = std::max(all.bound, std::fabs(all.value));
    return all;
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
