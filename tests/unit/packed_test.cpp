// SPDX-License-Identifier: Apache-2.0
//
// packed_span and packed_vector against a model that sets one bit at a time.
#include "compare.hpp"
#include "packed_model.hpp"
#include "random.hpp"

#include <catch2/catch_template_test_macros.hpp>

#include <kv1/packed_span.hpp>
#include <kv1/packed_vector.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <iterator>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

using kv1::errc;
using kv1::packed_span;
using kv1::packed_vector;
using kv1_test::generator;
using kv1_test::packed_model;
using kv1_test::random_codes;

#define KV1_WIDTHS ((int Bits), Bits), 1, 2, 3, 4, 8

namespace {

template <class Range>
std::vector<std::uint8_t> listed(const Range& range) {
    std::vector<std::uint8_t> codes;
    for (const std::uint8_t c : range)
        codes.push_back(c);
    return codes;
}

std::vector<std::byte> bytes_of(std::span<const std::byte> bytes) { return {bytes.begin(), bytes.end()}; }

template <int Bits>
std::vector<std::uint8_t> as_vector(const packed_vector<Bits>& v) {
    return listed(v);
}

} // namespace

TEMPLATE_TEST_CASE_SIG("packed sequences are random-access ranges of bytes", "[packed]", KV1_WIDTHS) {
    using span = packed_span<Bits>;
    using read_only = packed_span<Bits, const std::byte>;
    using vector = packed_vector<Bits>;
    STATIC_REQUIRE(std::ranges::random_access_range<span>);
    STATIC_REQUIRE(std::ranges::random_access_range<read_only>);
    STATIC_REQUIRE(std::ranges::random_access_range<vector>);
    STATIC_REQUIRE(std::ranges::random_access_range<const vector>);
    STATIC_REQUIRE(std::ranges::sized_range<span>);
    STATIC_REQUIRE(std::ranges::common_range<span>);
    STATIC_REQUIRE(std::ranges::view<span>);
    STATIC_REQUIRE(std::ranges::borrowed_range<span>);
    STATIC_REQUIRE(std::ranges::borrowed_range<read_only>);
    STATIC_REQUIRE_FALSE(std::ranges::borrowed_range<vector>);
    STATIC_REQUIRE(std::sortable<typename span::iterator>);
    STATIC_REQUIRE(std::indirectly_writable<typename span::iterator, std::uint8_t>);
    STATIC_REQUIRE_FALSE(std::indirectly_writable<typename read_only::iterator, std::uint8_t>);
    STATIC_REQUIRE(std::is_convertible_v<typename span::iterator, typename read_only::iterator>);
    STATIC_REQUIRE_FALSE(std::is_convertible_v<typename read_only::iterator, typename span::iterator>);
    STATIC_REQUIRE(std::is_convertible_v<span, read_only>);
    STATIC_REQUIRE_FALSE(std::is_convertible_v<read_only, span>);
    STATIC_REQUIRE(std::regular<vector>);
    STATIC_REQUIRE(span::max_code == (1 << Bits) - 1);
}

TEST_CASE("only widths of 1, 2, 3, 4 and 8 bits can be packed", "[packed]") {
    STATIC_REQUIRE_FALSE(kv1::packable<0>);
    STATIC_REQUIRE_FALSE(kv1::packable<5>);
    STATIC_REQUIRE_FALSE(kv1::packable<6>);
    STATIC_REQUIRE_FALSE(kv1::packable<7>);
    STATIC_REQUIRE_FALSE(kv1::packable<16>);
    STATIC_REQUIRE_FALSE(kv1::packable<-1>);
}

TEMPLATE_TEST_CASE_SIG("packed_size is the bits rounded up to bytes, and does not overflow", "[packed]",
                       KV1_WIDTHS) {
    for (std::size_t n = 0; n < 1000; ++n)
        REQUIRE(kv1::packed_size<Bits>(n) == (n * Bits + 7) / 8);
    constexpr std::size_t most = ~std::size_t{0};
    STATIC_REQUIRE(kv1::packed_size<8>(most) == most);
    STATIC_REQUIRE(kv1::packed_size<1>(most) == most / 8 + 1);
    STATIC_REQUIRE(kv1::packed_size<Bits>(most) >= most / 8 * Bits);
}

