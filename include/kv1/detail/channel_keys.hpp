// SPDX-License-Identifier: Apache-2.0
//
// Keys quantized per channel (quantization_axis). While a page is open its keys are kept in fp16; when it is
// full, seal_keys() makes codes of them, channel by channel. A sequence of 150 tokens in pages of 64 has codes
// in pages 0 and 1, and 22 keys in fp16 in page 2. Both kinds of page hold keys less their means and rotated.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/detail/page_fields.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/detail/prepared_encoding.hpp>
#include <kv1/float16.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

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

// Writes the codes of one channel for all tokens of a page. Precondition: their bits in K's lines are zero.
inline void or_channel_codes(const section_layout& s, std::byte* page, std::size_t channel,
                             const std::uint8_t* codes) noexcept {
    const format_traits t = s.traits();
    for (int p = 0; p < t.slice_count(); ++p) {
        const std::uint32_t mask = field_mask(t.field_bits(p));
        const int code_shift = t.slices[static_cast<std::size_t>(p)].shift;
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

// Reads channels c and c + 1 of a page of fp16 keys: first[token] and second[token]. c is even. If the last
// channel is c, second gets the padding.
inline void load_two_channels(const target_kernels& kernels, const section_layout& open,
                              const std::byte* open_page, std::size_t c, float* first,
                              float* second) noexcept {
    for (std::size_t tile = 0; tile < open.tokens; tile += line_lanes) {
        alignas(64) float both[2 * line_lanes];
        const std::uint16_t* line =
            plain_element<std::uint16_t>(open, const_cast<std::byte*>(open_page), tile, c);
        kernels.load_floats(scalar_type::fp16, line, 2 * line_lanes, both);
        for (std::size_t i = 0; i < line_lanes; ++i) {
            first[tile + i] = both[2 * i];
            second[tile + i] = both[2 * i + 1];
        }
    }
}

// Quantizes `count` channels, at most tile_tokens. Channel c is the vector x[c * stride + token] of a page's
// tokens. On failure the result's channel is the index of the one that failed, from 0.
inline encode_result encode_channels(const target_kernels& kernels, const prepared_encoding& encoding,
                                     const section_layout& s, const float* x, std::size_t count,
                                     std::size_t stride, std::uint8_t* codes, row_metadata* metadata,
                                     append_scratch& scratch) noexcept {
    encode_result r;
    if (encoding.chooses_levels) {
        vector_to_encode rows[tile_tokens];
        for (std::size_t c = 0; c < count; ++c)
            rows[c] = {x + c * stride, nullptr, nullptr};
        const encoding_params params{s.format, encoding.params.levels, s.tokens, s.tokens, 0};
        std::size_t failed = 0;
        r = kernels.encode_vectors(params, rows, count, codes, stride, metadata, failed, scratch.encoder());
        r.channel = failed;
        return r;
    }
    for (std::size_t c = 0; c < count && r.code == errc::ok; ++c) {
        r = kernels.encode_affine(x + c * stride, s.tokens, s.traits().code_bits, codes + c * stride);
        metadata[c] = r.metadata;
        r.channel = c;
    }
    return r;
}

// seal_keys() under error weights. Channels are quantized from the last to the first. The error that a
// channel leaves in a token changes what the channels before it should be in that token
// (encode_reference.hpp): wanted[] holds that. A channel's levels are fitted to its wanted values of all
// tokens, since its errors cost the same in each. GPTQ (Frantar et al. 2023) does this for weights.
inline encode_result seal_weighted_keys(const target_kernels& kernels, const prepared_encoding& encoding,
                                        const error_feedback& feedback, const section_layout& s,
                                        std::byte* page, const section_layout& open,
                                        const std::byte* open_page, append_scratch& scratch) noexcept {
    const std::size_t stride = s.tokens, channels = round_up(s.channels, 2);
    std::unique_ptr<float[]> room(new (std::nothrow) float[2 * channels * stride + stride + channels]);
    if (room == nullptr)
        return {errc::out_of_memory, "no memory for a page of keys", no_channel, {}};
    float *x = room.get(), *wanted = x + channels * stride, *errors = wanted + channels * stride,
          *factors = errors + stride;
    for (std::size_t c = 0; c < s.channels; c += 2)
        load_two_channels(kernels, open, open_page, c, x + c * stride, x + (c + 1) * stride);
    std::copy_n(x, s.channels * stride, wanted);
    std::uint8_t* const codes = scratch.codes;
    for (std::size_t c = s.channels; c-- > 0;) {
        row_metadata m;
        encode_result r =
            encode_channels(kernels, encoding, s, wanted + c * stride, 1, stride, codes, &m, scratch);
        if (r.code != errc::ok) {
            r.channel = c;
            return r;
        }
        or_channel_codes(s, page, c, codes);
        store_channel_metadata(s, page, c, m);
        for (std::size_t t = 0; t < s.tokens; ++t)
            errors[t] = x[c * stride + t] - decode_value(s.format, codes[t], m);
        for (std::size_t j = 0; j < c; ++j)
            factors[j] = feedback.unit(j) * static_cast<float>(feedback.factor(j, c));
        kernels.add_multiples(wanted, stride, factors, c, errors, s.tokens);
    }
    return {};
}

// Makes codes and metadata of a full page of one KV head's fp16 keys. On failure the page's keys are
// unspecified, and the result names the channel.
inline encode_result seal_keys(const target_kernels& kernels, const prepared_encoding& encoding,
                               std::size_t head, const section_layout& s, std::byte* page,
                               const section_layout& open, const std::byte* open_page,
                               append_scratch& scratch) noexcept {
    std::memset(page + s.offset, 0, s.bytes());
    if (const error_feedback* feedback = encoding.feedback_of(head))
        return seal_weighted_keys(kernels, encoding, *feedback, s, page, open, open_page, scratch);
    constexpr std::size_t room = 4 * max_vector_length;
    float* const x = scratch.page; // [channel of the batch][token]
    std::uint8_t* const codes = scratch.codes;
    row_metadata metadata[tile_tokens];
    const std::size_t stride = round_up(s.tokens, 32);
    const std::size_t most = (std::min)(tile_tokens, room / stride / 2 * 2); // of a batch
    for (std::size_t first = 0; first < s.channels; first += most) {
        const std::size_t count = (std::min)(most, s.channels - first);
        for (std::size_t c = 0; c < count; c += 2)
            load_two_channels(kernels, open, open_page, first + c, x + c * stride, x + (c + 1) * stride);
        encode_result r = encode_channels(kernels, encoding, s, x, count, stride, codes, metadata, scratch);
        if (r.code != errc::ok) {
            r.channel += first;
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
