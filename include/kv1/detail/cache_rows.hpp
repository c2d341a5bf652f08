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
#include <array>
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

// The codes of 32 channels of a token, as load_code() and store_code() of each, but a lane of keys, or sixteen of values,
// at a time. `first` is a multiple of 32. Where the section has fewer channels left, the rest of a run has no meaning, and
// is not stored.
inline constexpr std::size_t run_channels = 32;
using code_run = std::array<std::uint32_t, run_channels>;

inline code_run load_run(const section_layout& s, const std::byte* page, std::size_t token,
                         std::size_t first) noexcept {
    const format_traits& t = s.traits();
    const std::size_t n = (std::min)(run_channels, s.channels - first);
    code_run codes{};
    for (int p = 0; p < t.slice_count(); ++p) {
        const int bits = t.field_bits(p), to = t.slices[static_cast<std::size_t>(p)].shift;
        const std::uint32_t mask = field_mask(bits);
        const std::size_t step = s.keys ? static_cast<std::size_t>(32 / t.field_bits(0)) : line_lanes;
        for (std::size_t c = 0; c < n; c += step) {
            const field_place at = s.place(p, token, first + c);
            if (s.keys && t.slice_count() == 2) {
                const std::uint32_t own = load_lane(page + s.offset, s.place(0, token, first + c).lane),
                                    shared =
                                        load_lane(page + s.offset, s.place(1, token, first + c + 3).lane);
                for (std::size_t i = 0; i < step; ++i) {
                    const shared_place in = place_of_3_bits(true, p, i, c / step % 2);
                    codes[c + i] |= ((in.shared ? shared : own) >> in.shift & mask) << to;
                }
            } else if (s.keys) {
                const std::uint32_t word = load_lane(page + s.offset, at.lane);
                for (std::size_t i = 0; i < step; ++i)
                    codes[c + i] |= (word >> key_field_shift(bits, i) & mask) << to;
            } else {
                for (std::size_t i = 0; i < step; ++i)
                    codes[c + i] |= (load_lane(page + s.offset, at.lane + i) >> at.shift & mask) << to;
            }
        }
    }
    return codes;
}

inline void store_run(const section_layout& s, std::byte* page, std::size_t token, std::size_t first,
                      const code_run& codes) noexcept {
    const format_traits& t = s.traits();
    const std::size_t n = (std::min)(run_channels, s.channels - first);
    for (int p = 0; p < t.slice_count(); ++p) {
        const int bits = t.field_bits(p), from = t.slices[static_cast<std::size_t>(p)].shift;
        const std::uint32_t mask = field_mask(bits);
        const std::size_t step = s.keys ? static_cast<std::size_t>(32 / t.field_bits(0)) : line_lanes;
        for (std::size_t c = 0; c < n; c += step) {
            const std::size_t fields = (std::min)(step, n - c);
            const field_place at = s.place(p, token, first + c);
            const auto put = [&](std::uint32_t& word, std::size_t i, int shift) {
                word = (word & ~(mask << shift)) | (codes[c + i] >> from & mask) << shift;
            };
            if (s.keys && t.slice_count() == 2) {
                const std::size_t own = s.place(0, token, first + c).lane,
                                  shared = s.place(1, token, first + c + 3).lane;
                std::uint32_t own_word = load_lane(page + s.offset, own),
                              shared_word = load_lane(page + s.offset, shared);
                for (std::size_t i = 0; i < fields; ++i) {
                    const shared_place in = place_of_3_bits(true, p, i, c / step % 2);
                    put(in.shared ? shared_word : own_word, i, in.shift);
                }
                store_lane(page + s.offset, own, own_word);
                store_lane(page + s.offset, shared, shared_word);
            } else if (s.keys) {
                std::uint32_t word = load_lane(page + s.offset, at.lane);
                for (std::size_t i = 0; i < fields; ++i)
                    put(word, i, key_field_shift(bits, i));
                store_lane(page + s.offset, at.lane, word);
            } else {
                for (std::size_t i = 0; i < fields; ++i) {
                    std::uint32_t word = load_lane(page + s.offset, at.lane + i);
                    put(word, i, at.shift);
                    store_lane(page + s.offset, at.lane + i, word);
                }
            }
        }
    }
}

// The first n codes of a run in row format, low bits first, and back. Unused bits of the last byte are 0.
inline void pack_run(const code_run& codes, std::size_t n, std::size_t bits, std::byte* out) noexcept {
    std::uint64_t held = 0;
    std::size_t used = 0;
    for (std::size_t i = 0; i < n; ++i) {
        held |= std::uint64_t{codes[i]} << used;
        for (used += bits; used >= 8; used -= 8, held >>= 8)
            *out++ = static_cast<std::byte>(held & 0xffu);
    }
    if (used != 0)
        *out = static_cast<std::byte>(held & 0xffu);
}
inline code_run unpack_run(const std::byte* in, std::size_t n, std::size_t bits) noexcept {
    code_run codes{};
    std::uint64_t held = 0;
    std::size_t left = 0;
    for (std::size_t i = 0; i < n; ++i) {
        for (; left < bits; left += 8)
            held |= std::to_integer<std::uint64_t>(*in++) << left;
        codes[i] = static_cast<std::uint32_t>(held) & field_mask(static_cast<int>(bits));
        held >>= bits;
        left -= bits;
    }
    return codes;
}

// Writes row i of the buffers from a page.
inline void export_row(const section_layout& section, const std::byte* page, std::size_t token,
                       const row_buffers& out, std::size_t row) noexcept {
    const std::size_t bits = bits_of(section), bytes = packed_bytes(section.format, section.channels);
    for (std::size_t c = 0; c < section.channels; c += run_channels) {
        pack_run(load_run(section, page, token, c), (std::min)(run_channels, section.channels - c), bits,
                 out.packed.data() + row * bytes + c * bits / 8);
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
    const std::size_t bits = bits_of(section), bytes = packed_bytes(section.format, section.channels);
    for (std::size_t c = 0; c < section.channels; c += run_channels) {
        store_run(section, page, token, c,
                  unpack_run(from.packed.data() + row * bytes + c * bits / 8,
                             (std::min)(run_channels, section.channels - c), bits));
    }
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
