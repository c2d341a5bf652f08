// SPDX-License-Identifier: Apache-2.0
//
// The encodings of a layer (encoding.hpp), checked and made ready for kernels.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/crc32c.hpp>
#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/orthogonal_basis.hpp>
#include <kv1/detail/turning_means.hpp>
#include <kv1/encoding.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

namespace kv1::inline KV1_ABI::detail {

// The error weights of KV heads, factored and rounded for the encoder.
class feedback_matrices {
public:
    // Room for so many heads. False: no memory.
    [[nodiscard]] bool begin(std::size_t heads, std::size_t channels) noexcept {
        channels_ = channels;
        stride_ = round_up(channels, 4);
        return heads_.resize(heads) && factors_.resize(heads * channels * stride_) &&
               numbers_.resize(heads * 3 * channels);
    }
    // Takes the factors of a head, as factor_weights() gives them. Precondition: a head that there is room for.
    void set(std::size_t head, const float* factored) noexcept;
    // Null: no error weights.
    [[nodiscard]] const error_feedback* of(std::size_t head) const noexcept {
        return heads_.empty() ? nullptr : heads_.data() + head;
    }

private:
    std::size_t channels_ = 0, stride_ = 0;
    buffer<std::int8_t> factors_; // [head][channel][stride]
    buffer<float> numbers_;       // [head][units, sums, costs][channel]
    buffer<error_feedback> heads_;
};

// The encoding of a layer's keys, or of its values. Kernels get pointers into it.
struct prepared_encoding {
    encoding_params params{};
    buffer<float> means;         // [kv_heads][channels], or empty; zero in channels that turn
    turning_means turning;       // of keys that turn with their position
    basis_matrices basis;        // or empty
    feedback_matrices feedback;  // or empty
    bool chooses_levels = false; // encode_vectors chooses codes; else the format's own rule does

    // Of the means and of how they turn, which a saved cache must find again when it is loaded. 0: no means.
    std::uint32_t means_checksum = 0;

    [[nodiscard]] bool prepares() const noexcept {
        return params.hadamard != 0 || has_means() || !basis.empty();
    }
    [[nodiscard]] bool has_means() const noexcept { return !means.empty() || !turning.empty(); }
    // The part of a mean that all positions share; null: none.
    [[nodiscard]] const float* mean(std::size_t head) const noexcept {
        return means.empty() ? nullptr : means.data() + head * params.channels;
    }
    // The mean of a vector at a position; null: none. room: [channels], which the result may point to.
    template <class TurnMean>
    [[nodiscard]] const float* mean_at(std::size_t head, std::uint64_t position, float* room,
                                       const TurnMean& turn) const noexcept {
        if (turning.empty())
            return mean(head);
        if (means.empty())
            std::fill_n(room, params.channels, 0.0f);
        else
            std::copy_n(mean(head), params.channels, room);
        turn(turning.data()[head], position, room);
        return room;
    }
    [[nodiscard]] const error_feedback* feedback_of(std::size_t head) const noexcept {
        return feedback.of(head);
    }
    // Undoes what was done to a vector before it was stored: rotates it back, leaves the basis, and adds the
    // mean of its position.
    void restore(std::span<float> x, std::size_t head, std::uint64_t position) const noexcept {
        if (params.hadamard != 0)
            hadamard_transform(x, params.hadamard);
        float room[max_vector_length];
        if (const basis_view b = basis.of(head)) {
            std::copy(x.begin(), x.end(), room);
            from_basis(b, room, x.data());
        }
        if (const float* m = mean_at(head, position, room, set_mean_at))
            for (std::size_t c = 0; c < x.size(); ++c)
                x[c] += m[c];
    }
};

#include <kv1/detail/precise_math_begin.inl>

// Factors the error weights of one KV head (encode_reference.hpp).
//
//   input    weights W, [n][n], symmetric. First W is taken into the basis, if there is one, and rotated as
//            vectors are, if width is not 0.
//   factors  W = R^T D R, R upper triangular with ones on its diagonal, D diagonal (a Cholesky factorization)
//   output   feedback, [n][n]:  below the diagonal  feedback[i][j] = R[j][i]
//                               on it               feedback[j][j] = D[j] / (mean of W's diagonal)
//                               above it            0
//
// Example: W = {4, 2; 2, 2} has R = {1, 0.5; 0, 1} and D = {4, 1}, so feedback[1][0] = 0.5 (before the
// addition below).
//
// A hundredth of the mean diagonal is added to W's diagonal first. Without it a channel whose errors cost
// nothing would have D = 0, and no other could divide by it. Errors: invalid_argument if W is not positive
// semidefinite, out_of_memory.
inline status factor_weights(std::span<const float> weights, std::size_t n, std::size_t width,
                             float* feedback, const basis_view& basis = {}) noexcept {
    constexpr status indefinite(errc::invalid_argument, "error weights are positive semidefinite");
    buffer<double> w;
    buffer<float> line_buffer;
    if (!w.resize(weights.size()) || !line_buffer.resize(2 * n))
        return {errc::out_of_memory, "an allocation failed"};
    std::copy(weights.begin(), weights.end(), w.begin());
    if (basis || width != 0) { // rows, then columns
        const std::span<float> line(line_buffer.data(), n), inside(line_buffer.data() + n, n);
        for (const bool columns : {false, true})
            for (std::size_t i = 0; i < n; ++i) {
                const std::size_t first = columns ? i : i * n, step = columns ? n : 1;
                for (std::size_t k = 0; k < n; ++k)
                    line[k] = static_cast<float>(w[first + k * step]);
                if (basis) {
                    to_basis(basis, line.data(), inside.data());
                    std::copy(inside.begin(), inside.end(), line.begin());
                }
                if (width != 0)
                    hadamard_transform(line, width);
                for (std::size_t k = 0; k < n; ++k)
                    w[first + k * step] = line[k];
            }
    }
    double trace = 0.0;
    for (std::size_t i = 0; i < n; ++i)
        trace += w[i * n + i];
    if (!(trace >= 0.0))
        return indefinite;
    const double ridge = trace == 0.0 ? 1.0 : 0.01 * trace / static_cast<double>(n);
    const double mean = trace / static_cast<double>(n) + ridge;
    for (std::size_t i = 0; i < n; ++i)
        w[i * n + i] += ridge;
    for (std::size_t j = 0; j < n; ++j) { // Cholesky, in the lower half
        for (std::size_t k = 0; k < j; ++k)
            w[j * n + j] -= w[j * n + k] * w[j * n + k];
        if (!(w[j * n + j] > 0.0))
            return indefinite;
        w[j * n + j] = std::sqrt(w[j * n + j]);
        for (std::size_t i = j + 1; i < n; ++i) {
            for (std::size_t k = 0; k < j; ++k)
                w[i * n + j] -= w[i * n + k] * w[j * n + k];
            w[i * n + j] /= w[j * n + j];
        }
    }
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t i = 0; i < n; ++i)
            feedback[i * n + j] = i > j    ? static_cast<float>(w[i * n + j] / w[j * n + j])
                                  : i == j ? static_cast<float>(w[j * n + j] * w[j * n + j] / mean)
                                           : 0.0f;
    return {};
}

