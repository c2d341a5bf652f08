// SPDX-License-Identifier: Apache-2.0
//
// Attention under libllama is what a kv1::kv_cache of the same policy gives for the same keys, values and queries, token
// by token. These are taken out of llama.cpp's graphs as they are computed.
#include "client.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/rotary_embedding.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace {

struct step {
    std::vector<float> keys, values, queries, outputs;
    std::size_t heads = 0, kv_heads = 0, dim = 0;
};

// Of one decoded token, by layer.
struct recorder {
    std::map<std::string, step> layers;

    static bool see(ggml_tensor* t, bool ask, void* user) {
        const bool wanted = t->op == GGML_OP_SET_ROWS || t->op == GGML_OP_FLASH_ATTN_EXT;
        if (ask || !wanted)
            return wanted;
        auto& own = *static_cast<recorder*>(user);
        if (t->op == GGML_OP_SET_ROWS) {
            const std::string name = client::viewed_name(t);
            const bool key = name.starts_with("cache_k_");
            (key ? own.layers[name.substr(8)].keys : own.layers[name.substr(8)].values) =
                client::floats_of(t->src[0]);
            return true;
        }
        step& s = own.layers[client::viewed_name(t->src[1]).substr(8)];
        s.dim = static_cast<std::size_t>(t->src[0]->ne[0]);
        s.heads = static_cast<std::size_t>(t->src[0]->ne[2]);
        s.kv_heads = static_cast<std::size_t>(t->src[1]->ne[2]);
        s.queries.resize(s.heads * s.dim);
        for (std::size_t h = 0; h < s.heads; ++h)
            std::memcpy(s.queries.data() + h * s.dim,
                        static_cast<const char*>(t->src[0]->data) + h * t->src[0]->nb[2],
                        s.dim * sizeof(float));
        s.outputs = client::floats_of(t);
        return true;
    }
};

std::size_t number_of(const std::string& layer) { return std::stoul(layer.substr(1)); } // of "l2"

std::string model(const char* name) {
    return std::string(std::getenv("KV1_TEST_MODELS")) + "/" + name + ".gguf";
}

constexpr llama_pos tokens = 100;

// Runs a text, and compares each token's attention with a cache of describe(layer, shape). With `exact` both compute in
// fp32, and masked slots make no difference; `fast` rounds weights to 8 bits by runs of slots, which differ.
void compare(
    const std::string& file, const char* policy,
    const std::function<kv1::cache_description(std::size_t, const kv1::layer_description&)>& describe) {
    ::setenv("KV1_PRECISION", "exact", 1);
    recorder record;
    client::session s(file, policy, {.callback = recorder::see, .user = &record});
    std::map<std::string, kv1::kv_cache> caches;
    std::map<std::string, kv1::sequence_id> sequences;
    std::size_t compared = 0;
    for (llama_pos at = 0; at < tokens; ++at) {
        (void)s.decode({{static_cast<llama_token>(3 + at * 7 % 200), at, {0}}});
        for (const auto& [layer, got] : record.layers) {
            auto own = caches.find(layer);
            if (own == caches.end()) {
                const kv1::layer_description l{got.kv_heads, got.dim, got.dim};
                own = caches.emplace(layer, kv1::kv_cache(describe(number_of(layer), l))).first;
                sequences.emplace(layer, own->second.create_sequence());
            }
            kv1::kv_cache& cache = own->second;
            const kv1::sequence_id sequence = sequences.at(layer);
            cache.append(sequence, 0, {got.keys.data(), 1, got.kv_heads, got.dim},
                         {got.values.data(), 1, got.kv_heads, got.dim});
            std::vector<float> expected(got.outputs.size());
            cache.attend(sequence, 0, {got.queries.data(), 1, got.heads, got.dim},
                         {expected.data(), 1, got.heads, got.dim}, {.mode = kv1::precision::exact});
            cache.commit(sequence);
            float largest = 0, difference = 0;
            for (std::size_t i = 0; i < expected.size(); ++i) {
                largest = std::max(largest, std::abs(expected[i]));
                difference = std::max(difference, std::abs(expected[i] - got.outputs[i]));
            }
            INFO("position " << at << ", layer " << layer << ": " << difference << " of " << largest);
            // Sums in fp32, which merge in another order.
            CHECK(difference <= 1e-5f * largest);
            ++compared;
        }
    }
    CHECK(compared == 3 * tokens);
    ::unsetenv("KV1_PRECISION");
}

