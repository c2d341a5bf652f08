// SPDX-License-Identifier: Apache-2.0
//
// KV1_CALIBRATE: the file that libggml-kv1.so writes is what the library's calibrator gives for the same keys, values and
// queries, which are taken out of llama.cpp's graphs as they are computed.
#include "client.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/calibration.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/rotary_embedding.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace {

// What a layer's attention node had of a batch.
struct call {
    std::size_t tokens = 0;
    std::vector<float> keys, values, queries; // [token][head][channel]
};
struct layer {
    std::size_t heads = 0, kv_heads = 0, dim = 0, outputs = 0;
    std::vector<float> projection;
    std::vector<call> calls;
};

struct recorder {
    std::map<std::size_t, layer> layers;

    static bool see(ggml_tensor* t, bool ask, void* user) {
        const bool projects =
            t->op == GGML_OP_MUL_MAT && std::string_view(t->src[0]->name).ends_with("attn_output.weight");
        const bool wanted = t->op == GGML_OP_SET_ROWS || t->op == GGML_OP_FLASH_ATTN_EXT || projects;
        if (ask || !wanted)
            return wanted;
        auto& own = *static_cast<recorder*>(user);
        if (projects) {
            layer& l = own.layers[std::stoul(
                std::string(t->src[0]->name).substr(4))]; // of "blk.2.attn_output.weight"
            l.outputs = static_cast<std::size_t>(t->src[0]->ne[1]);
            l.projection = client::floats_of(t->src[0]);
            return true;
        }
        const std::string name = client::viewed_name(t->op == GGML_OP_SET_ROWS ? t : t->src[1]); // cache_k_l2
        layer& l = own.layers[std::stoul(name.substr(9))];
        if (t->op == GGML_OP_SET_ROWS) {
            if (name.starts_with("cache_k_"))
                l.calls.emplace_back().keys = client::floats_of(t->src[0]);
            else
                l.calls.back().values = client::floats_of(t->src[0]);
            return true;
        }
        const ggml_tensor* const q = t->src[0];
        l.dim = static_cast<std::size_t>(q->ne[0]);
        l.heads = static_cast<std::size_t>(q->ne[2]);
        l.kv_heads = static_cast<std::size_t>(t->src[1]->ne[2]);
        // Gemma scales queries before attention, where a calibrator divides products by the root of their length.
        float factor = 0;
        std::memcpy(&factor, t->op_params, sizeof factor);
        factor *= std::sqrt(static_cast<float>(l.dim));
        factor = std::abs(factor - 1) > 1e-6f ? factor : 1;
        call& c = l.calls.back();
        c.tokens = static_cast<std::size_t>(q->ne[1]);
        for (std::size_t i = 0; i < c.tokens; ++i)
            for (std::size_t h = 0; h < l.heads; ++h) {
                const auto* const row = reinterpret_cast<const float*>(static_cast<const char*>(q->data) +
                                                                       i * q->nb[1] + h * q->nb[2]);
                for (std::size_t channel = 0; channel < l.dim; ++channel)
                    c.queries.push_back(row[channel] * factor);
            }
        return true;
    }
};

std::string model(const char* name) {
    return std::string(std::getenv("KV1_TEST_MODELS")) + "/" + name + ".gguf";
}

client::tokens text(std::size_t n, std::uint32_t seed) {
    client::tokens t(n);
    for (std::size_t i = 0; i < n; ++i)
        t[i] = static_cast<llama_token>(3 + (i * i * 7 + i * 31 + seed * 101) % 200);
    return t;
}

const std::filesystem::path file = std::filesystem::temp_directory_path() / "kv1_calibrate_test.kv1calib";

struct variable {
    const char* name;
    variable(const char* n, const std::string& value) : name(n) { ::setenv(n, value.c_str(), 1); }
    variable(const variable&) = delete;
    variable& operator=(const variable&) = delete;
    ~variable() { ::unsetenv(name); }
};

// The calls of one text.
void add(kv1::calibrator& to, std::size_t number, const layer& l, std::size_t window = 0) {
    std::vector<float> keys, values;
    to.set_sliding_window(number, window);
    for (const call& c : l.calls) {
        keys.insert(keys.end(), c.keys.begin(), c.keys.end());
        values.insert(values.end(), c.values.begin(), c.values.end());
        const std::size_t n = keys.size() / (l.kv_heads * l.dim);
        to.add(number, {c.queries.data(), c.tokens, l.heads, l.dim}, {keys.data(), n, l.kv_heads, l.dim},
               {values.data(), n, l.kv_heads, l.dim});
    }
}

