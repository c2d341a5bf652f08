// SPDX-License-Identifier: Apache-2.0
//
// Keys quantized per channel (quantization_axis): from a page of fp16 keys, kept while it is open, to the
// codes of a full one. Both hold keys as they are prepared, less their means and rotated.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/vector_codec.hpp>
#include <kv1/float16.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kv1::inline KV1_ABI::detail {

// The element of a plain section that holds (token, channel); T is its storage type.
template <class T>
T* plain_element(const section_layout& s, std::byte* page, std::size_t token, std::size_t channel) noexcept {
    constexpr std::size_t per_lane = 4 / sizeof(T);
    const std::size_t across = s.keys ? token : channel, along = s.keys ? channel : token;
    const std::size_t line = across / line_lanes * s.unit_lines() + along / per_lane;
    return reinterpret_cast<T*>(page + s.offset) + (line * line_lanes + across % line_lanes) * per_lane +
           along % per_lane;
}

// A channel's codes of all tokens, into bits of K's lines that are zero.
inline void or_channel_codes(const section_layout& s, std::byte* page, std::size_t channel,
                             const std::uint8_t* codes) noexcept {
    const format_traits t = s.traits();
    for (int p = 0; p < t.part_count(); ++p) {
        const std::uint32_t mask = field_mask(t.field_bits(p));
        const int code_shift = t.parts[static_cast<std::size_t>(p)].shift;
        for (std::size_t tile = 0; tile < s.tokens; tile += line_lanes) {
            const field_place at = s.place(p, tile, channel);
            std::byte* line = page + s.offset + at.lane * sizeof(std::uint32_t);
            std::uint32_t words[line_lanes];
            std::memcpy(words, line, sizeof words);
            for (std::size_t i = 0; i < line_lanes; ++i)
                words[i] |= (static_cast<std::uint32_t>(codes[tile + i]) >> code_shift & mask) << at.shift;
            std::memcpy(line, words, sizeof words);
        }
    }
}

// Codes and metadata of a full page of fp16 keys. On failure `channel` of the result is the one whose values
// no metadata fit, and the page's keys are unspecified.
inline encode_result seal_keys(const target_kernels& kernels, const vector_codec& codec,
                               const section_layout& s, std::byte* page, const section_layout& open,
                               const std::byte* open_page) noexcept {
    constexpr std::size_t most_floats = 4 * max_vector_length;
    alignas(64) float values[most_floats]; // [channel of the batch][token]
    alignas(64) std::uint8_t codes[most_floats];
    row_metadata metadata[tile_tokens];
    encode_row rows[tile_tokens];
    const std::size_t tokens = s.tokens, stride = round_up(tokens, 32);
    const std::size_t most =
        std::min(tile_tokens, most_floats / stride / 2 * 2); // of a batch; lanes hold two
    const encode_recipe recipe{s.format, codec.recipe.levels, tokens, tokens, 0};
    std::memset(page + s.offset, 0, s.bytes());
    for (std::size_t first = 0; first < s.channels; first += most) {
        const std::size_t count = std::min(most, s.channels - first);
        for (std::size_t c = 0; c < count; c += 2)
            for (std::size_t tile = 0; tile < tokens; tile += line_lanes) {
                alignas(64) float both[2 * line_lanes];
                kernels.load_floats(scalar_type::fp16,
                                    plain_element<const std::uint16_t>(
                                        open, const_cast<std::byte*>(open_page), tile, first + c),
                                    2 * line_lanes, both);
                for (std::size_t i = 0; i < line_lanes; ++i) {
                    values[c * stride + tile + i] = both[2 * i];
                    values[(c + 1) * stride + tile + i] = both[2 * i + 1];
                }
            }
        for (std::size_t c = 0; c < count; ++c)
            rows[c] = {values + c * stride, nullptr, nullptr};
        std::size_t failed = 0;
        encode_result r;
        if (codec.by_recipe) {
            r = kernels.encode_rows(recipe, rows, count, codes, stride, metadata, failed);
        } else {
            for (; failed < count && r.code == errc::ok; ++failed) {
                r = kernels.encode_affine(rows[failed].x, tokens, s.traits().code_bits,
                                          codes + failed * stride);
                metadata[failed] = r.metadata;
            }
            --failed;
        }
        if (r.code != errc::ok) {
            r.channel = first + failed;
            return r;
        }
        for (std::size_t c = 0; c < count; ++c) {
            or_channel_codes(s, page, first + c, codes + c * stride);
            store_channel_metadata(s, page, first + c, metadata[c]);
        }
    }
    return {};
}

} // namespace kv1::inline KV1_ABI::detail
