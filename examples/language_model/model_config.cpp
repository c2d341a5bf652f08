// SPDX-License-Identifier: Apache-2.0
#include "model_config.hpp"

#include "error.hpp"
#include "json_file.hpp"

#include <limits>
#include <string>

namespace kv1_lm {

namespace {

// A limit far above any model, low enough that products of two numbers do not overflow.
constexpr std::size_t largest_size = std::size_t{1} << 24;

std::size_t size_of(const json_view& config, std::string_view key) {
    return config.member(key).count(1, largest_size);
}

// Refuses a member that has another value than the one that this program implements. It may be missing.
void expect_number(const json_view& config, std::string_view key, double only) {
    if (const auto found = config.find(key); found && found->number() != only)
        found->fail("only " + nlohmann::json(only).dump() + " is supported");
}
void expect_string(const json_view& config, std::string_view key, const std::string& only) {
    if (const auto found = config.find(key); found && found->string() != only)
        found->fail("only \"" + only + "\" is supported");
}
void expect_false(const json_view& config, std::string_view key) {
    if (const auto found = config.find(key); found && found->boolean())
        found->fail("only false is supported");
}

float positive(const json_view& value) {
    const double number = value.number();
    if (!(number > 0.0) || number > static_cast<double>(std::numeric_limits<float>::max()))
        value.fail("a positive number is needed");
    return static_cast<float>(number);
}

float read_rope_theta(const json_view& config) {
    if (const auto scaling = config.find("rope_scaling"))
        scaling->fail("scaled rotary positions are not supported");
    // Transformers 5 nests it
    const auto parameters = config.find("rope_parameters");
    if (parameters)
        expect_string(*parameters, "rope_type", "default");
    const auto theta = parameters && parameters->find("rope_theta") ? parameters->find("rope_theta")
                                                                    : config.find("rope_theta");
    return theta ? positive(*theta) : 10000.0f;
}

std::vector<std::int32_t> read_end_tokens(const json_view& config) {
    std::vector<std::int32_t> tokens;
    const auto add = [&](const json_view& token) {
        tokens.push_back(static_cast<std::int32_t>(token.count(0, largest_size)));
    };
    if (const auto eos = config.find("eos_token_id")) {
        if (eos->value().is_array())
            for (std::size_t i = 0; i < eos->array().size(); ++i)
                add(eos->element(i));
        else
            add(*eos);
    }
    return tokens;
}

} // namespace

model_config model_config::read(const std::filesystem::path& file) {
    const json_document document = read_json_file(file);
    const json_view config = document.root();
    const json_view type = config.member("model_type");
    const std::string& family = type.string();
    if (family != "banana_kv1" && family != "llama" && family != "qwen2" && family != "qwen3")
        type.fail(quote(family) + " is no model type of kv1's examples, which run \"banana_kv1\", \"llama\", "
                                  "\"qwen2\" and \"qwen3\"");

    model_config c;
    c.vocab_size = size_of(config, "vocab_size");
    c.hidden_size = size_of(config, "hidden_size");
    c.intermediate_size = size_of(config, "intermediate_size");
    c.layers = size_of(config, "num_hidden_layers");
    c.heads = size_of(config, "num_attention_heads");
    c.kv_heads = config.find("num_key_value_heads") ? size_of(config, "num_key_value_heads") : c.heads;
    if (c.heads % c.kv_heads != 0)
        config.member("num_key_value_heads").fail("does not divide num_attention_heads");
    if (config.find("head_dim"))
        c.head_dim = size_of(config, "head_dim");
    else if (family == "qwen3")
        c.head_dim = 128; // as Transformers has it
    else if (c.hidden_size % c.heads == 0)
        c.head_dim = c.hidden_size / c.heads;
    else
        config.member("num_attention_heads").fail("does not divide hidden_size");
    if (c.head_dim % 2 != 0)
        config.fail("rotary positions need an even head_dim, not " + std::to_string(c.head_dim));
    c.max_positions = size_of(config, "max_position_embeddings");
    const json_view eps = config.member("rms_norm_eps");
    c.rms_norm_eps = positive(eps);
    c.rope_theta = read_rope_theta(config);
    if (const auto tied = config.find("tie_word_embeddings"))
        c.tied_embeddings = tied->boolean();
    c.end_tokens = read_end_tokens(config);

    // limits of kv1's formats
    expect_number(config, "kv_quant_eps", 1e-6);
    expect_number(config, "kv_quant_threshold", 0.0);
    expect_string(config, "hidden_act", "silu");
    expect_false(config, "mlp_bias");
    expect_false(config, "use_sliding_window");
    if (family == "banana_kv1") {
        expect_false(config, "attention_bias");
        return c;
    }
    c.rotary_pairs = kv1::rotary_pairs::half_split;
    c.tensor_prefix = "model.";
    if (const auto bias = config.find("attention_bias"))
        c.qkv_bias = c.output_bias = bias->boolean();
    if (family == "qwen2") { // has no such member
        c.qkv_bias = true;
        c.output_bias = false;
    }
    c.normalized_qk = family == "qwen3";
    if (!config.find("tie_word_embeddings"))
        c.tied_embeddings = false; // as Transformers has it
    return c;
}

} // namespace kv1_lm
