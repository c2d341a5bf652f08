// SPDX-License-Identifier: Apache-2.0
//
// What a target provides: tables of functions over raw pointers. No SIMD type crosses this boundary.
//
// Attention consists of a driver per target (attend_rows, an online softmax over chunks of tokens) and two
// kernels per format and precision, key_scores and value_sums. So formats of K and V combine freely, without
// a kernel for each combination.
#pragma once

#include <kv1/detail/kernels/attention_job.hpp>
#include <kv1/detail/kernels/chunk.hpp>
#include <kv1/detail/kernels/encoding_params.hpp>
#include <kv1/detail/kernels/weight_codes.hpp>
#include <kv1/detail/orthogonal_basis.hpp>
#include <kv1/detail/turning_means.hpp>

#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

// Format-independent kernels of a target.
struct target_kernels {
    void (*load_floats)(scalar_type type, const void* source, std::size_t n, float* out) noexcept;
    void (*store_floats)(scalar_type type, const float* source, std::size_t n, void* out) noexcept;
    // finite numbers past the type's largest become the largest
    void (*store_outputs)(scalar_type type, const float* source, std::size_t n, void* out) noexcept;

    encode_result (*encode_affine)(const float* x, std::size_t n, int bits, std::uint8_t* codes) noexcept;
    encode_result (*encode_scaled_binary)(const float* x, std::size_t n, std::uint8_t* codes) noexcept;
    encode_result (*encode_binary)(const float* x, std::size_t n, std::uint8_t* codes) noexcept;

    // codes (one byte each) to and from bit fields, low bits first; indexed by the field width 1, 2, 4, 8.
    // 3-bit codes run across bytes and are handled by pack_codes().
    void (*pack)(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* bytes) noexcept;
    void (*unpack)(int bits, const std::uint8_t* bytes, std::size_t n, std::uint8_t* codes) noexcept;

    // codes of a vector to lanes of token `token` of a page section
    void (*insert_codes)(const section_layout& s, std::byte* page, std::size_t token,
                         const std::uint8_t* codes) noexcept;

    // up to tile_tokens vectors of 2-bit sections, metadata included; fastest where rows of one tile follow
    // each other. On failure nothing is inserted, and failed is the first offending row
    encode_result (*append_affine2)(const vector_to_append* rows, std::size_t count,
                                    std::size_t& failed) noexcept;

    // Up to tile_tokens vectors: codes [count][stride] and metadata [count][groups]. Outputs are unspecified
    // on failure, and failed is the first offending row
    encode_result (*encode_vectors)(const encoding_params& params, const vector_to_encode* rows,
                                    std::size_t count, std::uint8_t* codes, std::size_t stride,
                                    row_metadata* metadata, std::size_t& failed,
                                    const encode_scratch& scratch) noexcept;
    // y[r * stride + i] += factors[r] * x[i] for each of n, a multiple of tile_tokens; products are rounded
    void (*add_multiples)(float* y, std::size_t stride, const float* factors, std::size_t rows,
                          const float* x, std::size_t n) noexcept;
    // the mean at a position: set_mean_at()
    void (*turn_mean)(const turning_mean& m, std::uint64_t position, float* mean) noexcept;
    // to_basis() and from_basis(), bit for bit the former alone; `rows` vectors, n and n apart
    void (*enter_basis)(const basis_view& b, const float* x, std::size_t rows, float* y) noexcept;
    void (*leave_basis)(const basis_view& b, const float* y, float* x) noexcept;
    // hadamard_transform() of n channels
    void (*rotate)(float* x, std::size_t n, std::size_t width) noexcept;

    void (*attend_rows)(const attention_job& job) noexcept;
};

// Kernels of a target for one format.
struct format_kernels {
    // scores[r * score_stride + slot] = row r . key; tops[r] = the largest of row r
    void (*key_scores[2])(const chunk_view& view, const query_rows& q, float* scores, float* tops) noexcept;
    // key_scores of the fast path for queries whose channels are rounded one by one; null for plain formats
    void (*code_scores)(const chunk_view& view, const query_rows& q, float* scores, float* tops) noexcept;
    // sums[r * sum_stride + channel] = rescale[r] * (the same) + sum over slots of weight * value; scores are
    // used up
    void (*value_sums[2])(const chunk_view& view, const softmax_rows& w, float* sums,
                          std::size_t sum_stride) noexcept;
};

} // namespace kv1::inline KV1_ABI::detail
