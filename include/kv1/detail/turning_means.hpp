// SPDX-License-Identifier: Apache-2.0
//
// Means of keys before rotary embedding (rotary_embedding.hpp), made ready for kernels, and the definition of
// the mean at a position.
//
// Positions are integers, so an angle is reduced exactly: a turn is 2^64, half a position adds a fixed part of it,
// and multiplication of 64-bit integers wraps around where angles do. The 32 bits in front are a position's
// angle to 1.5e-9 radians, cosine and sine follow by polynomials, and every operation is an IEEE operation of
// floats. So a mean is the same bits on every target, which the codes of keys need.
//
// Example: half of a frequency of 1 is 0.0796 turns, 0x145f306dc9c8.... At position 7 fourteen of them have wrapped
// around once and are 0x1d34a60108f7...: 0.1141 turns, or 7 - 2 pi radians.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/rotary_embedding.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <tuple>
#include <utility>

namespace kv1::inline KV1_ABI::detail {

// Attention gives the mean's share of scores back in runs of at most twice this many tokens.
inline constexpr std::size_t wave_tokens = 128;

// Within half a run slow pairs turn by one radian at most. There their cosines and sines are sums of four
// Chebyshev polynomials each, to 2e-7 (Jacobi and Anger):
//
//   cos(a x) = J_0(a) - 2 J_2(a) T_2(x) + 2 J_4(a) T_4(x) - 2 J_6(a) T_6(x) + ...
//   sin(a x) = 2 J_1(a) T_1(x) - 2 J_3(a) T_3(x) + 2 J_5(a) T_5(x) - 2 J_7(a) T_7(x) + ...
//
// So all slow pairs together cost what four pairs cost, and their folding into these.
inline constexpr std::size_t slow_terms = 4;

// The part of one KV head's mean that turns, as kernels take it: the pairs of channels in which the mean is not
// zero, slow ones last. Arrays of numbers are padded with zeros to a multiple of 16.
struct turning_mean {
    std::size_t count;               // pairs
    std::size_t padded;              // and with padding
    std::size_t terms;               // waves after folding: of quick pairs, and of polynomials
    const std::uint64_t* half_turns; // [padded] what half a position adds, 2^64 a turn
    const float *first, *second;     // [padded] the mean of a pair's channels
    const std::uint16_t *first_channel, *second_channel; // [count] these channels
    // [terms] wave_tokens cosines and as many sines, of the angles of 0.5, 1.5, 2.5 ... positions; of polynomials the
    // even and the odd one, at these positions over wave_tokens
    const float* const* waves;
    // [slow pair][2 * slow_terms]: shares of the even polynomials in its cosine, of the odd ones in its sine. Null:
    // nothing is folded. May be read up to 16 numbers beyond its end.
    const float* shares;

