// SPDX-License-Identifier: Apache-2.0
//
// packed_span<Bits>: a non-owning, random-access sequence of unsigned codes of 1, 2, 3, 4 or 8 bits.
//
// Code i takes bits i*Bits ... i*Bits + Bits - 1, counted from the low bit of each byte: at 3 bits, code 5
// takes bits 15 ... 17, the highest bit of byte 1 and the two lowest of byte 2. Elements are read and written
// through a proxy; iterators model std::random_access_iterator. pack() and unpack() are vectorized. Bits of
// the last byte that belong to no code are kept by element writes and set to zero by pack().
#pragma once

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/status.hpp>

#include <cassert>
#include <compare>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <type_traits>

namespace kv1::inline KV1_ABI {

/// Widths that can be packed.
template <int Bits>
concept packable = Bits == 1 || Bits == 2 || Bits == 3 || Bits == 4 || Bits == 8;

/// Bytes that n codes of the width take.
template <int Bits>
requires packable<Bits>
[[nodiscard]] constexpr std::size_t packed_size(std::size_t n) noexcept {
    constexpr auto bits = static_cast<std::size_t>(Bits);
    return n / 8 * bits + (n % 8 * bits + 7) / 8; // n * bits may overflow
}

namespace detail {

template <int Bits>
struct code_bits {
    static constexpr unsigned mask = (1u << Bits) - 1u;

    [[nodiscard]] static constexpr std::uint8_t load(const std::byte* bytes, std::size_t i) noexcept {
        const std::size_t byte = i / 8 * Bits + i % 8 * Bits / 8;
        const unsigned shift = static_cast<unsigned>(i % 8 * Bits % 8);
        unsigned window = std::to_integer<unsigned>(bytes[byte]);
        if (shift + Bits > 8)
            window |= std::to_integer<unsigned>(bytes[byte + 1]) << 8;
        return static_cast<std::uint8_t>(window >> shift & mask);
    }

    static constexpr void store(std::byte* bytes, std::size_t i, std::uint8_t code) noexcept {
        const std::size_t byte = i / 8 * Bits + i % 8 * Bits / 8;
        const unsigned shift = static_cast<unsigned>(i % 8 * Bits % 8);
        const unsigned keep = ~(mask << shift);
        const unsigned bits = (code & mask) << shift;
        bytes[byte] =
            static_cast<std::byte>((std::to_integer<unsigned>(bytes[byte]) & keep) | (bits & 0xffu));
        if (shift + Bits > 8)
            bytes[byte + 1] = static_cast<std::byte>(
                (std::to_integer<unsigned>(bytes[byte + 1]) & (keep >> 8)) | bits >> 8);
    }
};

// Eight 3-bit codes, one a byte, to 24 bits and back, in three halving steps.
constexpr std::uint32_t join3(std::uint64_t x) noexcept {
    x = (x | x >> 5) & 0x003f003f003f003fu;
    x = (x | x >> 10) & 0x00000fff00000fffu;
    return static_cast<std::uint32_t>((x | x >> 20) & 0xffffffu);
}
constexpr std::uint64_t split3(std::uint32_t joined) noexcept {
    std::uint64_t x = joined;
    x = (x | x << 20) & 0x00000fff00000fffu;
    x = (x | x << 10) & 0x003f003f003f003fu;
    return (x | x << 5) & 0x0707070707070707u;
}

template <int Bits>
void pack_codes(const std::uint8_t* codes, std::size_t n, std::byte* bytes) noexcept {
    if (n == 0)
        return; // an empty span may be null
    if constexpr (Bits != 3) {
        common_kernels().pack(Bits, codes, n, reinterpret_cast<std::uint8_t*>(bytes));
    } else {
        std::size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            std::uint64_t eight = 0;
            std::memcpy(&eight, codes + i, 8);
            const std::uint32_t joined = join3(eight);
            std::memcpy(bytes + i / 8 * 3, &joined, 3);
        }
        if (i < n) {
            std::uint64_t rest = 0;
            std::memcpy(&rest, codes + i, n - i);
            const std::uint32_t joined = join3(rest);
            std::memcpy(bytes + i / 8 * 3, &joined, packed_size<3>(n - i));
        }
    }
}

template <int Bits>
void unpack_codes(const std::byte* bytes, std::size_t n, std::uint8_t* codes) noexcept {
    if (n == 0)
        return; // an empty span may be null
    if constexpr (Bits != 3) {
        common_kernels().unpack(Bits, reinterpret_cast<const std::uint8_t*>(bytes), n, codes);
    } else {
        std::size_t i = 0;
        for (; i < n; i += 8) {
            const std::size_t count = n - i < 8 ? n - i : 8;
            std::uint32_t joined = 0;
            std::memcpy(&joined, bytes + i / 8 * 3, packed_size<3>(count));
            const std::uint64_t eight = split3(joined);
            std::memcpy(codes + i, &eight, count);
        }
    }
}

// Whether every code is below 2^Bits.
template <int Bits>
[[nodiscard]] inline bool codes_fit(std::span<const std::uint8_t> codes) noexcept {
    unsigned all = 0;
    for (const std::uint8_t c : codes)
        all |= c;
    return all <= code_bits<Bits>::mask;
}

} // namespace detail

