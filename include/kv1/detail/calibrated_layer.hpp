// SPDX-License-Identifier: Apache-2.0
//
// The calibrated parts of a layer, as they are kept in memory and in files.
//
//   means           fp16
//   error weights   W = L L^T of each KV head: the lower triangle of L in fp16, by rows, times a power of two.
//                   However L is rounded, W stays positive semidefinite; W itself in fp16 would not.
//   basis           fp32, so that it stays orthogonal
//
// Errors of W from L's rounding: |dW_ij| <= 2^-10 sqrt(W_ii W_jj), for a row of L has the length sqrt(W_ii),
// and each of its elements is off by a part in 2^11 at most.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/float16.hpp>
#include <kv1/rotary_embedding.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

constexpr std::size_t triangle(std::size_t n) noexcept { return n * (n + 1) / 2; }

// W, [n][n], symmetric and positive semidefinite, becomes its factor in the lower triangle. Columns whose pivot
// is nothing but rounding become zero.
inline void factor_semidefinite(std::span<double> w, std::size_t n) noexcept {
    constexpr double rounding = 1e-12; // of sums of n products, in parts of the diagonal
    for (std::size_t j = 0; j < n; ++j) {
        double* const row = w.data() + j * n;
        double pivot = row[j];
        for (std::size_t k = 0; k < j; ++k)
            pivot -= row[k] * row[k];
        const double root = pivot > rounding * row[j] ? std::sqrt(pivot) : 0.0;
        row[j] = root;
        for (std::size_t i = j + 1; i < n; ++i) {
            double* const below = w.data() + i * n;
            double x = below[j];
            for (std::size_t k = 0; k < j; ++k)
                x -= below[k] * row[k];
            below[j] = root == 0.0 ? 0.0 : x / root;
        }
    }
}

// Error weights of KV heads in few bytes.
struct packed_weights {
    buffer<float> scales;          // [heads]: powers of two, or 0
    buffer<std::uint16_t> factors; // [heads][triangle(n)]: fp16

    [[nodiscard]] bool create(std::size_t heads, std::size_t n) noexcept {
        return scales.resize(heads) && factors.resize(heads * triangle(n));
    }
    [[nodiscard]] bool empty() const noexcept { return scales.empty(); }
    // w is factored in place.
    void pack(std::size_t head, std::span<double> w, std::size_t n) noexcept {
        factor_semidefinite(w, n);
        double most = 0.0;
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t k = 0; k <= i; ++k)
                most = (std::max)(most, std::fabs(w[i * n + k]));
        constexpr int largest = 14; // fp16 ends at 2^16, and begins to lose bits at 2^-14
        int exponent = 0;
        static_cast<void>(std::frexp(most, &exponent)); // most < 2^exponent
        const double scale = most == 0.0 ? 0.0 : std::ldexp(1.0, exponent - largest);
        scales[head] = static_cast<float>(scale);
        std::uint16_t* to = factors.data() + head * triangle(n);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t k = 0; k <= i; ++k)
                *to++ = scales[head] == 0.0f ? std::uint16_t{0}
                                             : float_to_half(static_cast<float>(w[i * n + k] / scale));
    }
    // out is [n][n]; work is [n][n].
    void unpack(std::size_t head, std::size_t n, std::span<float> out, std::span<float> work) const noexcept {
        const std::uint16_t* from = factors.data() + head * triangle(n);
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t k = 0; k <= i; ++k)
                work[i * n + k] = half_to_float(*from++);
            const float* const a = work.data() + i * n;
            for (std::size_t j = 0; j <= i; ++j) {
                const float* const b = work.data() + j * n;
                double sum = 0.0;
                for (std::size_t k = 0; k <= j; ++k)
                    sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
                const auto scale = static_cast<double>(scales[head]);
                out[i * n + j] = out[j * n + i] = static_cast<float>(sum * scale * scale);
            }
        }
    }
};

// Of keys, or of values. What is empty was not calibrated.
struct calibrated_side {
    buffer<std::uint16_t> means; // [heads][dim]: fp16
    packed_weights error_weights;
    buffer<float> basis; // [heads][dim][dim]
};

struct calibrated_layer {
    std::size_t kv_heads = 0, key_dim = 0, value_dim = 0;
    rotary_embedding rotary;  // keys' means are those before it
    calibrated_side sides[2]; // keys, values

    [[nodiscard]] std::size_t dim(std::size_t side) const noexcept { return side == 0 ? key_dim : value_dim; }
};

} // namespace kv1::inline KV1_ABI::detail