// What channel j's error weights are rounded to: R_ji = unit * (a whole number of -127 to 127), and the sum of row j of R
// with the one on its diagonal.
struct rounded_row {
    float unit, sum;
};

// Rounds column j of a matrix that factor_weights() made, which is row j of R: put(i, F_ji) for each i > j. The largest
// becomes 127 or -127.
template <class Put>
rounded_row round_factors(const float* factored, std::size_t n, std::size_t j, Put&& put) noexcept {
    float largest = 0.0f;
    for (std::size_t i = j + 1; i < n; ++i)
        largest = (std::max)(largest, std::fabs(factored[i * n + j]));
    const float unit = largest / 127.0f;
    const bool counts = unit > 1e-30f; // smaller ones change nothing
    int sum = 0;
    for (std::size_t i = j + 1; i < n; ++i) {
        const int factor = counts ? static_cast<int>(std::round(factored[i * n + j] / as_written(unit))) : 0;
        sum += factor;
        put(i, factor);
    }
    const float kept = counts ? unit : 0.0f;
    return {kept, 1.0f + product_of(kept, static_cast<float>(sum))};
}

inline void feedback_matrices::set(std::size_t head, const float* factored) noexcept {
    const std::size_t n = channels_;
    std::int8_t* const factors = factors_.data() + head * n * stride_;
    float *const units = numbers_.data() + head * 3 * n, *const sums = units + n, *const costs = sums + n;
    for (std::size_t j = 0; j < n; ++j) {
        const rounded_row row = round_factors(factored, n, j, [&](std::size_t i, int factor) {
            factors[j * stride_ + i] = static_cast<std::int8_t>(factor);
        });
        units[j] = row.unit;
        sums[j] = row.sum;
        costs[j] = factored[j * n + j];
    }
    heads_.data()[head] = {stride_, factors, units, sums, costs};
}

#include <kv1/detail/precise_math_end.inl>