/// A proxy of one code. Precondition of assignment: the code is below 2^Bits.
template <int Bits, class Byte>
class packed_reference {
public:
    /// Code i of the bytes.
    constexpr packed_reference(Byte* bytes, std::size_t i) noexcept : bytes_(bytes), index_(i) {}
    /// Refers to the same code.
    constexpr packed_reference(const packed_reference&) noexcept = default;

    /// Reads the code. O(1).
    constexpr operator std::uint8_t() const noexcept { return detail::code_bits<Bits>::load(bytes_, index_); }

    /// Writes the code, also that of another proxy. O(1).
    /// @{
    constexpr const packed_reference& operator=(std::uint8_t code) const noexcept
        requires(!std::is_const_v<Byte>) {
        assert(code <= detail::code_bits<Bits>::mask);
        detail::code_bits<Bits>::store(bytes_, index_, code);
        return *this;
    }
    constexpr const packed_reference& operator=(const packed_reference& other) const noexcept
        requires(!std::is_const_v<Byte>) {
        return *this = static_cast<std::uint8_t>(other);
    }
    constexpr packed_reference& operator=(const packed_reference& other) noexcept
        requires(!std::is_const_v<Byte>) {
        detail::code_bits<Bits>::store(bytes_, index_, other);
        return *this;
    }
    /// @}

    /// Exchanges two codes.
    friend constexpr void swap(packed_reference a, packed_reference b) noexcept
        requires(!std::is_const_v<Byte>) {
        const std::uint8_t code = a;
        a = static_cast<std::uint8_t>(b);
        b = code;
    }

private:
    Byte* bytes_;
    std::size_t index_;
};

/// Random-access iterator over codes; dereferencing gives a packed_reference.
template <int Bits, class Byte>
class packed_iterator {
public:
    /// As std::iterator_traits has them.
    /// @{
    using iterator_concept = std::random_access_iterator_tag;
    using iterator_category = std::input_iterator_tag; // a proxy is no lvalue
    using value_type = std::uint8_t;
    using difference_type = std::ptrdiff_t;
    using reference = packed_reference<Bits, Byte>;
    using pointer = void;
    /// @}

    /// Of no sequence.
    constexpr packed_iterator() noexcept = default;
    /// At code i of the bytes.
    constexpr packed_iterator(Byte* bytes, std::size_t i) noexcept : bytes_(bytes), index_(i) {}
    /// A read-only iterator from a writable one.
    template <class Other>
    requires(std::is_const_v<Byte> && !std::is_const_v<Other>) constexpr packed_iterator(
        const packed_iterator<Bits, Other>& other) noexcept
        : bytes_(other.bytes_), index_(other.index_) {}

    /// As the standard has them for random-access iterators; O(1). Comparison and difference take iterators
    /// of one sequence.
    /// @{
    [[nodiscard]] constexpr reference operator*() const noexcept { return {bytes_, index_}; }
    [[nodiscard]] constexpr reference operator[](difference_type n) const noexcept { return *(*this + n); }

    constexpr packed_iterator& operator++() noexcept { return *this += 1; }
    constexpr packed_iterator& operator--() noexcept { return *this -= 1; }
    constexpr packed_iterator operator++(int) noexcept {
        packed_iterator before = *this;
        *this += 1;
        return before;
    }
    constexpr packed_iterator operator--(int) noexcept {
        packed_iterator before = *this;
        *this -= 1;
        return before;
    }
    constexpr packed_iterator& operator+=(difference_type n) noexcept {
        index_ = static_cast<std::size_t>(static_cast<difference_type>(index_) + n);
        return *this;
    }
    constexpr packed_iterator& operator-=(difference_type n) noexcept { return *this += -n; }

    friend constexpr packed_iterator operator+(packed_iterator i, difference_type n) noexcept {
        return i += n;
    }
    friend constexpr packed_iterator operator+(difference_type n, packed_iterator i) noexcept {
        return i += n;
    }
    friend constexpr packed_iterator operator-(packed_iterator i, difference_type n) noexcept {
        return i -= n;
    }
    friend constexpr difference_type operator-(const packed_iterator& a, const packed_iterator& b) noexcept {
        return static_cast<difference_type>(a.index_) - static_cast<difference_type>(b.index_);
    }
    friend constexpr bool operator==(const packed_iterator& a, const packed_iterator& b) noexcept {
        return a.index_ == b.index_;
    }
    friend constexpr std::strong_ordering operator<=>(const packed_iterator& a,
                                                      const packed_iterator& b) noexcept {
        return a.index_ <=> b.index_;
    }
    /// @}

private:
    friend class packed_iterator<Bits, const Byte>;
    Byte* bytes_ = nullptr;
    std::size_t index_ = 0;
};

