// SPDX-License-Identifier: Apache-2.0
#include "gguf_model.hpp"

#include "error.hpp"
#include "float_tensors.hpp"
#include "output_file.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <ostream>
#include <string_view>
#include <system_error>
#include <utility>

namespace kv1_lm {

namespace {

struct family {
    std::string_view name, transformers_class;
    bool interleaved_rows; // of the projections of queries and keys
};
constexpr std::array<family, 3> families{{{"llama", "LlamaForCausalLM", true},
                                          {"qwen2", "Qwen2ForCausalLM", false},
                                          {"qwen3", "Qwen3ForCausalLM", false}}};

const family& family_of(const gguf& file) {
    const std::string& name = file.string("general.architecture");
    const auto found = std::ranges::find(families, std::string_view(name), &family::name);
    if (found == families.end())
        throw input_error(file.origin(), "general.architecture " + quote(name) +
                                             " is not supported; llama, qwen2 and qwen3 are");
    return *found;
}

std::size_t hyper(const gguf& file, std::string_view name) {
    return file.count(file.string("general.architecture") + "." + std::string(name));
}

std::optional<std::size_t> optional_hyper(const gguf& file, std::string_view name) {
    const std::string key = file.string("general.architecture") + "." + std::string(name);
    return file.find<double>(key) != nullptr ? std::optional(file.count(key)) : std::nullopt;
}

std::size_t head_dim_of(const gguf& file) {
    const std::size_t heads = hyper(file, "attention.head_count");
    if (heads == 0)
        throw input_error(file.origin(), "attention.head_count is 0");
    return optional_hyper(file, "attention.key_length").value_or(hyper(file, "embedding_length") / heads);
}

// The decimal number that an fp32 was made from: 1e-05, not 9.999999747378752e-06.
double as_written(double single) {
    std::array<char, 32> digits{};
    const auto end =
        std::to_chars(digits.data(), digits.data() + digits.size(), static_cast<float>(single)).ptr;
    double x = single;
    std::from_chars(digits.data(), end, x);
    return x;
}

struct renaming {
    std::string_view gguf, transformers;
};
constexpr std::array<renaming, 3> of_the_model{{{"token_embd.weight", "model.embed_tokens.weight"},
                                                {"output_norm.weight", "model.norm.weight"},
                                                {"output.weight", "lm_head.weight"}}};
constexpr std::array<renaming, 15> of_a_layer{{{"attn_norm.weight", "input_layernorm.weight"},
                                               {"ffn_norm.weight", "post_attention_layernorm.weight"},
                                               {"attn_q.weight", "self_attn.q_proj.weight"},
                                               {"attn_q.bias", "self_attn.q_proj.bias"},
                                               {"attn_k.weight", "self_attn.k_proj.weight"},
                                               {"attn_k.bias", "self_attn.k_proj.bias"},
                                               {"attn_v.weight", "self_attn.v_proj.weight"},
                                               {"attn_v.bias", "self_attn.v_proj.bias"},
                                               {"attn_output.weight", "self_attn.o_proj.weight"},
                                               {"attn_output.bias", "self_attn.o_proj.bias"},
                                               {"attn_q_norm.weight", "self_attn.q_norm.weight"},
                                               {"attn_k_norm.weight", "self_attn.k_norm.weight"},
                                               {"ffn_gate.weight", "mlp.gate_proj.weight"},
                                               {"ffn_up.weight", "mlp.up_proj.weight"},
                                               {"ffn_down.weight", "mlp.down_proj.weight"}}};

// Transformers' name of a tensor; nothing for one that these models do not have.
std::optional<std::string> transformers_name(std::string_view name) {
    const auto look_up = [](const auto& table, std::string_view key) -> std::optional<std::string_view> {
        const auto found = std::ranges::find(table, key, &renaming::gguf);
        return found == table.end() ? std::nullopt : std::optional(found->transformers);
    };
    if (const auto found = look_up(of_the_model, name))
        return std::string(*found);
    constexpr std::string_view block = "blk.";
    if (!name.starts_with(block))
        return std::nullopt;
    std::size_t layer = 0;
    const char* const end = name.data() + name.size();
    const auto [dot, error] = std::from_chars(name.data() + block.size(), end, layer);
    if (error != std::errc() || dot == end || *dot != '.')
        return std::nullopt;
    const auto found = look_up(of_a_layer, std::string_view(dot + 1, end));
    if (!found)
        return std::nullopt;
    return "model.layers." + std::to_string(layer) + "." + std::string(*found);
}

// Rows of each head from the order of pairs (0, 1, 2, ..: pair 0's two, pair 1's two) to that of halves (all pairs'
// first, all pairs' second).
std::vector<float> to_halves(const std::vector<float>& rows, std::size_t head_dim, std::size_t width) {
    std::vector<float> out(rows.size());
    const std::size_t half = head_dim / 2;
    for (std::size_t row = 0; row * width < rows.size(); ++row) {
        const std::size_t head = row / head_dim, channel = row % head_dim;
        const std::size_t to = head * head_dim + channel % 2 * half + channel / 2;
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(row * width), width,
                    out.begin() + static_cast<std::ptrdiff_t>(to * width));
    }
    return out;
}

json split_by(const char* expression) {
    const json byte_level = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
    const json split = {
        {"type", "Split"}, {"pattern", {{"Regex", expression}}}, {"behavior", "Isolated"}, {"invert", false}};
    return {{"type", "Sequence"}, {"pretokenizers", {split, byte_level}}};
}

json pre_tokenizer_of(const gguf& file) {
    const auto* pre = file.find<std::string>("tokenizer.ggml.pre");
    const std::string name = pre != nullptr ? *pre : "default";
    const json gpt2 = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
    if (name == "gpt-2")
        return gpt2;
    if (name == "smollm")
        return {{"type", "Sequence"},
                {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}, gpt2}}};
    if (name == "llama-bpe")
        return split_by(
            R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+)"
            R"([\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
    if (name == "qwen2")
        return split_by(R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+)"
                        R"([\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
    throw input_error(file.origin(), "tokenizer.ggml.pre " + quote(name) +
                                         " is not supported; smollm, gpt-2, llama-bpe and qwen2 are");
}

