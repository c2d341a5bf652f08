// SPDX-License-Identifier: Apache-2.0
//
// Cache policies: text to value and back, errors with their places, caches of well-known shapes.
#include "../fuzz/policy_body.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_policy.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

using kv1::errc;
using kv1::kv_format;
using kv1::level_choice;
using kv1::parse_policy;

namespace {

kv1::vector_policy random_side(kv1_test::generator& g, bool key) {
    kv1::vector_policy p;
    p.format = kv1::all_kv_formats[g.below(kv1::all_kv_formats.size())];
    p.levels = static_cast<level_choice>(g.below(3));
    p.basis = g.chance(0.3);
    p.hadamard = g.chance(0.5);
    p.means = g.chance(0.5);
    p.error_weights = g.chance(0.5);
    if (key && g.chance(0.3))
        p.axis = kv1::quantization_axis::per_channel;
    if (g.chance(0.3))
        p.group = g.between(1, 512);
    return p;
}

kv1::layer_policy random_layer(kv1_test::generator& g) {
    return {random_side(g, true), random_side(g, false)};
}

kv1::cache_policy random_policy(kv1_test::generator& g) {
    kv1::cache_policy p;
    p.common = random_layer(g);
    for (std::size_t layer = g.below(6); g.chance(0.7); layer += g.between(1, 40))
        p.layers.push_back({layer, random_layer(g)});
    if (g.chance(0.5)) {
        p.fp16_sinks = g.below(100);
        p.fp16_window = g.below(1000);
    }
    if (g.chance(0.3))
        p.page_tokens = g.between(1, 4096);
    return p;
}

// With this rule, at this place.
void refuses(const std::string& text, std::int64_t position, const std::string& rule,
             errc code = errc::invalid_argument) {
    INFO(text);
    const auto p = kv1::try_parse_policy(text);
    REQUIRE_FALSE(p);
    CHECK(p.code() == code);
    CHECK(p.reason().where().position == position);
    CHECK(std::string(p.reason().rule()).find(rule) != std::string::npos);
    CHECK_THROWS_AS(parse_policy(text), kv1::error);
}

// A model's layers, with an identity for every matrix that a policy may ask for.
struct model_shape {
    kv1::cache_description shape;
    std::vector<float> means, weights;
    std::vector<kv1::layer_calibration> calibration;

    model_shape(std::size_t layers, std::size_t kv_heads, std::size_t head_dim)
        : shape(kv1::uniform_cache(layers, {kv_heads, head_dim, head_dim}, 256)),
          means(kv_heads * head_dim, 0.25f), weights(kv_heads * head_dim * head_dim) {
        for (std::size_t i = 0; i < kv_heads * head_dim; ++i)
            weights[i * head_dim + i % head_dim] = 1.0f;
        calibration.assign(layers, {means, means, weights, weights, weights, weights});
    }
};

bool calibrated(const kv1::cache_policy& p) {
    return p.needs_means() || p.needs_error_weights() || p.needs_basis();
}

} // namespace

TEST_CASE("a policy that is written and read is the same", "[policy]") {
    kv1_test::generator g(17);
    for (int i = 0; i < 2000; ++i) {
        const kv1::cache_policy p = random_policy(g);
        const std::string text = to_string(p);
        INFO(text);
        const auto again = kv1::try_parse_policy(text);
        REQUIRE(again);
        REQUIRE(*again == p);
    }
}

TEST_CASE("a changed policy is refused at a place or means what it says", "[policy]") {
    kv1_test::generator g(18);
    constexpr std::string_view letters = "0123456789,/@#+:cbglshadmienw.x";
    for (int i = 0; i < 5000; ++i) {
        std::string text = to_string(random_policy(g));
        for (std::size_t n = g.between(1, 3); n != 0 && !text.empty(); --n) {
            const std::size_t at = g.below(text.size());
            if (g.chance(0.3))
                text.erase(at, 1);
            else if (g.chance(0.5))
                text.insert(at, 1, letters[g.below(letters.size())]);
            else
                text[at] = letters[g.below(letters.size())];
        }
        INFO(text);
        REQUIRE_NOTHROW(
            kv1_test::policy_body({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}));
    }
}

TEST_CASE("the seeds of the policy fuzzer pass", "[policy]") {
    std::size_t seen = 0;
    for (const auto& seed : std::filesystem::directory_iterator(KV1_FUZZ_SEED_DIR "/policy")) {
        INFO(seed.path());
        std::ifstream file(seed.path(), std::ios::binary);
        const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
        CHECK_NOTHROW(
            kv1_test::policy_body({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}));
        ++seen;
    }
    CHECK(seen >= 10);
}

