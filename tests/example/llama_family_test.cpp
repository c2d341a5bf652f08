// SPDX-License-Identifier: Apache-2.0
//
// The transformer on models of the Llama family, against Transformers, and the same models from GGUF files.
#include "calibrate.hpp"
#include "command_line.hpp"
#include "error.hpp"
#include "gguf_model.hpp"
#include "json_file.hpp"
#include "llama_family.hpp"
#include "model.hpp"
#include "model_logits.hpp"
#include "refusal.hpp"
#include "temporary_folder.hpp"
#include "tiny_tokenizer.hpp"
#include "tokenizer.hpp"

#include <kv1/float16.hpp>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

using kv1_test::json;
using kv1_test::largest_difference;
using kv1_test::logits_of;

namespace {

constexpr kv1_lm::kv_formats plain{kv1::kv_format::fp32, kv1::kv_format::fp32};

// fp32 sums of some tens of numbers of size 1, in another order, through two layers: a few 1e-6. Transformers' own
// implementations of attention differ by as much.
constexpr float tolerance = 1e-4f;

// Writes GGUF version 3.
class gguf_writer {
public:
    void number(const std::string& key, std::uint32_t value) { pair(key, 4), put(value); }
    void real(const std::string& key, float value) { pair(key, 6), put(value); }
    void string(const std::string& key, const std::string& value) { pair(key, 8), text(value); }
    void list(const std::string& key, const std::vector<std::string>& values) {
        pair(key, 9), put(std::uint32_t{8}), put(std::uint64_t{values.size()});
        for (const std::string& v : values)
            text(v);
    }
    void list(const std::string& key, const std::vector<std::int32_t>& values) {
        pair(key, 9), put(std::uint32_t{5}), put(std::uint64_t{values.size()});
        for (const std::int32_t v : values)
            put(v);
    }
    void tensor(const std::string& name, std::vector<std::size_t> shape, std::uint32_t type,
                const std::string& bytes) {
        std::swap(header_, tensors_);
        text(name), put(static_cast<std::uint32_t>(shape.size()));
        for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent)
            put(std::uint64_t{*extent});
        put(type), put(std::uint64_t{data_.size()});
        std::swap(header_, tensors_);
        ++tensor_count_;
        data_ += bytes;
        data_.resize((data_.size() + 31) / 32 * 32);
    }
    void tensor(const std::string& name, std::vector<std::size_t> shape, const std::vector<float>& values) {
        tensor(name, std::move(shape), 0, {reinterpret_cast<const char*>(values.data()), 4 * values.size()});
    }
    [[nodiscard]] std::string file() const {
        gguf_writer all;
        all.header_ = "GGUF";
        all.put(std::uint32_t{3}), all.put(tensor_count_), all.put(pair_count_);
        all.header_ += header_ + tensors_;
        all.header_.resize((all.header_.size() + 31) / 32 * 32);
        return all.header_ + data_;
    }

private:
    template <class T>
    void put(T value) {
        header_.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
    void text(const std::string& s) {
        put(std::uint64_t{s.size()});
        header_ += s;
    }
    void pair(const std::string& key, std::uint32_t kind) {
        text(key), put(kind);
        ++pair_count_;
    }
    std::string header_, tensors_, data_;
    std::uint64_t tensor_count_ = 0, pair_count_ = 0;
};

std::vector<std::byte> bytes_of(const std::string& text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

// A model folder as a GGUF file, named and ordered as llama.cpp's converter does: rows of q and k of llama by pairs.
gguf_writer as_gguf(const std::filesystem::path& folder) {
    const json config = kv1_lm::read_json_file(folder / "config.json").value;
    const auto file = kv1_lm::safetensors::read(folder / "model.safetensors");
    const std::string family = config.at("model_type"), p = family + ".";
    const std::size_t heads = config.at("num_attention_heads");
    const std::size_t head_dim = config.contains("head_dim") && !config["head_dim"].is_null()
                                     ? config["head_dim"].get<std::size_t>()
                                     : config["hidden_size"].get<std::size_t>() / heads;
    const double theta = config.contains("rope_parameters")
                             ? config["rope_parameters"].at("rope_theta").get<double>()
                             : config.at("rope_theta").get<double>();
    gguf_writer out;
    out.string("general.architecture", family);
    for (const auto& [to, from] : {std::pair{"block_count", "num_hidden_layers"},
                                   {"context_length", "max_position_embeddings"},
                                   {"embedding_length", "hidden_size"},
                                   {"feed_forward_length", "intermediate_size"},
                                   {"attention.head_count", "num_attention_heads"},
                                   {"attention.head_count_kv", "num_key_value_heads"}})
        out.number(p + to, config.at(from).get<std::uint32_t>());
    out.number(p + "attention.key_length", static_cast<std::uint32_t>(head_dim));
    out.real(p + "attention.layer_norm_rms_epsilon", config.at("rms_norm_eps").get<float>());
    out.real(p + "rope.freq_base", static_cast<float>(theta));
    out.string("tokenizer.ggml.model", "gpt2");
    out.string("tokenizer.ggml.pre", "smollm");
    const std::vector<std::string> tokens{"<|end|>", "a", "b", "ab"};
    out.list("tokenizer.ggml.tokens", tokens);
    out.list("tokenizer.ggml.token_type", {3, 1, 1, 1});
    out.list("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
    out.number("tokenizer.ggml.eos_token_id", 0);

    const std::map<std::string, std::string> names{{"input_layernorm", "attn_norm"},
                                                   {"post_attention_layernorm", "ffn_norm"},
                                                   {"q_proj", "attn_q"},
                                                   {"k_proj", "attn_k"},
                                                   {"v_proj", "attn_v"},
                                                   {"o_proj", "attn_output"},
                                                   {"q_norm", "attn_q_norm"},
                                                   {"k_norm", "attn_k_norm"},
                                                   {"gate_proj", "ffn_gate"},
                                                   {"up_proj", "ffn_up"},
                                                   {"down_proj", "ffn_down"},
                                                   {"embed_tokens", "token_embd"},
                                                   {"norm", "output_norm"},
                                                   {"lm_head", "output"}};
    for (const auto& [name, t] : file.tensors()) {
        const std::size_t dot = name.rfind('.'), before = name.rfind('.', dot - 1);
        const std::string module = name.substr(before == std::string::npos ? 0 : before + 1,
                                               dot - (before == std::string::npos ? 0 : before + 1));
        std::string to = names.at(module) + name.substr(dot);
        if (const std::size_t layers = name.find("layers."); layers != std::string::npos)
            to = "blk." + name.substr(layers + 7, name.find('.', layers + 7) - layers - 7) + "." + to;
        std::vector<float> values = kv1_lm::to_floats(t);
        if (family == "llama" && (module == "q_proj" || module == "k_proj")) {
            std::vector<float> rows(values.size());
            const std::size_t width = values.size() / t.shape[0], half = head_dim / 2;
            for (std::size_t head = 0; head < t.shape[0] / head_dim; ++head)
                for (std::size_t i = 0; i < half; ++i)
                    for (const std::size_t side : {std::size_t{0}, std::size_t{1}})
                        for (std::size_t x = 0; x < width; ++x)
                            rows[(head * head_dim + 2 * i + side) * width + x] =
                                values[(head * head_dim + side * half + i) * width + x];
            values = rows;
        }
        out.tensor(to, t.shape, values);
    }
    return out;
}

} // namespace

TEST_CASE("Models of the Llama family have Transformers' logits", "[model]") {
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const auto m = kv1_lm::model::read(golden.folder);
        REQUIRE(largest_difference(logits_of(m, golden.ids, plain), golden.logits) <= tolerance);
    }
}

// A key that RoPE turned is turned back, in double, by the pairs of channels that Transformers turns. The first layer's
// keys of one token differ in their positions alone: turned back they are alike, and their mean is each of them.
TEST_CASE("Means of keys before RoPE are taken as the Llama family turns them", "[model][calibrate]") {
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const auto m = kv1_lm::model::read(golden.folder);
        const kv1_lm::model_config& c = m.config();
        const std::vector<std::int32_t> ids(40, golden.ids.front());
        kv1_lm::thread_pool pool(1);
        std::vector<float> first; // token 0 stands where RoPE does not turn
        kv1::kv_cache cache(m.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, ids.size()));
        (void)m.forward(ids, cache, cache.create_sequence(), kv1::precision::exact, pool,
                        [&](std::size_t layer, kv1::tensor_view, kv1::tensor_view k, kv1::tensor_view) {
                            for (std::size_t h = 0; layer == 0 && h < c.kv_heads; ++h) {
                                const auto* key = static_cast<const float*>(k.at(0, h));
                                first.insert(first.end(), key, key + c.head_dim);
                            }
                        });
        const kv1::calibration found =
            calibrate(m, ids, {ids.size()}, kv1_lm::parse_policy("c4+ls+mean,c4+ls"), {}, pool);
        // fp16 has 11 bits; angles in fp32 are off by 40 / 2^24
        const std::vector<float> means = found.means(0, kv1::kv_side::key);
        REQUIRE(means.size() == first.size());
        for (std::size_t i = 0; i < means.size(); ++i)
            REQUIRE(std::fabs(means[i] - first[i]) <= 1e-3f * std::fabs(first[i]) + 1e-5f);
        REQUIRE(found.rotary(0).frequencies.size() == c.head_dim / 2);
    }
}

