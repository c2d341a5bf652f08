// SPDX-License-Identifier: Apache-2.0
//
// config.json and the tensors it promises.
#include "command_line.hpp"
#include "error.hpp"
#include "model_config.hpp"
#include "shipped_model.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <bit>
#include <cstring>
#include <functional>
#include <string>

using Catch::Matchers::ContainsSubstring;
using nlohmann::json;

namespace {

// A model of one small layer, whose files a test spoils.
struct tiny_model {
    json config = {{"model_type", "banana_kv1"}, {"vocab_size", 10},
                   {"hidden_size", 8},           {"intermediate_size", 12},
                   {"num_hidden_layers", 1},     {"num_attention_heads", 2},
                   {"num_key_value_heads", 1},   {"max_position_embeddings", 16},
                   {"rms_norm_eps", 1e-5},       {"eos_token_id", 0},
                   {"tie_word_embeddings", true}};
    std::vector<std::pair<std::string, std::vector<std::size_t>>> tensors{
        {"embed_tokens.weight", {10, 8}},
        {"layers.0.input_layernorm.weight", {8}},
        {"layers.0.self_attn.q_proj.weight", {8, 8}},
        {"layers.0.self_attn.k_proj.weight", {4, 8}},
        {"layers.0.self_attn.v_proj.weight", {4, 8}},
        {"layers.0.self_attn.o_proj.weight", {8, 8}},
        {"layers.0.post_attention_layernorm.weight", {8}},
        {"layers.0.mlp.gate_proj.weight", {12, 8}},
        {"layers.0.mlp.up_proj.weight", {12, 8}},
        {"layers.0.mlp.down_proj.weight", {8, 12}},
        {"norm.weight", {8}}};
    std::string dtype = "F32";

    void write(const kv1_test::temporary_folder& folder) const {
        folder.write("config.json", config.dump());
        json header = json::object();
        std::string data;
        std::uint32_t state = 1;
        for (const auto& [name, shape] : tensors) {
            const std::size_t from = data.size();
            std::size_t count = 1;
            for (const std::size_t extent : shape)
                count *= extent;
            for (std::size_t i = 0; i < count; ++i) {
                state = state * 1664525u + 1013904223u;
                const float x = static_cast<float>(state >> 24) / 256.0f - 0.5f; // exact in bf16 and fp16
                const auto put = [&](const auto& bits) {
                    data.append(reinterpret_cast<const char*>(&bits), sizeof bits);
                };
                if (dtype == "F32")
                    put(x);
                else if (dtype == "F16")
                    put(kv1::float16(x).bits());
                else
                    put(kv1::bfloat16(x).bits());
            }
            header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {from, data.size()}}};
        }
        const std::string text = header.dump();
        const auto length = static_cast<std::uint64_t>(text.size());
        std::string file(sizeof length, '\0');
        std::memcpy(file.data(), &length, sizeof length);
        folder.write("model.safetensors", file + text + data);
    }
    [[nodiscard]] std::vector<float> logits(const kv1_test::temporary_folder& folder) const {
        write(folder);
        const kv1_lm::model m = kv1_lm::model::read(folder.path());
        kv1_lm::thread_pool pool(1);
        kv1::kv_cache cache(m.cache_shape(kv1_lm::parse_kv("32", "--kv"), 16));
        const std::vector<std::int32_t> ids{1, 9, 3};
        const auto states = m.forward(ids, cache, cache.create_sequence(), kv1::precision::exact, pool);
        std::vector<float> out(ids.size() * m.config().vocab_size);
        m.logits(states, out, pool);
        return out;
    }
};

// kv1-lm ends with exit code 2 and one line that says what and where.
void refuses(const std::function<void(tiny_model&)>& spoil, const std::string& what) {
    const kv1_test::temporary_folder folder;
    tiny_model m;
    spoil(m);
    m.write(folder);
    const kv1_test::command_result r = kv1_test::run_kv1_lm({"info", "--model", folder.path().string()});
    INFO(r.err);
    CHECK(r.code == 2);
    CHECK(r.one_error_line());
    CHECK_THAT(r.err, ContainsSubstring(what));
    CHECK_THAT(r.err, ContainsSubstring(folder.path().string()));
}

} // namespace

TEST_CASE("F32, F16 and BF16 weights of the same values give the same logits", "[config]") {
    const kv1_test::temporary_folder folder;
    tiny_model m;
    const std::vector<float> expected = m.logits(folder);
    for (const char* dtype : {"F16", "BF16"}) {
        m.dtype = dtype;
        CHECK(m.logits(folder) == expected);
    }
    // what config.json says of the dtype is not asked
    m.config["dtype"] = "float32";
    CHECK(m.logits(folder) == expected);
}

TEST_CASE("an lm_head of its own is used where it is present", "[config]") {
    const kv1_test::temporary_folder folder;
    tiny_model tied;
    const std::vector<float> expected = tied.logits(folder);
    tiny_model own;
    own.config["tie_word_embeddings"] = false;
    own.tensors.insert(own.tensors.begin(), {"lm_head.weight", {10, 8}}); // takes the embeddings' numbers
    CHECK(own.logits(folder) != expected);
    CHECK(own.logits(folder).size() == expected.size());
}

