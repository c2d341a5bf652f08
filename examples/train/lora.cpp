// SPDX-License-Identifier: Apache-2.0
#include "lora.hpp"

#include "adapter.hpp"
#include "checkpoint.hpp"
#include "durable.hpp"
#include "error.hpp"
#include "json_file.hpp"
#include "language_model.hpp"
#include "safetensors.hpp"
#include "safetensors_writer.hpp"

#include <torch/utils.h>

#include <algorithm>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace kv1_train {

namespace {

using kv1_lm::input_error;
using nlohmann::json;

constexpr const char* config_file = "adapter_config.json";

void write_json(const durable_folder& folder, const char* name, const json& value) {
    const std::string text = value.dump(2) + "\n";
    folder.write(name, std::as_bytes(std::span(text)));
}

// PEFT's word for weights that are trained whole: the modules' last names.
std::vector<std::string> trained_norms(const language_model& model) {
    std::set<std::string> names;
    for (const parameter& p : model.trained().parts)
        if (p.value.dim() == 1) {
            const std::string module = p.name.substr(0, p.name.rfind('.'));
            names.insert(module.substr(module.rfind('.') + 1));
        }
    return {names.begin(), names.end()};
}

lora_options read_options(const std::filesystem::path& folder) {
    kv1_lm::adapter_config c = kv1_lm::read_adapter_config(folder);
    return {static_cast<std::int64_t>(c.rank), c.alpha, std::move(c.targets), c.norms};
}

} // namespace

json describe(const lora_options& o) {
    return {{"rank", o.rank}, {"scale", o.scale()}, {"targets", o.targets}, {"norms", o.norms}};
}

void write_adapter(const durable_folder& folder, const language_model& model,
                   const std::filesystem::path& base) {
    const lora_options& o = *model.adapter();
    json config = {{"peft_type", "LORA"},
                   {"task_type", "CAUSAL_LM"},
                   {"base_model_name_or_path", base.filename().string()},
                   {"r", o.rank},
                   {"lora_alpha", o.scale() * static_cast<double>(o.rank)},
                   {"target_modules", o.targets},
                   {"lora_dropout", 0.0},
                   {"bias", "none"},
                   {"fan_in_fan_out", false},
                   {"inference_mode", true},
                   {"modules_to_save", nullptr}};
    if (o.norms)
        config["modules_to_save"] = trained_norms(model);
    write_json(folder, config_file, config);
    std::vector<std::pair<std::string, torch::Tensor>> halves;
    for (const parameter& p : model.trained().parts)
        halves.emplace_back(p.name, p.value.detach().to(torch::kFloat16));
    folder.write(kv1_lm::adapter_weights_file, to_safetensors(halves, {{"format", "pt"}}));
}

void read_adapter(const std::filesystem::path& folder, language_model& model, torch::ScalarType type) {
    const torch::NoGradGuard no_gradient;
    model.adapt(read_options(folder), 0, type);
    const auto file = kv1_lm::safetensors::read(folder / kv1_lm::adapter_weights_file);
    for (const parameter& p : model.trained().parts) {
        const kv1_lm::tensor* found = file.find(p.name);
        if (found == nullptr)
            throw input_error(file.origin(), "tensor " + p.name + " is missing");
        if (!std::ranges::equal(found->shape, p.value.sizes(), [](std::size_t a, std::int64_t b) {
                return static_cast<std::int64_t>(a) == b;
            }))
            throw input_error(found->place, "has another shape than this model's");
        torch::Tensor value = p.value;
        value.copy_(torch::tensor(kv1_lm::to_floats(*found)).view(value.sizes()));
    }
    if (model.trained().parts.size() != file.tensors().size())
        throw input_error(file.origin(), "has tensors that are not this model's");
    read_means(folder, model);
}

training_policy read_adapter_policy(const std::filesystem::path& folder) {
    std::error_code error;
    if (!std::filesystem::exists(folder / kv1_lm::adapter_cache_file, error))
        return plain_kv;
    const kv1_lm::json_document document = kv1_lm::read_json_file(folder / kv1_lm::adapter_cache_file);
    const kv1_lm::json_view root = document.root();
    training_policy p = parse_policy(root.member("policy").string(), root.member("policy").place());
    if (const auto rounded = root.find("round_metadata"))
        p.round_metadata = rounded->boolean();
    return p;
}

} // namespace kv1_train
