// SPDX-License-Identifier: Apache-2.0
//
// The chunks of tokens that attention takes one after the other, and the query rows of a task. With pages of 64
// tokens, a sequence of 1,300 is taken as tokens 0-511, 512-1023 and 1024-1299: chunks cross pages.
#pragma once

#include <kv1/detail/page_fields.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>

#include <bit>
#include <cstddef>

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

// In the place of a tile's first token: the tile only completes a granule.
inline constexpr std::size_t no_token = static_cast<std::size_t>(-1);

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
    std::size_t next_lines; // of these bytes, the lines that this walk fetches
};

// Groups of channels are walked one by one, as sections. While group g of `count` is walked, a share of the
// next section is prefetched, with the metadata of one of its groups.
struct group_share {
    section_layout section; // where the share begins
    std::size_t lines;      // of each tile
};
inline group_share fetched_with(const chunk_view& view, std::size_t g, std::size_t count) noexcept {
    const std::size_t its_groups = view.next_layout->groups();
    const section_layout its = view.next_layout->group(g < its_groups ? g : its_groups - 1);
    const std::size_t lines = view.next_lines / count;
    group_share s{*view.next_layout, g + 1 < count ? lines : view.next_lines - g * lines};
    s.section.offset += g * lines * line_bytes;
    s.section.scale_offset = its.scale_offset;
    s.section.minimum_offset = its.minimum_offset;
    return s;
}

} // namespace kv1::inline KV1_ABI::detail
