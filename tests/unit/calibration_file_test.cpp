// SPDX-License-Identifier: Apache-2.0
//
// Calibrations in files and streams: what comes back, what is refused, and what a refusal says.
#include "../fuzz/calibration_body.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using kv1::errc;
using kv1::kv_side;
using kv1_test::saved_bytes;

namespace {

const char* const policy = "c3+ls+basis+had+mean+ew,c2+ls+basis+had+ew@4:8";

kv1::status load(saved_bytes b, bool sealed = true) {
    if (sealed)
        kv1_test::reseal_calibration(b);
    return kv1::try_load_calibration(kv1::memory_source(b)).reason();
}

saved_bytes with(saved_bytes b, std::size_t at, std::uint64_t value, std::size_t size = 4) {
    kv1_test::write_number(b, at, value, size);
    return b;
}

bool same_layers(const kv1::cache_description& a, const kv1::cache_description& b) {
    return a.layers == b.layers && a.fp16_sinks == b.fp16_sinks && a.fp16_window == b.fp16_window;
}

} // namespace

TEST_CASE("a calibration file gives back the cache that was described, bit for bit", "[calibration_file]") {
    const kv1_test::temporary_folder folder;
    const std::filesystem::path file = folder.path() / "model.kv1calib";
    const kv1::model_fingerprint model = kv1::fingerprint_of("a model");
    const kv1::calibration found = kv1_test::small_calibration(policy, model);
    kv1::save_calibration(found, file);
    const kv1::calibration known = kv1::load_calibration(file, model);

    CHECK(known.model() == model);
    CHECK(known.policy() == kv1::parse_policy(policy));
    const kv1::cache_description shape = kv1_test::small_calibrated_shape();
    CHECK(same_layers(describe_cache(known, shape), describe_cache(found, shape)));
    CHECK(kv1_test::saved_calibration(known) == kv1_test::saved_calibration(found));
    CHECK(std::filesystem::file_size(file) == kv1_test::saved_calibration(found).size());
    CHECK(kv1::kv_cache::create(describe_cache(known, shape)));

    SECTION("and takes another policy that needs no other parts") {
        kv1::calibration other = kv1::load_calibration(file, model);
        other.set_policy(kv1::parse_policy("c2+ls+ew,c4"));
        const kv1::cache_description d = describe_cache(other, shape);
        CHECK(d.layers[0].key_format == kv1::kv_format::compact2);
        CHECK(d.layers[0].key_encoding.means.empty());
        CHECK(d.layers[0].key_encoding.error_weights == found.error_weights(0, kv_side::key));
        other.set_policy(kv1::parse_policy("c2+ls+mean"));
        CHECK(try_describe_cache(other, shape).code() == errc::shape_mismatch); // no means of values
    }
    SECTION("and is given to a model that was trained from the one that it is of") {
        kv1::calibration given = kv1::load_calibration(file, model);
        const kv1::model_fingerprint trained = kv1::fingerprint_of("the model, trained");
        given.set_model(trained);
        kv1::save_calibration(given, file);
        CHECK(kv1::try_load_calibration(file, model).reason().code() == errc::different_model);
        CHECK(same_layers(describe_cache(kv1::load_calibration(file, trained), shape),
                          describe_cache(found, shape)));
    }
}

TEST_CASE("a calibration of another model, or of another shape, is refused with what differs",
          "[calibration_file]") {
    const kv1::model_fingerprint model = kv1::fingerprint_of("a model");
    const saved_bytes named = kv1_test::saved_calibration(kv1_test::small_calibration(policy, model)),
                      nameless = kv1_test::saved_calibration(kv1_test::small_calibration(policy));
    const auto refused = [](const saved_bytes& b, const kv1::model_fingerprint& expected) {
        return kv1::try_load_calibration(kv1::memory_source(b), expected).reason();
    };
    CHECK(refused(named, kv1::fingerprint_of("another")).code() == errc::different_model);
    CHECK_THAT(refused(named, kv1::fingerprint_of("another")).rule(), ContainsSubstring("of another model"));
    CHECK_THAT(refused(named, {}).rule(), ContainsSubstring("give its fingerprint"));
    CHECK_THAT(refused(nameless, model).rule(), ContainsSubstring("does not say"));

    const kv1::calibration c = kv1_test::small_calibration(policy);
    const auto differs = [&](auto change) {
        kv1::cache_description shape = kv1_test::small_calibrated_shape();
        change(shape);
        const kv1::status s = try_describe_cache(c, shape).reason();
        CHECK(s.code() == errc::different_cache);
        return s.message();
    };
    CHECK_THAT(differs([](auto& d) { d.layers.pop_back(); }), ContainsSubstring("layers"));
    CHECK_THAT(differs([](auto& d) { d.layers[1].kv_heads = 2; }),
               ContainsSubstring("KV heads") && ContainsSubstring("layer 1"));
    CHECK_THAT(differs([](auto& d) { d.layers[0].key_dim = 16; }),
               ContainsSubstring("keys") && ContainsSubstring("layer 0"));
    CHECK_THAT(differs([](auto& d) { d.layers[0].value_dim = 16; }), ContainsSubstring("values"));
    CHECK_THAT(differs([](auto& d) { d.layers[1].rotary.frequencies[1] = 0.5f; }),
               ContainsSubstring("turn otherwise") && ContainsSubstring("layer 1"));
    kv1::cache_description silent = kv1_test::small_calibrated_shape();
    silent.layers[1].rotary = {};
    CHECK(describe_cache(c, silent).layers[1].rotary == kv1_test::small_calibrated_shape().layers[1].rotary);
}