TEST_CASE("A GGUF file of the Llama family becomes the folder it was made of", "[gguf]") {
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const kv1_test::temporary_folder folder;
        const auto file = folder.write("model.gguf", as_gguf(golden.folder).file());
        const std::string out = (folder.path() / "out").string();
        const auto converted = kv1_test::run_kv1_lm({"convert", "--gguf", file.string(), "--out", out});
        INFO(converted.err);
        REQUIRE(converted.code == 0);
        REQUIRE(logits_of(kv1_lm::model::read(out), golden.ids, plain) ==
                logits_of(kv1_lm::model::read(golden.folder), golden.ids, plain));
        const auto config = kv1_lm::model_config::read(folder.path() / "out/config.json");
        REQUIRE(config.end_tokens == std::vector<std::int32_t>{0});
        const auto words = kv1_lm::tokenizer::read(folder.path() / "out/tokenizer.json");
        REQUIRE(words.encode("abba<|end|>") == std::vector<std::int32_t>{3, 2, 1, 0});

        const auto again = kv1_test::run_kv1_lm({"convert", "--gguf", file.string(), "--out", out});
        REQUIRE(again.code == 2);
        REQUIRE(again.one_error_line());
        REQUIRE(again.err.find("exists already") != std::string::npos);
    }
}

