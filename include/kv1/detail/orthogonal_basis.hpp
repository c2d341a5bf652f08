// SPDX-License-Identifier: Apache-2.0
//
// An orthogonal basis for each KV head (vector_encoding::basis): its check, how it lies in memory, and the
// definition of a change of basis. With the rows of B as the new axes,
//
//   into it      y_i = sum_j B_ij x_j    keys and values when they are stored, queries
//   out of it    x_j = sum_i B_ij y_i    outputs, vectors that are read back
//
// Terms are added in the order of the index, each product rounded before it is added. So stored vectors are the
// same bits on every target.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/detail/crc32c.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// How far B B^T may be from the unit matrix, in each number. Matrices that were rounded to fp16 are nearer.
inline constexpr float basis_tolerance = 0.002f;

// Whether the rows of a matrix [n][n] are orthogonal and of length one. O(n^3).
inline bool is_orthogonal(std::span<const float> matrix, std::size_t n) noexcept {
    constexpr std::size_t at_once = 8; // sums that do not wait for each other
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t k = i; k < n; ++k) {
            const float *a = matrix.data() + i * n, *b = matrix.data() + k * n;
            float sums[at_once]{};
            for (std::size_t j = 0; j < n; ++j)
                sums[j % at_once] += a[j] * b[j];
            float sum = 0.0f;
            for (const float each : sums)
                sum += each;
            if (!(std::fabs(sum - (i == k ? 1.0f : 0.0f)) <= basis_tolerance))
                return false;
        }
    return true;
}

// A matrix as kernels take it: [n][stride], number j * stride + i is B_ij, zeros past i = n. So the numbers
// that one channel of a vector is multiplied by lie side by side.
struct basis_view {
    std::size_t n = 0, stride = 0;
    const float* columns = nullptr; // aligned to a line; null: no basis

    [[nodiscard]] explicit operator bool() const noexcept { return columns != nullptr; }
    [[nodiscard]] const float* column(std::size_t j) const noexcept { return columns + j * stride; }
};

#include <kv1/detail/precise_math_begin.inl>

// x and y do not overlap.
inline void to_basis(const basis_view& b, const float* x, float* y) noexcept {
    for (std::size_t i = 0; i < b.n; ++i)
        y[i] = 0.0f;
    for (std::size_t j = 0; j < b.n; ++j)
        for (std::size_t i = 0; i < b.n; ++i)
            y[i] = as_written(y[i] + product_of(b.column(j)[i], x[j]));
}

inline void from_basis(const basis_view& b, const float* y, float* x) noexcept {
    for (std::size_t j = 0; j < b.n; ++j) {
        float sum = 0.0f;
        for (std::size_t i = 0; i < b.n; ++i)
            sum = as_written(sum + product_of(b.column(j)[i], y[i]));
        x[j] = sum;
    }
}

#include <kv1/detail/precise_math_end.inl>

// The bases of a layer's KV heads.
class basis_matrices {
public:
    // matrices: [heads][n][n]. False: no memory.
    [[nodiscard]] bool assign(std::span<const float> matrices, std::size_t n) noexcept {
        const std::size_t heads = matrices.size() / (n * n), stride = round_up(n, line_lanes);
        if (!lines_.resize(heads * n * stride / line_lanes))
            return false;
        n_ = n;
        for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t j = 0; j < n; ++j)
                for (std::size_t i = 0; i < n; ++i)
                    lines_[(h * n + j) * stride / line_lanes + i / line_lanes].numbers[i % line_lanes] =
                        matrices[(h * n + i) * n + j];
        checksum_ = crc32c(0, std::as_bytes(matrices));
        return true;
    }
    [[nodiscard]] bool empty() const noexcept { return lines_.empty(); }
    // Of one KV head; none where empty().
    [[nodiscard]] basis_view of(std::size_t head) const noexcept {
        if (empty())
            return {};
        const std::size_t stride = round_up(n_, line_lanes);
        return {n_, stride, lines_[head * n_ * stride / line_lanes].numbers};
    }
    // 0: none.
    [[nodiscard]] std::uint32_t checksum() const noexcept { return checksum_; }

private:
    struct alignas(line_bytes) line {
        float numbers[line_lanes];
    };
    buffer<line> lines_;
    std::size_t n_ = 0;
    std::uint32_t checksum_ = 0;
};

} // namespace kv1::inline KV1_ABI::detail