TEST_CASE("damaged calibrations are refused, and each refusal says why", "[calibration_file]") {
    const saved_bytes good = kv1_test::saved_calibration(kv1_test::small_calibration(policy));
    const std::size_t table = kv1_test::calibration_places::fixed_part,
                      rows = table + std::string(policy).size();
    REQUIRE(load(good));

    CHECK(load(with(good, 0, 'X', 1)).code() == errc::bad_format);
    CHECK(load(with(good, 8, 2)).code() == errc::unsupported_version);
    CHECK(load(with(good, 72, 1)).code() == errc::unsupported_version); // what this version does not use
    CHECK(load(with(good, 16, 3)).code() == errc::bad_format);          // a layer more
    CHECK(load(with(good, 16, 1u << 30)).code() == errc::bad_format);
    CHECK(load(with(good, 20, 5)).code() == errc::bad_format); // a shorter policy
    CHECK(load(with(good, 24, std::uint64_t{1} << 62, 8), true).code() == errc::bad_format);
    CHECK(load(with(good, 32, 5, 8)).code() == errc::bad_format);
    CHECK(load(with(good, table, '@', 1)).code() == errc::bad_format); // no policy
    for (const std::size_t field : {0u, 1u, 2u})
        for (const std::uint32_t value : {0u, 5000u, 0xffffffffu, 3u})
            CHECK(load(with(good, rows + 4 * field, value)).code() == errc::bad_format);
    CHECK(load(with(good, rows + 12, 8)).code() == errc::bad_format); // a part that there is not
    CHECK(load(with(good, rows + 20, 5)).code() == errc::bad_format); // frequencies past the channels
    CHECK(load(with(good, rows + 24, 2)).code() == errc::bad_format); // a way to pair channels
    CHECK(load(with(good, rows + 28, 0x80000000u)).code() == errc::bad_format);       // past the channels
    CHECK(load(with(good, good.size() - 8, 0x7f800000u)).code() == errc::non_finite); // of a basis, in fp32
    const saved_bytes halves = kv1_test::saved_calibration(kv1_test::small_calibration("c3+ls+mean+ew"));
    CHECK(load(with(halves, halves.size() - 6, 0x7c00, 2)).code() ==
          errc::non_finite); // of a factor, in fp16

    for (std::size_t n = 0; n < good.size(); ++n) {
        saved_bytes cut = good;
        cut.resize(n);
        CHECK(load(cut, false).code() == errc::truncated);
    }
    for (std::size_t at = 0; at < good.size(); ++at) // checksums are not made right
        CHECK_FALSE(load(with(good, at, std::to_integer<std::uint64_t>(good[at]) ^ 0x20u, 1), false));
}

TEST_CASE("a calibration file with more than a calibration is refused, a stream is not",
          "[calibration_file]") {
    const kv1_test::temporary_folder folder;
    saved_bytes b = kv1_test::saved_calibration(kv1_test::small_calibration(policy));
    b.push_back(std::byte{7});
    std::ofstream(folder.path() / "long", std::ios::binary)
        .write(reinterpret_cast<const char*>(b.data()), static_cast<std::streamsize>(b.size()));
    CHECK(kv1::try_load_calibration(folder.path() / "long").code() == errc::bad_format);
    CHECK(kv1::try_load_calibration(folder.path() / "none").code() == errc::io_error);
    CHECK(kv1::try_load_calibration(folder.path()).code() == errc::io_error);
    kv1_test::one_way source{b};
    CHECK(kv1::try_load_calibration(source));
    CHECK(source.left.size() == 1);
    CHECK(kv1::try_save_calibration(kv1_test::small_calibration(policy), folder.path() / "no" / "folder")
              .code() == errc::io_error);
    CHECK(kv1::try_save_calibration(kv1_test::small_calibration(policy), [](std::span<const std::byte>) {
              return false;
          }).code() == errc::io_error);
}

TEST_CASE("whatever a calibration's bytes become, it is refused or is one", "[calibration_file][fuzz]") {
    kv1_test::calibration_body::tallies tallies;
    std::size_t seeds = 0;
    for (const auto& seed : std::filesystem::directory_iterator(KV1_FUZZ_SEED_DIR "/calibration")) {
        INFO(seed.path());
        std::ifstream in(seed.path(), std::ios::binary);
        const std::vector<char> input{std::istreambuf_iterator<char>(in), {}};
        CHECK_NOTHROW(kv1_test::calibration_body::run(
            {reinterpret_cast<const std::uint8_t*>(input.data()), input.size()}, tallies));
        ++seeds;
    }
    CHECK(seeds >= 10);
    kv1_test::generator g(3);
    for (int trial = 0; trial < 4000; ++trial) {
        std::vector<std::uint8_t> input{static_cast<std::uint8_t>(g.bits())};
        for (std::size_t changes = g.below(4); changes != 0; --changes) {
            const std::size_t place = g.chance(0.7) ? g.below(220) : g.below(65536);
            input.insert(input.end(),
                         {static_cast<std::uint8_t>(place), static_cast<std::uint8_t>(place >> 8),
                          static_cast<std::uint8_t>(g.bits())});
        }
        kv1_test::calibration_body::run(input, tallies);
    }
    CHECK(tallies.refused > 500);
    CHECK(tallies.loaded > 100);
    CHECK(tallies.caches > 500);
}