kv1::calibrator by_hand(const recorder& record, const char* policy, const kv1::calibration& like) {
    kv1::cache_description shape;
    for (const auto& [number, l] : record.layers) {
        shape.layers.push_back({l.kv_heads, l.dim, l.dim});
        shape.layers.back().rotary = like.rotary(number);
    }
    kv1::calibrator to(kv1::parse_policy(policy), shape);
    for (const auto& [number, l] : record.layers)
        to.set_output_projection(number, {l.projection.data(), l.outputs, l.heads, l.dim});
    return to;
}

// The largest difference, of the largest number.
float difference(const std::vector<float>& a, const std::vector<float>& b) {
    REQUIRE(a.size() == b.size());
    float most = 0, apart = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        most = std::max(most, std::abs(b[i]));
        apart = std::max(apart, std::abs(a[i] - b[i]));
    }
    return apart / std::max(most, 1e-30f);
}

void compare(const kv1::calibration& got, const kv1::calibration& expected, float allowed) {
    REQUIRE(got.layers() == expected.layers());
    for (std::size_t l = 0; l < got.layers(); ++l)
        for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value}) {
            INFO("layer " << l << (side == kv1::kv_side::key ? ", keys" : ", values"));
            CHECK_FALSE(got.error_weights(l, side).empty());
            CHECK(difference(got.means(l, side), expected.means(l, side)) <= allowed);
            CHECK(difference(got.error_weights(l, side), expected.error_weights(l, side)) <= allowed);
        }
}

kv1::model_fingerprint fingerprint_in(const std::filesystem::path& path) {
    std::FILE* const f = std::fopen(path.c_str(), "rb");
    REQUIRE(f != nullptr);
    std::vector<std::uint8_t> start(80);
    REQUIRE(std::fread(start.data(), 1, start.size(), f) == start.size());
    std::fclose(f);
    // The fixed part ends with the fingerprint, 4 bytes of zeros and a checksum of 4 (calibration_form.hpp).
    kv1::model_fingerprint own;
    std::copy_n(start.end() - 40, 32, own.bytes.begin());
    return own;
}

constexpr const char* policy = "c3+ls+had+mean+ew,c2+ls+had+mean+ew@4:8";

} // namespace

TEST_CASE("a calibration is what the calibrator gives for the same tokens", "[llama_cpp]") {
    for (const char* name : {"llama", "qwen2", "qwen3"}) {
        INFO(name);
        recorder record;
        {
            const variable calibrate("KV1_CALIBRATE", file.string());
            client::session s(model(name), policy, {.callback = recorder::see, .user = &record});
            (void)s.decode(text(100, 1), 0); // of 64 tokens and of 36
        }
        const kv1::calibration got = kv1::load_calibration(file, fingerprint_in(file));
        CHECK(to_string(got.policy()) == to_string(kv1::parse_policy(policy)));
        CHECK_FALSE(got.model().empty());
        const std::size_t dim = record.layers.at(0).dim;
        CHECK(got.rotary(0).pairs == (name == std::string("llama") ? kv1::rotary_pairs::interleaved
                                                                   : kv1::rotary_pairs::half_split));
        CHECK(difference(got.rotary(0).frequencies, kv1::rotary_frequencies(10000.0, dim)) < 1e-6f);
        kv1::calibrator expected = by_hand(record, policy, got);
        for (const auto& [number, l] : record.layers)
            add(expected, number, l);
        compare(got, expected.finish(), 0.0f); // the same sums in the same order
    }
    std::filesystem::remove(file);
}

