// SPDX-License-Identifier: Apache-2.0
//
// The reference's own bytes, bit for bit, on every target (tests/data/quantizers.safetensors).
#include "compare.hpp"
#include "safetensors_reader.hpp"
#include "targets.hpp"

#include <kv1/row.hpp>

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

using kv1::affine;
using kv1::float16;
using kv1_test::tally;

namespace {

const kv1_test::safetensors_file& golden() {
    static const kv1_test::safetensors_file file(KV1_TEST_DATA_DIR "/quantizers.safetensors");
    return file;
}

// body(prefix, channels, vectors, x) for every d{D}.
template <class F>
void for_each_dimension(F&& body) {
    std::size_t seen = 0;
    for (const auto& [name, tensor] : golden().tensors()) {
        if (!name.ends_with(".x"))
            continue;
        REQUIRE(tensor.shape.size() == 2);
        INFO(name);
        body(name.substr(0, name.size() - 1), tensor.shape[1], tensor.shape[0], golden().values<float>(name));
        ++seen;
    }
    REQUIRE(seen >= 17);
}

template <class T>
std::span<T> row(std::vector<T>& all, std::size_t i, std::size_t width) {
    return std::span<T>(all).subspan(i * width, width);
}
template <class T>
std::span<const T> row(const std::vector<T>& all, std::size_t i, std::size_t width) {
    return std::span<const T>(all).subspan(i * width, width);
}

// Whether a positive number lies within `relative` of the midpoint of two neighbouring halves.
bool near_half_boundary(long double x, long double relative) {
    const int exponent = std::max(std::ilogb(x), -14);
    const long double scaled = std::ldexp(x, 10 - exponent); // in quanta
    const long double distance = std::fabs(scaled - std::floor(scaled) - 0.5L);
    return distance <= relative * scaled;
}

// What the reference's fake quantization gives: the codes of the unrounded metadata, evaluated with the
// metadata as it would be stored.
template <int Bits>
void check_fake(const std::string& name) {
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for_each_dimension(
            [&](const std::string& prefix, std::size_t d, std::size_t n, const std::vector<float>& x) {
                const std::vector<float> expected = golden().values<float>(prefix + name);
                std::vector<std::uint8_t> codes(d);
                for (std::size_t i = 0; i < n; ++i) {
                    kv1::affine_metadata m{};
                    REQUIRE(kv1::try_quantize<affine<Bits>>(row(x, i, d), codes, m));
                    for (std::size_t c = 0; c < d; ++c)
                        t.expect(kv1_test::bits_of(affine<Bits>::dequantize(codes[c], m)) ==
                                     kv1_test::bits_of(expected[i * d + c]),
                                 prefix, i, c, expected[i * d + c]);
                }
            });
        KV1_REQUIRE_CLEAN(t);
    });
}

} // namespace