TEMPLATE_TEST_CASE_SIG("packing gives the model's bytes and unpacking the codes, for any length", "[packed]",
                       KV1_WIDTHS) {
    generator g(1);
    std::vector<std::size_t> lengths;
    for (std::size_t n = 0; n <= 200; ++n)
        lengths.push_back(n);
    lengths.insert(lengths.end(), {1023, 1024, 1025, 4095, 4096, 5001});
    for (const std::size_t n : lengths) {
        const std::vector<std::uint8_t> codes = random_codes(g, n, Bits);
        const std::size_t size = kv1::packed_size<Bits>(n);
        std::vector<std::byte> buffer(size + 2, std::byte{0xcc}); // padding bits must become 0, the rest stay
        const packed_span<Bits> packed{std::span(buffer).subspan(1, size), n};
        REQUIRE(packed.try_pack(codes));
        REQUIRE(bytes_of(packed.bytes()) == packed_model(codes, Bits));
        REQUIRE(buffer.front() == std::byte{0xcc});
        REQUIRE(buffer.back() == std::byte{0xcc});

        std::vector<std::uint8_t> unpacked(n + 2, 0xcc);
        REQUIRE(packed.try_unpack(std::span(unpacked).subspan(1, n)));
        REQUIRE(std::equal(codes.begin(), codes.end(), unpacked.begin() + 1));
        REQUIRE(unpacked.front() == 0xcc);
        REQUIRE(unpacked.back() == 0xcc);
        REQUIRE(listed(packed) == codes);
        for (std::size_t i = 0; i < n; ++i)
            if (packed[i] != codes[i])
                FAIL("element " << i << " of " << n);
    }
}

TEMPLATE_TEST_CASE_SIG("writing an element changes its bits and no other", "[packed]", KV1_WIDTHS) {
    generator g(2);
    for (std::size_t n = 1; n <= 70; ++n) {
        std::vector<std::uint8_t> codes = random_codes(g, n, Bits);
        std::vector<std::byte> buffer = packed_model(codes, Bits);
        const packed_span<Bits> packed{std::span(buffer), n};
        for (int round = 0; round < 20; ++round) {
            const std::size_t i = g.below(n);
            const auto code = static_cast<std::uint8_t>(g.below(std::size_t{1} << Bits));
            packed[i] = code;
            codes[i] = code;
            REQUIRE(buffer == packed_model(codes, Bits));
        }
    }
}

TEMPLATE_TEST_CASE_SIG("writing the last element leaves the tail of its byte alone", "[packed]", KV1_WIDTHS) {
    for (std::size_t n = 1; n <= 16; ++n) {
        std::vector<std::byte> buffer(kv1::packed_size<Bits>(n), std::byte{0xff});
        const packed_span<Bits> packed{std::span(buffer), n};
        for (std::size_t i = 0; i < n; ++i)
            packed[i] = std::uint8_t{0};
        const std::size_t used = n * Bits % 8;
        REQUIRE(buffer.back() == (used == 0 ? std::byte{0} : std::byte{0xff} << used));
    }
}

TEMPLATE_TEST_CASE_SIG("codes that do not fit are refused before a byte is written", "[packed]", KV1_WIDTHS) {
    generator g(3);
    for (std::size_t n = 1; n <= 100; ++n) {
        std::vector<std::uint8_t> codes = random_codes(g, n, Bits);
        std::vector<std::byte> buffer(kv1::packed_size<Bits>(n), std::byte{0xa5});
        const std::vector<std::byte> before = buffer;
        const packed_span<Bits> packed{std::span(buffer), n};
        if constexpr (Bits < 8) {
            codes[g.below(n)] = static_cast<std::uint8_t>(g.between(std::size_t{1} << Bits, 255));
            REQUIRE(packed.try_pack(codes).code() == errc::out_of_range);
            REQUIRE_THROWS_AS(packed.pack(codes), kv1::error);
            REQUIRE_THROWS_AS(packed_vector<Bits>(std::span<const std::uint8_t>(codes)), kv1::error);
        }
        codes.push_back(0);
        REQUIRE(packed.try_pack(codes).code() == errc::shape_mismatch);
        REQUIRE(packed.try_unpack(codes).code() == errc::shape_mismatch);
        REQUIRE(buffer == before);
    }
}

