// SPDX-License-Identifier: Apache-2.0
//
// model_fingerprint: 32 bytes that name a model. Caches of two models of one shape look alike, but the keys
// of one mean nothing to the other. A saved cache carries the fingerprint that it was saved with, and is
// loaded only with the same one (cache_io.hpp).
//
//   kv1::model_fingerprint model = kv1::fingerprint_of("Qwen/Qwen2.5-7B@a09a354");  // a name and revision
//   model = kv1::fingerprint_of(std::as_bytes(std::span(lora_weights)), model);      // and what else matters
#pragma once

#include <kv1/detail/config.hpp>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kv1::inline KV1_ABI {

/// Names a model. Zeros, the default, name none.
struct model_fingerprint {
    /// A digest (SHA-256 has 32 bytes; a shorter one is followed by zeros), or what fingerprint_of() gives.
    std::array<std::uint8_t, 32> bytes{};
    /// Whether it names none.
    [[nodiscard]] constexpr bool empty() const noexcept { return *this == model_fingerprint{}; }
    /// Whether all bytes are the same.
    friend bool operator==(const model_fingerprint&, const model_fingerprint&) = default;
};

/// The fingerprint of bytes that tell models apart: weights, a digest of them, a file's name and date. With
/// `before`, the fingerprint of what that stands for followed by these bytes, so that tensors can be added
/// one by one. The same bytes give the same fingerprint in every version and on every machine, and it is
/// never empty. It tells models apart by accident, not against people who look for collisions: against them
/// take a cryptographic digest. O(bytes).
[[nodiscard]] constexpr model_fingerprint fingerprint_of(std::span<const std::byte> bytes,
                                                         const model_fingerprint& before = {}) noexcept;
/// The fingerprint of a text.
[[nodiscard]] constexpr model_fingerprint fingerprint_of(std::string_view text,
                                                         const model_fingerprint& before = {}) noexcept;

namespace detail {

// Four 64-bit lanes. Each step maps a lane's states one to one, for every word, so that a change of one word
// always changes the result.
class fingerprint_lanes {
public:
    constexpr explicit fingerprint_lanes(const model_fingerprint& before) noexcept {
        for (std::size_t i = 0; i < 4; ++i)
            lanes_[i] = word(before.bytes.data() + 8 * i) ^ seeds[i];
    }
    template <class Byte>
    constexpr void add(const Byte* bytes, std::size_t n) noexcept {
        std::size_t i = 0;
        for (; i + 32 <= n; i += 32)
            add_block(bytes + i);
        std::array<std::uint8_t, 32> rest{};
        for (std::size_t left = i; left < n; ++left)
            rest[left - i] = static_cast<std::uint8_t>(bytes[left]);
        add_block(rest.data());
        lanes_[0] ^= n; // zeros at the end count
        for (int round = 0; round < 4; ++round)
            mix();
    }
    [[nodiscard]] constexpr model_fingerprint result() const noexcept {
        model_fingerprint f;
        for (std::size_t i = 0; i < 32; ++i)
            f.bytes[i] = static_cast<std::uint8_t>(lanes_[i / 8] >> (8 * (i % 8)));
        if (f.empty())
            f.bytes[0] = 1;
        return f;
    }

private:
    // digits of pi
    static constexpr std::array<std::uint64_t, 4> seeds{0x243f6a8885a308d3u, 0x13198a2e03707344u,
                                                        0xa4093822299f31d0u, 0x082efa98ec4e6c89u};

    template <class Byte>
    static constexpr std::uint64_t word(const Byte* bytes) noexcept {
        std::uint64_t value = 0;
        for (std::size_t i = 0; i < 8; ++i)
            value |= static_cast<std::uint64_t>(static_cast<std::uint8_t>(bytes[i])) << (8 * i);
        return value;
    }
    template <class Byte>
    constexpr void add_block(const Byte* bytes) noexcept {
        for (std::size_t i = 0; i < 4; ++i)
            lanes_[i] ^= word(bytes + 8 * i);
        mix();
    }
    constexpr void mix() noexcept {
        for (std::size_t i = 0; i < 4; ++i) {
            std::uint64_t& lane = lanes_[i];
            lane *= 0x9e3779b97f4a7c15u;
            lane ^= lane >> 32;
            lanes_[(i + 1) % 4] += std::rotl(lane, 23);
        }
    }

    std::array<std::uint64_t, 4> lanes_{};
};

} // namespace detail

constexpr model_fingerprint fingerprint_of(std::span<const std::byte> bytes,
                                           const model_fingerprint& before) noexcept {
    detail::fingerprint_lanes lanes(before);
    lanes.add(bytes.data(), bytes.size());
    return lanes.result();
}
constexpr model_fingerprint fingerprint_of(std::string_view text, const model_fingerprint& before) noexcept {
    detail::fingerprint_lanes lanes(before);
    lanes.add(text.data(), text.size());
    return lanes.result();
}

} // namespace kv1::inline KV1_ABI
