// SPDX-License-Identifier: Apache-2.0
//
// Vectors into and out of an orthogonal basis (detail/orthogonal_basis.hpp). Into it a channel of a vector is multiplied
// by a column of numbers, which serves several vectors; sums are the definition's, bit for bit. Out of it a channel is a
// product of two vectors. Parsed once per target.
//
// Cost of a vector of n channels: n * n / lanes products and as many sums. A matrix of 128 channels takes 64 KiB, so one
// vector alone waits for the second-level cache.

#include <kv1/detail/precise_math_begin.inl>

// Sums of Rows vectors in Registers registers of new channels, from `first` on.
template <std::size_t Rows, std::size_t Registers>
KV1_INLINE void enter_channels(const basis_view& b, const float* x, std::size_t first, float* y) {
    f32 sums[Rows][Registers];
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) { sums[r][k] = f32(0.0f); }
    }
    for (std::size_t j = 0; j < b.n; ++j) {
        const float* column = b.column(j) + first;
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) {
            const f32 numbers = f32::load_aligned(column + k * lanes);
            KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
                sums[r][k] = sum_of(sums[r][k], product_of(numbers, f32(x[r * b.n + j])));
            }
        }
    }
    KV1_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        KV1_UNROLL for (std::size_t k = 0; k < Registers; ++k) {
            const std::size_t at = first + k * lanes;
            if (at + lanes <= b.n) {
                sums[r][k].store_unaligned(y + r * b.n + at);
                continue;
            }
            alignas(64) float tail[lanes];
            sums[r][k].store_aligned(tail);
            for (std::size_t i = 0; at + i < b.n; ++i)
                y[r * b.n + at + i] = tail[i];
        }
    }
}

template <std::size_t Rows>
KV1_INLINE void enter_rows(const basis_view& b, const float* x, float* y) {
    constexpr std::size_t registers = many_registers && Rows > 1 ? 4 : 8 / Rows;
    std::size_t first = 0;
    for (; first + registers * lanes <= b.stride; first += registers * lanes)
        enter_channels<Rows, registers>(b, x, first, y);
    for (; Rows == 1 && first + 4 * lanes <= b.stride; first += 4 * lanes)
        enter_channels<Rows, 4>(b, x, first, y);
    for (; first < b.stride; first += lanes)
        enter_channels<Rows, 1>(b, x, first, y);
}

KV1_LAZY inline void enter_basis(const basis_view& b, const float* x, std::size_t rows, float* y) noexcept {
    std::size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        enter_rows<4>(b, x + r * b.n, y + r * b.n);
    for (; r < rows; ++r)
        enter_rows<1>(b, x + r * b.n, y + r * b.n);
}

#include <kv1/detail/precise_math_end.inl>

KV1_LAZY inline void leave_basis(const basis_view& b, const float* y, float* x) noexcept {
    alignas(64) float padded[max_vector_length]; // columns are
    std::memcpy(padded, y, b.n * sizeof(float));
    for (std::size_t i = b.n; i < b.stride; ++i)
        padded[i] = 0.0f;
    constexpr std::size_t at_once = 4; // sums that do not wait for each other
    std::size_t j = 0;
    for (; j + at_once <= b.n; j += at_once) {
        f32 sums[at_once];
        KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) { sums[k] = f32(0.0f); }
        for (std::size_t i = 0; i < b.stride; i += lanes) {
            const f32 numbers = f32::load_aligned(padded + i);
            KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) {
                sums[k] = xs::fma(numbers, f32::load_aligned(b.column(j + k) + i), sums[k]);
            }
        }
        KV1_UNROLL for (std::size_t k = 0; k < at_once; ++k) { x[j + k] = xs::reduce_add(sums[k]); }
    }
    for (; j < b.n; ++j) {
        f32 sum(0.0f);
        for (std::size_t i = 0; i < b.stride; i += lanes)
            sum = xs::fma(f32::load_aligned(padded + i), f32::load_aligned(b.column(j) + i), sum);
        x[j] = xs::reduce_add(sum);
    }
}