TEMPLATE_TEST_CASE_SIG("the algorithms of the ranges library work in place", "[packed]", KV1_WIDTHS) {
    generator g(4);
    for (const std::size_t n :
         {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{64}, std::size_t{333}}) {
        std::vector<std::uint8_t> codes = random_codes(g, n, Bits);
        packed_vector<Bits> packed{std::span<const std::uint8_t>(codes)};

        std::ranges::reverse(packed);
        std::ranges::reverse(codes);
        REQUIRE(as_vector(packed) == codes);
        std::ranges::sort(packed);
        std::ranges::sort(codes);
        REQUIRE(as_vector(packed) == codes);
        REQUIRE(std::ranges::is_sorted(packed));
        std::ranges::swap_ranges(packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(n / 2),
                                 packed.end() - static_cast<std::ptrdiff_t>(n / 2), packed.end());
        std::ranges::swap_ranges(codes.begin(), codes.begin() + static_cast<std::ptrdiff_t>(n / 2),
                                 codes.end() - static_cast<std::ptrdiff_t>(n / 2), codes.end());
        REQUIRE(as_vector(packed) == codes);
        std::ranges::fill(packed, std::uint8_t{1});
        std::ranges::fill(codes, std::uint8_t{1});
        REQUIRE(bytes_of(packed.bytes()) == packed_model(codes, Bits));
        REQUIRE(std::ranges::count(packed, std::uint8_t{1}) == static_cast<std::ptrdiff_t>(n));
        std::ranges::copy(random_codes(g, n, Bits), packed.begin());
        REQUIRE(std::ranges::distance(packed) == static_cast<std::ptrdiff_t>(n));
    }
}

TEMPLATE_TEST_CASE_SIG("iterators move, compare and subtract as a random-access iterator does", "[packed]",
                       KV1_WIDTHS) {
    generator g(5);
    const std::vector<std::uint8_t> codes = random_codes(g, 50, Bits);
    packed_vector<Bits> packed{std::span<const std::uint8_t>(codes)};
    const packed_vector<Bits>& constant = packed;
    auto i = packed.begin();
    REQUIRE(std::distance(packed.begin(), packed.end()) == 50);
    REQUIRE(*i++ == codes[0]);
    REQUIRE(*i == codes[1]);
    REQUIRE(*++i == codes[2]);
    REQUIRE(*i-- == codes[2]);
    REQUIRE(*--i == codes[0]);
    REQUIRE(i[17] == codes[17]);
    REQUIRE(*(i + 33) == codes[33]);
    REQUIRE(*(33 + i) == codes[33]);
    REQUIRE(*(packed.end() - 1) == codes[49]);
    i += 20;
    i -= 3;
    REQUIRE(i - packed.begin() == 17);
    REQUIRE(packed.begin() - i == -17);
    REQUIRE((packed.begin() < i && i > packed.begin() && i <= i && i != packed.end()));
    REQUIRE(constant.begin() == packed.cbegin());
    REQUIRE(constant.end() - packed.begin() == 50); // a mutable one converts
    REQUIRE(listed(constant) == codes);
    REQUIRE(listed(constant.span()) == codes);
    const typename packed_span<Bits>::iterator none, other;
    REQUIRE(none == other);
}

