// SPDX-License-Identifier: Apache-2.0
//
// Changes to the bytes of saved caches, for tests and the fuzzer.
#pragma once

#include <kv1/cache_io.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kv1_test {

using saved_bytes = std::vector<std::byte>;

/// Offsets in the saved form that cache_io.hpp describes.
struct saved_places {
    static constexpr std::size_t fixed_part = 96, fixed_checksum = 92, table_size = 40, page_size = 48;
};

inline void write_number(std::span<std::byte> b, std::size_t at, std::uint64_t value, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i)
        b[at + i] = static_cast<std::byte>(value >> (8 * i) & 0xffu);
}
inline std::uint64_t number_at(std::span<const std::byte> b, std::size_t at, std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i)
        value |= std::to_integer<std::uint64_t>(b[at + i]) << (8 * i);
    return value;
}

/// Corrects the checksum of the fixed part, or all checksums, so that a load looks at the change itself.
/// @{
inline void reseal_fixed(std::span<std::byte> b) {
    write_number(b, saved_places::fixed_checksum,
                 kv1::detail::crc32c(0, b.first(saved_places::fixed_checksum)), 4);
}
inline void reseal(std::span<std::byte> b) {
    reseal_fixed(b);
    const std::uint64_t tables = number_at(b, saved_places::table_size, 8);
    const std::size_t room = b.size() - saved_places::fixed_part;
    if (room < 8 || tables > room - 8)
        return;
    const std::size_t pages = saved_places::fixed_part + static_cast<std::size_t>(tables) + 4;
    write_number(
        b, pages - 4,
        kv1::detail::crc32c(0, b.subspan(saved_places::fixed_part, static_cast<std::size_t>(tables))), 4);
    write_number(b, b.size() - 4, kv1::detail::crc32c(0, b.subspan(pages, b.size() - 4 - pages)), 4);
}
/// @}

/// A source without rewind().
struct one_way {
    std::span<const std::byte> left;
    bool operator()(std::span<std::byte> out) noexcept {
        if (out.size() > left.size())
            return false;
        std::copy_n(left.begin(), out.size(), out.begin());
        left = left.subspan(out.size());
        return true;
    }
};

/// The bytes that try_save() writes.
template <class Cache>
kv1::result<saved_bytes> try_saved(const Cache& cache, std::span<const kv1::sequence_id> ids,
                                   const kv1::save_options& options = {}) {
    saved_bytes b;
    const auto sink = [&](std::span<const std::byte> some) {
        b.insert(b.end(), some.begin(), some.end());
        return true;
    };
    if (const kv1::status s = kv1::try_save(cache, ids, sink, options); !s)
        return s;
    return b;
}

} // namespace kv1_test
