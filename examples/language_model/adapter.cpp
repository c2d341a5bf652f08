// SPDX-License-Identifier: Apache-2.0
#include "adapter.hpp"

#include "cache_policy.hpp"
#include "error.hpp"
#include "file.hpp"
#include "float_tensors.hpp"
#include "json_file.hpp"
#include "model_cache.hpp"
#include "model_config.hpp"
#include "output_file.hpp"
#include "safetensors.hpp"

#include <kv1/calibration_file.hpp>
#include <kv1/float16.hpp>

#include <algorithm>
#include <array>
#include <ostream>
#include <set>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

namespace kv1_lm {

namespace {

constexpr const char* config_file = "adapter_config.json";

void expect(const json_view& config, std::string_view key, const json& only) {
    if (const auto found = config.find(key); found && found->value() != only)
        found->fail("only " + only.dump() + " is supported");
}

// The tensors of an adapter, each of which has its place in the model.
class adapter_tensors {
public:
    explicit adapter_tensors(const safetensors& file) : file_(file) {}

    // The tensor of this name; nothing where there is none.
    const tensor* take(const std::string& name, const std::vector<std::size_t>& shape) {
        const tensor* found = file_.find(name);
        if (found == nullptr)
            return nullptr;
        if (found->shape != shape)
            throw input_error(found->place, "has another shape than this model's");
        taken_.insert(name);
        return found;
    }
    void check_all_taken() const {
        for (const auto& [name, t] : file_.tensors())
            if (!taken_.contains(name))
                throw input_error(t.place, "is not of this model");
    }

private:
    const safetensors& file_;
    std::set<std::string> taken_;
};

// w, [outputs][inputs], += scale B A: B is [outputs][rank], A is [rank][inputs].
void add_product(std::span<float> w, std::size_t inputs, std::span<const float> b, std::span<const float> a,
                 float scale) {
    const std::size_t rank = a.size() / inputs, outputs = w.size() / inputs;
    std::vector<float> sum(inputs);
    for (std::size_t o = 0; o < outputs; ++o) {
        std::ranges::fill(sum, 0.0f);
        for (std::size_t r = 0; r < rank; ++r)
            for (std::size_t i = 0; i < inputs; ++i)
                sum[i] += b[o * rank + r] * a[r * inputs + i];
        for (std::size_t i = 0; i < inputs; ++i)
            w[o * inputs + i] += scale * sum[i];
    }
}

// The adapted weights of the model's file, in fp16, as a file.
std::string adapted_weights(const safetensors& weights, const safetensors& adapter,
                            const adapter_config& config) {
    adapter_tensors added(adapter);
    nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
    std::size_t end = 0;
    for (const auto& [name, t] : weights.tensors()) {
        std::size_t elements = 1;
        for (const std::size_t extent : t.shape)
            elements *= extent;
        header[name] = {{"dtype", "F16"}, {"shape", t.shape}, {"data_offsets", {end, end + 2 * elements}}};
        end += 2 * elements;
    }
    std::string file = safetensors_head(header);
    file.reserve(file.size() + end);
    constexpr std::string_view suffix = ".weight";
    for (const auto& [name, t] : weights.tensors()) {
        std::vector<float> values = to_floats(t);
        const std::string at = adapter_prefix + name.substr(0, name.size() - suffix.size());
        if (t.shape.size() == 2 && name.ends_with(suffix)) {
            const std::vector<std::size_t> down{config.rank, t.shape[1]}, up{t.shape[0], config.rank};
            const tensor *const a = added.take(at + ".lora_A.weight", down), *const b = added.take(
                                                                                 at + ".lora_B.weight", up);
            if ((a == nullptr) != (b == nullptr))
                throw input_error(adapter.origin(), "has one of lora_A and lora_B of " + name);
            if (a != nullptr)
                add_product(values, t.shape[1], to_floats(*b), to_floats(*a),
                            static_cast<float>(config.alpha / static_cast<double>(config.rank)));
        } else if (const tensor* norm = added.take(adapter_prefix + name, t.shape)) {
            values = to_floats(*norm);
        }
        for (const float value : values) {
            const std::uint16_t half = kv1::float16(value).bits();
            file += static_cast<char>(half & 0xffu);
            file += static_cast<char>(half >> 8);
        }
    }
    added.check_all_taken();
    return file;
}

// The calibration of the adapter's folder, or else of the model's, named after the adapted weights.
std::string adapted_calibration(const merge_options& options, const cache_policy& policy,
                                std::string_view weights) {
    std::error_code unknown;
    const std::filesystem::path own = options.adapter / calibration_file,
                                file = exists(own, unknown) ? own : options.model / calibration_file;
    auto found = kv1::try_load_calibration(file, fingerprint_of_model(options.model));
    if (!found)
        throw input_error(file.string(), found.reason().message());
    found->set_policy(policy);
    found->set_model(kv1::fingerprint_of(weights));
    std::string bytes;
    const kv1::status saved = kv1::try_save_calibration(*found, [&bytes](std::span<const std::byte> more) {
        bytes.append(reinterpret_cast<const char*>(more.data()), more.size());
        return true;
    });
    if (!saved)
        throw input_error(file.string(), saved.message());
    return bytes;
}

} // namespace

adapter_config read_adapter_config(const std::filesystem::path& folder) {
    const json_document document = read_json_file(folder / config_file);
    const json_view config = document.root();
    if (const json_view type = config.member("peft_type"); type.string() != "LORA")
        type.fail("only \"LORA\" is supported");
    for (const char* flag : {"use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "use_qalora"})
        expect(config, flag, false);
    for (const char* table : {"rank_pattern", "alpha_pattern"})
        expect(config, table, json::object());
    for (const char* list : {"layers_to_transform", "layers_pattern", "trainable_token_indices"})
        if (const auto found = config.find(list);
            found && !(found->value().is_array() && found->array().empty()))
            found->fail("is not supported");
    expect(config, "bias", "none");

    adapter_config c;
    c.rank = config.member("r").count(1, 1 << 16);
    c.alpha = config.member("lora_alpha").number();
    if (!(c.alpha > 0.0))
        config.member("lora_alpha").fail("a positive number is needed");
    const json_view targets = config.member("target_modules");
    if (targets.value().is_string())
        targets.fail("a list of names is needed, not an expression");
    for (std::size_t i = 0; i < targets.array().size(); ++i)
        c.targets.push_back(targets.element(i).string());
    if (const auto whole = config.find("modules_to_save"))
        c.norms = !whole->array().empty();
    return c;
}

void merge(const merge_options& options, std::ostream& out) {
    const adapter_config adapter = read_adapter_config(options.adapter);
    json config = read_json_file(options.model / "config.json").value;
    json cache = {{"policy", "16"}};
    std::error_code unknown;
    if (exists(options.adapter / adapter_cache_file, unknown))
        cache = read_json_file(options.adapter / adapter_cache_file).value;
    const json_document described{cache, (options.adapter / adapter_cache_file).string()};
    const cache_policy policy = parse_policy(described.root().member("policy").string(),
                                             described.root().member("policy").place() + ":");

    const std::array<const char*, 7> names{
        "model.safetensors",      means_file,   calibration_file, "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "config.json"};
    std::error_code error;
    std::filesystem::create_directories(options.out, error);
    if (error)
        throw input_error(options.out.string(), "cannot be made: " + error.message());
    for (const char* name : names)
        if (exists(options.out / name, error))
            throw input_error((options.out / name).string(), "exists already");

    const std::string weights =
        adapted_weights(safetensors::read(options.model / "model.safetensors"),
                        safetensors::read(options.adapter / adapter_weights_file), adapter);
    const bool has_means = exists(options.adapter / means_file, error);
    if (policy.needs_means() && has_means)
        output_file(options.out / means_file).commit(read_text_file(options.adapter / means_file));
    if (policy.needs_error_weights() || policy.needs_basis() || (policy.needs_means() && !has_means))
        output_file(options.out / calibration_file).commit(adapted_calibration(options, policy, weights));
    output_file(options.out / "model.safetensors").commit(weights);
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"})
        if (exists(options.model / name, error))
            output_file(options.out / name).commit(read_text_file(options.model / name));
    config["dtype"] = "float16";
    config["kv_cache_bits"] = reference_bits(policy);
    config["kv1"] = cache;
    output_file(options.out / "config.json").commit(config.dump(2) + "\n");
    out << options.out.string() << ": " << (weights.size() / 2) / 1000000
        << " million weights in fp16, keys and values " << to_string(policy) << '\n';
}

} // namespace kv1_lm
