// SPDX-License-Identifier: Apache-2.0
//
// clip_search<Q>: the format of Q, affine or compact, with a range that may be narrower than the vector's.
// Channels outside of it are clipped. That pays where the channels inside lose more error than the clipped
// ones gain. Bytes and decoder are those of Q.
//
// Candidates are the range as min/max would store it and, with L = 2^bits - 1 and k = 1 ... 9,
//
//   scale = (hi - lo) (16 - k) / (16 L) as stored, base = (lo + hi) / 2 - scale L / 2
//
// The candidate with the smallest squared error is taken, the widest of equals. So it is never worse than
// min/max, and as near to the best evenly spaced levels about the middle as a grid of sixteenths allows.
// least_squares<Q> moves the middle too, and costs half as much. Other engines' formats come with a search
// like this one.
//
// Sums run as in least_squares.hpp: the same bits on every target. O(n), no allocation.
#pragma once

#include <kv1/quantizers/least_squares.hpp>

namespace kv1::inline KV1_ABI {

namespace detail {

inline constexpr int clip_candidates = 10; // with the whole range
constexpr float clip_share(int k) noexcept { return static_cast<float>(16 - k) / 16.0f; }

#include <kv1/detail/precise_math_begin.inl>

// Candidate k > 0.
template <class Q>
stored_levels clipped_levels(float lo, float hi, int k) noexcept {
    using format = level_format<Q>;
    const float middle = 0.5f * lo + 0.5f * hi;
    const auto scale = format::round_scale(product_of(hi - lo, clip_share(k)) / as_written(format::top));
    return format::store(scale, middle - product_of(format::scale_of(scale), 0.5f * format::top));
}

// As fit_levels.
template <class Q>
stored_levels search_levels(std::span<const float> x, std::uint8_t* codes) noexcept {
    const auto [lo, hi] = plain_range(x);
    level_selection best = range_first<Q>(x, lo, hi, codes);
    for (int k = 1; k < clip_candidates; ++k)
        best.consider<Q>(x, clipped_levels<Q>(lo, hi, k));
    return best.levels;
}

#include <kv1/detail/precise_math_end.inl>

} // namespace detail

/// Q's format, fitted by a search over narrower ranges. Q is affine, of 1 to 8 bits, or compact.
template <class Q>
struct clip_search : detail::chosen_levels<Q, detail::search_levels<Q>> {};

static_assert(quantizer<clip_search<affine<2>>> && quantizer<clip_search<compact<2>>>);

} // namespace kv1::inline KV1_ABI