TEST_CASE("GGUF's quantized blocks have the values that their definition says", "[gguf]") {
    std::uint32_t state = 7;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
    const auto half = [](float x) {
        const auto bits = kv1::float16(x).bits();
        return std::string(reinterpret_cast<const char*>(&bits), 2);
    };
    constexpr std::size_t blocks = 6;
    std::string q8, q40, q41, f16, bf16;
    std::vector<float> of_q8, of_q40, of_q41, of_f16, of_bf16;
    for (std::size_t b = 0; b < blocks; ++b) {
        const float d = static_cast<float>(next() % 1000) / 512.0f - 1.0f,
                    m = static_cast<float>(next() % 64) / 8.0f;
        const float dh = static_cast<float>(kv1::float16(d)), mh = static_cast<float>(kv1::float16(m));
        q8 += half(d), q40 += half(d), q41 += half(d) + half(m);
        std::array<unsigned, 32> codes{};
        for (unsigned& c : codes)
            c = next() % 16;
        for (std::size_t i = 0; i < 16; ++i) { // codes 0 to 15 are low halves, 16 to 31 high ones
            const auto byte = static_cast<char>(codes[i] | codes[i + 16] << 4);
            q40 += byte, q41 += byte;
        }
        for (std::size_t i = 0; i < 32; ++i) {
            const int s = static_cast<int>(next() % 256) - 128;
            q8 += static_cast<char>(s);
            of_q8.push_back(static_cast<float>(s) * dh);
            of_q40.push_back((static_cast<float>(codes[i]) - 8.0f) * dh);
            of_q41.push_back(static_cast<float>(codes[i]) * dh + mh);
            const float x = static_cast<float>(next() % 4096) / 1024.0f - 2.0f;
            f16 += half(x);
            of_f16.push_back(static_cast<float>(kv1::float16(x)));
            const auto bits = kv1::bfloat16(x).bits();
            bf16.append(reinterpret_cast<const char*>(&bits), 2);
            of_bf16.push_back(static_cast<float>(kv1::bfloat16(x)));
        }
    }
    gguf_writer out;
    out.string("general.architecture", "llama");
    const std::vector<std::size_t> shape{blocks / 2, 64};
    out.tensor("q8_0", shape, 8, q8);
    out.tensor("q4_0", shape, 2, q40);
    out.tensor("q4_1", shape, 3, q41);
    out.tensor("f16", shape, 1, f16);
    out.tensor("bf16", shape, 30, bf16);
    out.tensor("f32", shape, of_f16);
    out.tensor("q6_k", shape, 14, std::string(210 * blocks, 'x'));
    const auto file = kv1_lm::gguf::parse(bytes_of(out.file()), "m.gguf");
    REQUIRE(file.tensors().at("q8_0").shape == shape);
    REQUIRE(file.floats("q8_0") == of_q8);
    REQUIRE(file.floats("q4_0") == of_q40);
    REQUIRE(file.floats("q4_1") == of_q41);
    REQUIRE(file.floats("f16") == of_f16);
    REQUIRE(file.floats("bf16") == of_bf16);
    REQUIRE(file.floats("f32") == of_f16);
    REQUIRE(
        kv1_test::refusal([&] { (void)file.floats("q6_k"); }) ==
        "m.gguf: tensor \"q6_k\" has elements of type 14; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are supported");
}

