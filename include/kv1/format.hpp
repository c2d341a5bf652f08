// SPDX-License-Identifier: Apache-2.0
//
// Storage formats: how one K or V vector (one token, one KV head) is kept.
//
// A format is a type at compile time, and an enumerator of kv_format at run time. Coded formats store
// unsigned codes, and metadata for each vector or for each group of its channels: value = scale * code +
// minimum. (Keys may instead have metadata for each channel of a page: layer_description::key_axis.) A
// compact word is 16 bits with scale and offset.
//
//   format          code bits  metadata (fp16)  bytes per vector of D channels  value
//   affine<b>       b          scale, minimum   ceil(D*b/8) + 4                 scale*code + minimum
//   compact<b>      b          compact word     ceil(D*b/8) + 2                 scale*(code + offset)
//   codebook2       2          compact word     ceil(D/4) + 2                   scale*(0, 5, 9, 14 + offset)
//   codebook4       4          compact word     ceil(D/2) + 2                   scale*(level of 16 + offset)
//   scaled_binary   1          scale            ceil(D/8) + 2                   +-scale
//   binary          1          none             ceil(D/8)                       0 or 1
//   plain<float16>  -          none             2 D                             the value
//   plain<float>    -          none             4 D                             the value
//
// The quantizers behind the coded formats are in kv1/quantizers/, one scheme a file.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/float16.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace kv1::inline KV1_ABI {

/// 2^Bits levels from the minimum to the maximum of a vector; see kv1/quantizers/affine.hpp.
template <int Bits>
struct affine;
/// 2^Bits levels with scale and offset in 16 bits, for vectors about zero; see kv1/quantizers/compact.hpp.
/// Bits is 2 to 4.
template <int Bits>
struct compact;
/// Four uneven levels that suit a normal distribution; see kv1/quantizers/codebook.hpp.
struct codebook2;
/// Sixteen levels, of which the outer ones are uneven; see kv1/quantizers/codebook.hpp.
struct codebook4;
/// Signs alone; see kv1/quantizers/binary.hpp.
struct binary;
/// Signs and a mean magnitude; see kv1/quantizers/scaled_binary.hpp.
struct scaled_binary;

/// Values kept as they are, in fp32 or fp16.
template <class T>
requires std::same_as<T, float> || std::same_as<T, float16>
struct plain {
    /// What a channel is kept as.
    using value_type = T;
};

/// The formats a cache can store, K and V independently, layer by layer.
enum class kv_format : std::uint8_t {
    fp32,
    fp16,
    affine8,
    affine4,
    affine3,
    affine2,
    scaled_binary,
    binary,
    compact4,
    compact3,
    compact2,
    codebook2,
    codebook4
};

namespace detail {

enum class metadata_kind : std::uint8_t { none, scale, scale_and_minimum, compact };

// Which levels codes stand for: themselves, or those of a codebook.
enum class code_levels : std::uint8_t { even, codebook2, codebook4 };

// Levels of the codebooks' codes. codebook2's as a 32-bit number, a byte each.
inline constexpr std::int32_t packed_codebook = 14 << 24 | 9 << 16 | 5 << 8;
inline constexpr std::array<std::uint8_t, 16> codebook4_levels = {0,  4,  7,  9,  11, 13, 15, 17,
                                                                  19, 21, 23, 25, 27, 29, 32, 36};

// A bit slice: bits of a code that lie side by side in a byte. A 3-bit code has two, its two low bits and its high
// bit, since three bits do not divide a byte (layout.hpp); other codes have one.
struct bit_slice {
    int bits;  // width of the field
    int shift; // its place in the code
};

// What a format is made of: a row of format_table. code_bits is 0 for plain formats; slices[1].bits is 0 where
// one slice is enough.
struct format_traits {
    kv_format id{};
    std::string_view name = "unknown"; // the enumerator's
    std::string_view short_name;       // in options of programs
    std::uint8_t saved = 0;            // number in saved caches: it never changes, nor is it used again
    int code_bits = 0;
    int plain_bits = 0;
    metadata_kind metadata = metadata_kind::none;
    code_levels levels = code_levels::even;
    std::array<bit_slice, 2> slices{};

