// SPDX-License-Identifier: Apache-2.0
//
// Copies single vectors between the tiles of a page and the row format.
#pragma once

#include <kv1/cache_views.hpp>
#include <kv1/detail/page_fields.hpp>
#include <kv1/float16.hpp>
#include <kv1/layout.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/row.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

inline std::size_t bits_of(const section_layout& section) noexcept {
    const format_traits t = section.traits();
    return static_cast<std::size_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits);
}

// Whether buffers of these sizes hold exactly so many rows.
inline bool fits(const section_layout& section, std::size_t rows, std::size_t bytes, std::size_t scales,
                 std::size_t minima) noexcept {
    const metadata_kind kind = section.traits().metadata;
    const std::size_t pairs = rows * section.groups();
    return bytes == rows * packed_bytes(section.format, section.channels) &&
           scales == (kind != metadata_kind::none ? pairs : 0) &&
           minima == (kind == metadata_kind::scale_and_minimum ? pairs : 0);
}

// Writes row i of the buffers from a page.
inline void export_row(const section_layout& section, const std::byte* page, std::size_t token,
                       const row_buffers& out, std::size_t row) noexcept {
    const std::size_t bits = bits_of(section), bytes = packed_bytes(section.format, section.channels);
    const std::span<std::byte> packed = out.packed.subspan(row * bytes, bytes);
    std::fill(packed.begin(), packed.end(), std::byte{0});
    for (std::size_t c = 0; c < section.channels; ++c) {
        const std::uint64_t code = load_code(section, page, token, c), shifted = code << (c * bits % 8);
        for (std::size_t k = 0; k < (c * bits % 8 + bits + 7) / 8; ++k)
            packed[c * bits / 8 + k] |= static_cast<std::byte>(shifted >> (8 * k) & 0xffu);
    }
    for (std::size_t g = 0; g < section.groups(); ++g) {
        const row_metadata m = load_metadata(section, page, token, g);
        if (!out.scales.empty())
            out.scales[row * section.groups() + g] = float16::from_bits(m.scale);
        if (!out.minima.empty())
            out.minima[row * section.groups() + g] = float16::from_bits(m.minimum);
    }
}

inline void decode_row(const section_layout& section, const std::byte* page, std::size_t token,
                       std::span<float> out) noexcept {
    if (section.axis == quantization_axis::per_channel) {
        for (std::size_t c = 0; c < section.channels; ++c)
            out[c] = decode_value(section.format, load_code(section, page, token, c),
                                  load_channel_metadata(section, page, c));
        return;
    }
    for (std::size_t g = 0, c = 0; g < section.groups(); ++g) {
        const row_metadata m = load_metadata(section, page, token, g);
        for (const std::size_t end = c + section.group_channels; c < end; ++c)
            out[c] = decode_value(section.format, load_code(section, page, token, c), m);
    }
}

// The code, or the plain bits, of channel c of a row.
inline std::uint32_t row_code(const section_layout& section, const const_row_buffers& from, std::size_t row,
                              std::size_t c) noexcept {
    const std::size_t bits = bits_of(section);
    const std::byte* bytes =
        from.packed.data() + row * packed_bytes(section.format, section.channels) + c * bits / 8;
    std::uint64_t word = 0;
    for (std::size_t k = 0; k < (c * bits % 8 + bits + 7) / 8; ++k)
        word |= std::to_integer<std::uint64_t>(bytes[k]) << (8 * k);
    return static_cast<std::uint32_t>(word >> (c * bits % 8)) & field_mask(static_cast<int>(bits));
}

inline status check_rows_finite(const section_layout& section, std::size_t rows,
                                const const_row_buffers& from) noexcept {
    const std::size_t groups = section.groups();
    for (std::size_t i = 0; i < rows; ++i) {
        bool fine = true;
        for (std::size_t at = i * groups; at < (i + 1) * groups; ++at)
            fine = fine && (from.scales.empty() || is_finite(from.scales[at])) &&
                   (from.minima.empty() || is_finite(from.minima[at]));
        if (section.traits().code_bits == 0)
            for (std::size_t c = 0; fine && c < section.channels; ++c)
                fine = is_finite(decode_value(section.format, row_code(section, from, i, c), {}));
        if (!fine)
            return {errc::non_finite, "rows hold finite numbers", {.token = static_cast<std::int64_t>(i)}};
    }
    return {};
}

// Writes row i of the buffers to a page.
inline void store_row(const section_layout& section, std::byte* page, std::size_t token,
                      const const_row_buffers& from, std::size_t row) noexcept {
    for (std::size_t c = 0; c < section.channels; ++c)
        store_code(section, page, token, c, row_code(section, from, row, c));
    for (std::size_t g = 0; g < section.groups(); ++g) {
        row_metadata m;
        if (!from.scales.empty())
            m.scale = from.scales[row * section.groups() + g].bits();
        if (!from.minima.empty())
            m.minimum = from.minima[row * section.groups() + g].bits();
        store_metadata(section, page, token, m, g);
    }
}

} // namespace kv1::inline KV1_ABI::detail
