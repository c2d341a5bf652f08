// SPDX-License-Identifier: Apache-2.0
//
// The tile layout: how one page (page_tokens tokens of one layer and KV head) lies in memory.
//
// Everything is 64-byte lines of sixteen 32-bit lanes, so that one walk serves 16-, 8- and 4-lane processors
// and no kernel needs a horizontal sum:
//
//   K line  lane = token (16 tokens), the lane's bits = 32/b consecutive channels of that token, in row-format
//           order: byte j, field f (bits b*f.. of the byte) = channel (8/b)*j + f of the line's channels
//   V line  lane = channel (16 channels), the lane's bits = 32/b consecutive tokens: byte i, field f = token
//           4f + i, so that four consecutive tokens' weights make one broadcast dword
//
// b is the field width: the code bits, or 16 or 32 for plain formats (a plain V lane holds tokens in order). Example
// at 2 bits: the code of token 5, channel 17 lies in K line 1, lane 5, bits 2-3, and in V line 1, lane 1, bits 10-11
// (ARCHITECTURE.md has a drawing).
//
// 3-bit codes have lines of 16 codes a lane too, byte j and field f as at 2 bits. Such a line has no room for all of
// its codes, and two of them share a third line. Byte j of the three, with fields 0 ... 3 of the first line and 4 ... 7
// of the second:
//
//                bits 0-2    3-5    6-7
//   first line   0           1      low bits of 2
//   second line  4           5      low bits of 6
//   shared line  3           7      high bit of 2, high bit of 6
//
// So a shift and a mask give most codes. A tile of values needs its own line and the shared one. A page is
//
//   [K lines: by tile of 16 tokens, shared lines last] [V lines: by run of 16 channels, shared lines last]
//   [k_scale] [k_minimum] [v_scale] [v_minimum]   fp16 arrays [page_tokens], if the format has them; compact words lie
//                                                 in the place of scales
//
// and is padded to whole lines. K channels are padded to whole lanes, V channels to 16; page_layout::bytes()
// counts the padding. Bytes past the stored tokens of an open page are any finite numbers and have no
// meaning.
//
// With groups of channels, arrays are [group][page_tokens]; lines do not change. A group is a multiple of 32
// channels, so its codes are whole lanes of K and whole lines of V, and its share of a section is a section
// (section_layout::group). With keys per channel, the keys' arrays are [channels]; lines do not change.
//
// If the values are the first channels of the keys, a page is [K lines][k_scale][k_minimum], and its values
// are a view of these (section_layout::first).
//
// All of this is arithmetic: constexpr, no allocation.
#pragma once

#include <kv1/format.hpp>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace kv1::inline KV1_ABI {

/// A line, the unit of alignment and of the layout.
inline constexpr std::size_t line_bytes = 64;
/// 32-bit lanes of a line.
inline constexpr std::size_t line_lanes = 16;
/// A page holds a multiple of this many tokens.
inline constexpr std::size_t tile_tokens = 16;
/// Channels that share metadata are all of a vector's, or a multiple of this many.
inline constexpr std::size_t group_unit = 32;

/// Which values share a scale and minimum. per_token: the channels of one token. per_channel: the values of
/// one channel in all tokens of a page, when it is full (KIVI, Liu et al. 2024).
enum class quantization_axis : std::uint8_t { per_token, per_channel };

static_assert(std::endian::native == std::endian::little, "kv1 stores little-endian lanes");

namespace detail {

constexpr std::size_t round_up(std::size_t n, std::size_t unit) noexcept {
    return (n + unit - 1) / unit * unit;
}

// Where a field of a lane-structured section lies.
struct field_place {
    std::size_t lane; // index of the 32-bit lane in the section
    int shift;        // first bit of the field in the lane
};

// Bit position of the n-th field of width b in a K lane: plain row-format order, low bits first.
constexpr int key_field_shift(int b, std::size_t n) noexcept { return b * static_cast<int>(n); }

// Bit position of the n-th token of width b in a V lane: byte n % 4, field n / 4 of the byte.
constexpr int value_field_shift(int b, std::size_t n) noexcept {
    return b >= 8 ? b * static_cast<int>(n) : 8 * static_cast<int>(n % 4) + b * static_cast<int>(n / 4);
}

// Where bit slice p of a 3-bit code lies: in its own line or in the shared one, and its first bit in the lane. n: which
// of the 16 codes of its line's lane; odd: whether the line is the second of those that share.
struct shared_place {
    bool shared;
    int shift;
};
constexpr shared_place place_of_3_bits(bool keys, int p, std::size_t n, std::size_t odd) noexcept {
    const std::size_t byte = keys ? n / 4 : n % 4, field = keys ? n % 4 : n / 4;
    const int first = 8 * static_cast<int>(byte), high = 2 * p, line = static_cast<int>(odd);
    switch (field) {
    case 0:
        return {false, first + high};
    case 1:
        return {false, first + 3 + high};
    case 2:
        return p == 0 ? shared_place{false, first + 6} : shared_place{true, first + 6 + line};
    default:
        return {true, first + 3 * line + high};
    }
}

} // namespace detail

