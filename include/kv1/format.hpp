// SPDX-License-Identifier: Apache-2.0
//
// Storage formats: how one K or V vector (one token, one KV head) is kept.
//
// A format is a type that describes itself at compile time; `kv_format` names the same choice at run time.
// Coded formats store unsigned codes and metadata for each vector, or for each group of its channels
// (layer_description; there, too, the choice of one pair a channel and page for keys), value = scale * code +
// minimum:
//
//   format          code bits  metadata (fp16)  bytes per vector of D channels  value
//   affine<b>       b          scale, minimum   ceil(D*b/8) + 4                 scale*code + minimum
//   compact<b>      b          16-bit pair      ceil(D*b/8) + 2                 scale*(code + offset)
//   codebook2       2          16-bit pair      ceil(D/4) + 2                   scale*(0, 5, 9, 14 + offset)
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
/// The same with scale and offset in 16 bits, for centred vectors; see kv1/quantizers/compact.hpp. Bits is 2
/// to 4.
template <int Bits>
struct compact;
/// Four levels that lie as those of a normal distribution should; see kv1/quantizers/codebook.hpp.
struct codebook2;
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
    codebook2
};

/// Every format, in the enumeration's order.
inline constexpr std::array all_kv_formats{
    kv_format::fp32,     kv_format::fp16,     kv_format::affine8,       kv_format::affine4,
    kv_format::affine3,  kv_format::affine2,  kv_format::scaled_binary, kv_format::binary,
    kv_format::compact4, kv_format::compact3, kv_format::compact2,      kv_format::codebook2};

/// The enumerator's name.
[[nodiscard]] constexpr std::string_view to_string(kv_format f) noexcept {
    switch (f) {
    case kv_format::fp32:
        return "fp32";
    case kv_format::fp16:
        return "fp16";
    case kv_format::affine8:
        return "affine8";
    case kv_format::affine4:
        return "affine4";
    case kv_format::affine3:
        return "affine3";
    case kv_format::affine2:
        return "affine2";
    case kv_format::scaled_binary:
        return "scaled_binary";
    case kv_format::binary:
        return "binary";
    case kv_format::compact4:
        return "compact4";
    case kv_format::compact3:
        return "compact3";
    case kv_format::compact2:
        return "compact2";
    case kv_format::codebook2:
        return "codebook2";
    }
    return "unknown";
}

namespace detail {

enum class metadata_kind : std::uint8_t { none, scale, scale_and_minimum, compact };

// A code is stored as one or two bit fields, each in lines of its own: a 3-bit code is its two low bits and
// its high bit, so that every field divides a 32-bit lane.
struct code_part {
    int bits;  // width of the field
    int shift; // its place in the code
};

// code_bits is 0 for plain formats; parts[1].bits is 0 where one part is enough.
struct format_traits {
    kv_format id;
    int code_bits;
    int plain_bits;
    metadata_kind metadata;
    std::array<code_part, 2> parts;
    bool codebook = false; // codes 0 ... 3 stand for levels 0, 5, 9, 14; else they are the levels

