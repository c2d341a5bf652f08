// SPDX-License-Identifier: Apache-2.0
//
// What a target provides: tables of functions over raw pointers. No SIMD type crosses this boundary.
//
// Attention consists of a driver per target (attend_rows, an online softmax over chunks of tokens) and two
// kernels per format and precision, key_scores and value_sums. So formats of K and V combine freely, without
// a kernel for each combination.
#pragma once

#include <kv1/detail/page_fields.hpp>
#include <kv1/layout.hpp>
#include <kv1/precision.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>
#include <kv1/target.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI::detail {

// A task takes at most max_rows query rows of one KV head (a query row is one query token and query head). It
// takes tokens by chunks of at most max_chunk_tokens. Chunks cross pages, so that the cost of a chunk does
// not depend on the size of pages.
inline constexpr std::size_t max_rows = 16;
inline constexpr std::size_t max_chunk_tokens = 512;
// Query rows of a task times padded head_dim: at least one row, and max_rows with the 576 channels of a
// latent that many heads share.
inline constexpr std::size_t scratch_floats = 9216;
inline constexpr std::size_t max_groups = max_vector_length / group_unit;  // of a vector
inline constexpr std::size_t max_group_rows = scratch_floats / group_unit; // rows * groups fits

// A granule: the tokens that share a line of V, at least a tile. Chunks end between granules.
constexpr std::size_t granule_of(const page_layout& l) noexcept {
    const std::size_t fields = l.values().traits().fields_per_lane();
    return fields > tile_tokens ? fields : tile_tokens;
}

// Softmax weights are rounded to 0 ... this on the integer path, and one more where a carry rounds the
// largest up. They are not negative and codes below 128 are signed bytes too, so weights may have all of an
// unsigned byte.
constexpr int top_weight_code(int code_bits) noexcept { return code_bits == 8 ? 126 : 254; }

// A component that all values share is weighted by what a chunk's weights add up to. So the codes are worth
// what the weights were: their step is the sum of the weights (times slopes) over the sum of the codes. Where
// codes add up to little, a few large ones stand among many that would be rounded to zero; there a code's
// rounding passes on what it left, at each place j of the tiles apart (x: a weight in steps, i: its code):
//
//   i = round(x + carry), carry = (carry + (x + carry - i)) / 2
//
// Half of it: all of it would make independent values' errors larger by sqrt(2) instead of 1.15. With weights
// far below a step a carry moves between 0 and 1/2, where it begins, in even distances. |carry| <= 1/2
// whatever the roundings, so a token that is not seen has no weight.
inline constexpr float few_codes = 2048.0f;
struct first_carries {
    alignas(64) float at[16]; // by place in a tile
};
inline constexpr first_carries weight_carries = [] {
    first_carries c{};
    for (int j = 0; j < 16; ++j)
        c.at[j] = static_cast<float>(2 * (j * 7 % 16) + 1) / 64.0f;
    return c;
}();

// A granule that the end of a page cuts still takes the slots of a whole one in scratch. If that can happen,
// chunks have half as many tokens.
inline constexpr std::size_t max_chunk_slots = max_chunk_tokens;
inline constexpr std::size_t max_chunk_tiles = max_chunk_slots / tile_tokens;
inline constexpr std::size_t score_stride = max_chunk_slots + 16; // rows do not meet in one cache set

// Values in keys are transposed into lines of V, chunk by chunk (kernels/latent.inl). The lines should stay
// in the second-level cache, so their bytes limit the tokens of a chunk. longest_chunk() gives that limit; 0:
// not even the shortest chunk fits.
inline constexpr std::size_t transposed_chunk_bytes = 65536;
constexpr std::size_t longest_chunk(const page_layout& l) noexcept {
    if (!l.values_in_keys())
        return max_chunk_tokens;
    const format_traits t = l.values().traits();
    const auto bits = static_cast<std::size_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits);
    const std::size_t token_bits = round_up(l.values().channels, line_lanes) * bits;
    const std::size_t fit = std::bit_floor(8 * transposed_chunk_bytes / token_bits);
    // pages may cut granules of two tiles
    const std::size_t shortest = granule_of(l) == tile_tokens ? tile_tokens : 4 * tile_tokens;
    return fit < shortest ? 0 : fit < max_chunk_tokens ? fit : max_chunk_tokens;
}

