// SPDX-License-Identifier: Apache-2.0
//
// The row format: one vector as the KV1 reference stores it, packed codes with fp16 metadata beside them.
// Codes are packed low bits first: at 2 bits, channel 5 has bits 2-3 of byte 1. Unused bits of the last byte
// are 0. The functions run on the current target, and give the same bytes on every target. O(channels), no
// allocation, thread-safe. A vector that is refused leaves the outputs as they were.
#pragma once

#include <kv1/packed_span.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/quantizers/all.hpp>

#include <array>
#include <cstring>

namespace kv1::inline KV1_ABI {

namespace detail {

template <class Q>
inline constexpr int affine_bits = 0;
template <int Bits>
inline constexpr int affine_bits<affine<Bits>> = Bits;

inline status as_status(const encode_result& r) noexcept {
    if (r.code == errc::ok)
        return {};
    return {r.code, r.rule, {.channel = r.channel != no_channel ? static_cast<std::int64_t>(r.channel) : -1}};
}

// How a quantizer's codes are chosen, where encoding parameters can say it; else its format is the first, which has none.
template <class Q>
inline constexpr encoding_params params_of{};
template <storage_format Q>
requires(traits_of(kv_format_of<Q>).metadata ==
         metadata_kind::compact) inline constexpr encoding_params params_of<Q>{
    kv_format_of<Q>, level_choice::min_max, 0, 0, 0};
template <storage_format Q>
inline constexpr encoding_params params_of<least_squares<Q>>{kv_format_of<Q>, level_choice::least_squares, 0,
                                                             0, 0};
template <storage_format Q>
inline constexpr encoding_params params_of<clip_search<Q>>{kv_format_of<Q>, level_choice::clip_search, 0, 0,
                                                           0};

template <quantizer Q>
inline constexpr bool library_quantizer = params_of<Q>.format != kv_format{} || affine_bits<Q> != 0 ||
                                          std::same_as<Q, scaled_binary> || std::same_as<Q, binary>;

// Codes of a vector on the current target; `codes` holds round_up(n, 32) bytes.
template <quantizer Q>
requires library_quantizer<Q> encode_result encode_codes(const float* x, std::size_t n, std::uint8_t* codes)
noexcept {
    if constexpr (params_of<Q>.format != kv_format{}) {
        encoding_params params = params_of<Q>;
        params.channels = params.group = n;
        const vector_to_encode row{x, nullptr, nullptr};
        std::size_t failed = 0;
        row_metadata metadata;
        constexpr std::size_t channels = 256;
        alignas(64) float lanes[channels * tile_tokens];
        alignas(64) std::uint32_t words[channels / 4 * tile_tokens];
        encode_result r =
            common_kernels().encode_vectors(params, &row, 1, codes, max_vector_length, &metadata, failed,
                                            {channels, lanes, nullptr, words, nullptr});
        r.metadata = metadata;
        return r;
    } else if constexpr (affine_bits<Q> != 0)
        return common_kernels().encode_affine(x, n, affine_bits<Q>, codes);
    else if constexpr (std::same_as<Q, scaled_binary>)
        return common_kernels().encode_scaled_binary(x, n, codes);
    else
        return common_kernels().encode_binary(x, n, codes);
}

} // namespace detail

/// Quantizes a vector to codes, one byte each, and metadata, as Q::quantize defines them. codes.size() is
/// x.size(). Errors: shape_mismatch; out_of_range for no channel or more than 4096; non_finite;
/// not_representable.
template <quantizer Q>
requires detail::library_quantizer<Q> status try_quantize(std::span<const float> x,
                                                          std::span<std::uint8_t> codes,
                                                          typename Q::metadata& metadata)
noexcept {
    if (codes.size() != x.size())
        return {errc::shape_mismatch, "one code per channel is needed"};
    if (x.empty() || x.size() > max_vector_length)
        return {errc::out_of_range, "a vector has 1 to 4096 channels"};
    std::array<std::uint8_t, max_vector_length> buffer;
    const detail::encode_result encoded = detail::encode_codes<Q>(x.data(), x.size(), buffer.data());
    if (encoded.code != errc::ok)
        return detail::as_status(encoded);
    std::memcpy(codes.data(), buffer.data(), codes.size());
    if constexpr (requires { metadata.scale; })
        metadata.scale = float16::from_bits(encoded.metadata.scale);
    if constexpr (requires { metadata.minimum; })
        metadata.minimum = float16::from_bits(encoded.metadata.minimum);
    return {};
}

/// Quantizes a vector and packs its codes. packed.size() is packed_size<Q::bits>(x.size()). Errors:
/// shape_mismatch; out_of_range for no channel or more than 4096; non_finite; not_representable.
template <quantizer Q>
requires detail::library_quantizer<Q> && packable<Q::bits> status
try_encode_row(std::span<const float> x, std::span<std::byte> packed, typename Q::metadata& metadata)
noexcept {
    if (packed.size() != packed_size<Q::bits>(x.size()))
        return {errc::shape_mismatch, "the row's bytes do not fit the number of channels"};
    if (x.empty() || x.size() > max_vector_length)
        return {errc::out_of_range, "a vector has 1 to 4096 channels"};
    std::array<std::uint8_t, max_vector_length> codes;
    if (const status s = try_quantize<Q>(x, std::span(codes).first(x.size()), metadata); !s)
        return s;
    detail::pack_codes<Q::bits>(codes.data(), x.size(), packed.data());
    return {};
}

/// Unpacks and dequantizes a vector: out[i] = Q::dequantize(code i). packed.size() is
/// packed_size<Q::bits>(out.size()). Errors: shape_mismatch.
template <quantizer Q>
requires packable<Q::bits> status try_decode_row(std::span<const std::byte> packed,
                                                 typename Q::metadata metadata, std::span<float> out)
noexcept {
    if (packed.size() != packed_size<Q::bits>(out.size()))
        return {errc::shape_mismatch, "the row's bytes do not fit the number of channels"};
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = Q::dequantize(detail::code_bits<Q::bits>::load(packed.data(), i), metadata);
    return {};
}

#if KV1_EXCEPTIONS
/// Quantizes a vector to codes, one byte each, and metadata. codes.size() is x.size(). Throws kv1::error:
/// shape_mismatch; out_of_range for no channel or more than 4096; non_finite; not_representable.
template <quantizer Q>
requires detail::library_quantizer<Q>
void quantize(std::span<const float> x, std::span<std::uint8_t> codes, typename Q::metadata& metadata) {
    detail::throw_if_error(try_quantize<Q>(x, codes, metadata));
}
/// Quantizes a vector and packs its codes. packed.size() is packed_size<Q::bits>(x.size()). Throws
/// kv1::error: shape_mismatch; out_of_range for no channel or more than 4096; non_finite; not_representable.
template <quantizer Q>
void encode_row(std::span<const float> x, std::span<std::byte> packed, typename Q::metadata& metadata) {
    detail::throw_if_error(try_encode_row<Q>(x, packed, metadata));
}
/// Unpacks and dequantizes a vector: out[i] = Q::dequantize(code i). Throws kv1::error: shape_mismatch unless
/// packed.size() is packed_size<Q::bits>(out.size()).
template <quantizer Q>
void decode_row(std::span<const std::byte> packed, typename Q::metadata metadata, std::span<float> out) {
    detail::throw_if_error(try_decode_row<Q>(packed, metadata, out));
}
#endif

} // namespace kv1::inline KV1_ABI
