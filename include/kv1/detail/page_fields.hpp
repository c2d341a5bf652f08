// SPDX-License-Identifier: Apache-2.0
//
// Codes, plain values and metadata in the bytes of a page, one by one, and what they stand for. The
// definition that kernels are held to.
#pragma once

#include <kv1/float16.hpp>
#include <kv1/format.hpp>
#include <kv1/layout.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kv1::inline KV1_ABI::detail {

// Metadata of one vector as stored: bit patterns of fp16.
struct row_metadata {
    std::uint16_t scale = 0;
    std::uint16_t minimum = 0;
};

inline std::uint32_t load_lane(const std::byte* section, std::size_t lane) noexcept {
    std::uint32_t word = 0;
    std::memcpy(&word, section + lane * sizeof word, sizeof word);
    return word;
}

inline void store_lane(std::byte* section, std::size_t lane, std::uint32_t word) noexcept {
    std::memcpy(section + lane * sizeof word, &word, sizeof word);
}

constexpr std::uint32_t field_mask(int bits) noexcept { return bits >= 32 ? ~0u : (1u << bits) - 1u; }

// The code, or the plain bits, of (token, channel). `page` is the page's first byte.
inline std::uint32_t load_code(const section_layout& s, const std::byte* page, std::size_t token,
                               std::size_t channel) noexcept {
    const format_traits t = s.traits();
    std::uint32_t code = 0;
    for (int p = 0; p < t.slice_count(); ++p) {
        const field_place at = s.place(p, token, channel);
        const std::uint32_t field =
            load_lane(page + s.offset, at.lane) >> at.shift & field_mask(t.field_bits(p));
        code |= field << t.slices[static_cast<std::size_t>(p)].shift;
    }
    return code;
}

inline void store_code(const section_layout& s, std::byte* page, std::size_t token, std::size_t channel,
                       std::uint32_t code) noexcept {
    const format_traits t = s.traits();
    for (int p = 0; p < t.slice_count(); ++p) {
        const field_place at = s.place(p, token, channel);
        const std::uint32_t mask = field_mask(t.field_bits(p));
        const std::uint32_t field = code >> t.slices[static_cast<std::size_t>(p)].shift & mask;
        const std::uint32_t word = load_lane(page + s.offset, at.lane);
        store_lane(page + s.offset, at.lane, (word & ~(mask << at.shift)) | field << at.shift);
    }
}

inline row_metadata load_metadata(const section_layout& s, const std::byte* page, std::size_t token,
                                  std::size_t group = 0) noexcept {
    row_metadata m;
    const metadata_kind kind = s.traits().metadata;
    const std::size_t at = (group * s.tokens + token) * 2;
    if (kind != metadata_kind::none)
        std::memcpy(&m.scale, page + s.scale_offset + at, 2);
    if (kind == metadata_kind::scale_and_minimum)
        std::memcpy(&m.minimum, page + s.minimum_offset + at, 2);
    return m;
}

inline void store_metadata(const section_layout& s, std::byte* page, std::size_t token, row_metadata m,
                           std::size_t group = 0) noexcept {
    const metadata_kind kind = s.traits().metadata;
    const std::size_t at = (group * s.tokens + token) * 2;
    if (kind != metadata_kind::none)
        std::memcpy(page + s.scale_offset + at, &m.scale, 2);
    if (kind == metadata_kind::scale_and_minimum)
        std::memcpy(page + s.minimum_offset + at, &m.minimum, 2);
}

// A compact word, the metadata of compact formats: an fp16 number whose sign and six lowest bits hold the
// offset.
//
//   bit 15  14..10    9..6          5..0
//   sign of exponent  mantissa of   magnitude of
//   offset  of scale  scale         offset
//
// With L the largest level and w the offset, -63 ... 63, value = scale * (level + L * (w - 64) / 128). With w
// = 0 the levels lie about zero. The product is exact in fp32: code, offset and scale have 16 bits together.
struct compact_word {
    static constexpr std::uint16_t scale_mask = 0x7fc0u, smallest_scale = 0x0040u;
    static constexpr int largest_offset = 63;

    static constexpr float scale(std::uint16_t pair) noexcept {
        return half_to_float(static_cast<std::uint16_t>(pair & scale_mask));
    }
    // in steps
    static constexpr float offset(std::uint16_t pair, int top_level) noexcept {
        const int magnitude = pair & largest_offset, w = (pair & 0x8000u) != 0 ? -magnitude : magnitude;
        return static_cast<float>(top_level * (w - 64)) * (1.0f / 128.0f);
    }
};

// Of keys per channel: a channel's metadata.
inline row_metadata load_channel_metadata(const section_layout& s, const std::byte* page,
                                          std::size_t channel) noexcept {
    row_metadata m;
    const metadata_kind kind = s.traits().metadata;
    if (kind != metadata_kind::none)
        std::memcpy(&m.scale, page + s.scale_offset + 2 * channel, 2);
    if (kind == metadata_kind::scale_and_minimum)
        std::memcpy(&m.minimum, page + s.minimum_offset + 2 * channel, 2);
    return m;
}

inline void store_channel_metadata(const section_layout& s, std::byte* page, std::size_t channel,
                                   row_metadata m) noexcept {
    const metadata_kind kind = s.traits().metadata;
    if (kind != metadata_kind::none)
        std::memcpy(page + s.scale_offset + 2 * channel, &m.scale, 2);
    if (kind == metadata_kind::scale_and_minimum)
        std::memcpy(page + s.minimum_offset + 2 * channel, &m.minimum, 2);
}

// The value of every coded format is slope * level + base, in fp32.
struct affine_map {
    float slope;
    float base;
};

constexpr affine_map decode_metadata(kv_format f, row_metadata m) noexcept {
    const format_traits t = traits_of(f);
    switch (t.metadata) {
    case metadata_kind::scale_and_minimum:
        return {half_to_float(m.scale), half_to_float(m.minimum)};
    case metadata_kind::scale:
        return {2.0f * half_to_float(m.scale), -half_to_float(m.scale)};
    case metadata_kind::compact: {
        const float slope = compact_word::scale(m.scale);
        return {slope, slope * compact_word::offset(m.scale, t.top_level())};
    }
    case metadata_kind::none:
        break;
    }
    return {1.0f, 0.0f};
}

constexpr float decode_value(kv_format f, std::uint32_t code, row_metadata m) noexcept {
    if (f == kv_format::fp32)
        return std::bit_cast<float>(code);
    if (f == kv_format::fp16)
        return half_to_float(static_cast<std::uint16_t>(code));
    const affine_map p = decode_metadata(f, m);
    return static_cast<float>(traits_of(f).level(code)) * p.slope + p.base;
}

} // namespace kv1::inline KV1_ABI::detail