TEST_CASE("rope_theta is found where Transformers 4 and 5 put it", "[config]") {
    const kv1_test::temporary_folder folder;
    tiny_model m;
    const std::vector<float> standard = m.logits(folder);
    m.config["rope_theta"] = 10000.0;
    CHECK(m.logits(folder) == standard);
    m.config["rope_theta"] = 100.0;
    const std::vector<float> other = m.logits(folder);
    CHECK(other != standard);
    m.config.erase("rope_theta");
    m.config["rope_parameters"] = {{"rope_theta", 100.0}, {"rope_type", "default"}};
    CHECK(m.logits(folder) == other);
}

TEST_CASE("one or several end tokens are read", "[config]") {
    const kv1_test::temporary_folder folder;
    tiny_model m;
    const auto read = [&] {
        m.write(folder);
        return kv1_lm::model_config::read(folder.path() / "config.json").end_tokens;
    };
    CHECK(read() == std::vector<std::int32_t>{0});
    m.config["eos_token_id"] = {3, 4};
    CHECK(read() == std::vector<std::int32_t>{3, 4});
    m.config["eos_token_id"] = nullptr;
    CHECK(read().empty());
}

TEST_CASE("a config that this program does not run is refused by its key", "[config]") {
    const auto set = [](const char* key, const json& value) {
        return [key, value](tiny_model& m) { m.config[key] = value; };
    };
    refuses(set("model_type", "mamba"), "config.json: model_type");
    refuses([](tiny_model& m) { m.config.erase("model_type"); }, "model_type");
    refuses([](tiny_model& m) { m.config.erase("hidden_size"); }, "hidden_size");
    refuses(set("hidden_size", 0), "hidden_size");
    refuses(set("hidden_size", -8), "hidden_size");
    refuses(set("hidden_size", 8.5), "hidden_size");
    refuses(set("hidden_size", "8"), "hidden_size");
    refuses(set("vocab_size", 1e30), "vocab_size");
    refuses(set("num_hidden_layers", 99999999999), "num_hidden_layers");
    refuses(set("num_key_value_heads", 3), "num_key_value_heads");
    refuses(set("num_attention_heads", 6), "num_attention_heads");
    refuses(set("head_dim", 3), "head_dim");
    refuses(set("rms_norm_eps", 0), "rms_norm_eps");
    refuses(set("rope_theta", -1.0), "rope_theta");
    refuses(set("rope_scaling", json{{"type", "linear"}}), "rope_scaling");
    refuses(set("rope_parameters", json{{"rope_type", "yarn"}}), "rope_type");
    refuses(set("hidden_act", "gelu"), "hidden_act");
    refuses(set("attention_bias", true), "attention_bias");
    refuses(set("kv_quant_eps", 1e-5), "kv_quant_eps");
    refuses(set("kv_quant_threshold", 0.5), "kv_quant_threshold");
    refuses(set("tie_word_embeddings", 1), "tie_word_embeddings");
    refuses(set("eos_token_id", json::array({1, "2"})), "eos_token_id");
}

TEST_CASE("missing, extra and misshapen tensors are refused by name", "[config]") {
    for (std::size_t i = 0; i < tiny_model{}.tensors.size(); ++i) {
        const std::string name = tiny_model{}.tensors[i].first;
        refuses([&](tiny_model& m) { m.tensors.erase(m.tensors.begin() + static_cast<std::ptrdiff_t>(i)); },
                "tensor " + name + " is missing");
        refuses([&](tiny_model& m) { m.tensors[i].second[0] += 1; }, "tensor " + name + " has shape [");
    }
    refuses(
        [](tiny_model& m) {
            m.tensors.push_back({"layers.1.mlp.up_proj.weight", {2}});
        },
        "tensor layers.1.mlp.up_proj.weight is not one of this model's");
    refuses([](tiny_model& m) { m.config["tie_word_embeddings"] = false; },
            "tensor lm_head.weight is missing");
    refuses([](tiny_model& m) { m.dtype = "F64"; }, "embed_tokens.weight");
}

TEST_CASE("a folder without the files, or a file in its place, is refused", "[config]") {
    const kv1_test::temporary_folder folder;
    const auto refused = [](const std::filesystem::path& model, const std::string& what) {
        const kv1_test::command_result r = kv1_test::run_kv1_lm({"info", "--model", model.string()});
        CHECK(r.code == 2);
        CHECK(r.one_error_line());
        CHECK_THAT(r.err, ContainsSubstring(what));
    };
    refused(folder.path(), "config.json");
    refused(folder.path() / "nowhere", "config.json");
    refused(folder.write("config.json", "{}"), "config.json");
    refused(folder.path(), "model_type");
    folder.write("config.json", "{\"model_type\": \"banana_kv1\",");
    refused(folder.path(), "config.json");
    folder.write("config.json", tiny_model{}.config.dump());
    refused(folder.path(), "model.safetensors");
}