TEMPLATE_TEST_CASE_SIG("proxies assign and swap values, not references", "[packed]", KV1_WIDTHS) {
    std::vector<std::byte> buffer(kv1::packed_size<Bits>(9), std::byte{0});
    const packed_span<Bits> packed{std::span(buffer), 9};
    const std::uint8_t top = packed_span<Bits>::max_code;
    packed[2] = top;
    packed[7] = packed[2];
    REQUIRE(packed[7] == top);
    packed[2] = std::uint8_t{0};
    REQUIRE(packed[7] == top);
    swap(packed[2], packed[7]);
    REQUIRE((packed[2] == top && packed[7] == 0));
    std::ranges::iter_swap(packed.begin() + 2, packed.begin() + 7);
    REQUIRE((packed[2] == 0 && packed[7] == top));
    auto proxy = packed[7];
    proxy = packed[2];
    REQUIRE(packed[7] == 0);
}

TEMPLATE_TEST_CASE_SIG("spans are usable in constant expressions", "[packed]", KV1_WIDTHS) {
    constexpr auto sum = [] {
        std::array<std::byte, 8> bytes{};
        const packed_span<Bits> packed(std::span<std::byte>(bytes), 8);
        for (std::size_t i = 0; i < 8; ++i)
            packed[i] = static_cast<std::uint8_t>(i & packed.max_code);
        unsigned total = 0;
        for (const std::uint8_t c : packed_span<Bits, const std::byte>(packed))
            total += c;
        return total;
    }();
    unsigned expected = 0;
    for (unsigned i = 0; i < 8; ++i)
        expected += i & packed_span<Bits>::max_code;
    STATIC_REQUIRE(sum > 0);
    REQUIRE(sum == expected);
}

TEMPLATE_TEST_CASE_SIG("a packed vector lives as a std::vector does", "[packed]", KV1_WIDTHS) {
    generator g(6);
    packed_vector<Bits> packed;
    std::vector<std::uint8_t> model;
    REQUIRE(packed.empty());
    for (int round = 0; round < 3000; ++round) {
        switch (g.below(8)) {
        case 0:
            if (!model.empty()) {
                packed.pop_back();
                model.pop_back();
            }
            break;
        case 1: {
            const std::size_t n = g.below(40) == 0 ? 0 : g.below(150);
            packed.resize(n);
            model.resize(n);
            break;
        }
        case 2:
            packed.reserve(g.below(300));
            break;
        case 3:
            if (!model.empty()) {
                const std::size_t i = g.below(model.size());
                model[i] = static_cast<std::uint8_t>(g.below(std::size_t{1} << Bits));
                packed[i] = model[i];
            }
            break;
        default:
            model.push_back(static_cast<std::uint8_t>(g.below(std::size_t{1} << Bits)));
            packed.push_back(model.back());
        }
        REQUIRE(packed.size() == model.size());
        REQUIRE(bytes_of(packed.bytes()) == packed_model(model, Bits)); // padding bits included
    }
    const packed_vector<Bits> copy = packed;
    REQUIRE(copy == packed);
    packed.push_back(0);
    REQUIRE(copy != packed);
    packed.pop_back();
    REQUIRE(copy == packed);
    packed.clear();
    REQUIRE(packed == packed_vector<Bits>());
    packed_vector<Bits> moved = packed_vector<Bits>(copy);
    REQUIRE(moved == copy);
    REQUIRE(packed_vector<Bits>(7) != packed_vector<Bits>(8)); // the same bytes, perhaps, but other lengths
    REQUIRE(as_vector(packed_vector<Bits>(5)) == std::vector<std::uint8_t>(5, 0));
}

TEMPLATE_TEST_CASE_SIG("codes that a shrink cut off do not come back", "[packed]", KV1_WIDTHS) {
    for (std::size_t kept = 0; kept < 20; ++kept) {
        packed_vector<Bits> packed(20);
        std::ranges::fill(packed, packed.max_code);
        packed.resize(kept);
        packed.resize(20);
        for (std::size_t i = 0; i < 20; ++i)
            REQUIRE(packed[i] == (i < kept ? packed.max_code : 0));
        packed_vector<Bits> other(kept);
        std::ranges::fill(other, other.max_code);
        packed.resize(kept);
        REQUIRE(packed == other);
    }
}