TEST_CASE("a policy says formats, encodings, layers that differ, fp16 tokens and pages", "[policy]") {
    const kv1::cache_policy p =
        parse_policy("c3+ls+had+mean+ew+channel,2+cs+g32/7:c4+ls,1.5/0:16,32@4:32#256");
    CHECK(p.common.key == kv1::vector_policy{.format = kv_format::compact3,
                                             .levels = level_choice::least_squares,
                                             .hadamard = true,
                                             .means = true,
                                             .error_weights = true,
                                             .axis = kv1::quantization_axis::per_channel});
    CHECK(p.common.value ==
          kv1::vector_policy{.format = kv_format::affine2, .levels = level_choice::clip_search, .group = 32});
    REQUIRE(p.layers.size() == 2); // in order
    CHECK(p.layers[0].layer == 0);
    CHECK(p.of(0).value.format == kv_format::fp32);
    CHECK(p.of(7).key.levels == level_choice::least_squares);
    CHECK(p.of(7).value.format == kv_format::scaled_binary);
    CHECK(p.of(3) == p.common);
    CHECK(p.fp16_sinks == 4);
    CHECK(p.fp16_window == 32);
    CHECK(p.page_tokens == 256);
    CHECK(p.needs_means());
    CHECK(p.needs_error_weights());
    CHECK_FALSE(parse_policy("2+ls+had").needs_means());
    CHECK(parse_policy("2/3:2,c2+ls+ew").needs_error_weights());
    CHECK(parse_policy("c2+basis+had,2").needs_basis());
    CHECK_FALSE(p.needs_basis());
    CHECK(to_string(parse_policy("c2+mean+had+basis+ls")) == "c2+ls+basis+had+mean,c2+ls+basis+had+mean");
    CHECK_FALSE(parse_policy("2/3:2,c2+ls+mean").needs_error_weights());
    CHECK(parse_policy("c2+ls+had") == parse_policy("c2+had+ls,c2+ls+had"));
    CHECK(to_string(parse_policy("cb2+g64+ls")) == "cb2+ls+g64,cb2+ls+g64");
    CHECK(to_string(parse_policy("cb4+ls,cb2")) == "cb4+ls,cb2");
    CHECK(parse_policy("2,2") == kv1::cache_policy{});
    for (const kv_format f : kv1::all_kv_formats) // each has a name
        CHECK(parse_policy(to_string(kv1::vector_policy{.format = f})).common.value.format == f);
}

TEST_CASE("what is no policy is refused where it goes wrong", "[policy]") {
    const char *format = "a format is", *start = "a policy begins", *option = "an option is ls",
               *twice = "an option is named once", *number = "a decimal number is missing",
               *rest = "after keys and values", *levels = "by ls or by cs", *keys = "for keys alone";
    refuses("", 0, start);
    refuses("c5,2", 0, start);
    refuses("Safe", 0, start);
    refuses(",2", 0, start);
    refuses(" 2", 0, start);
    refuses("2,", 2, format);
    refuses("2,safe", 2, format);
    refuses("2/1:safe", 4, format);
    refuses("2,2/3:2,", 8, format);
    refuses("2,2,2", 3, rest);
    refuses("2,2#16@1:2", 6, rest);
    refuses("2,2@1:2/0:2", 7, rest);
    refuses("safe+ls", 4, rest);
    refuses("2+", 2, option);
    refuses("2+ls+lsq,2", 5, option);
    refuses("2+g32x,2", 2, option);
    refuses("2,c2+ls+had+ls", 12, twice);
    refuses("2+had+had", 6, twice);
    refuses("2+mean+mean", 7, twice);
    refuses("2+ew+ew", 5, twice);
    refuses("2+g32+g32", 6, twice);
    refuses("2+channel+channel,2", 10, twice);
    refuses("2+ls+cs,2", 5, levels);
    refuses("2,2+channel", 4, keys);
    refuses("c3+ls+channel", 6, keys);
    refuses("2/0:2+channel", 6, keys);
    refuses("2+g,2", 3, number);
    refuses("2+g-32", 3, number);
    refuses("2+g0", 3, "a group has");
    refuses("2,2@x:1", 4, number);
    refuses("2,2@1:", 6, number);
    refuses("2,2@1", 5, "@SINKS:WINDOW");
    refuses("2#", 2, number);
    refuses("2#0", 2, "a page has");
    refuses("2/", 2, number);
    refuses("2/a:2", 2, number);
    refuses("2/3", 3, "/LAYER:KEYS,VALUES");
    refuses("2/3:2/1:2/3:4", 10, "a layer is named once");
    refuses("2+g99999999999999999999", 3, "too large", errc::out_of_range);
    refuses("2@4:99999999999999999999", 4, "too large", errc::out_of_range);
    const std::string most = std::to_string((std::numeric_limits<std::size_t>::max)());
    CHECK(parse_policy("2#" + most).page_tokens == (std::numeric_limits<std::size_t>::max)());
    CHECK(
        kv1::try_parse_policy("2+ls+lsq").reason().message() ==
        "invalid argument: an option is ls, cs, basis, had, mean, ew, channel, or g and a number of channels "
        "(position 5)");
}

