// SPDX-License-Identifier: Apache-2.0
//
// packed_vector<Bits>: an owning sequence of codes of 1, 2, 3, 4 or 8 bits, with the bit order of
// packed_span. A regular type; equality compares codes. Growth invalidates iterators and proxies as
// std::vector's does, and gives the strong guarantee; allocation failure throws what the allocator throws.
#pragma once

#include <kv1/packed_span.hpp>

#include <algorithm>
#include <memory>
#include <vector>

namespace kv1::inline KV1_ABI {

/// An owning sequence of codes.
template <int Bits, class Allocator = std::allocator<std::byte>>
requires packable<Bits>
class packed_vector {
public:
    static constexpr int bits = Bits;                                     ///< of a code
    static constexpr std::uint8_t max_code = packed_span<Bits>::max_code; ///< the largest code
    /// As the standard's containers have them.
    /// @{
    using value_type = std::uint8_t;
    using size_type = std::size_t;
    using difference_type = std::ptrdiff_t;
    using allocator_type = Allocator;
    using reference = packed_reference<Bits, std::byte>;
    using const_reference = packed_reference<Bits, const std::byte>;
    using iterator = packed_iterator<Bits, std::byte>;
    using const_iterator = packed_iterator<Bits, const std::byte>;
    /// @}

    /// No codes.
    /// @{
    packed_vector() = default;
    explicit packed_vector(const Allocator& allocator) : bytes_(allocator) {}
    /// @}
    /// n codes of value 0.
    explicit packed_vector(std::size_t n, const Allocator& allocator = {})
        : bytes_(packed_size<Bits>(n), allocator), size_(n) {}
#if KV1_EXCEPTIONS
    /// The given codes; throws error (out_of_range) for one that does not fit.
    explicit packed_vector(std::span<const std::uint8_t> codes, const Allocator& allocator = {})
        : packed_vector(codes.size(), allocator) {
        span().pack(codes);
    }
#endif

    /// Number of codes.
    /// @{
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
    /// @}
    /// The packed bytes; bits past the last code are 0.
    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }

    /// A view, valid until the next growth.
    /// @{
    [[nodiscard]] packed_span<Bits> span() noexcept { return {std::span<std::byte>(bytes_), size_}; }
    [[nodiscard]] packed_span<Bits, const std::byte> span() const noexcept {
        return {std::span<const std::byte>(bytes_), size_};
    }
    operator packed_span<Bits>() noexcept { return span(); }
    operator packed_span<Bits, const std::byte>() const noexcept { return span(); }
    /// @}

    /// One code, or a proxy of it. Precondition: i < size().
    /// @{
    [[nodiscard]] reference operator[](std::size_t i) noexcept { return span()[i]; }
    [[nodiscard]] const_reference operator[](std::size_t i) const noexcept { return span()[i]; }
    /// @}

    /// The codes in order.
    /// @{
    [[nodiscard]] iterator begin() noexcept { return span().begin(); }
    [[nodiscard]] iterator end() noexcept { return span().end(); }
    [[nodiscard]] const_iterator begin() const noexcept { return span().begin(); }
    [[nodiscard]] const_iterator end() const noexcept { return span().end(); }
    [[nodiscard]] const_iterator cbegin() const noexcept { return begin(); }
    [[nodiscard]] const_iterator cend() const noexcept { return end(); }
    /// @}

    /// Room for n codes in all.
    void reserve(std::size_t n) { bytes_.reserve(packed_size<Bits>(n)); }
    /// No codes; the room stays.
    void clear() noexcept {
        bytes_.clear();
        size_ = 0;
    }
    /// New codes are 0.
    void resize(std::size_t n) {
        const std::size_t kept = (std::min)(n, size_);
        bytes_.resize(packed_size<Bits>(n));
        size_ = n;
        // codes that a shrink cut off must not come back with a later growth, nor a part of one
        if (const std::size_t used = kept % 8 * Bits % 8; used != 0)
            bytes_[packed_size<Bits>(kept) - 1] &= static_cast<std::byte>((1u << used) - 1u);
    }
    /// Precondition: code < 2^Bits.
    void push_back(std::uint8_t code) {
        resize(size_ + 1);
        (*this)[size_ - 1] = code;
    }
    /// Precondition: !empty().
    void pop_back() { resize(size_ - 1); }

    /// Whether the codes are the same.
    friend bool operator==(const packed_vector& a, const packed_vector& b) noexcept {
        return a.size_ == b.size_ && a.bytes_ == b.bytes_; // padding bits are 0
    }

private:
    std::vector<std::byte, Allocator> bytes_;
    std::size_t size_ = 0;
};

} // namespace kv1::inline KV1_ABI
