// SPDX-License-Identifier: Apache-2.0
//
// Attention under libllama is what a kv1::kv_cache of the same policy gives for the same keys, values and queries, token
// by token. These are taken out of llama.cpp's graphs as they are computed.
#include "client.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/kv_cache.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
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
        const auto floats = [](const ggml_tensor* x) {
            const auto* const data = static_cast<const float*>(x->data);
            return std::vector<float>(data, data + ggml_nelements(x));
        };
        const auto layer_of = [](const ggml_tensor* x) {
            while (x->view_src != nullptr)
                x = x->view_src;
            return std::string(x->name);
        };
        if (t->op == GGML_OP_SET_ROWS) {
            const std::string name = layer_of(t);
            const bool key = name.starts_with("cache_k_");
            (key ? own.layers[name.substr(8)].keys : own.layers[name.substr(8)].values) = floats(t->src[0]);
            return true;
        }
        step& s = own.layers[layer_of(t->src[1]).substr(8)];
        s.dim = static_cast<std::size_t>(t->src[0]->ne[0]);
        s.heads = static_cast<std::size_t>(t->src[0]->ne[2]);
        s.kv_heads = static_cast<std::size_t>(t->src[1]->ne[2]);
        s.queries.resize(s.heads * s.dim);
        for (std::size_t h = 0; h < s.heads; ++h)
            std::memcpy(s.queries.data() + h * s.dim,
                        static_cast<const char*>(t->src[0]->data) + h * t->src[0]->nb[2],
                        s.dim * sizeof(float));
        s.outputs = floats(t);
        return true;
    }
};

} // namespace

TEST_CASE("decoded tokens under libllama and in a kv_cache", "[llama_cpp]") {
    const std::string file = std::string(std::getenv("KV1_TEST_MODELS")) + "/llama.gguf";
    // Under libllama a token always sees itself as it came: @0:1 at least. With `exact` both compute in fp32, and masked
    // slots make no difference; `fast` rounds weights to 8 bits by runs of slots, which differ.
    ::setenv("KV1_PRECISION", "exact", 1);
    for (const char* text : {"safe", "2,2@0:1", "c4+ls+had@2:8", "c2+ls+had,8@4:1"}) {
        INFO(text);
        recorder record;
        client::session s(file, text, {.callback = recorder::see, .user = &record});
        const kv1::cache_policy policy = kv1::parse_policy(text);
        std::map<std::string, kv1::kv_cache> caches;
        std::map<std::string, kv1::sequence_id> sequences;
        std::size_t compared = 0;
        for (llama_pos at = 0; at < 100; ++at) {
            (void)s.decode({{static_cast<llama_token>(3 + at * 7 % 200), at, {0}}});
            for (const auto& [layer, got] : record.layers) {
                auto own = caches.find(layer);
                if (own == caches.end()) {
                    kv1::layer_description l{got.kv_heads, got.dim, got.dim};
                    own = caches
                              .emplace(layer, kv1::kv_cache(
                                                  kv1::describe_cache(policy, kv1::uniform_cache(1, l, 512))))
                              .first;
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
        CHECK(compared == 300);
    }
    ::unsetenv("KV1_PRECISION");
}