    [[nodiscard]] constexpr bool codebook() const noexcept { return levels != code_levels::even; }
    // there is a choice of levels: level_choice, groups of channels, keys per channel
    [[nodiscard]] constexpr bool fits_levels() const noexcept {
        return metadata == metadata_kind::scale_and_minimum || metadata == metadata_kind::compact;
    }
    [[nodiscard]] constexpr int top_level() const noexcept {
        return static_cast<int>(level((1u << code_bits) - 1u));
    }
    [[nodiscard]] constexpr std::uint32_t level(std::uint32_t code) const noexcept {
        switch (levels) {
        case code_levels::even:
            break;
        case code_levels::codebook2:
            return 5 * code - (code >> 1);
        case code_levels::codebook4:
            return codebook4_levels[code];
        }
        return code;
    }
    // width of a stored field of bit slice p; of plain formats slice 0 is the whole value
    [[nodiscard]] constexpr int field_bits(int p) const noexcept {
        return code_bits == 0 ? (p == 0 ? plain_bits : 0) : slices[static_cast<std::size_t>(p)].bits;
    }
    [[nodiscard]] constexpr int slice_count() const noexcept { return slices[1].bits != 0 ? 2 : 1; }
    // codes that fill whole lanes: K channels and V tokens are padded to a multiple of it
    [[nodiscard]] constexpr std::size_t fields_per_lane() const noexcept {
        const int narrowest = slice_count() == 2 ? slices[1].bits : field_bits(0);
        return static_cast<std::size_t>(32 / narrowest);
    }
    [[nodiscard]] constexpr std::size_t metadata_bytes() const noexcept {
        return metadata == metadata_kind::none ? 0u : metadata == metadata_kind::scale_and_minimum ? 4u : 2u;
    }
};

// A row with the type that it describes.
template <class Format>
struct format_row {
    format_traits traits;
};

template <class T>
constexpr format_row<plain<T>> plain_row(kv_format id, std::string_view name, std::string_view short_name,
                                         std::uint8_t saved) noexcept {
    return {{id, name, short_name, saved, 0, 8 * static_cast<int>(sizeof(T))}};
}

template <class Format>
constexpr format_row<Format> coded_row(kv_format id, std::string_view name, std::string_view short_name,
                                       std::uint8_t saved, int bits, metadata_kind metadata,
                                       code_levels levels = code_levels::even) noexcept {
    return {{id, name, short_name, saved, bits, 0, metadata, levels,
             bits == 3 ? std::array<bit_slice, 2>{{{2, 0}, {1, 2}}}
                       : std::array<bit_slice, 2>{{{bits, 0}, {0, 0}}}}};
}

// A list of types, and a row for each.
template <class... Fs>
struct format_rows {
    std::array<format_traits, sizeof...(Fs)> rows;