TEST_CASE("a calibration of two texts in a batch, of sliding windows and of several threads", "[llama_cpp]") {
    recorder record;
    {
        const variable calibrate("KV1_CALIBRATE", file.string());
        client::session s(model("llama"), policy, {.sequences = 2, .threads = 2});
        std::vector<client::place> both;
        const client::tokens a = text(40, 2), b = text(30, 3);
        for (std::size_t i = 0; i < a.size(); ++i) {
            both.push_back({a[i], static_cast<llama_pos>(i), {0}});
            if (i < b.size())
                both.push_back({b[i], static_cast<llama_pos>(i), {1}});
        }
        (void)s.decode(both);
    }
    const kv1::calibration two = kv1::load_calibration(file, fingerprint_in(file));
    kv1::calibrator sum = by_hand(
        [&] {
            client::session s(model("llama"), "32",
                              {.ubatch = 128, .callback = recorder::see, .user = &record});
            (void)s.decode(text(40, 2), 0);
            return record;
        }(),
        policy, two);
    for (const auto& [number, l] : record.layers)
        add(sum, number, l);
    record.layers.clear();
    {
        client::session s(model("llama"), "32", {.ubatch = 128, .callback = recorder::see, .user = &record});
        (void)s.decode(text(30, 3), 0);
    }
    for (const auto& [number, l] : record.layers)
        add(sum, number, l);
    // Sums in another order, of keys and queries that products of other shapes gave: parts are kept in fp16.
    compare(two, sum.finish(), 1e-3f);

    record.layers.clear();
    {
        const variable calibrate("KV1_CALIBRATE", file.string());
        client::session s(model("gemma3"), policy,
                          {.ubatch = 32, .callback = recorder::see, .user = &record});
        (void)s.decode(text(100, 4), 0);
    }
    const kv1::calibration windows = kv1::load_calibration(file, fingerprint_in(file));
    kv1::calibrator expected = by_hand(record, policy, windows);
    for (const auto& [number, l] : record.layers)
        add(expected, number, l, number % 6 == 5 ? 0 : 32); // every sixth layer sees all
    compare(windows, expected.finish(), 1e-3f);
    std::filesystem::remove(file);
}

TEST_CASE("a calibrated cache is nearer to the model, and serves no other", "[llama_cpp]") {
    {
        const variable calibrate("KV1_CALIBRATE", file.string());
        client::session s(model("qwen2"), policy);
        for (std::uint32_t seed = 10; seed < 14; ++seed) {
            llama_memory_clear(s.memory(), true);
            (void)s.decode(text(300, seed), 0);
        }
    }
    const auto predictions = [](const char* name, const char* of_policy) {
        client::session s(model(name), of_policy, {.ubatch = 16});
        return s.decode(text(300, 20), 0);
    };
    const std::vector<float> plain = predictions("qwen2", nullptr);
    const double without =
        client::divergence(plain, predictions("qwen2", "c2+ls+had@4:8"), client::tiny_vocabulary);
    const variable calibration("KV1_CALIBRATION", file.string());
    const double with =
        client::divergence(plain, predictions("qwen2", "c2+ls+had+mean+ew@4:8"), client::tiny_vocabulary);
    INFO("KL divergence " << with << " with, " << without << " without");
    CHECK(with < 0.8 * without);
    // It has the shape of this one's layers, too.
    client::session other(model("qwen3"), policy);
    CHECK(other.try_decode({{5, 0, {0}}}) != 0);
    std::filesystem::remove(file);
}

TEST_CASE("models of other kinds are calibrated, and served", "[llama_cpp]") {
    for (const char* name : {"gemma2", "gpt-oss", "lfm2", "bloom"}) {
        INFO(name);
        {
            const variable calibrate("KV1_CALIBRATE", file.string());
            client::session s(model(name), policy);
            (void)s.decode(text(150, 5), 0);
        }
        const kv1::calibration found = kv1::load_calibration(file, fingerprint_in(file));
        CHECK(found.layers() == (name == std::string("bloom") ? 3 : 4));
        for (std::size_t l = 0; l < found.layers();
             ++l) // the first and the third layer of lfm2 have no attention
            CHECK(found.error_weights(l, kv1::kv_side::key).empty() ==
                  (name == std::string("lfm2") && l % 2 == 0));
        const variable calibration("KV1_CALIBRATION", file.string());
        client::session s(model(name), policy);
        CHECK(s.try_decode({{5, 0, {0}}}) == 0);
    }
    std::filesystem::remove(file);
}

TEST_CASE("what can not be calibrated is refused, and no file is written", "[llama_cpp]") {
    std::filesystem::remove(file);
    const variable calibrate("KV1_CALIBRATE", file.string());
    {
        client::session no_part(model("llama"), "safe");
        CHECK(no_part.try_decode({{5, 0, {0}}}) != 0);
        client::session turned(model("llama"), policy, {.keys = GGML_TYPE_Q8_0, .values = GGML_TYPE_Q8_0});
        CHECK(turned.try_decode({{5, 0, {0}}}) != 0);
        client::session values_in_keys(model("deepseek2"), policy);
        CHECK(values_in_keys.try_decode({{5, 0, {0}}}) != 0);
    }
    CHECK_FALSE(std::filesystem::exists(file));
}
