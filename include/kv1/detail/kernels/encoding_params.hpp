// SPDX-License-Identifier: Apache-2.0
//
// What kernels that store vectors are given, and what they answer. detail/encode_reference.hpp defines what they do.
#pragma once

#include <kv1/detail/page_fields.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::size_t no_channel = static_cast<std::size_t>(-1);

// The outcome of encoding one vector. channel is the one that is refused, or no_channel if it is not a single
// one.
struct encode_result {
    errc code = errc::ok;
    const char* rule = "";
    std::size_t channel = 0;
    row_metadata metadata{};
};

// An encoding as kernels take it (detail/encode_reference.hpp).
struct encoding_params {
    kv_format format; // affine or compact
    level_choice levels;
    std::size_t channels;
    std::size_t group;    // channels that share levels; divides them
    std::size_t hadamard; // channels rotated together; 0: no rotation

    [[nodiscard]] constexpr std::size_t groups() const noexcept { return channels / group; }
};

// The error weights of a KV head as an encoder takes them: W = R^T D R, see encode_reference.hpp.
struct error_feedback {
    std::size_t stride; // from row to row of factors: the channels, rounded up to a multiple of four
    // R in 8 bits, [channels][stride]: row j holds what the channels after j do to channel j, and zeros before
    const std::int8_t* factors;
    const float* units; // [channels] R_ji = units[j] * factors[j][i]
    const float* sums;  // [channels] of a row of R, with the one on its diagonal
    const float* costs; // [channels] D, in units of the mean of W's diagonal

    [[nodiscard]] std::int32_t factor(std::size_t j, std::size_t i) const noexcept {
        return factors[j * stride + i];
    }
    [[nodiscard]] float unit(std::size_t j) const noexcept { return units[j]; }
    [[nodiscard]] float sum(std::size_t j) const noexcept { return sums[j]; }
    [[nodiscard]] float cost(std::size_t j) const noexcept { return costs[j]; }
};

// A vector as it was given, and what its KV head's encoding needs.
struct vector_to_encode {
    const float* x;
    const float* mean;              // null: none
    const error_feedback* feedback; // null: no error weights, or several groups
};

// The choices of levels that are tried together under error weights.
inline constexpr std::size_t weighted_together = 4;

// Memory for encode_vectors: up to tile_tokens vectors of up to `channels` channels. Longer vectors are encoded
// one by one, by the definition. wanted and candidate_words may be null if no vector has feedback.
struct encode_scratch {
    std::size_t channels;
    float *x, *wanted;              // [channels][tile_tokens]
    std::uint32_t* words;           // [channels / 4][tile_tokens]
    std::uint32_t* candidate_words; // [channels / 4][weighted_together][tile_tokens]
};

// A vector, and the slot that it goes to.
struct vector_to_append {
    const section_layout* section;
    std::byte* page;
    std::size_t token; // in the page
    const float* x;
};

} // namespace kv1::inline KV1_ABI::detail
