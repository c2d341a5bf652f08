// SPDX-License-Identifier: Apache-2.0
//
// What formats say of themselves.
#include <kv1/detail/encode_reference.hpp>
#include <kv1/detail/saved_form.hpp>
#include <kv1/encoding.hpp>
#include <kv1/fake_quantize.hpp>
#include <kv1/format.hpp>
#include <kv1/kv_cache.hpp>

#include <catch2/catch_test_macros.hpp>

#include <array>
#include <string>

TEST_CASE("A format's properties are those of its rows", "[format]") {
    for (const kv1::kv_format f : kv1::all_kv_formats) {
        INFO(to_string(f));
        const kv1::format_info info = kv1::info_of(f);
        CHECK(info.metadata_bytes == kv1::row_bytes(f, 64) - kv1::packed_bytes(f, 64));
        if (info.code_bits != 0)
            CHECK(kv1::packed_bytes(f, 64) == 8 * static_cast<std::size_t>(info.code_bits));
        else
            CHECK(info.metadata_bytes == 0);
        CHECK(info.compact == (std::string(to_string(f)).starts_with("co")));
    }
}

TEST_CASE("A cache fits the levels of the formats that say that levels are fitted", "[format]") {
    for (const kv1::kv_format f : kv1::all_kv_formats) {
        INFO(to_string(f));
        kv1::cache_description d = kv1::uniform_cache(1, {1, 32, 32, f, f}, 64);
        d.layers[0].key_encoding.levels = d.layers[0].value_encoding.levels =
            kv1::level_choice::least_squares;
        CHECK(static_cast<bool>(kv1::kv_cache::create(d)) == kv1::info_of(f).fits_levels);
    }
}

TEST_CASE("What saved caches and rows rest on stays as it is", "[format]") {
    struct row {
        const char *name, *short_name;
        int saved, code_bits;
        std::size_t metadata_bytes;
    };
    constexpr std::array rows{row{"fp32", "32", 1, 0, 0},           row{"fp16", "16", 2, 0, 0},
                              row{"affine8", "8", 3, 8, 4},         row{"affine4", "4", 4, 4, 4},
                              row{"affine3", "3", 5, 3, 4},         row{"affine2", "2", 6, 2, 4},
                              row{"scaled_binary", "1.5", 7, 1, 2}, row{"binary", "1", 8, 1, 0},
                              row{"compact4", "c4", 9, 4, 2},       row{"compact3", "c3", 10, 3, 2},
                              row{"compact2", "c2", 11, 2, 2},      row{"codebook2", "cb2", 12, 2, 2},
                              row{"codebook4", "cb4", 13, 4, 2}};
    REQUIRE(rows.size() == kv1::all_kv_formats.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const kv1::kv_format f = kv1::all_kv_formats[i];
        const kv1::format_info info = kv1::info_of(f);
        CHECK(static_cast<std::size_t>(f) == i);
        CHECK(to_string(f) == rows[i].name);
        CHECK(info.short_name == rows[i].short_name);
        CHECK(kv1::format_from_short_name(rows[i].short_name) == f);
        CHECK(kv1::detail::saved_format(f) == rows[i].saved);
        CHECK(info.code_bits == rows[i].code_bits);
        CHECK(info.metadata_bytes == rows[i].metadata_bytes);
    }
    for (const char* name : {"", "5", "c", "affine2"})
        CHECK_FALSE(kv1::format_from_short_name(name).has_value());
}

TEST_CASE("A number that is no format is refused, and taken for none", "[format]") {
    const auto none = static_cast<kv1::kv_format>(kv1::all_kv_formats.size());
    CHECK(to_string(none) == "unknown");
    CHECK_FALSE(kv1::all_formats::contains(none));
    CHECK(kv1::info_of(none).code_bits == 0);
    CHECK(kv1::kv_cache::create(kv1::uniform_cache(1, {1, 32, 32, none, none}, 64)).code() ==
          kv1::errc::unsupported_format);
    std::array<float, 8> x{};
    CHECK(kv1::try_fake_quantize(none, 8, x, x).code() == kv1::errc::unsupported_format);
}

TEST_CASE("Encoding parameters for a format without a choice of levels are refused", "[format]") {
    std::array<float, 32> x{};
    std::array<std::uint8_t, 32> codes{};
    kv1::detail::row_metadata metadata;
    for (const kv1::kv_format f : kv1::all_kv_formats) {
        INFO(to_string(f));
        const kv1::detail::encoding_params params{f, kv1::level_choice::least_squares, 32, 32, 0};
        const auto code =
            kv1::detail::encode_reference(params, {x.data(), nullptr, nullptr}, codes.data(), &metadata).code;
        CHECK(code == (kv1::info_of(f).fits_levels ? kv1::errc::ok : kv1::errc::unsupported_format));
    }
}
