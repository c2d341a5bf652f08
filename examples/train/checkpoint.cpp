// SPDX-License-Identifier: Apache-2.0
#include "checkpoint.hpp"

#include "adapter.hpp"
#include "durable.hpp"
#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "model_cache.hpp"
#include "safetensors.hpp"
#include "safetensors_writer.hpp"

#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace kv1_train {

namespace {

using kv1_lm::input_error;
using nlohmann::json;

constexpr std::string_view prefix = "step-";
constexpr const char* state_file = "trainer_state.safetensors";

std::optional<std::int64_t> step_of(const std::filesystem::path& folder) {
    const std::string name = folder.filename().string();
    std::int64_t step = 0;
    if (!name.starts_with(prefix))
        return std::nullopt;
    const char* end = name.data() + name.size();
    const auto [at, error] = std::from_chars(name.data() + prefix.size(), end, step);
    return error == std::errc() && at == end ? std::optional(step) : std::nullopt;
}

std::vector<std::pair<std::int64_t, std::filesystem::path>> checkpoints(const std::filesystem::path& root) {
    std::vector<std::pair<std::int64_t, std::filesystem::path>> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(root, error))
        if (const auto step = step_of(entry.path()))
            found.emplace_back(*step, entry.path());
    std::ranges::sort(found);
    return found;
}

// The member "kv1" of config.json, as kv1-lm reads it (model_cache.hpp).
json describe(const training_policy& p) {
    return {{"policy", to_string(p.cache)}, {"round_metadata", p.round_metadata}};
}

void write_means(const durable_folder& folder, const language_model& model) {
    std::vector<std::pair<std::string, torch::Tensor>> means;
    for (std::int64_t i = 0; i < model.means().size(0); ++i)
        for (const std::int64_t side : {0, 1})
            means.emplace_back("layers." + std::to_string(i) + (side == 0 ? ".key_means" : ".value_means"),
                               model.means()[i][side]);
    std::map<std::string, std::string> about;
    if (model.means_turn())
        about.insert(kv1_lm::means_that_turn);
    folder.write(kv1_lm::means_file, to_safetensors(means, about));
}

} // namespace

void read_means(const std::filesystem::path& folder, language_model& model) {
    const torch::NoGradGuard no_gradient;
    std::error_code error;
    if (!std::filesystem::exists(folder / kv1_lm::means_file, error))
        return;
    const auto file = kv1_lm::safetensors::read(folder / kv1_lm::means_file);
    model.set_means_turn(kv1_lm::means_turn(file));
    for (std::int64_t i = 0; i < model.means().size(0); ++i)
        for (const std::int64_t side : {0, 1}) {
            const std::string name =
                "layers." + std::to_string(i) + (side == 0 ? ".key_means" : ".value_means");
            torch::Tensor into = model.means()[i][side];
            const kv1_lm::tensor* found = file.find(name);
            if (found == nullptr || found->bytes.size() != into.nbytes())
                throw input_error(file.origin(), "holds no " + name + " of this model");
            into.copy_(torch::tensor(kv1_lm::to_floats(*found)).view(into.sizes()));
        }
}

void write_model(const durable_folder& folder, const language_model& model,
                 const std::filesystem::path& model_folder, const training_policy& kv) {
    json config = kv1_lm::read_json_file(model_folder / "config.json").value;
    config["dtype"] = "float16";
    config["kv_cache_bits"] = kv1_lm::reference_bits(kv.cache);
    config["kv1"] = describe(kv);
    const std::string text = config.dump(2) + "\n";
    folder.write("config.json", std::as_bytes(std::span(text)));
    for (const char* file : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
        std::error_code error;
        if (std::filesystem::exists(model_folder / file, error))
            folder.write(file, kv1_lm::read_binary_file(model_folder / file));
    }
    std::vector<std::pair<std::string, torch::Tensor>> halves;
    for (const parameter& p : model.base().parts)
        halves.emplace_back(p.name, p.value.detach().to(torch::kFloat16));
    const auto weights = to_safetensors(halves, {{"format", "pt"}});
    folder.write("model.safetensors", weights);
    if (kv.cache.needs_means())
        write_means(folder, model);
    if (kv.cache.needs_error_weights())
        folder.write(kv1_lm::calibration_file, calibration_of(model.error_weights().value(), weights, kv));
}