json tokenizer_config_of(const gguf& file) {
    const gguf::strings& tokens = file.list("tokenizer.ggml.tokens");
    json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
    for (const char* role : {"bos", "eos", "unknown", "padding"}) {
        const std::string key = "tokenizer.ggml." + std::string(role) + "_token_id";
        if (file.find<double>(key) == nullptr)
            continue;
        const std::size_t id = file.count(key);
        if (id >= tokens.size())
            throw input_error(file.origin(), key + " is past the last token");
        const std::string_view name(role);
        config[(name == "unknown"   ? "unk"
                : name == "padding" ? "pad"
                                    : std::string(name)) +
               "_token"] = tokens[id];
    }
    if (const auto* chat = file.find<std::string>("tokenizer.chat_template"))
        config["chat_template"] = *chat;
    return config;
}

} // namespace

json config_of(const gguf& file) {
    const family& f = family_of(file);
    const std::string prefix = std::string(f.name) + ".";
    if (const auto* scaling = file.find<std::string>(prefix + "rope.scaling.type");
        (scaling != nullptr && *scaling != "none") || file.tensors().contains("rope_freqs.weight"))
        throw input_error(file.origin(), "scaled rotary positions are not supported");
    const auto embeddings = file.tensors().find("token_embd.weight");
    if (embeddings == file.tensors().end() || embeddings->second.shape.size() != 2)
        throw input_error(file.origin(), "holds no matrix token_embd.weight");
    const std::size_t head_dim = head_dim_of(file), heads = hyper(file, "attention.head_count");
    if (optional_hyper(file, "rope.dimension_count").value_or(head_dim) != head_dim)
        throw input_error(file.origin(), "rotary positions on a part of the channels are not supported");
    if (optional_hyper(file, "attention.value_length").value_or(head_dim) != head_dim)
        throw input_error(file.origin(), "values of other lengths than keys are not supported");
    const auto* theta = file.find<double>(prefix + "rope.freq_base");
    json config = {{"architectures", {f.transformers_class}},
                   {"model_type", f.name},
                   {"dtype", "float32"},
                   {"hidden_act", "silu"},
                   {"vocab_size", embeddings->second.shape[0]},
                   {"hidden_size", hyper(file, "embedding_length")},
                   {"intermediate_size", hyper(file, "feed_forward_length")},
                   {"num_hidden_layers", hyper(file, "block_count")},
                   {"num_attention_heads", heads},
                   {"num_key_value_heads", optional_hyper(file, "attention.head_count_kv").value_or(heads)},
                   {"head_dim", head_dim},
                   {"max_position_embeddings", hyper(file, "context_length")},
                   {"rms_norm_eps", as_written(file.number(prefix + "attention.layer_norm_rms_epsilon"))},
                   {"rope_theta", theta != nullptr ? *theta : 10000.0},
                   {"tie_word_embeddings", !file.tensors().contains("output.weight")}};
    if (f.name != "qwen2")
        config["attention_bias"] = file.tensors().contains("blk.0.attn_q.bias");
    for (const char* role : {"bos", "eos"}) {
        const std::string name = std::string(role) + "_token_id";
        if (file.find<double>("tokenizer.ggml." + name) != nullptr)
            config[name] = file.count("tokenizer.ggml." + name);
    }
    return config;
}