    // The place of a format's type in the list; rows.size() where it is not there.
    template <class F>
    [[nodiscard]] static constexpr std::size_t place_of() noexcept {
        std::size_t place = 0;
        static_cast<void>(((std::is_same_v<F, Fs> || (++place, false)) || ...));
        return place;
    }
};

template <class... Fs>
constexpr format_rows<Fs...> table_of(format_row<Fs>... rows) noexcept {
    return {{rows.traits...}};
}

// The one table of formats, in the enumeration's order. Names, numbers in saved caches, options of programs,
// sizes, layouts, kernels and all lists of formats derive from it.
// clang-format off
inline constexpr auto format_table = table_of(
    // type                 enumerator                 name           short saved bits, metadata, levels
    plain_row<float>(         kv_format::fp32,          "fp32",          "32",  1),
    plain_row<float16>(       kv_format::fp16,          "fp16",          "16",  2),
    coded_row<affine<8>>(     kv_format::affine8,       "affine8",       "8",   3,  8, metadata_kind::scale_and_minimum),
    coded_row<affine<4>>(     kv_format::affine4,       "affine4",       "4",   4,  4, metadata_kind::scale_and_minimum),
    coded_row<affine<3>>(     kv_format::affine3,       "affine3",       "3",   5,  3, metadata_kind::scale_and_minimum),
    coded_row<affine<2>>(     kv_format::affine2,       "affine2",       "2",   6,  2, metadata_kind::scale_and_minimum),
    coded_row<scaled_binary>( kv_format::scaled_binary, "scaled_binary", "1.5", 7,  1, metadata_kind::scale),
    coded_row<binary>(        kv_format::binary,        "binary",        "1",   8,  1, metadata_kind::none),
    coded_row<compact<4>>(    kv_format::compact4,      "compact4",      "c4",  9,  4, metadata_kind::compact),
    coded_row<compact<3>>(    kv_format::compact3,      "compact3",      "c3",  10, 3, metadata_kind::compact),
    coded_row<compact<2>>(    kv_format::compact2,      "compact2",      "c2",  11, 2, metadata_kind::compact),
    coded_row<codebook2>(     kv_format::codebook2,     "codebook2",     "cb2", 12, 2, metadata_kind::compact, code_levels::codebook2),
    coded_row<codebook4>(     kv_format::codebook4,     "codebook4",     "cb4", 13, 4, metadata_kind::compact, code_levels::codebook4));
// clang-format on

// Stands for numbers that are no enumerator.
inline constexpr format_traits no_format{};

constexpr const format_traits& traits_of(kv_format f) noexcept {
    const auto place = static_cast<std::size_t>(f);
    return place < format_table.rows.size() ? format_table.rows[place] : no_format;
}

// Whether kernels can take the format: widths of fields, and which metadata stand beside which codes.
constexpr bool kernels_know(const format_traits& row) noexcept {
    if (row.code_bits == 0)
        return row.plain_bits == 16 || row.plain_bits == 32;
    for (int p = 0; p < row.slice_count(); ++p)
        if (const int bits = row.field_bits(p); bits != 1 && bits != 2 && bits != 4 && bits != 8)
            return false;
    switch (row.metadata) {
    case metadata_kind::none:
    case metadata_kind::scale:
        return row.code_bits == 1 && !row.codebook();
    case metadata_kind::scale_and_minimum:
        return row.code_bits >= 2 && !row.codebook();
    case metadata_kind::compact:
        return row.code_bits >= 2 && row.code_bits <= 4 &&
               (!row.codebook() || row.code_bits == (row.levels == code_levels::codebook2 ? 2 : 4));
    }
    return false;
}

constexpr bool format_table_holds() noexcept {
    for (std::size_t i = 0; i < format_table.rows.size(); ++i) {
        const format_traits& row = format_table.rows[i];
        if (static_cast<std::size_t>(row.id) != i || row.saved == 0 || !kernels_know(row))
            return false;
        for (std::size_t k = 0; k < i; ++k) {
            const format_traits& other = format_table.rows[k];
            if (row.saved == other.saved || row.name == other.name || row.short_name == other.short_name)
                return false;
            if (row.code_bits == other.code_bits && row.plain_bits == other.plain_bits &&
                row.metadata == other.metadata && row.levels == other.levels)
                return false; // what is stored would be the same
        }
    }
    return true;
}
static_assert(format_table_holds(), "rows stand in the enumeration's order, names and saved numbers are used "
                                    "once, and kernels know the codes and their metadata");

} // namespace detail

/// A type that a cache can store vectors in.
template <class F>
concept storage_format = detail::format_table.place_of<F>() < detail::format_table.rows.size();

/// From the type to the run-time choice.
template <storage_format F>
inline constexpr kv_format kv_format_of = static_cast<kv_format>(detail::format_table.place_of<F>());

/// A compile-time list of storage formats: the ones a cache type carries kernels for.
template <storage_format... Fs>
struct formats {
    /// Whether the list has the format.
    [[nodiscard]] static constexpr bool contains(kv_format f) noexcept {
        return ((kv_format_of<Fs> == f) || ...);
    }
};

namespace detail {

template <class... Fs>
constexpr formats<Fs...> types_of(const format_rows<Fs...>&) noexcept {
    return {};
}

template <class... Fs>
constexpr std::array<kv_format, sizeof...(Fs)> ids_of(const format_rows<Fs...>&) noexcept {
    return {kv_format_of<Fs>...};
}

} // namespace detail

/// Every format there is.
using all_formats = decltype(detail::types_of(detail::format_table));