TEST_CASE("2-bit rows are the reference's bytes, minima, scales and values", "[golden]") {
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for_each_dimension([&](const std::string& prefix, std::size_t d, std::size_t n,
                               const std::vector<float>& x) {
            const auto packed = golden().values<std::byte>(prefix + "affine2.packed");
            const auto minima = golden().values<std::uint16_t>(prefix + "affine2.min");
            const auto scales = golden().values<std::uint16_t>(prefix + "affine2.scale");
            const auto values = golden().values<float>(prefix + "affine2.dequant");
            const std::size_t width = kv1::packed_size<2>(d);
            REQUIRE(packed.size() == n * width);
            std::vector<std::byte> bytes(width);
            std::vector<float> decoded(d);
            for (std::size_t i = 0; i < n; ++i) {
                kv1::affine_metadata m{};
                REQUIRE(kv1::try_encode_row<affine<2>>(row(x, i, d), bytes, m));
                t.expect(kv1_test::same_bits(bytes, row(packed, i, width)), prefix, i, "bytes");
                t.expect(m.minimum.bits() == minima[i] && m.scale.bits() == scales[i], prefix, i, "metadata");
                REQUIRE(kv1::try_decode_row<affine<2>>(row(packed, i, width), m, decoded));
                t.expect(kv1_test::same_bits(decoded, row(values, i, d)), prefix, i, "values");
            }
        });
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("1-bit rows are the reference's bytes", "[golden]") {
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        for_each_dimension(
            [&](const std::string& prefix, std::size_t d, std::size_t n, const std::vector<float>& x) {
                const auto packed = golden().values<std::byte>(prefix + "binary1.packed");
                const std::size_t width = kv1::packed_size<1>(d);
                REQUIRE(packed.size() == n * width);
                std::vector<std::byte> bytes(width);
                for (std::size_t i = 0; i < n; ++i) {
                    kv1::no_metadata none;
                    REQUIRE(kv1::try_encode_row<kv1::binary>(row(x, i, d), bytes, none));
                    t.expect(kv1_test::same_bits(bytes, row(packed, i, width)), prefix, i);
                }
            });
        KV1_REQUIRE_CLEAN(t);
    });
}

// The reference sums |x| in another order than kv1's fixed one, so where the exact mean lies next to the
// midpoint of two halves its scale may be the other one, and nowhere else. "Next to" is 1e-6 of the mean:
// sums of at most 256 non-negative terms, blocked or pairwise, lose a few times 6e-8.
TEST_CASE("1.5-bit rows are the reference's bytes, scales and values", "[golden]") {
    kv1_test::for_each_target([&](kv1::target) {
        tally t;
        std::size_t near = 0, other = 0;
        for_each_dimension([&](const std::string& prefix, std::size_t d, std::size_t n,
                               const std::vector<float>& x) {
            const auto packed = golden().values<std::byte>(prefix + "scaled_binary.packed");
            const auto scales = golden().values<std::uint16_t>(prefix + "scaled_binary.scale");
            const auto values = golden().values<float>(prefix + "scaled_binary.dequant");
            const std::size_t width = kv1::packed_size<1>(d);
            REQUIRE(packed.size() == n * width);
            std::vector<std::byte> bytes(width);
            std::vector<float> decoded(d);
            for (std::size_t i = 0; i < n; ++i) {
                kv1::scale_metadata m{};
                REQUIRE(kv1::try_encode_row<kv1::scaled_binary>(row(x, i, d), bytes, m));
                t.expect(kv1_test::same_bits(bytes, row(packed, i, width)), prefix, i, "bytes");
                long double sum = 0.0L;
                for (const float v : row(x, i, d))
                    sum += std::fabs(static_cast<long double>(v));
                const bool may_differ =
                    near_half_boundary(std::max(sum / static_cast<long double>(d), 1e-6L), 1e-6L);
                near += may_differ ? 1 : 0;
                const int difference = static_cast<int>(m.scale.bits()) - static_cast<int>(scales[i]);
                other += difference != 0 ? 1 : 0;
                t.expect(difference == 0 || (may_differ && std::abs(difference) == 1), prefix, i, "scale",
                         difference);
                REQUIRE(kv1::try_decode_row<kv1::scaled_binary>(row(packed, i, width),
                                                                {float16::from_bits(scales[i])}, decoded));
                t.expect(kv1_test::same_bits(decoded, row(values, i, d)), prefix, i, "values");
            }
        });
        KV1_REQUIRE_CLEAN(t);
        INFO(near << " means lie next to a boundary, " << other << " scales differ");
        CHECK(near == 5); // a property of the data
        CHECK(other == 0);
    });
}

TEST_CASE("3-bit fake quantization is the reference's", "[golden]") { check_fake<3>("fake3"); }
TEST_CASE("4-bit fake quantization is the reference's", "[golden]") { check_fake<4>("fake4"); }
TEST_CASE("8-bit fake quantization is the reference's", "[golden]") { check_fake<8>("fake8"); }