json tokenizer_of(const gguf& file) {
    if (const std::string& model = file.string("tokenizer.ggml.model"); model != "gpt2")
        throw input_error(file.origin(), "tokenizer.ggml.model " + quote(model) +
                                             " is not supported; byte-level BPE (gpt2) is");
    const gguf::strings& tokens = file.list("tokenizer.ggml.tokens");
    const auto* types = file.find<gguf::numbers>("tokenizer.ggml.token_type");
    if (types != nullptr && types->size() != tokens.size())
        throw input_error(file.origin(), "tokenizer.ggml.token_type has not a number for each token");
    constexpr double control = 3.0, user_defined = 4.0;
    json vocabulary = json::object(), added = json::array();
    for (std::size_t id = 0; id < tokens.size(); ++id) {
        if (!vocabulary.emplace(tokens[id], id).second)
            throw input_error(file.origin(), "the token " + quote(tokens[id]) + " is there twice");
        if (types != nullptr && ((*types)[id] == control || (*types)[id] == user_defined))
            added.push_back({{"id", id},
                             {"content", tokens[id]},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", false},
                             {"special", (*types)[id] == control}});
    }
    const std::string* pre = file.find<std::string>("tokenizer.ggml.pre");
    return {
        {"version", "1.0"},
        {"truncation", nullptr},
        {"padding", nullptr},
        {"added_tokens", std::move(added)},
        {"normalizer", nullptr},
        {"pre_tokenizer", pre_tokenizer_of(file)},
        {"post_processor", nullptr},
        {"decoder",
         {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
        {"model",
         {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", pre != nullptr && *pre == "llama-bpe"},
          {"vocab", std::move(vocabulary)},
          {"merges", file.list("tokenizer.ggml.merges")}}}};
}

std::vector<float_tensor> weights_of(const gguf& file) {
    const bool interleaved = family_of(file).interleaved_rows;
    const std::size_t head_dim = head_dim_of(file);
    std::vector<float_tensor> out;
    for (const auto& [name, t] : file.tensors()) {
        const auto to = transformers_name(name);
        if (!to)
            throw input_error(file.origin(),
                              "tensor " + quote(name) + " is not one of a model of the Llama family");
        std::vector<float> values = file.floats(name);
        const bool turned =
            name.find(".attn_q.") != std::string::npos || name.find(".attn_k.") != std::string::npos;
        if (interleaved && turned) {
            if (head_dim % 2 != 0 || t.shape[0] % head_dim != 0)
                throw input_error(file.origin(),
                                  "tensor " + quote(name) + " has rows that are not whole heads");
            values = to_halves(values, head_dim, values.size() / t.shape[0]);
        }
        out.push_back({*to, t.shape, std::move(values)});
    }
    return out;
}

void convert(const convert_options& options, std::ostream& out) {
    const gguf file = gguf::read(options.gguf);
    const json config = config_of(file), words = tokenizer_of(file), words_config = tokenizer_config_of(file);
    const std::vector<float_tensor> weights = weights_of(file);

    std::error_code error;
    std::filesystem::create_directories(options.out, error);
    if (error)
        throw input_error(options.out.string(), "cannot be made: " + error.message());
    const std::array<const char*, 4> names{"tokenizer.json", "tokenizer_config.json", "config.json",
                                           "model.safetensors"};
    for (const char* name : names)
        if (std::filesystem::exists(options.out / name, error))
            throw input_error((options.out / name).string(), "exists already");
    output_file(options.out / names[0]).commit(words.dump() + "\n");
    output_file(options.out / names[1]).commit(words_config.dump(2) + "\n");
    output_file(options.out / names[2]).commit(config.dump(2) + "\n");
    output_file(options.out / names[3]).commit(to_safetensors(weights));

    std::size_t parameters = 0;
    for (const float_tensor& t : weights)
        parameters += t.values.size();
    out << options.out.string() << ": " << config.at("model_type").get<std::string>() << ", " << parameters
        << " weights in fp32, " << file.list("tokenizer.ggml.tokens").size() << " tokens\n";
}

} // namespace kv1_lm