    [[nodiscard]] std::size_t quick() const noexcept {
        return shares == nullptr ? count : terms - slow_terms;
    }
};

#include <kv1/detail/precise_math_begin.inl>

struct unit_vector {
    float cosine, sine;
};

inline constexpr float phase_step = 1.46291807926715968e-9f; // 2 pi / 2^32
// Taylor's series of cosine and sine up to pi / 4, by powers of the angle's square. Errors are below 4e-8.
inline constexpr float cosine_terms[] = {2.48015873e-5f, -1.38888889e-3f, 4.16666667e-2f, -0.5f, 1.0f};
inline constexpr float sine_terms[] = {2.75573192e-6f, -1.98412698e-4f, 8.33333333e-3f, -0.166666667f, 1.0f};

// Cosine and sine of an angle, 2^32 a turn.
inline unit_vector unit_at(std::uint32_t phase) noexcept {
    const std::uint32_t quarter = (phase + (1u << 29)) >> 30;
    const float x =
        product_of(static_cast<float>(static_cast<std::int32_t>(phase - (quarter << 30))), phase_step);
    const float z = product_of(x, x);
    float c = cosine_terms[0], s = sine_terms[0];
    for (std::size_t i = 1; i < std::size(cosine_terms); ++i) {
        c = as_written(product_of(c, z) + cosine_terms[i]);
        s = as_written(product_of(s, z) + sine_terms[i]);
    }
    s = product_of(s, x);
    const float across = quarter % 2 == 0 ? c : s, along = quarter % 2 == 0 ? s : c;
    return {((quarter + 1) & 2u) != 0 ? -across : across, (quarter & 2u) != 0 ? -along : along};
}

// A pair of a mean's channels at a position, given the angle there.
inline std::pair<float, float> turned(float first, float second, unit_vector u) noexcept {
    return {as_written(product_of(first, u.cosine) - product_of(second, u.sine)),
            as_written(product_of(first, u.sine) + product_of(second, u.cosine))};
}

// Half a frequency as a part of a turn, 2^64 a turn.
inline std::uint64_t half_turns_of(float frequency) noexcept {
    constexpr double per_radian = 0.15915494309189533577;
    const double turns = 0.5 * static_cast<double>(frequency) * per_radian, part = turns - std::floor(turns);
    return part < 1.0 ? static_cast<std::uint64_t>(std::ldexp(part, 64)) : 0; // it may round to 1
}

// The angle of a position.
inline unit_vector unit_of(std::uint64_t half_turns, std::uint64_t position) noexcept {
    return unit_at(static_cast<std::uint32_t>(half_turns * (2 * position) >> 32));
}

// The mean at a position: writes the channels that turn, and leaves the others as they are.
inline void set_mean_at(const turning_mean& m, std::uint64_t position, float* mean) noexcept {
    for (std::size_t j = 0; j < m.count; ++j)
        std::tie(mean[m.first_channel[j]], mean[m.second_channel[j]]) =
            turned(m.first[j], m.second[j], unit_of(m.half_turns[j], position));
}

#include <kv1/detail/precise_math_end.inl>

// The turning means of a layer's KV heads.
class turning_means {
public:
    // Takes the channels that turn out of means, [heads][channels], which keep zeros there. Preconditions:
    // means are not empty, and the channels that turn are among those of a vector. False: no memory.
    [[nodiscard]] bool take(const rotary_embedding& rotary, std::size_t heads, std::size_t channels,
                            std::span<float> means) noexcept {
        const std::size_t all = rotary.frequencies.size();
        const auto is_zero = [&](std::size_t head, std::size_t pair) {
            const float* m = means.data() + head * channels;
            return m[rotary.first_of(pair)] == 0.0f && m[rotary.second_of(pair)] == 0.0f;
        };
        const auto is_slow = [&](std::size_t pair) { return slow(rotary.frequencies[pair]); };
        // pairs of a head, quick or slow ones
        const auto pairs_of = [&](std::size_t head, bool slow_ones) {
            std::size_t count = 0;
            for (std::size_t j = 0; j < all; ++j)
                count += !is_zero(head, j) && is_slow(j) == slow_ones ? 1 : 0;
            return count;
        };
        const auto is_used = [&](std::size_t pair) {
            for (std::size_t h = 0; h < heads; ++h)
                if (!is_zero(h, pair))
                    return true;
            return false;
        };
        std::size_t padded = 0, used = 0;
        for (std::size_t h = 0; h < heads; ++h)
            padded += round_up(pairs_of(h, false) + pairs_of(h, true), line_lanes);
        for (std::size_t j = 0; j < all; ++j)
            used += is_used(j) ? 1 : 0;
        if (padded == 0)
            return true;
        constexpr std::size_t table_lines = 2 * wave_tokens / line_lanes;
        if (!half_turns_.resize(padded) || !means_.resize(2 * padded / line_lanes) ||
            !channels_.resize(2 * padded) || !tables_.resize((slow_terms + used) * table_lines) ||
            !waves_.resize(padded) || !shares_.resize(2 * slow_terms * padded + line_lanes) ||
            !heads_.resize(heads))
            return false;
        for (std::size_t i = 0; i < slow_terms; ++i)
            fill_polynomials(i, tables_[i * table_lines].numbers);
        for (std::size_t pair = 0, table = slow_terms; pair < all; ++pair)
            if (is_used(pair))
                fill_waves(rotary.frequencies[pair], tables_[table_lines * table++].numbers);
        for (std::size_t h = 0, at = 0; h < heads; ++h) {
            const std::size_t quick = pairs_of(h, false), count = quick + pairs_of(h, true);
            const bool folds = count > quick + slow_terms;
            const std::size_t n = round_up(count, line_lanes);
            float* const first = count == 0 ? nullptr : means_[2 * at / line_lanes].numbers;
            float* const second = count == 0 ? nullptr : means_[(2 * at + n) / line_lanes].numbers;
            std::uint16_t* const first_channel = channels_.data() + 2 * at;
            float* const shares = shares_.data() + 2 * slow_terms * at;
            heads_[h] = {count,
                         n,
                         folds ? quick + slow_terms : count,
                         half_turns_.data() + at,
                         first,
                         second,
                         first_channel,
                         first_channel + n,
                         waves_.data() + at,
                         folds ? shares : nullptr};
            std::size_t next_quick = 0, next_slow = quick;
            for (std::size_t pair = 0, table = slow_terms; pair < all; ++pair) {
                const std::size_t its_table = table;
                table += is_used(pair) ? 1 : 0;
                if (is_zero(h, pair))
                    continue;
                const std::size_t j = is_slow(pair) ? next_slow++ : next_quick++;
                first[j] = means[h * channels + rotary.first_of(pair)];
                second[j] = means[h * channels + rotary.second_of(pair)];
                first_channel[j] = static_cast<std::uint16_t>(rotary.first_of(pair));
                first_channel[n + j] = static_cast<std::uint16_t>(rotary.second_of(pair));
                half_turns_[at + j] = half_turns_of(rotary.frequencies[pair]);
                waves_[at + j] = tables_[its_table * table_lines].numbers;
                if (folds && j >= quick)
                    fill_shares(rotary.frequencies[pair], shares + 2 * slow_terms * (j - quick));
            }
            for (std::size_t i = 0; folds && i < slow_terms; ++i)
                waves_[at + quick + i] = tables_[i * table_lines].numbers;
            at += n;
        }
        for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t pair = 0; pair < all; ++pair)
                means[h * channels + rotary.first_of(pair)] = means[h * channels + rotary.second_of(pair)] =
                    0.0f;
        return true;
    }