TEST_CASE("presets have names, and what follows a name replaces its fp16 tokens and pages", "[policy]") {
    for (const kv1::policy_preset& preset : kv1::policy_presets) {
        INFO(preset.name);
        const kv1::cache_policy p = parse_policy(preset.text);
        CHECK(parse_policy(preset.name) == p);
        CHECK(calibrated(p) == (preset.name != "safe" && preset.name != "reference"));
        kv1::cache_policy other = p;
        other.fp16_sinks = 64;
        other.fp16_window = 256;
        other.page_tokens = 128;
        other.layers = {{3, {{.format = kv_format::fp16}, {.format = kv_format::fp16}}}};
        CHECK(parse_policy(std::string(preset.name) + "/3:16@64:256#128") == other);
        const auto refused = kv1::try_parse_policy("x"); // the message names each
        CHECK(std::string(refused.reason().rule()).find(preset.name) != std::string::npos);
    }
    const auto format_rule = std::string(kv1::try_parse_policy("2,x").reason().rule());
    for (const kv_format f : kv1::all_kv_formats)
        CHECK(format_rule.find(to_string(kv1::vector_policy{.format = f})) != std::string::npos);
}

TEST_CASE("presets are caches of well-known models, of the bytes that are documented", "[policy]") {
    const model_shape smollm2(30, 3, 64), llama3(32, 8, 128), qwen3(36, 8, 128);
    model_shape gemma3(26, 1, 256); // 1B: five layers of six see 512 tokens
    for (std::size_t i = 0; i < gemma3.shape.layers.size(); ++i)
        gemma3.shape.layers[i].sliding_window = i % 6 == 5 ? 0 : 512;
    const auto bytes = [](const kv1::cache_description& d) {
        const kv1::layer_description& l = d.layers.front();
        return (kv1::row_bytes(l.key_format, l.key_dim) + kv1::row_bytes(l.value_format, l.value_dim)) / 2;
    };
    const std::size_t documented[][2] = {{22, 42}, {22, 42}, {18, 34}, {34, 66}, {20, 36}};
    for (std::size_t i = 0; i < kv1::policy_presets.size(); ++i) {
        const kv1::cache_policy p = parse_policy(kv1::policy_presets[i].name);
        INFO(kv1::policy_presets[i].name);
        for (const model_shape* m : {&smollm2, &llama3, &qwen3, static_cast<const model_shape*>(&gemma3)}) {
            const kv1::cache_description d = kv1::describe_cache(p, m->shape, m->calibration);
            REQUIRE(d.layers.size() == m->shape.layers.size());
            CHECK(d.capacity_tokens == 256);
            CHECK(d.page_tokens == 64);
            CHECK(d.fp16_sinks == p.fp16_sinks);
            CHECK(d.fp16_window == p.fp16_window);
            for (std::size_t l = 0; l < d.layers.size(); ++l) {
                CHECK(d.layers[l].sliding_window == m->shape.layers[l].sliding_window);
                CHECK(d.layers[l].key_format == p.common.key.format);
                CHECK(d.layers[l].value_format == p.common.value.format);
                CHECK(d.layers[l].key_encoding.levels == p.common.key.levels);
                CHECK(d.layers[l].key_encoding.hadamard ==
                      (p.common.key.hadamard ? kv1::rotation_width(d.layers[l].key_dim) : 0));
                CHECK((d.layers[l].key_encoding.means == m->means) == p.common.key.means);
                CHECK((d.layers[l].value_encoding.error_weights == m->weights) ==
                      p.common.value.error_weights);
                CHECK(d.layers[l].value_encoding.means.empty());
            }
            kv1::cache_description few = d; // factors of error weights take a while
            few.layers.resize(6);
            const auto cache = kv1::kv_cache::create(std::move(few));
            INFO(cache.reason().message());
            CHECK(cache);
            const auto bare = kv1::try_describe_cache(p, m->shape);
            CHECK(static_cast<bool>(bare) == !calibrated(p));
        }
        CHECK(bytes(kv1::describe_cache(p, smollm2.shape, smollm2.calibration)) == documented[i][0]);
        CHECK(bytes(kv1::describe_cache(p, qwen3.shape, qwen3.calibration)) == documented[i][1]);
    }
}

