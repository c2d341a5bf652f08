// SPDX-License-Identifier: Apache-2.0
//
// What a target provides: tables of functions over raw pointers. No SIMD type crosses this boundary.
//
// Attention is decomposed into a driver per target (attend_rows: online softmax over blocks of tokens) and
// two kernels per format and precision, key_scores and value_sums, so that K and V formats combine freely
// without a kernel for every pair.
#pragma once

#include <kv1/layout.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI {

/// How attention computes. fast: dot products of codes with 8-bit queries and weights in the integer domain;
/// exact: fp32 arithmetic on the decoded values. Plain formats always use fp32 arithmetic.
enum class precision : std::uint8_t { fast, exact };

namespace detail {

// Queries of one KV head are processed in blocks of at most max_rows rows (a row is one query token and
// head), tokens in blocks of at most max_block_tokens; scratch for them lives on the stack.
inline constexpr std::size_t max_rows = 16;
inline constexpr std::size_t max_block_tokens = 128;
inline constexpr std::size_t max_head_dim = 4096;
inline constexpr std::size_t scratch_floats = 4096; // rows * padded head_dim fits, with at least one row

// Rows of a block for a head_dim, padding included.
constexpr std::size_t rows_for(std::size_t head_dim) noexcept {
    const std::size_t fit = scratch_floats / round_up(head_dim, 32);
    return fit < 1 ? 1 : fit < max_rows ? fit : max_rows;
}

// K or V of a run of tokens that begins at a tile boundary of a page: `page` is the page's first byte.
struct section_view {
    const section_layout* layout;
    const std::byte* page;
    std::size_t first_token; // a multiple of tile_tokens
    std::size_t tokens;      // rounded up to tile_tokens; lanes past the stored tokens hold finite garbage
};

// Query rows prepared for one KV head: scaled by the softmax scale, padded with zeros to a multiple of 32.
struct query_rows {
    std::size_t rows;
    std::size_t stride;  // floats between rows: padded key_dim
    const float* values; // [rows][stride]
    const float* sums;   // [rows]: sum of the values
    const std::int8_t*
        codes[2]; // by part, [rows][stride]: values / code_scale rounded, in dot4 order (fast only)
    const float* code_scales;      // [rows]
    const std::int32_t* code_sums; // [rows]
};

// Softmax weights of a block, zero where a row does not see a token.
struct weight_rows {
    std::size_t rows;
    std::size_t stride;   // floats between rows
    const float* weights; // [rows][stride], zero past the block's tokens up to a multiple of 32
    const float* rescale; // [rows]: factor for what sums hold from earlier blocks
};

// Outcome of encoding one vector; channel is the offending one.
struct encode_result {
    errc code = errc::ok;
    const char* rule = "";
    std::size_t channel = 0;
    row_metadata metadata{};
};

// A description of one unit of attention work: some query rows of one KV head against a range of tokens.
struct attention_job {
    const struct target_kernels* target;
    const struct format_kernels* key_kernels;
    const struct format_kernels* value_kernels;
    precision mode;

    const page_layout* layout;
    const std::byte* pages;           // first byte of this KV head's page in block 0 of the layer's arena
    std::size_t block_stride;         // bytes between blocks
    const std::uint32_t* block_table; // block of page i of the sequence
    std::size_t first_token;          // range of tokens, first_token a multiple of page_tokens
    std::size_t last_token;

    // queries [token][head][channel] of the group of heads that share this KV head
    const void* queries;
    scalar_type query_type;
    std::ptrdiff_t query_token_stride, query_head_stride; // in elements
    std::size_t group;                                    // heads per KV head
    std::size_t first_row, rows;                          // row = token * group + head in group
    float scale;

    // A query token i sees tokens t < visible_base + i * visible_step; where mask is given, tokens from
    // mask_first on only where mask[i * mask_stride + t - mask_first] is not 0.
    std::size_t visible_base, visible_step;
    const std::uint8_t* mask;
    std::size_t mask_first, mask_stride;

    // Either outputs [token][head][channel], or, where partials is set, per row: {max, sum, weighted sums}.
    void* outputs;
    scalar_type output_type;
    std::ptrdiff_t output_token_stride, output_head_stride;
    float* partials;
    std::size_t partial_stride;
    float* log_sum_exp; // may be null: [row] natural log of the softmax denominator
};

// Format-independent kernels of a target.
struct target_kernels {
    void (*load_floats)(scalar_type type, const void* source, std::size_t n, float* out) noexcept;
    void (*store_floats)(scalar_type type, const float* source, std::size_t n, void* out) noexcept;

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

    void (*attend_rows)(const attention_job& job) noexcept;
};

// Kernels of a target for one format.
struct format_kernels {
    // scores[r * score_stride + t] = row r . key t, for view.tokens tokens
    void (*key_scores[2])(const section_view& view, const query_rows& q, float* scores,
                          std::size_t score_stride) noexcept;
    // sums[r * sum_stride + channel] = rescale[r] * (the same) + sum over t of weight[r][t] *
    // value[t][channel]
    void (*value_sums[2])(const section_view& view, const weight_rows& w, float* sums,
                          std::size_t sum_stride) noexcept;
};

} // namespace detail

} // namespace kv1::inline KV1_ABI