    [[nodiscard]] bool empty() const noexcept { return heads_.empty(); }
    // No channel of a mean is larger than this, at any position.
    [[nodiscard]] float largest() const noexcept {
        float most = 0.0f;
        for (const turning_mean& m : heads_)
            for (std::size_t j = 0; j < m.count; ++j)
                most = (std::max)(most, std::fabs(m.first[j]) + std::fabs(m.second[j]));
        return most;
    }
    // Of all KV heads; null: none.
    [[nodiscard]] const turning_mean* data() const noexcept {
        return heads_.empty() ? nullptr : heads_.data();
    }

private:
    struct alignas(line_bytes) line {
        float numbers[line_lanes];
    };

    static bool slow(float frequency) noexcept {
        return std::fabs(frequency) * static_cast<float>(wave_tokens) <= 1.0f;
    }
    static void fill_waves(float frequency, float* waves) noexcept {
        for (std::size_t i = 0; i < wave_tokens; ++i) {
            const double angle = static_cast<double>(frequency) * (static_cast<double>(i) + 0.5);
            waves[i] = static_cast<float>(std::cos(angle));
            waves[wave_tokens + i] = static_cast<float>(std::sin(angle));
        }
    }
    // T_n(x) = cos(n arccos x), n = 2 i and 2 i + 1.
    static void fill_polynomials(std::size_t i, float* values) noexcept {
        for (std::size_t k = 0; k < wave_tokens; ++k) {
            const double angle = std::acos((static_cast<double>(k) + 0.5) / static_cast<double>(wave_tokens));
            values[k] = static_cast<float>(std::cos(static_cast<double>(2 * i) * angle));
            values[wave_tokens + k] = static_cast<float>(std::cos(static_cast<double>(2 * i + 1) * angle));
        }
    }
    static void fill_shares(float frequency, float* shares) noexcept {
        const double a = static_cast<double>(frequency) * static_cast<double>(wave_tokens);
        for (std::size_t i = 0; i < slow_terms; ++i) {
            const double sign = i % 2 == 0 ? 1.0 : -1.0;
            shares[i] = static_cast<float>((i == 0 ? 1.0 : 2.0) * sign * bessel(2 * i, a));
            shares[slow_terms + i] = static_cast<float>(2.0 * sign * bessel(2 * i + 1, a));
        }
    }
    // J_n(x) by its series, for |x| <= 1.
    static double bessel(std::size_t n, double x) noexcept {
        double term = 1.0, sum = 0.0;
        for (std::size_t k = 1; k <= n; ++k)
            term *= 0.5 * x / static_cast<double>(k);
        for (std::size_t m = 1; m <= 9; ++m) {
            sum += term;
            term *= -0.25 * x * x / static_cast<double>(m * (m + n));
        }
        return sum;
    }

    buffer<turning_mean> heads_;
    buffer<std::uint64_t> half_turns_;
    buffer<line> means_;  // of each head: [2][padded]
    buffer<line> tables_; // of polynomials, and of each pair that any head uses: [2][wave_tokens]
    buffer<const float*> waves_;
    buffer<float> shares_;
    buffer<std::uint16_t> channels_;
};

} // namespace kv1::inline KV1_ABI::detail
