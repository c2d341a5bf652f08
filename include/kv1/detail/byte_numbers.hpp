// SPDX-License-Identifier: Apache-2.0
//
// How numbers of saved forms are written and read: little-endian, with checksums.
#pragma once

#include <kv1/detail/crc32c.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv1::inline KV1_ABI::detail {

// Writes numbers to a sink as bytes, and counts and checksums them.
template <class Sink>
class byte_writer {
public:
    explicit byte_writer(Sink& sink) noexcept : sink_(sink) {}
    bool bytes(std::span<const std::byte> b) {
        crc_ = crc32c(crc_, b);
        written_ += b.size();
        return b.empty() || static_cast<bool>(sink_(b));
    }
    template <std::unsigned_integral T>
    bool number(T value) {
        std::array<std::byte, sizeof(T)> b;
        for (std::size_t i = 0; i < sizeof(T); ++i)
            b[i] = static_cast<std::byte>(value >> (8 * i) & 0xffu);
        return bytes(b);
    }
    bool checksum() { // of the bytes since the last checksum
        const std::uint32_t crc = crc_;
        const bool fine = number(crc);
        crc_ = 0;
        return fine;
    }
    [[nodiscard]] std::size_t written() const noexcept { return written_; }

private:
    Sink& sink_;
    std::uint32_t crc_ = 0;
    std::size_t written_ = 0;
};

// Reads numbers from bytes. Reading past the end gives zero and sets failed().
class byte_reader {
public:
    explicit byte_reader(std::span<const std::byte> bytes) noexcept : bytes_(bytes) {}
    template <std::unsigned_integral T>
    T number() noexcept {
        T value = 0;
        if (bytes_.size() < sizeof(T)) {
            failed_ = true;
            bytes_ = {};
            return value;
        }
        for (std::size_t i = 0; i < sizeof(T); ++i)
            value = static_cast<T>(value | std::to_integer<T>(bytes_[i]) << (8 * i));
        bytes_ = bytes_.subspan(sizeof(T));
        return value;
    }
    [[nodiscard]] bool failed() const noexcept { return failed_; }
    [[nodiscard]] std::size_t left() const noexcept { return bytes_.size(); }

private:
    std::span<const std::byte> bytes_;
    bool failed_ = false;
};

} // namespace kv1::inline KV1_ABI::detail