/// Geometry of the K or the V half of a page.
struct section_layout {
    kv_format format{};                                    ///< of this half
    bool keys = false;                                     ///< whether it is the K half
    std::size_t channels = 0;                              ///< head_dim
    std::size_t tokens = 0;                                ///< page_tokens
    std::size_t group_channels = 0;                        ///< that share metadata
    quantization_axis axis = quantization_axis::per_token; ///< per_channel: of keys alone, in one group
    std::size_t offset = 0;                                ///< of the lines in the page, in bytes
    std::size_t scale_offset = 0;                          ///< of the fp16 scales in the page, in bytes
    std::size_t minimum_offset = 0;                        ///< of the fp16 minima in the page, in bytes

    /// No section at all.
    constexpr section_layout() = default;
    /// Geometry for head_dim channels and page_tokens tokens; offsets are set by page_layout. group: channels
    /// that share metadata; 0: all.
    constexpr section_layout(bool is_keys, kv_format f, std::size_t head_dim, std::size_t page_tokens,
                             std::size_t group = 0,
                             quantization_axis a = quantization_axis::per_token) noexcept
        : format(f), keys(is_keys), channels(head_dim), tokens(page_tokens),
          group_channels(group == 0 ? head_dim : group), axis(a) {
        const detail::format_traits t = traits();
        const std::size_t fields = detail::round_up(keys ? channels : tokens, t.fields_per_lane());
        for (int p = 0; p < t.slice_count(); ++p)
            lines_[static_cast<std::size_t>(p)] = lines_of(p, fields);
        first_shared_ = lines_[0];
        unit_lines_ = lines_[0] + lines_[1];
    }

    /// The number of groups of channels.
    [[nodiscard]] constexpr std::size_t groups() const noexcept {
        return channels == 0 ? 1 : channels / group_channels;
    }
    /// The number of elements of an array of metadata.
    [[nodiscard]] constexpr std::size_t metadata_count() const noexcept {
        return axis == quantization_axis::per_channel ? channels : groups() * tokens;
    }
    /// The share of group g, as a section with one group: its channels and their metadata.
    [[nodiscard]] constexpr section_layout group(std::size_t g) const noexcept {
        section_layout s = *this;
        s.channels = group_channels;
        s.scale_offset += g * tokens * sizeof(float16);
        s.minimum_offset += g * tokens * sizeof(float16);
        if (!keys) {
            s.offset += g * (group_channels / line_lanes) * unit_lines_ * line_bytes;
            return s;
        }
        const std::size_t fields = detail::round_up(group_channels, traits().fields_per_lane());
        for (int p = 0; p < traits().slice_count(); ++p)
            s.lines_[static_cast<std::size_t>(p)] = lines_of(p, fields);
        s.offset += g * s.lines_[0] * line_bytes;
        s.first_shared_ = first_shared_ + g * s.lines_[1] - g * s.lines_[0];
        return s;
    }

    /// The first n channels of keys, in the same lines and with the same metadata. n channels are whole
    /// groups if there are several.
    [[nodiscard]] constexpr section_layout first(std::size_t n) const noexcept {
        section_layout s = *this;
        s.channels = n;
        s.group_channels = groups() == 1 ? n : group_channels;
        return s;
    }

    /// Properties of the format.
    [[nodiscard]] constexpr const detail::format_traits& traits() const noexcept {
        return detail::traits_of(format);
    }

    /// Lines of one unit without shared ones. A unit is a tile of a K section, or a run of 16 channels of a V
    /// section.
    [[nodiscard]] constexpr std::size_t own_lines() const noexcept { return lines_[0]; }
    /// Shared lines of one unit: half as many for 3-bit codes, none for others.
    [[nodiscard]] constexpr std::size_t shared_lines() const noexcept { return lines_[1]; }
    /// Lines from the first of a unit to its first shared one.
    [[nodiscard]] constexpr std::size_t first_shared() const noexcept { return first_shared_; }
    /// Lines of one unit, with shared ones and all groups.
    [[nodiscard]] constexpr std::size_t unit_lines() const noexcept { return unit_lines_; }
    /// The number of units: tiles of a K section, runs of 16 channels of a V section.
    [[nodiscard]] constexpr std::size_t units() const noexcept {
        return detail::round_up(keys ? tokens : channels, line_lanes) / line_lanes;
    }
    /// Bytes of the lines, padding included.
    [[nodiscard]] constexpr std::size_t bytes() const noexcept { return units() * unit_lines() * line_bytes; }

