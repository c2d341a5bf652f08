// SPDX-License-Identifier: Apache-2.0
//
// What formats say of themselves.
#include <kv1/encoding.hpp>
#include <kv1/format.hpp>
#include <kv1/kv_cache.hpp>

#include <catch2/catch_test_macros.hpp>

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