TEST_CASE("what a cache lacks for its policy is named, with the layer", "[policy]") {
    const model_shape m(4, 2, 32);
    const auto refusal = [&](const char* text, const std::vector<kv1::layer_calibration>& c) {
        const auto d = kv1::try_describe_cache(parse_policy(text), m.shape, c);
        REQUIRE_FALSE(d);
        CHECK(d.code() == errc::shape_mismatch);
        return d.reason();
    };
    const auto says = [](const kv1::status& s, std::int64_t layer, const char* what) {
        INFO(s.message());
        CHECK(s.where().layer == layer);
        CHECK(std::string(s.rule()).find(what) != std::string::npos);
    };
    const std::vector<kv1::layer_calibration> none;
    says(refusal("c2+ls+mean,2", none), 0, "means off keys (+mean)");
    says(refusal("2,c2+ls+mean", none), 0, "means off values (+mean)");
    says(refusal("2/2:c2+ls+ew,2", none), 2, "errors of keys (+ew)");
    says(refusal("2/3:2,c2+ls+ew", none), 3, "errors of values (+ew)");
    says(refusal("2/1:c2+basis,2", none), 1, "keys into a basis (+basis)");
    says(refusal("2,c2+ls+basis", none), 0, "values into a basis (+basis)");
    std::vector<kv1::layer_calibration> c = m.calibration;
    c[1].key_means = {};
    says(refusal("balanced", c), 1, "means off keys (+mean)");
    c = m.calibration;
    c[3].value_error_weights = c[3].value_error_weights.first(32 * 32); // of one head
    says(refusal("balanced", c), 3, "errors of values (+ew)");
    c[3].value_means = c[3].value_error_weights = {};
    CHECK(kv1::try_describe_cache(parse_policy("safe"), m.shape, c)); // nobody asks
    c.pop_back();
    CHECK(kv1::try_describe_cache(parse_policy("safe"), m.shape, c).code() == errc::shape_mismatch);
    const auto beyond = kv1::try_describe_cache(parse_policy("2/4:3"), m.shape);
    CHECK(beyond.code() == errc::out_of_range);
    CHECK(beyond.reason().where().layer == 4);
    CHECK_THROWS_AS(kv1::describe_cache(parse_policy("2/4:3"), m.shape), kv1::error);
    kv1::cache_policy made{.layers = {{2, {}}, {1, {}}}};
    CHECK(kv1::try_describe_cache(made, m.shape).code() == errc::invalid_argument);
    made.layers = {};
    made.common.value.axis = kv1::quantization_axis::per_channel;
    CHECK(kv1::try_describe_cache(made, m.shape).code() == errc::invalid_argument);
}

TEST_CASE("a policy replaces formats and encodings of a shape, and leaves its size", "[policy]") {
    kv1::cache_description shape = kv1::uniform_cache(2, {2, 96, 80}, 640, 32);
    shape.layers[1].sliding_window = 100;
    shape.layers[0].key_encoding = {.levels = level_choice::clip_search, .means = std::vector<float>(192)};
    shape.layers[0].key_axis = kv1::quantization_axis::per_channel;
    shape.fp16_sinks = 9;
    const kv1::cache_description d =
        kv1::describe_cache(parse_policy("c3+ls+had,c2+g16/1:2+channel,4#64"), shape);
    CHECK(d.capacity_tokens == 640);
    CHECK(d.page_tokens == 64);
    CHECK(d.fp16_sinks == 0);
    CHECK(d.layers[1].sliding_window == 100);
    CHECK(d.layers[0].key_encoding ==
          kv1::vector_encoding{.levels = level_choice::least_squares, .hadamard = 32});
    CHECK(d.layers[0].key_axis == kv1::quantization_axis::per_token);
    CHECK(d.layers[0].value_group == 16);
    CHECK(d.layers[1].key_axis == kv1::quantization_axis::per_channel);
    CHECK(d.layers[1].value_format == kv_format::affine4);
    CHECK(kv1::describe_cache(parse_policy("2"), shape).page_tokens == 32);
    // the latent of multi-head latent attention is kept as keys are
    kv1::cache_description latent = kv1::uniform_cache(1, kv1::latent_layer(576, 512), 64);
    latent = kv1::describe_cache(parse_policy("c3+ls+had,4"), latent);
    CHECK(latent.layers[0].value_format == kv_format::compact3);
    CHECK(latent.layers[0].value_encoding == kv1::vector_encoding{});
    CHECK(latent.layers[0].key_encoding.hadamard == 64);
    CHECK(kv1::kv_cache::create(latent));
}