// The layout of these lines and their metadata: a section of V that holds a chunk's slots. It has one tile
// more, which keeps runs of 16 channels out of each other's cache sets.
constexpr section_layout transposed_values(const page_layout& l) noexcept {
    const section_layout& v = l.values();
    const std::size_t slots = longest_chunk(l);
    section_layout s(false, v.format, v.channels, slots < 4 * tile_tokens ? slots : slots + tile_tokens,
                     v.group_channels);
    s.scale_offset = s.bytes();
    s.minimum_offset = s.scale_offset + s.metadata_count() * sizeof(float16);
    return s;
}
constexpr std::size_t transposed_bytes(const section_layout& transposed) noexcept {
    return round_up(transposed.minimum_offset + transposed.metadata_count() * sizeof(float16), line_bytes);
}
// Room for any such section: the lines, a quarter more for the tile, and metadata, which take half as much at
// 2 bits in the smallest groups.
inline constexpr std::size_t transposed_room = 2 * transposed_chunk_bytes;

// One past the last token of the chunk that begins at `first`, which is a multiple of the granule within its
// page. Weights are rounded chunk by chunk, so every target forms the same chunks.
constexpr std::size_t chunk_end(const page_layout& layout, std::size_t first, std::size_t last) noexcept {
    const std::size_t page_tokens = layout.page_tokens(), granule = granule_of(layout);
    const bool whole = page_tokens % granule == 0;
    const std::size_t most = longest_chunk(layout) / (whole ? 1 : 2);
    if (last - first <= most)
        return last;
    if (whole)
        return first + most;
    std::size_t end = first;
    for (;;) {
        const std::size_t left = page_tokens - end % page_tokens;
        const std::size_t step = left < granule ? left : granule;
        if (end + step - first > most)
            return end;
        end += step;
    }
}

// The query rows of a task for a head_dim.
constexpr std::size_t rows_for(std::size_t head_dim) noexcept {
    const std::size_t fit = scratch_floats / round_up(head_dim, 32);
    return fit < 1 ? 1 : fit < max_rows ? fit : max_rows;
}

// The memory that attend_rows works in, too large for a thread's stack.
struct attention_scratch {
    alignas(64) float query[scratch_floats];
    alignas(64) float sums[scratch_floats];
    alignas(64) float scores[max_rows * score_stride];
    alignas(64) std::int8_t codes[2][scratch_floats];
    alignas(64) std::uint8_t tables[8 * scratch_floats];     // of pairs
    alignas(64) float group_scores[max_rows * score_stride]; // of one of several groups of channels
    // of keys quantized per channel: queries times a page's scales, and its metadata
    alignas(64) float scaled[scratch_floats];
    alignas(64) float slopes[max_vector_length], bases[max_vector_length];
    alignas(64) std::byte transposed[transposed_room]; // a chunk's values, where they lie in keys
};