// Checks an encoding and makes it ready. heads: KV heads. channels: of a vector. group: channels that share
// metadata, 0: all. Errors: invalid_argument, shape_mismatch, non_finite, out_of_memory.
inline status prepare_encoding(kv_format format, const vector_encoding& e, std::size_t heads,
                               std::size_t channels, std::size_t group, prepared_encoding& out) noexcept {
    const format_traits& t = traits_of(format);
    if (e == vector_encoding{} && t.metadata != metadata_kind::compact)
        return {};
    if (t.code_bits == 0)
        return {errc::invalid_argument, "plain formats take no encoding"};
    if (e.levels != level_choice::min_max && !t.fits_levels())
        return {errc::invalid_argument, "levels can be chosen for affine and compact formats"};
    if (e.hadamard != 0 && (!std::has_single_bit(e.hadamard) || channels % e.hadamard != 0))
        return {errc::invalid_argument, "a Hadamard width is a power of two that divides the head dim"};
    if (!e.means.empty() && e.means.size() != heads * channels)
        return {errc::shape_mismatch, "means are one a channel of each KV head"};
    if (!e.error_weights.empty() && e.error_weights.size() != heads * channels * channels)
        return {errc::shape_mismatch, "error weights are a square matrix for each KV head"};
    if (!e.error_weights.empty() && e.levels == level_choice::min_max)
        return {errc::invalid_argument, "error weights need least squares or a clip search"};
    if (!e.error_weights.empty() && group != 0 && group != channels)
        return {errc::invalid_argument, "error weights need one scale for all channels of a vector"};
    if (!e.basis.empty() && e.basis.size() != heads * channels * channels)
        return {errc::shape_mismatch, "a basis is a square matrix for each KV head"};
    for (const std::vector<float>* all : {&e.means, &e.error_weights, &e.basis})
        if (first_non_finite(*all) != all->size())
            return {errc::non_finite, "means, error weights and bases are finite"};
    for (std::size_t first = 0; first < e.basis.size(); first += channels * channels)
        if (!is_orthogonal(std::span(e.basis).subspan(first, channels * channels), channels))
            return {errc::invalid_argument, "a basis is an orthogonal matrix, to 0.002 in each number"};
    out.params = {format, e.levels, channels, group == 0 ? channels : group, e.hadamard};
    out.chooses_levels = e.levels != level_choice::min_max || t.metadata == metadata_kind::compact;
    const std::size_t matrix = channels * channels;
    buffer<float> factored;
    if (!out.means.assign(e.means) || (!e.basis.empty() && !out.basis.assign(e.basis, channels)) ||
        (!e.error_weights.empty() && (!out.feedback.begin(heads, channels) || !factored.resize(matrix))))
        return {errc::out_of_memory, "an allocation failed"};
    out.means_checksum = e.means.empty() ? 0 : crc32c(0, std::as_bytes(out.means.view()));
    for (std::size_t h = 0; h < (e.error_weights.empty() ? 0 : heads); ++h) {
        if (const status s = factor_weights(std::span(e.error_weights).subspan(h * matrix, matrix), channels,
                                            e.hadamard, factored.data(), out.basis.of(h));
            !s)
            return s;
        out.feedback.set(h, factored.data());
    }
    return {};
}

// Takes the means of channels that turn apart from the others. Precondition: rotary turns channels of a key.
// Errors: out_of_memory.
inline status prepare_turning(const rotary_embedding& rotary, std::size_t heads,
                              prepared_encoding& keys) noexcept {
    if (rotary.empty() || keys.means.empty())
        return {};
    const std::span<float> means(keys.means.data(), keys.means.size());
    if (!keys.turning.take(rotary, heads, keys.params.channels, means))
        return {errc::out_of_memory, "an allocation failed"};
    if (std::all_of(means.begin(), means.end(), [](float x) { return x == 0.0f; }))
        keys.means.clear();
    const std::uint64_t kind[] = {static_cast<std::uint64_t>(rotary.pairs), rotary.first_channel};
    keys.means_checksum = crc32c(keys.means_checksum, std::as_bytes(std::span(rotary.frequencies)));
    keys.means_checksum = crc32c(keys.means_checksum, std::as_bytes(std::span(kind)));
    return {};
}

// What restores the first n channels of keys, for values that lie in keys. Precondition: n is a multiple of
// the channels that are rotated together. Errors: out_of_memory.
inline status make_first_channels(const prepared_encoding& keys, std::size_t heads, std::size_t n,
                                  prepared_encoding& out) noexcept {
    out.params = keys.params;
    out.params.channels = n;
    if (keys.means.empty())
        return {};
    if (!out.means.resize(heads * n))
        return {errc::out_of_memory, "an allocation failed"};
    for (std::size_t h = 0; h < heads; ++h)
        std::copy_n(keys.mean(h), n, out.means.data() + h * n);
    return {};
}

} // namespace kv1::inline KV1_ABI::detail
