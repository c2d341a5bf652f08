// SPDX-License-Identifier: Apache-2.0
//
// Compact formats and least squares against bytes that an independent implementation made of the definitions
// (tests/data/make_encoders.py), on every target.
#include "compare.hpp"
#include "safetensors_reader.hpp"
#include "targets.hpp"

#include <kv1/kv_cache.hpp>
#include <kv1/row.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

using kv1_test::tally;

namespace {

const kv1_test::safetensors_file& golden() {
    static const kv1_test::safetensors_file file(KV1_TEST_DATA_DIR "/encoders.safetensors");
    return file;
}

template <class Q>
void check(const std::string& scheme, tally& t) {
    for (const std::size_t d : {1u, 7u, 32u, 64u, 128u}) {
        std::string at("d"); // put together so that g++ 12 at -O3 sees no overlap
        at.append(std::to_string(d)).append(".");
        const auto x = golden().values<float>(at + "x");
        const auto codes = golden().values<std::uint8_t>(at + scheme + ".codes");
        const auto scales = golden().values<std::uint16_t>(at + scheme + ".scale");
        const auto minima = golden().values<std::uint16_t>(at + scheme + ".minimum");
        for (std::size_t i = 0; i < scales.size(); ++i) {
            std::vector<std::uint8_t> found(d);
            typename Q::metadata m{};
            REQUIRE(kv1::try_quantize<Q>(std::span(x).subspan(i * d, d), found, m));
            bool same = m.scale.bits() == scales[i];
            if constexpr (requires { m.minimum; })
                same = same && m.minimum.bits() == minima[i];
            for (std::size_t c = 0; c < d; ++c)
                same = same && found[c] == codes[i * d + c];
            t.expect(same, scheme, "row", i, "of", d, "channels");
        }
    }
}

// A full page against golden bytes, on every target.
void check_page(const std::string& name, const kv1::layer_description& l, std::size_t tokens,
                std::size_t bytes_a_token) {
    const auto keys = golden().values<float>(name + ".keys"),
               values = golden().values<float>(name + ".values");
    const auto expected = golden().values<std::uint8_t>(name + ".bytes");
    kv1_test::for_each_target([&](kv1::target) {
        kv1::kv_cache cache(kv1::uniform_cache(1, l, tokens, tokens));
        const kv1::sequence_id id = cache.create_sequence();
        cache.append(id, 0, {keys.data(), tokens, 1, l.key_dim}, {values.data(), tokens, 1, l.value_dim});
        const std::span<const std::byte> bytes = cache.page(0, 0, 0);
        std::vector<std::uint8_t> page;
        for (const std::byte b : bytes)
            page.push_back(std::to_integer<std::uint8_t>(b));
        REQUIRE(page.size() == tokens * bytes_a_token);
        REQUIRE(page.size() == expected.size());
        CAPTURE(kv1_test::first_difference(page, expected));
        REQUIRE(page == expected);
    });
}

} // namespace

TEST_CASE("compact formats and least squares give the golden codes and metadata on every target",
          "[encode]") {
    using kv1::affine, kv1::compact, kv1::least_squares;
    kv1_test::for_each_target([](kv1::target) {
        tally t;
        check<compact<2>>("compact2", t);
        check<compact<3>>("compact3", t);
        check<compact<4>>("compact4", t);
        check<kv1::codebook2>("codebook2", t);
        check<least_squares<kv1::codebook2>>("codebook2.fit", t);
        check<kv1::codebook4>("codebook4", t);
        check<least_squares<kv1::codebook4>>("codebook4.fit", t);
        check<least_squares<compact<2>>>("compact2.fit", t);
        check<least_squares<compact<3>>>("compact3.fit", t);
        check<least_squares<compact<4>>>("compact4.fit", t);
        check<least_squares<affine<2>>>("affine2.fit", t);
        check<least_squares<affine<3>>>("affine3.fit", t);
        check<least_squares<affine<4>>>("affine4.fit", t);
        KV1_REQUIRE_CLEAN(t);
    });
}

TEST_CASE("a page of compact formats is the golden one, byte for byte, on every target", "[encode]") {
    kv1::layer_description l{1, 32, 32, kv1::kv_format::compact3, kv1::kv_format::compact2};
    l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::least_squares;
    check_page("page", l, 32, 12 + 12);
}

TEST_CASE("a page of codebooks is the golden one, byte for byte, on every target", "[encode]") {
    kv1::layer_description l{1, 32, 32, kv1::kv_format::codebook2, kv1::kv_format::codebook2};
    l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::least_squares;
    check_page("codebook", l, 16, 10 + 10);
}

TEST_CASE("a page of codebooks of four bits is the golden one, byte for byte, on every target", "[encode]") {
    kv1::layer_description l{1, 32, 32, kv1::kv_format::codebook4, kv1::kv_format::codebook4};
    l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::least_squares;
    check_page("codebook4", l, 16, 18 + 18);
}

TEST_CASE("a page with metadata by groups is the golden one, byte for byte, on every target", "[encode]") {
    kv1::layer_description l{1, 64, 64, kv1::kv_format::compact3, kv1::kv_format::affine2};
    l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::least_squares;
    l.key_group = l.value_group = 32;
    check_page("grouped", l, 16, (24 + 2 * 2) + (16 + 2 * 4));
}

TEST_CASE("a full page of keys per channel is the golden one, byte for byte, on every target", "[encode]") {
    kv1::layer_description l{1, 32, 32, kv1::kv_format::affine2, kv1::kv_format::compact2};
    l.key_encoding.levels = l.value_encoding.levels = kv1::level_choice::least_squares;
    l.key_axis = kv1::quantization_axis::per_channel;
    check_page("channels", l, 32, (8 + 4) + 10);
}