/// View of n codes in caller-owned bytes; with Byte = const std::byte a read-only one.
template <int Bits, class Byte = std::byte>
requires packable<Bits> && std::same_as<std::remove_const_t<Byte>, std::byte>
class packed_span {
public:
    static constexpr int bits = Bits;                                       ///< of a code
    static constexpr std::uint8_t max_code = detail::code_bits<Bits>::mask; ///< the largest code
    /// As the standard's containers have them.
    /// @{
    using value_type = std::uint8_t;
    using size_type = std::size_t;
    using difference_type = std::ptrdiff_t;
    using reference = packed_reference<Bits, Byte>;
    using iterator = packed_iterator<Bits, Byte>;
    using const_iterator = packed_iterator<Bits, const std::byte>;
    /// @}

    /// An empty view.
    constexpr packed_span() noexcept = default;
    /// Precondition: bytes.size() >= packed_size<Bits>(n).
    constexpr packed_span(std::span<Byte> bytes, std::size_t n) noexcept : bytes_(bytes.data()), size_(n) {
        assert(bytes.size() >= packed_size<Bits>(n));
    }
    /// A read-only view of a writable one.
    template <class Other>
    requires(std::is_const_v<Byte> &&
             !std::is_const_v<Other>) constexpr packed_span(const packed_span<Bits, Other>& other) noexcept
        : bytes_(other.data()), size_(other.size()) {}

    /// Number of codes.
    /// @{
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }
    /// @}
    /// The bytes that hold them.
    /// @{
    [[nodiscard]] constexpr Byte* data() const noexcept { return bytes_; }
    [[nodiscard]] constexpr std::span<Byte> bytes() const noexcept {
        return {bytes_, packed_size<Bits>(size_)};
    }
    /// @}

    /// Precondition: i < size().
    [[nodiscard]] constexpr reference operator[](std::size_t i) const noexcept {
        assert(i < size_);
        return {bytes_, i};
    }
    /// The codes in order.
    /// @{
    [[nodiscard]] constexpr iterator begin() const noexcept { return {bytes_, 0}; }
    [[nodiscard]] constexpr iterator end() const noexcept { return {bytes_, size_}; }
    [[nodiscard]] constexpr const_iterator cbegin() const noexcept { return {bytes_, 0}; }
    [[nodiscard]] constexpr const_iterator cend() const noexcept { return {bytes_, size_}; }
    /// @}

    /// Writes all codes, one byte each in `codes`. O(size()). Errors: shape_mismatch unless codes.size() is
    /// size(); out_of_range for a code of 2^Bits or more. Nothing is written then.
    status try_pack(std::span<const std::uint8_t> codes) const noexcept requires(!std::is_const_v<Byte>) {
        if (codes.size() != size_)
            return {errc::shape_mismatch, "one code per element is needed"};
        if (!detail::codes_fit<Bits>(codes))
            return {errc::out_of_range, "a code does not fit the width"};
        detail::pack_codes<Bits>(codes.data(), size_, bytes_);
        return {};
    }
    /// Reads all codes, one byte each. O(size()). Errors: shape_mismatch unless codes.size() is size().
    status try_unpack(std::span<std::uint8_t> codes) const noexcept {
        if (codes.size() != size_)
            return {errc::shape_mismatch, "one code per element is needed"};
        detail::unpack_codes<Bits>(bytes_, size_, codes.data());
        return {};
    }
#if KV1_EXCEPTIONS
    /// Writes all codes, one byte each in `codes`. Throws kv1::error, and writes nothing: shape_mismatch
    /// unless codes.size() is size(); out_of_range for a code of 2^Bits or more.
    void pack(std::span<const std::uint8_t> codes) const requires(!std::is_const_v<Byte>) {
        detail::throw_if_error(try_pack(codes));
    }
    /// Reads all codes, one byte each. Throws kv1::error: shape_mismatch unless codes.size() is size().
    void unpack(std::span<std::uint8_t> codes) const { detail::throw_if_error(try_unpack(codes)); }
#endif

private:
    Byte* bytes_ = nullptr;
    std::size_t size_ = 0;
};

static_assert(std::random_access_iterator<packed_span<3>::iterator>);

} // namespace kv1::inline KV1_ABI

// <span>, which does the same, declares them; all of <ranges> takes long to parse
template <int Bits, class Byte>
inline constexpr bool std::ranges::enable_borrowed_range<kv1::packed_span<Bits, Byte>> = true;
template <int Bits, class Byte>
inline constexpr bool std::ranges::enable_view<kv1::packed_span<Bits, Byte>> = true;
