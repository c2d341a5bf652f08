// SPDX-License-Identifier: Apache-2.0
//
// The saved form of a cache's contents, which cache_io.hpp describes: the fixed part, and checks of page
// bytes. cache_saving.hpp writes the form, cache_loading.hpp reads it.
#pragma once

#include <kv1/detail/byte_numbers.hpp>
#include <kv1/detail/cache_storage.hpp>
#include <kv1/detail/crc32c.hpp>
#include <kv1/layout.hpp>
#include <kv1/model_fingerprint.hpp>
#include <kv1/quantizer.hpp>
#include <kv1/status.hpp>
#include <kv1/version.hpp>

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

namespace kv1::inline KV1_ABI::detail {

inline constexpr std::array<char, 8> saved_magic{'K', 'V', '1', 'C', 'A', 'C', 'H', 'E'};
// 2: rotations and means, 3: groups of channels, 4: a model's fingerprint, prefixes, values in keys,
// retention
inline constexpr std::uint32_t saved_version = 4;
inline constexpr std::uint32_t layout_version = 2; // of layout.hpp
inline constexpr std::size_t saved_fixed_bytes = 96;
inline constexpr std::size_t saved_start_bytes =
    12; // of it, that all forms have in common: magic and version
// stands for "no page" and "no parent" in a node of the prefix index
inline constexpr std::uint32_t saved_none = (std::numeric_limits<std::uint32_t>::max)();
// stands for "never committed"
inline constexpr std::uint64_t saved_never = (std::numeric_limits<std::uint64_t>::max)();
// the form's own numbers of formats and the like do not move when an enumeration does
constexpr std::uint8_t saved_format(kv_format f) noexcept { return traits_of(f).saved; }

constexpr std::uint8_t saved_axis(quantization_axis a) noexcept {
    return a == quantization_axis::per_channel ? 1 : 0;
}
constexpr std::uint32_t saved_kind(plane_kind k) noexcept {
    return k == plane_kind::open_keys ? 2 : k == plane_kind::fp16_copy ? 1 : 0;
}

// The fixed part.
struct saved_sizes {
    std::uint32_t library = 0, page_tokens = 0, layers = 0, groups = 0, sequences = 0, prefixes = 0;
    std::uint64_t table_bytes = 0, page_bytes = 0; // checksums not counted
    model_fingerprint model;
};

template <class Writer>
bool write_fixed(Writer& w, const saved_sizes& s) {
    return w.bytes(std::as_bytes(std::span(saved_magic))) && w.number(saved_version) &&
           w.number(static_cast<std::uint32_t>(KV1_VERSION)) && w.number(layout_version) &&
           w.number(s.page_tokens) && w.number(s.layers) && w.number(s.groups) && w.number(s.sequences) &&
           w.number(s.prefixes) && w.number(s.table_bytes) && w.number(s.page_bytes) &&
           w.bytes(std::as_bytes(std::span(s.model.bytes))) && w.number(std::uint32_t{0}) && w.checksum();
}

// Checks the first bytes, which all versions of the form have in common: magic and version.
inline status check_start(std::span<const std::byte, saved_start_bytes> bytes) noexcept {
    if (std::memcmp(bytes.data(), saved_magic.data(), saved_magic.size()) != 0)
        return {errc::bad_format, "the bytes do not begin like a saved cache"};
    const auto version = byte_reader(bytes.subspan(saved_magic.size())).number<std::uint32_t>();
    if (version < saved_version)
        return {errc::unsupported_version, "the saved cache is of an earlier version"};
    if (version > saved_version)
        return {errc::unsupported_version, "the saved cache is of a later version"};
    return {};
}

// Precondition: check_start().
inline status read_fixed(std::span<const std::byte, saved_fixed_bytes> bytes, saved_sizes& s) noexcept {
    byte_reader r(bytes.subspan(saved_start_bytes));
    s.library = r.number<std::uint32_t>();
    const auto layout = r.number<std::uint32_t>();
    s.page_tokens = r.number<std::uint32_t>();
    s.layers = r.number<std::uint32_t>();
    s.groups = r.number<std::uint32_t>();
    s.sequences = r.number<std::uint32_t>();
    s.prefixes = r.number<std::uint32_t>();
    s.table_bytes = r.number<std::uint64_t>();
    s.page_bytes = r.number<std::uint64_t>();
    for (std::uint8_t& b : s.model.bytes)
        b = r.number<std::uint8_t>();
    const auto unused = r.number<std::uint32_t>();
    if (r.number<std::uint32_t>() != crc32c(0, bytes.first(saved_fixed_bytes - 4)))
        return {errc::checksum_mismatch, "the fixed part was changed"};
    if (layout != layout_version || unused != 0)
        return {errc::unsupported_version, "the saved cache has another page layout"};
    return {};
}

// Clears the slots of a page from a token on. Keys per channel of a page that is not full are cleared whole:
// their codes are written when it is full.
inline void clear_slots(const section_layout& s, std::byte* page, std::size_t first) noexcept {
    if (s.axis == quantization_axis::per_channel) {
        std::memset(page + s.offset, 0, s.bytes());
        for (std::size_t c = 0; c < s.channels; ++c)
            store_channel_metadata(s, page, c, {});
        return;
    }
    for (std::size_t t = first; t < s.tokens; ++t) {
        for (std::size_t c = 0; c < s.channels; ++c)
            store_code(s, page, t, c, 0);
        for (std::size_t g = 0; g < s.groups(); ++g)
            store_metadata(s, page, t, {}, g);
    }
}

// Whether all numbers of a page that kernels read as floats are finite.
inline bool finite_section(const section_layout& s, const std::byte* page) noexcept {
    const auto halves = [&](std::size_t offset, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) {
            std::uint16_t h = 0;
            std::memcpy(&h, page + offset + 2 * i, 2);
            if ((h & 0x7c00u) == 0x7c00u)
                return false;
        }
        return true;
    };
    if (s.format == kv_format::fp16)
        return halves(s.offset, s.bytes() / 2);
    if (s.format == kv_format::fp32) {
        for (std::size_t i = 0; i < s.bytes() / 4; ++i)
            if (!is_finite(std::bit_cast<float>(load_lane(page + s.offset, i))))
                return false;
        return true;
    }
    const metadata_kind kind = s.traits().metadata;
    const std::size_t n = s.metadata_count();
    return (kind == metadata_kind::none || halves(s.scale_offset, n)) &&
           (kind != metadata_kind::scale_and_minimum || halves(s.minimum_offset, n));
}

} // namespace kv1::inline KV1_ABI::detail