    [[nodiscard]] constexpr int top_level() const noexcept { return codebook ? 14 : (1 << code_bits) - 1; }
    [[nodiscard]] constexpr std::uint32_t level(std::uint32_t code) const noexcept {
        return codebook ? 5 * code - (code >> 1) : code;
    }
    // width of a stored field of part p: codes, or whole plain values
    [[nodiscard]] constexpr int field_bits(int p) const noexcept {
        return code_bits == 0 ? (p == 0 ? plain_bits : 0) : parts[static_cast<std::size_t>(p)].bits;
    }
    [[nodiscard]] constexpr int part_count() const noexcept { return parts[1].bits != 0 ? 2 : 1; }
    // fields of the narrowest part that fill a lane: K channels and V tokens are padded to a multiple of it
    [[nodiscard]] constexpr std::size_t fields_per_lane() const noexcept {
        const int narrowest = part_count() == 2 ? parts[1].bits : field_bits(0);
        return static_cast<std::size_t>(32 / narrowest);
    }
    [[nodiscard]] constexpr std::size_t metadata_bytes() const noexcept {
        return metadata == metadata_kind::none ? 0u : metadata == metadata_kind::scale_and_minimum ? 4u : 2u;
    }
};

// Levels of codebook2's codes, a byte each.
inline constexpr std::int32_t packed_codebook = 14 << 24 | 9 << 16 | 5 << 8;

constexpr format_traits coded(kv_format id, int bits, metadata_kind metadata) noexcept {
    return {id,
            bits,
            0,
            metadata,
            bits == 3 ? std::array<code_part, 2>{{{2, 0}, {1, 2}}}
                      : std::array<code_part, 2>{{{bits, 0}, {0, 0}}},
            false};
}

constexpr format_traits traits_of(kv_format f) noexcept {
    switch (f) {
    case kv_format::fp32:
        return {f, 0, 32, metadata_kind::none, {}};
    case kv_format::fp16:
        return {f, 0, 16, metadata_kind::none, {}};
    case kv_format::affine8:
        return coded(f, 8, metadata_kind::scale_and_minimum);
    case kv_format::affine4:
        return coded(f, 4, metadata_kind::scale_and_minimum);
    case kv_format::affine3:
        return coded(f, 3, metadata_kind::scale_and_minimum);
    case kv_format::affine2:
        return coded(f, 2, metadata_kind::scale_and_minimum);
    case kv_format::scaled_binary:
        return coded(f, 1, metadata_kind::scale);
    case kv_format::binary:
        return coded(f, 1, metadata_kind::none);
    case kv_format::compact4:
        return coded(f, 4, metadata_kind::compact);
    case kv_format::compact3:
        return coded(f, 3, metadata_kind::compact);
    case kv_format::compact2:
        return coded(f, 2, metadata_kind::compact);
    case kv_format::codebook2: {
        format_traits t = coded(f, 2, metadata_kind::compact);
        t.codebook = true;
        return t;
    }
    }
    return {};
}

template <class Format>
struct format_id;
template <>
struct format_id<plain<float>> : std::integral_constant<kv_format, kv_format::fp32> {};
template <>
struct format_id<plain<float16>> : std::integral_constant<kv_format, kv_format::fp16> {};
template <>
struct format_id<affine<8>> : std::integral_constant<kv_format, kv_format::affine8> {};
template <>
struct format_id<affine<4>> : std::integral_constant<kv_format, kv_format::affine4> {};
template <>
struct format_id<affine<3>> : std::integral_constant<kv_format, kv_format::affine3> {};
template <>
struct format_id<affine<2>> : std::integral_constant<kv_format, kv_format::affine2> {};
template <>
struct format_id<scaled_binary> : std::integral_constant<kv_format, kv_format::scaled_binary> {};
template <>
struct format_id<binary> : std::integral_constant<kv_format, kv_format::binary> {};
template <>
struct format_id<compact<4>> : std::integral_constant<kv_format, kv_format::compact4> {};
template <>
struct format_id<compact<3>> : std::integral_constant<kv_format, kv_format::compact3> {};
template <>
struct format_id<compact<2>> : std::integral_constant<kv_format, kv_format::compact2> {};
template <>
struct format_id<codebook2> : std::integral_constant<kv_format, kv_format::codebook2> {};

// The format whose attention kernels serve F: codes of one width lie alike, and kernels ask the layout what
// the metadata beside them mean. One set of kernels a width is half the compile time.
template <class F>
struct kernel_format {
    using type = F;
};
template <int Bits>
struct kernel_format<compact<Bits>> {
    using type = affine<Bits>;
};
template <>
struct kernel_format<binary> {
    using type = scaled_binary;
};

} // namespace detail

/// A type that a cache can store vectors in.
template <class F>
concept storage_format = requires {
    detail::format_id<F>::value;
};

/// From the type to the run-time choice.
template <storage_format F>
inline constexpr kv_format kv_format_of = detail::format_id<F>::value;

/// What a format keeps of a vector, for programs that treat formats by their properties.
struct format_info {
    int code_bits = 0;              ///< of a channel's code; 0: the format keeps values plain
    std::size_t metadata_bytes = 0; ///< beside the codes of a vector, or of a group of its channels
    bool fits_levels = false;       ///< takes a level_choice besides min_max: affine, compact, codebook2
    bool compact = false;           ///< scale and offset share 16 bits: compact, codebook2
};

/// The properties of a format. O(1).
[[nodiscard]] constexpr format_info info_of(kv_format f) noexcept {
    const detail::format_traits t = detail::traits_of(f);
    const bool compact = t.metadata == detail::metadata_kind::compact;
    return {t.code_bits, t.metadata_bytes(),
            compact || t.metadata == detail::metadata_kind::scale_and_minimum, compact};
}

/// Bytes of the packed values of one row-format vector, metadata not counted.
[[nodiscard]] constexpr std::size_t packed_bytes(kv_format f, std::size_t head_dim) noexcept {
    const detail::format_traits t = detail::traits_of(f);
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

/// A compile-time list of storage formats: the ones a cache type carries kernels for.
template <storage_format... Fs>
struct formats {
    /// Whether the list has the format.
    [[nodiscard]] static constexpr bool contains(kv_format f) noexcept {
        return ((kv_format_of<Fs> == f) || ...);
    }
};

/// Every format there is.
using all_formats = formats<plain<float>, plain<float16>, affine<8>, affine<4>, affine<3>, affine<2>,
                            scaled_binary, binary, compact<4>, compact<3>, compact<2>, codebook2>;

} // namespace kv1::inline KV1_ABI
