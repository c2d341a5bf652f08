// SPDX-License-Identifier: Apache-2.0
//
// What a task of attention is given: the job, the memory it works in, and the forms that queries and scores take on
// their way through the kernels.
#pragma once

#include <kv1/detail/kernels/chunk.hpp>
#include <kv1/detail/kernels/slot_rules.hpp>
#include <kv1/detail/orthogonal_basis.hpp>
#include <kv1/detail/page_hole.hpp>
#include <kv1/detail/turning_means.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>
#include <kv1/precision.hpp>
#include <kv1/target.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

// A tile with large scores of a query row, kept to be scored once more (kernels/correct.inl).
struct kept_tile {
    alignas(64) float scores[tile_tokens];
    tile_ref tile;
    std::size_t token; // its first one
};
inline constexpr std::size_t most_kept = 8; // of a query row

// A channel's room in the tables of a query row by pairs (kernels/pairs.inl).
inline constexpr std::size_t pair_table_bytes = 8;

// The memory that attend_rows works in, too large for a thread's stack.
struct attention_scratch {
    alignas(64) float query[scratch_floats];
    alignas(64) float sums[scratch_floats];
    alignas(64) float scores[max_rows * score_stride];
    alignas(64) std::int8_t codes[scratch_floats];
    alignas(64) std::uint8_t tables[pair_table_bytes * scratch_floats];
    alignas(64) float group_scores[max_rows * score_stride]; // of one of several groups of channels
    // of keys quantized per channel: queries times a page's scales, and its metadata
    alignas(64) float scaled[scratch_floats];
    alignas(64) float slopes[max_vector_length], bases[max_vector_length];
    // of means that turn: the waves that a row's query makes of them at position 0, and at a run of tokens
    alignas(64) float still_waves[scratch_floats], waves[scratch_floats];
    alignas(64) std::byte transposed[transposed_room];         // a chunk's values, where they lie in keys
    alignas(64) std::int8_t fine_codes[2 * max_vector_length]; // of one row (kernels/correct.inl)
    alignas(64) std::int8_t fine_room[2 * max_vector_length];
    kept_tile kept[max_rows][most_kept];
    alignas(64) float kept_tops[max_rows]
                               [tile_tokens]; // the largest scores of these; lowest_score where there is none
};

// Query rows prepared for one KV head: multiplied by the softmax scale, and padded with zeros to a multiple
// of 32. If keys have groups of channels, kernels get one group after the other, as if it were the whole
// vector.
struct query_rows {
    std::size_t rows;
    std::size_t stride;  // floats between rows: channels, padded
    const float* values; // [rows][stride]
    const float* sums;   // [rows]: sum of the values
    // values / code_scale rounded (fast only), in row tiles, stride bytes a row. On the scalar target: plain
    // [rows][stride]. Of pairs (kernels/pairs.inl): their multipliers.
    const std::int8_t* codes;
    const std::uint8_t*
        tables; // of pairs, in row tiles, pair_table_bytes * stride a row; null where not in pairs
    const float* code_scales; // [rows]
    // [rows]: -code_scale * top level / 2 * sum of codes, which centres the stored levels
    const float* code_offsets;
};

// Whether keys are taken by channel pairs (kernels/pairs.inl): the format's part of the answer, and the
// target's.
constexpr bool takes_pairs(const format_traits& keys) noexcept { return keys.code_bits == 2; }
constexpr bool takes_pairs(target t) noexcept {
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VL__) && defined(__AVX512DQ__) &&       \
    defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
    if (t == target::baseline)
        return true;
#endif
    return t == target::avx512_vbmi;
}

// The target that computes without channel pairs. Keys per channel need another query for every page, whose
// tables would cost more than they save.
constexpr target without_pairs(target t) noexcept {
    return t == target::avx512_vbmi ? target::avx512_vnni : t;
}

// The scores of a chunk, from which kernels make softmax weights: exp(score - maximum), or zero for a token
// that the row does not see.
struct softmax_rows {
    std::size_t rows;
    float* scores;        // [rows][score_stride], by slot; scratch of the kernel afterwards
    const float* maxima;  // [rows]: largest score so far
    const float* rescale; // [rows]: factor for what sums and denominators hold from earlier chunks
    float* denominators;  // [rows]: updated by the chunk's weights
};

// One task of attention: some query rows of one KV head against a range of tokens.
struct attention_job {
    const struct target_kernels* target;
    const struct format_kernels* key_kernels;
    const struct format_kernels* value_kernels;
    precision mode;
    class scratch_pool* scratches; // where a task's scratch comes from; not for kernels
    attention_scratch* scratch;    // of this job alone