std::filesystem::path save_checkpoint(const std::filesystem::path& root, std::int64_t step,
                                      const language_model& model, adamw& optimizer,
                                      const checkpoint_source& source, std::size_t keep) {
    std::array<char, 32> name{};
    std::snprintf(name.data(), name.size(), "step-%08lld", static_cast<long long>(step));
    const std::filesystem::path target = root / name.data();
    durable_folder folder(target);

    if (model.adapter()) {
        write_adapter(folder, model, source.model_folder);
        const std::string text = describe(source.kv).dump(2) + "\n";
        folder.write(kv1_lm::adapter_cache_file, std::as_bytes(std::span(text)));
        if (source.kv.cache.needs_means())
            write_means(folder, model);
        if (source.kv.cache.needs_error_weights())
            folder.write(kv1_lm::calibration_file, model.error_weights().value().file);
    } else {
        write_model(folder, model, source.model_folder, source.kv);
    }
    folder.write(state_file,
                 to_safetensors({{"weights", model.trained().values},
                                 {"first_moments", optimizer.first()},
                                 {"second_moments", optimizer.second()},
                                 {"means", model.means().flatten()}},
                                {{"step", std::to_string(step)}, {"options", source.options.dump()}}));
    folder.commit();

    auto all = checkpoints(root);
    for (std::size_t i = 0; i + keep < all.size(); ++i)
        remove_folder(all[i].second);
    return target;
}

std::unique_ptr<language_model> read_model(const std::filesystem::path& folder, torch::Device device,
                                           bool weights) {
    auto model = std::make_unique<language_model>(kv1_lm::model_config::read(folder / "config.json"), device);
    if (weights) {
        model->load(kv1_lm::safetensors::read(folder / "model.safetensors"));
        read_means(folder, *model);
    }
    return model;
}

std::optional<std::filesystem::path> last_checkpoint(const std::filesystem::path& root) {
    auto all = checkpoints(root);
    return all.empty() ? std::nullopt : std::optional(std::move(all.back().second));
}

std::int64_t load_checkpoint(const std::filesystem::path& folder, language_model& model, adamw& optimizer,
                             const json& options) {
    const torch::NoGradGuard no_gradient;
    const auto file = kv1_lm::safetensors::read(folder / state_file);
    const auto metadata = [&](const char* key) -> const std::string& {
        const auto found = file.metadata().find(key);
        if (found == file.metadata().end())
            throw input_error(file.origin(), "names no " + std::string(key));
        return found->second;
    };
    const json saved = kv1_lm::parse_json(metadata("options"), file.origin() + ": options");
    for (const auto& [key, value] : options.items())
        if (!saved.contains(key) || saved[key] != value)
            throw input_error(file.origin(), "this run had another " + key + ": " +
                                                 (saved.contains(key) ? saved[key].dump() : "none") +
                                                 ", not " + value.dump());
    const auto restore = [&](const char* name, torch::Tensor& into) {
        const kv1_lm::tensor* found = file.find(name);
        if (found == nullptr ||
            found->shape != std::vector<std::size_t>{static_cast<std::size_t>(into.numel())})
            throw input_error(file.origin(), "holds no " + std::string(name) + " of this model");
        into.copy_(torch::tensor(kv1_lm::to_floats(*found)));
    };
    restore("weights", model.trained().values);
    restore("first_moments", optimizer.first());
    restore("second_moments", optimizer.second());
    torch::Tensor means = model.means().view({-1});
    restore("means", means);
    std::int64_t step = 0;
    const std::string& text = metadata("step");
    if (std::from_chars(text.data(), text.data() + text.size(), step).ec != std::errc())
        throw input_error(file.origin(), "names no step");
    return step;
}

} // namespace kv1_train