// What a model's layers attend with over a text of another kind, as a calibration.
kv1::calibration calibrated(const std::string& file, const char* policy,
                            const kv1::rotary_embedding& rotary) {
    recorder record;
    client::session s(file, "16", {.callback = recorder::see, .user = &record});
    std::map<std::size_t, step> all;
    for (llama_pos at = 0; at < tokens; ++at) {
        (void)s.decode({{static_cast<llama_token>(3 + at * 11 % 190), at, {0}}});
        for (const auto& [layer, got] : record.layers) {
            step& sum = all[number_of(layer)];
            sum.heads = got.heads, sum.kv_heads = got.kv_heads, sum.dim = got.dim;
            sum.keys.insert(sum.keys.end(), got.keys.begin(), got.keys.end());
            sum.values.insert(sum.values.end(), got.values.begin(), got.values.end());
            sum.queries.insert(sum.queries.end(), got.queries.begin(), got.queries.end());
        }
    }
    const step& first = all.at(0);
    kv1::layer_description l{first.kv_heads, first.dim, first.dim};
    l.rotary = rotary;
    kv1::calibrator found(kv1::parse_policy(policy), kv1::uniform_cache(all.size(), l, 512));
    for (const auto& [layer, x] : all)
        found.add(layer, {x.queries.data(), tokens, x.heads, x.dim},
                  {x.keys.data(), tokens, x.kv_heads, x.dim}, {x.values.data(), tokens, x.kv_heads, x.dim});
    return found.finish();
}

} // namespace

TEST_CASE("decoded tokens under libllama and in a kv_cache", "[llama_cpp]") {
    // Under libllama a token always sees itself as it came: @0:1 at least.
    for (const char* text : {"safe", "2,2@0:1", "c4+ls+had@2:8", "c2+ls+had,8@4:1"}) {
        INFO(text);
        compare(model("llama"), text, [&](std::size_t, const kv1::layer_description& l) {
            return kv1::describe_cache(kv1::parse_policy(text), kv1::uniform_cache(1, l, 512));
        });
    }
}

TEST_CASE("keys less means that turn with their position", "[llama_cpp]") {
    struct setting {
        const char* model;
        kv1::rotary_pairs pairs;
        std::size_t dim;
    };
    const char* const policy = "c3+ls+had+mean,c2+ls+had@4:8";
    const std::filesystem::path file = std::filesystem::temp_directory_path() / "kv1_llama_cpp_test.kv1calib";
    for (const setting& s : {setting{"llama", kv1::rotary_pairs::interleaved, 64},
                             setting{"qwen2", kv1::rotary_pairs::half_split, 32}}) {
        INFO(s.model);
        const kv1::rotary_embedding rotary{kv1::rotary_frequencies(10000.0, s.dim), s.pairs};
        const kv1::calibration found = calibrated(model(s.model), policy, rotary);
        kv1::save_calibration(found, file);
        ::setenv("KV1_CALIBRATION", file.c_str(), 1);
        compare(model(s.model), policy, [&](std::size_t layer, kv1::layer_description l) {
            l.rotary = rotary;
            kv1::cache_description all =
                kv1::describe_cache(found, kv1::uniform_cache(found.layers(), l, 512));
            all.layers = {all.layers[layer]};
            return all;
        });
        // A saved state has the positions, too.
        client::session before(model(s.model), policy), after(model(s.model), policy);
        const client::tokens text{9, 14, 3, 77, 120, 5, 66, 31, 8, 92, 40, 17, 51, 23, 101, 4};
        (void)before.decode(text, 0);
        const std::vector<std::uint8_t> state = before.save();
        REQUIRE(after.restore(state));
        CHECK(after.save() == state);
        ::unsetenv("KV1_CALIBRATION");
    }
    std::filesystem::remove(file);
}