    const page_layout* layout;
    const std::byte* pages;           // first byte of this KV head's page in block 0 of the layer's arena
    std::size_t block_stride;         // bytes between blocks
    const std::uint32_t* block_table; // block of page i of the sequence
    std::size_t first_token;          // range of tokens, which begins with a granule of a page
    std::size_t last_token;
    // With keys per channel, if the last page is not full: its fp16 keys, of the tokens from open_from on.
    // Null: there is no such page.
    const std::byte* open_keys;
    const page_layout* open_layout;
    const struct format_kernels* open_kernels;
    std::size_t open_from;
    std::size_t first_visible;   // no row sees an earlier token
    std::size_t fetch_token;     // what is stored up to here is likely to be attended next
    const std::byte* next_pages; // where nothing is: the same of the next KV head from next_token on, or null
    std::size_t next_token;

    // queries [token][head][channel] of the group of heads that share this KV head
    const void* queries;
    scalar_type query_type;
    std::ptrdiff_t query_token_stride, query_head_stride; // in elements
    std::size_t head_group;                               // heads per KV head
    std::size_t first_row, rows;                          // row = token * head_group + head in it
    float scale;

    // Query token i sees tokens t < visible_base + i * visible_step. With a mask, it sees a token t >=
    // mask_first only if mask[i * mask_stride + t - mask_first] is not 0.
    std::size_t visible_base, visible_step;
    const std::uint8_t* mask;
    std::size_t mask_first, mask_stride;

    // Query token i has the position first_position + i. With a window that is not 0 it sees no token before
    // first_position + i + 1 - window.
    std::ptrdiff_t first_position;
    std::size_t window;
    float soft_cap;            // score -> soft_cap * tanh(score / soft_cap) where positive
    const float* alibi_slopes; // [head_group] or null: score += slope * (t - position)
    const float* sink_logits;  // [head_group] or null: logits that the softmax sees and no value belongs to

    // Positions and additive masks, of query heads first_head and on (slot_rules.hpp); null: none.
    const slot_rules* slots;
    std::size_t first_head;

    // What encodings did to keys and values, which attention undoes.
    std::size_t key_hadamard, value_hadamard; // channels rotated together; 0: not rotated
    const float *key_means, *value_means;     // [channels] of this KV head, or null
    const turning_mean* key_turning;          // of this KV head, or null
    basis_view key_basis, value_basis;        // of this KV head, or none
    const float* queries_in_basis;            // [row][channels], where keys have a basis; not rotated yet
    // Positions of tokens, which key_turning asks for (position_of()).
    std::size_t first_position_of_keys; // of the sequence's first token
    std::size_t skipped_pages;          // pages that are not dropped before the first of block_table
    const page_hole* holes;             // of the sequence, in order
    std::size_t hole_count;
    // Of slots whose order says nothing, in place of these: [block][page_tokens]; negative: of no token. Null: none.
    const std::int32_t* block_positions;

    // The result goes to outputs [token][head][channel], or to partials if that is set. A partial result of a
    // row is {maximum, sum, weighted sums}, with the maximum in units of log2 (softmax.hpp) and without sink
    // logits.
    void* outputs;
    scalar_type output_type;
    std::ptrdiff_t output_token_stride, output_head_stride;
    float* partials; // means and rotation are undone when partial results are merged
    std::size_t partial_stride;
    float* log_sum_exp; // may be null: [row] natural log of the softmax denominator
};

// Where the slots from a place on stand, up to the end of its page. Precondition: the job has block_positions.
inline const std::int32_t* slot_positions(const attention_job& job, std::size_t place) noexcept {
    const std::size_t page_tokens = job.layout->page_tokens();
    return job.block_positions + job.block_table[place / page_tokens] * page_tokens + place % page_tokens;
}

// The position of the token at a place, an index among a job's tokens.
inline std::uint64_t position_of(const attention_job& job, std::size_t place) noexcept {
    if (job.block_positions != nullptr) {
        const std::int32_t at = *slot_positions(job, place);
        return at < 0 ? 0 : static_cast<std::uint64_t>(at);
    }
    const std::size_t page_tokens = job.layout->page_tokens(), kept = place / page_tokens + job.skipped_pages;
    std::size_t gone = 0; // pages dropped before it
    for (std::size_t i = 0; i < job.hole_count && job.holes[i].first <= kept + gone; ++i)
        gone += job.holes[i].last - job.holes[i].first;
    return job.first_position_of_keys + place + (job.skipped_pages + gone) * page_tokens;
}

} // namespace kv1::inline KV1_ABI::detail