/// Every format, in the enumeration's order.
inline constexpr std::array all_kv_formats = detail::ids_of(detail::format_table);

/// The enumerator's name.
[[nodiscard]] constexpr std::string_view to_string(kv_format f) noexcept { return detail::traits_of(f).name; }

namespace detail {

// The format whose attention kernels serve F: the first whose codes are as wide and stand for the same
// levels. Such codes lie alike, and kernels ask the layout what the metadata beside them mean. One set of
// kernels for them is half the compile time.
constexpr std::size_t kernel_place(kv_format f) noexcept {
    const format_traits& own = traits_of(f);
    std::size_t place = 0;
    while (format_table.rows[place].code_bits != own.code_bits ||
           format_table.rows[place].plain_bits != own.plain_bits ||
           format_table.rows[place].levels != own.levels)
        ++place;
    return place;
}

template <std::size_t Place, class Formats>
struct format_at;
template <class F, class... Fs>
struct format_at<0, formats<F, Fs...>> {
    using type = F;
};
template <std::size_t Place, class F, class... Fs>
struct format_at<Place, formats<F, Fs...>> : format_at<Place - 1, formats<Fs...>> {};

template <storage_format F>
struct kernel_format : format_at<kernel_place(kv_format_of<F>), all_formats> {};

// What f.template operator()<F>() gives for the format of that number; otherwise where no such format is in
// the list.
template <class Result, class... Fs, class F>
constexpr Result with_format(formats<Fs...>, kv_format id, Result otherwise, F&& f) {
    static_cast<void>(((kv_format_of<Fs> == id && (otherwise = f.template operator()<Fs>(), true)) || ...));
    return otherwise;
}

} // namespace detail

/// What a format keeps of a vector, for programs that treat formats by their properties.
struct format_info {
    int code_bits = 0;              ///< of a channel's code; 0: the format keeps values plain
    std::size_t metadata_bytes = 0; ///< beside the codes of a vector, or of a group of its channels
    bool fits_levels = false;       ///< takes a level_choice besides min_max
    bool compact = false;           ///< scale and offset share 16 bits
    bool codebook = false;          ///< codes stand for uneven levels
    std::string_view short_name;    ///< for options of programs: "8", "1.5", "c3"
};

/// The properties of a format. O(1).
[[nodiscard]] constexpr format_info info_of(kv_format f) noexcept {
    const detail::format_traits& t = detail::traits_of(f);
    return {t.code_bits,  t.metadata_bytes(), t.fits_levels(), t.metadata == detail::metadata_kind::compact,
            t.codebook(), t.short_name};
}

/// The format of that short name, if there is one. O(formats).
[[nodiscard]] constexpr std::optional<kv_format> format_from_short_name(std::string_view name) noexcept {
    for (const kv_format f : all_kv_formats)
        if (detail::traits_of(f).short_name == name)
            return f;
    return std::nullopt;
}

/// Bytes of the packed values of one row-format vector, metadata not counted.
[[nodiscard]] constexpr std::size_t packed_bytes(kv_format f, std::size_t head_dim) noexcept {
    const detail::format_traits& t = detail::traits_of(f);
    return (head_dim * static_cast<std::size_t>(t.code_bits != 0 ? t.code_bits : t.plain_bits) + 7) / 8;
}

/// Bytes of one row-format vector: packed values and metadata. group: channels that share metadata; 0: all.
[[nodiscard]] constexpr std::size_t row_bytes(kv_format f, std::size_t head_dim,
                                              std::size_t group = 0) noexcept {
    return packed_bytes(f, head_dim) +
           (group == 0 ? 1 : head_dim / group) * detail::traits_of(f).metadata_bytes();
}

/// Bytes of a full page of keys that are quantized per channel (quantization_axis): packed values, and
/// metadata of each channel.
[[nodiscard]] constexpr std::size_t channel_page_bytes(kv_format f, std::size_t head_dim,
                                                       std::size_t page_tokens) noexcept {
    return page_tokens * packed_bytes(f, head_dim) + head_dim * detail::traits_of(f).metadata_bytes();
}

} // namespace kv1::inline KV1_ABI