// Query rows are taken in row tiles of up to four, of nearly equal sizes: 5 = 3 + 2, 7 = 4 + 3. The 8-bit
// numbers of a row tile lie together: [line][row of the tile][4 * (codes in a byte)]. A row's run is what one
// line is multiplied by.
inline constexpr std::size_t max_tile_rows = 4;
constexpr std::size_t row_tiles(std::size_t rows) noexcept {
    return (rows + max_tile_rows - 1) / max_tile_rows;
}
constexpr std::size_t row_tile_size(std::size_t rows, std::size_t tile) noexcept {
    const std::size_t tiles = row_tiles(rows);
    return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

// A tile of 16 tokens: the first byte of its page, and its first token in the page.
struct tile_ref {
    const std::byte* page;
    std::size_t token;
};

// The tiles of a chunk, in K's or V's section of their pages. Lanes past the stored tokens hold finite
// garbage. A tile that only completes a granule refers to the tile before it, and no row sees it.
struct chunk_view {
    const section_layout* layout;
    const tile_ref* tiles;
    std::size_t count;
    // the section that is walked next, and is prefetched meanwhile
    const section_layout* next_layout;
    const tile_ref* next_tiles;
    std::size_t next_count;
    std::size_t next_share; // bytes of that section that come with a tile
};

// Query rows prepared for one KV head: multiplied by the softmax scale, and padded with zeros to a multiple
// of 32. If keys have groups of channels, kernels get one group after the other, as if it were the whole
// vector.
struct query_rows {
    std::size_t rows;
    std::size_t stride;  // floats between rows: channels, padded
    const float* values; // [rows][stride]
    const float* sums;   // [rows]: sum of the values
    // values / code_scale rounded (fast only), by part; in row tiles, stride bytes a row. On the scalar
    // target: plain [rows][stride]. Of pairs (kernels/pairs.inl): their multipliers, [0] alone.
    const std::int8_t* codes[2];
    const std::uint8_t* tables; // of pairs, in row tiles, 8 stride bytes a row; null where not in pairs
    const float* code_scales;   // [rows]
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

// Groups of channels are walked one by one, as sections. While group g of `count` is walked, a share of the
// next section is prefetched, with the metadata of one of its groups. This gives that share as a section.
inline section_layout fetched_with(const chunk_view& view, std::size_t g, std::size_t count) noexcept {
    const std::size_t its_groups = view.next_layout->groups();
    const section_layout its = view.next_layout->group(g < its_groups ? g : its_groups - 1);
    section_layout s = *view.next_layout;
    s.offset += g * (view.next_share / count / line_bytes * line_bytes);
    s.scale_offset = its.scale_offset;
    s.minimum_offset = its.minimum_offset;
    return s;
}

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

struct vector_to_encode {
    const float* x;
    const float* mean; // null: none
    // [channels][channels], see encode_reference.hpp; null: no error weights, or several groups
    const float* feedback;
};

// Memory for encode_vectors: up to tile_tokens vectors of up to `channels` channels. Longer vectors are encoded
// one by one, by the definition. errors and candidate_words may be null if no vector has feedback.
struct encode_scratch {
    std::size_t channels;
    float *x, *errors;                      // [channels][tile_tokens]
    std::uint32_t *words, *candidate_words; // [channels / 4][tile_tokens]
};

// A vector, and the slot that it goes to.
struct vector_to_append {
    const section_layout* section;
    std::byte* page;
    std::size_t token; // in the page
    const float* x;
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
    std::size_t first_token;          // range of tokens, first_token a multiple of page_tokens
    std::size_t last_token;
    // With keys per channel, if the last page is not full: its fp16 keys, of the tokens from open_from on.
    // Null: there is no such page.
    const std::byte* open_keys;
    const page_layout* open_layout;
    const struct format_kernels* open_kernels;
    std::size_t open_from;
    std::size_t first_visible; // no row sees an earlier token
    std::size_t fetch_token;   // what is stored up to here is likely to be attended next

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

    // What encodings did to keys and values, which attention undoes.
    std::size_t key_hadamard, value_hadamard; // channels rotated together; 0: not rotated
    const float *key_means, *value_means;     // [channels] of this KV head, or null

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
    // hadamard_transform() of n channels
    void (*rotate)(float* x, std::size_t n, std::size_t width) noexcept;

    void (*attend_rows)(const attention_job& job) noexcept;
};

// Kernels of a target for one format.
struct format_kernels {
    // scores[r * score_stride + slot] = row r . key; tops[r] = the largest of row r
    void (*key_scores[2])(const chunk_view& view, const query_rows& q, float* scores, float* tops) noexcept;
    // sums[r * sum_stride + channel] = rescale[r] * (the same) + sum over slots of weight * value; scores are
    // used up
    void (*value_sums[2])(const chunk_view& view, const softmax_rows& w, float* sums,
                          std::size_t sum_stride) noexcept;
};

} // namespace kv1::inline KV1_ABI::detail
