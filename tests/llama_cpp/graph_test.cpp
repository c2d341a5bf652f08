// SPDX-License-Identifier: Apache-2.0
//
// The engine of examples/llama_cpp/graph beside libllama: two programs that build the graph of a model each in its own way,
// on the same ggml.
#include "client.hpp"
#include "graph_cache.hpp"
#include "llama_graph.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_policy.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

namespace {

// Logits after each of these steps, with 24 cells.
std::vector<float> run(const std::string& file, const char* policy, const std::vector<client::tokens>& steps,
                       int threads) {
    kv1_ggml::llama_graph model(file, threads);
    const kv1_ggml::llama_shape& m = model.shape();
    kv1::slot_store_description d;
    d.layers = kv1::describe_cache(kv1::parse_policy(policy),
                                   kv1::uniform_cache(m.layers, {m.kv_heads, m.head_dim, m.head_dim}, 64))
                   .layers;
    d.slots = 64;
    d.fp16_slots = 64;
    d.fp16_window = 8;
    kv1_ggml::graph_cache cache(d);
    std::vector<float> all;
    std::size_t length = 0;
    for (const client::tokens& t : steps) {
        std::vector<std::uint32_t> slots(t.size());
        std::iota(slots.begin(), slots.end(), static_cast<std::uint32_t>(length));
        const kv1::slot_view seen = kv1::slot_view::range(0, length + t.size());
        const kv1::slot_stream stream{t.size(), seen, kv1::slot_mask::causal()};
        const kv1::slot_sequence sequence{seen};
        cache.begin({slots, {&stream, 1}});
        const std::vector<float> logits = model.run(
            [&](ggml_context* ctx, std::size_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
                return cache.attend(ctx, layer, q, cache.write(ctx, layer, k, v));
            },
            t, length);
        REQUIRE(cache.end({&sequence, 1}));
        all.insert(all.end(), logits.begin(), logits.end());
        length += t.size();
    }
    return all;
}

const std::vector<client::tokens> steps{{5, 9, 17, 101, 33, 8, 54, 2, 77, 150, 6}, {41}, {12, 3}, {90}};

} // namespace

TEST_CASE("nodes of a graph give the logits of libllama", "[llama_cpp]") {
    for (const char* name : {"llama", "qwen2", "qwen3"}) {
        INFO(name);
        const std::string file = std::string(std::getenv("KV1_TEST_MODELS")) + "/" + name + ".gguf";
        client::session own(
            file, nullptr,
            {.keys = GGML_TYPE_F32, .values = GGML_TYPE_F32, .flash = LLAMA_FLASH_ATTN_TYPE_DISABLED});
        std::vector<float> expected;
        llama_pos first = 0;
        for (const client::tokens& t : steps) {
            const std::vector<float> rows = own.decode(t, first);
            const auto last = rows.end() - static_cast<std::ptrdiff_t>(own.vocabulary());
            expected.insert(expected.end(), last, rows.end());
            first += static_cast<llama_pos>(t.size());
        }
        const std::vector<float> got = run(file, "32", steps, 2);
        REQUIRE(got.size() == expected.size());
        float largest = 0.0f, scale = 0.0f;
        for (std::size_t i = 0; i < got.size(); ++i) {
            largest = std::max(largest, std::fabs(got[i] - expected[i]));
            scale = std::max(scale, std::fabs(expected[i]));
        }
        // fp32 sums of at most some hundred numbers, in another order, through a few layers. ggml's flash
        // attention, which is off here, rounds to fp16.
        CHECK(largest <= 1e-4f * scale);
    }
}

TEST_CASE("nodes of a graph give the same bits on any number of threads", "[llama_cpp]") {
    const std::string file = std::string(std::getenv("KV1_TEST_MODELS")) + "/llama.gguf";
    const std::vector<float> one = run(file, "2+ls", steps, 1);
    CHECK(run(file, "2+ls", steps, 2) == one);
    CHECK(run(file, "2+ls", steps, 5) == one);
}