    /// Where bit slice p of (token, channel) lies, counted in lanes from the section's first line.
    [[nodiscard]] constexpr detail::field_place place(int p, std::size_t token,
                                                      std::size_t channel) const noexcept {
        const int b = traits().field_bits(0);
        const std::size_t per_lane = static_cast<std::size_t>(32 / b);
        const std::size_t across = keys ? token : channel; // runs over lanes and units
        const std::size_t along = keys ? channel : token;  // runs over the fields of a lane and over lines
        const std::size_t line = along / per_lane, n = along % per_lane;
        const auto lane = [&](std::size_t l) {
            return (across / line_lanes * unit_lines() + l) * line_lanes + across % line_lanes;
        };
        if (shared_lines() != 0) {
            const detail::shared_place at = detail::place_of_3_bits(keys, p, n, line % 2);
            return {lane(at.shared ? first_shared() + line / 2 : line), at.shift};
        }
        return {lane(line), keys ? detail::key_field_shift(b, n) : detail::value_field_shift(b, n)};
    }

private:
    // The lines of so many codes: of their own (p = 0), shared (1). Precondition: whole lanes.
    [[nodiscard]] constexpr std::size_t lines_of(int p, std::size_t fields) const noexcept {
        return fields * static_cast<std::size_t>(traits().field_bits(p)) / 32;
    }

    std::array<std::size_t, 2> lines_{}; // own, shared
    std::size_t first_shared_ = 0, unit_lines_ = 0;
};

/// Geometry of a page of one layer and KV head.
class page_layout {
public:
    /// No page at all.
    constexpr page_layout() = default;
    /// Preconditions: key_dim > 0 (a value_dim of 0 makes a page of keys), page_tokens a multiple of
    /// tile_tokens and > 0; groups (channels that share metadata; 0: all) are multiples of group_unit that
    /// divide the head dim; of keys per channel there is one.
    constexpr page_layout(kv_format key_format, std::size_t key_dim, kv_format value_format,
                          std::size_t value_dim, std::size_t page_tokens, std::size_t key_group = 0,
                          std::size_t value_group = 0,
                          quantization_axis key_axis = quantization_axis::per_token) noexcept
        : keys_(true, key_format, key_dim, page_tokens, key_group, key_axis),
          values_(false, value_format, value_dim, page_tokens, value_group) {
        values_.offset = keys_.bytes();
        std::size_t end = values_.offset + values_.bytes();
        for (section_layout* s : {&keys_, &values_}) {
            const detail::metadata_kind kind = s->traits().metadata;
            const std::size_t array = s->channels == 0 ? 0 : s->metadata_count() * sizeof(float16);
            s->scale_offset = end;
            end += kind != detail::metadata_kind::none ? array : 0;
            s->minimum_offset = end;
            end += kind == detail::metadata_kind::scale_and_minimum ? array : 0;
        }
        bytes_ = detail::round_up(end, line_bytes);
    }

    /// A page of keys whose first value_dim channels are the values. Preconditions: as above, keys per token;
    /// value_dim > 0 is at most key_dim, and a multiple of the group where there is one.
    [[nodiscard]] static constexpr page_layout with_values_in_keys(kv_format format, std::size_t key_dim,
                                                                   std::size_t value_dim,
                                                                   std::size_t page_tokens,
                                                                   std::size_t group = 0) noexcept {
        page_layout p(format, key_dim, format, 0, page_tokens, group);
        p.values_ = p.keys_.first(value_dim);
        return p;
    }

    /// The halves of the page; of values in keys, a view of the keys' half.
    /// @{
    [[nodiscard]] constexpr const section_layout& keys() const noexcept { return keys_; }
    [[nodiscard]] constexpr const section_layout& values() const noexcept { return values_; }
    /// @}
    /// Whether the values have no bytes of their own.
    [[nodiscard]] constexpr bool values_in_keys() const noexcept { return values_.keys; }
    /// Tokens of a page.
    [[nodiscard]] constexpr std::size_t page_tokens() const noexcept { return keys_.tokens; }
    /// Bytes of a page, padding included; a multiple of line_bytes.
    [[nodiscard]] constexpr std::size_t bytes() const noexcept { return bytes_; }

private:
    section_layout keys_;
    section_layout values_;
    std::size_t bytes_ = 0;
};

// If dims and pages fill lines, a page takes exactly the bytes of its rows.
static_assert(page_layout(kv_format::affine2, 32, kv_format::affine2, 32, 16).bytes() == 16 * 2 * 12);
static_assert(page_layout(kv_format::affine2, 128, kv_format::affine2, 128, 64).bytes() == 64 * 2 * 36);
static_assert(page_layout(kv_format::affine2, 128, kv_format::compact2, 128, 64, 32, 64).bytes() ==
              64 * (48 + 36));
static_assert(page_layout(kv_format::affine2, 32, kv_format::affine2, 32, 64, 0, 0,
                          quantization_axis::per_channel)
                  .bytes() == 64 * (10 + 12));
static_assert(page_layout::with_values_in_keys(kv_format::affine2, 576, 512, 64).bytes() == 64 * 148);

} // namespace kv1::inline KV1_ABI