TEST_CASE("A GGUF file cut anywhere is refused, and never read beyond its end", "[gguf]") {
    const auto golden = kv1_test::read_family_model("llama_tied");
    const std::string whole = as_gguf(golden.folder).file();
    const std::size_t header = whole.size() - 4 * (64 * 32); // the data is longer than the embeddings alone
    for (std::size_t n = 0; n < header; n += n < 3000 ? 1 : 997) {
        INFO(n);
        auto bytes = bytes_of(whole.substr(0, n));
        REQUIRE(kv1_test::refusal([&] { (void)kv1_lm::gguf::parse(std::move(bytes), "cut"); }) !=
                "(accepted)");
    }
}

TEST_CASE("What a GGUF file holds that kv1 does not run is refused by name", "[gguf]") {
    const auto refused = [](const gguf_writer& w, const std::string& why) {
        const auto file = kv1_lm::gguf::parse(bytes_of(w.file()), "m.gguf");
        REQUIRE(kv1_test::refusal([&] {
                    (void)kv1_lm::config_of(file);
                    (void)kv1_lm::tokenizer_of(file);
                    (void)kv1_lm::weights_of(file);
                }).find(why) != std::string::npos);
    };
    gguf_writer other;
    other.string("general.architecture", "mamba");
    refused(other, "general.architecture \"mamba\" is not supported");
    const auto folder = kv1_test::read_family_model("llama").folder;
    gguf_writer scaled = as_gguf(folder);
    scaled.tensor("rope_freqs.weight", {4}, std::vector<float>(4, 1.0f));
    refused(scaled, "scaled rotary positions are not supported");
    gguf_writer extra = as_gguf(folder);
    extra.tensor("blk.0.ffn_gate_exps.weight", {4}, std::vector<float>(4, 1.0f));
    refused(extra, "tensor \"blk.0.ffn_gate_exps.weight\" is not one of a model of the Llama family");
}
