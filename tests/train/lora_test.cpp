// SPDX-License-Identifier: Apache-2.0
//
// Adapters: gradients, PEFT's form, training and resuming; and the Llama family that they are for.
#include "batch_reader.hpp"
#include "calibrate.hpp"
#include "checkpoint.hpp"
#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "language_model.hpp"
#include "llama_family.hpp"
#include "lora.hpp"
#include "model_cache.hpp"
#include "sampler_order.hpp"
#include "token_file.hpp"
#include "training_fixture.hpp"

#include <torch/autograd.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

using torch::Tensor;

namespace {

double largest_difference(const Tensor& a, const std::vector<float>& b) {
    return (a.detach() - torch::tensor(b).view(a.sizes())).abs().max().item<double>();
}

Tensor tokens_of(const std::vector<std::int32_t>& ids) {
    return torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end())).unsqueeze(0);
}

const std::vector<std::string> lora_run{"--kv",
                                        "c2+ls+had+mean@2:8",
                                        "--round-metadata",
                                        "--lora-rank",
                                        "4",
                                        "--steps",
                                        "6",
                                        "--micro-batch",
                                        "4",
                                        "--save-every",
                                        "3",
                                        "--log-every",
                                        "1",
                                        "--teacher-weight",
                                        "0.8",
                                        "--weight-decay",
                                        "0"};

bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
    return kv1_lm::read_binary_file(a) == kv1_lm::read_binary_file(b);
}

// A model to adapt: a few steps from nothing.
void train_base(const kv1_test::training_fixture& f) {
    const auto trained = kv1_test::run_kv1_train(f.train("base", {"--kv", "16", "--steps", "20"}));
    INFO(trained.err);
    REQUIRE(trained.code == 0);
}

std::vector<std::string> adapting(const kv1_test::training_fixture& f, const std::string& out,
                                  const std::vector<std::string>& more = {}) {
    auto arguments = f.train(out, lora_run);
    for (std::size_t i = 0; i < arguments.size(); ++i)
        if (arguments[i] == "--model")
            arguments[i + 1] = f.file("base/step-00000020");
        else if (arguments[i] == "--lr")
            arguments[i + 1] = "2e-2";
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
}

std::vector<std::string> with(std::vector<std::string> arguments,
                              const std::vector<std::pair<std::string, std::string>>& changes) {
    for (const auto& [option, value] : changes)
        *(std::ranges::find(arguments, option) + 1) = value;
    return arguments;
}

} // namespace

TEST_CASE("The trained model of the Llama family has Transformers' logits", "[train]") {
    const torch::NoGradGuard no_gradient;
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const auto model = kv1_train::read_model(golden.folder, torch::kCPU, true);
        const Tensor logits = model->logits(tokens_of(golden.ids), kv1_train::plain_kv, torch::kFloat32);
        REQUIRE(largest_difference(logits, golden.logits) <= 1e-4);
    }
}

TEST_CASE("An adapter that PEFT saved gives PEFT's logits, and so do the merged weights", "[train]") {
    const torch::NoGradGuard no_gradient;
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const auto model = kv1_train::read_model(golden.folder, torch::kCPU, true);
        const Tensor ids = tokens_of(golden.ids);
        const auto logits = [&] { return model->logits(ids, kv1_train::plain_kv, torch::kFloat32); };
        kv1_train::read_adapter(golden.folder / "adapter", *model);
        REQUIRE(largest_difference(logits(), golden.adapted_logits) <= 1e-4);
        REQUIRE(largest_difference(model->original_logits(ids, torch::kFloat32), golden.logits) <= 1e-4);
        model->merge();
        REQUIRE_FALSE(model->adapter().has_value());
        REQUIRE(largest_difference(logits(), golden.adapted_logits) <= 1e-4);
    }
}

TEST_CASE("An adapter's gradient is what finite differences of the loss say", "[train]") {
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const auto golden = kv1_test::read_family_model(name);
        const auto model = kv1_train::read_model(golden.folder, torch::kCPU, true);
        model->adapt({.rank = 3,
                      .alpha = 6.0,
                      .targets = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"},
                      .norms = true},
                     5, torch::kFloat32);
        torch::manual_seed(6);
        auto& adapter = model->trained();
        {
            const torch::NoGradGuard no_gradient; // where B is zero, A has no gradient
            adapter.values.add_(torch::randn_like(adapter.values), 0.1);
        }
        const Tensor ids = tokens_of(golden.ids), targets = ids.view({-1}).roll(-1);
        const auto loss = [&] {
            const Tensor log_p = torch::log_softmax(
                model->logits(ids, kv1_train::parse_policy("16@2:4", "--kv"), torch::kFloat32)
                    .to(torch::kFloat64),
                1);
            return -log_p.gather(1, targets.unsqueeze(1)).sum();
        };
        loss().backward();
        const Tensor gradient = adapter.gradients.to(torch::kFloat64);
        REQUIRE(gradient.count_nonzero().item<std::int64_t>() == gradient.numel());
        for (int direction = 0; direction < 4; ++direction) {
            const torch::NoGradGuard no_gradient;
            const Tensor step = torch::randn_like(adapter.values);
            const Tensor at = adapter.values.clone();
            constexpr double h = 2e-3;
            adapter.values.copy_(at + step * h);
            const double above = loss().item<double>();
            adapter.values.copy_(at - step * h);
            const double below = loss().item<double>();
            adapter.values.copy_(at);
            const double expected = (gradient * step.to(torch::kFloat64)).sum().item<double>();
            // The gradient's size is that of derivatives in random directions. Of it, h^2 times the third derivative
            // and fp32's rounding of logits (1e-6 over h, in 40 terms) take less than a hundredth.
            REQUIRE(std::abs((above - below) / (2 * h) - expected) <= 0.01 * gradient.norm().item<double>());
        }
    }
}

TEST_CASE("A model's frozen weights stay, and a resumed adapter equals one that was not interrupted",
          "[train]") {
    const kv1_test::training_fixture f;
    train_base(f);
    const auto whole = kv1_test::run_kv1_train(adapting(f, "whole"));
    INFO(whole.out << whole.err);
    REQUIRE(whole.code == 0);
    std::filesystem::create_directory(f.path() / "resumed");
    std::filesystem::copy(f.path() / "whole/step-00000003", f.path() / "resumed/step-00000003");
    const auto resumed = kv1_test::run_kv1_train(adapting(f, "resumed", {"--resume"}));
    INFO(resumed.out << resumed.err);
    REQUIRE(resumed.code == 0);
    for (const char* file : {"trainer_state.safetensors", "adapter_model.safetensors", "adapter_config.json",
                             "kv1_means.safetensors", "kv1.json"})
        REQUIRE(
            same_file(f.path() / "resumed/step-00000006" / file, f.path() / "whole/step-00000006" / file));
    REQUIRE_FALSE(std::filesystem::exists(f.path() / "whole/step-00000006/model.safetensors"));

    const auto other = kv1_test::run_kv1_train(adapting(f, "whole", {"--resume", "--lora-alpha", "3"}));
    REQUIRE(other.code == 2);
    REQUIRE(other.err.find("another lora") != std::string::npos);
}

TEST_CASE("A run goes on with the adapter of another, its rank and its means", "[train]") {
    const kv1_test::training_fixture f;
    train_base(f);
    const auto first = kv1_test::run_kv1_train(adapting(f, "first"));
    INFO(first.err);
    REQUIRE(first.code == 0);
    const std::filesystem::path adapter = f.path() / "first/step-00000006";
    auto arguments = with(adapting(f, "still", {"--last-lr", "0"}), {{"--lr", "0"}});
    auto rank = std::ranges::find(arguments, "--lora-rank");
    *rank++ = "--init-adapter";
    *rank = adapter.string();
    // At a rate of 0 the adapter stays as it was, bit for bit, and means take a share of a step's.
    const auto still = kv1_test::run_kv1_train(arguments);
    INFO(still.err);
    REQUIRE(still.code == 0);
    const std::filesystem::path after = f.path() / "still/step-00000006";
    for (const char* file : {"adapter_model.safetensors", "kv1.json"})
        REQUIRE(same_file(after / file, adapter / file));
    const auto config = kv1_lm::read_json_file(after / "adapter_config.json").value;
    REQUIRE(config.at("r") == 4);
    const torch::NoGradGuard no_gradient;
    const auto means = [&](const std::filesystem::path& folder) {
        const auto model = kv1_train::read_model(f.path() / "base/step-00000020", torch::kCPU, true);
        kv1_train::read_adapter(folder, *model);
        return model->means().clone();
    };
    const Tensor before = means(adapter);
    // six steps leave 0.98^6 of the old means, and a text over and over has about the same ones everywhere
    const double moved = (means(after) - before).norm().item<double>(), size = before.norm().item<double>();
    REQUIRE(moved > 0.0);
    REQUIRE(moved < 0.1 * size);

    const auto both = kv1_test::run_kv1_train(adapting(f, "both", {"--init-adapter", adapter.string()}));
    REQUIRE(both.code == 2);
    REQUIRE(both.err.find("--lora-rank excludes --init-adapter") != std::string::npos);
}

TEST_CASE("An adapter is trained under error weights, which go with it", "[train]") {
    const kv1_test::training_fixture f;
    train_base(f);
    const std::filesystem::path base = f.path() / "base/step-00000020";
    const auto under = [&](const std::string& out, const std::vector<std::string>& more = {}) {
        return kv1_test::run_kv1_train(with(adapting(f, out, more), {{"--kv", "c2+ls+had+mean+ew@2:8"}}));
    };
    const auto missing = under("none");
    REQUIRE(missing.code == 2);
    REQUIRE(missing.err.find("kv1_calibration.bin: a policy with +ew needs it") != std::string::npos);

    std::ostringstream said;
    kv1_lm::calibrate_folder({.model = base,
                              .text = f.path() / "text.txt",
                              .policy = kv1::parse_policy("c2+ls+had+mean+ew@2:8"),
                              .tokens = 256,
                              .chunk_tokens = {64}},
                             said);
    const auto whole = under("whole");
    INFO(whole.err);
    REQUIRE(whole.code == 0);
    const std::filesystem::path adapter = f.path() / "whole/step-00000006";
    REQUIRE(same_file(adapter / kv1_lm::calibration_file, base / kv1_lm::calibration_file));
    // the same steps without them end elsewhere
    REQUIRE(kv1_test::run_kv1_train(adapting(f, "plain")).code == 0);
    REQUIRE_FALSE(same_file(adapter / "adapter_model.safetensors",
                            f.path() / "plain/step-00000006/adapter_model.safetensors"));

    std::filesystem::create_directory(f.path() / "resumed");
    std::filesystem::copy(f.path() / "whole/step-00000003", f.path() / "resumed/step-00000003");
    REQUIRE(under("resumed", {"--resume"}).code == 0);
    REQUIRE(same_file(adapter / "trainer_state.safetensors",
                      f.path() / "resumed/step-00000006/trainer_state.safetensors"));

    // The merged model's folder names the same cache for itself, and a cache takes the same parts from it.
    const auto merged = kv1_test::run_kv1_train(
        {"merge", "--model", base.string(), "--adapter", adapter.string(), "--out", f.file("merged")});
    INFO(merged.err);
    REQUIRE(merged.code == 0);
    const auto config = kv1_lm::model_config::read(f.path() / "merged/config.json");
    const auto cache = [&](const std::filesystem::path& folder) {
        return kv1_lm::choose_cache(folder, config, std::nullopt);
    };
    REQUIRE(to_string(cache(f.path() / "merged").policy) == "c2+ls+had+mean+ew,c2+ls+had+mean+ew@2:8");
    REQUIRE(cache(f.path() / "merged").calibrated.key_weights == cache(base).calibrated.key_weights);
    REQUIRE(cache(f.path() / "merged").calibrated.value_weights == cache(base).calibrated.value_weights);
    const auto evaluated =
        kv1_test::run_kv1_train({"evaluate", "--data", f.file("tokens"), "--model", f.file("merged"), "--kv",
                                 "c2+ls+had+mean+ew@2:8", "--length", "64"});
    INFO(evaluated.err);
    REQUIRE(evaluated.code == 0);

    // Other error weights make another run, and those of another model are refused.
    kv1_lm::calibrate_folder({.model = base, .text = f.path() / "text.txt", .tokens = 64}, said);
    const auto other = under("whole", {"--resume"});
    REQUIRE(other.code == 2);
    REQUIRE(other.err.find("another error_weights") != std::string::npos);
    std::filesystem::copy_file(f.path() / "merged/kv1_calibration.bin", base / "kv1_calibration.bin",
                               std::filesystem::copy_options::overwrite_existing);
    REQUIRE(under("foreign").err.find("model") != std::string::npos);
}

TEST_CASE("Steps that take turns at lengths cut the same sequences", "[train]") {
    const kv1_test::training_fixture f;
    train_base(f);
    const auto run = [](const std::vector<std::string>& arguments) {
        const auto result = kv1_test::run_kv1_train(arguments);
        INFO(result.err);
        REQUIRE(result.code == 0);
    };
    const auto log = [&](const std::string& out) {
        const auto bytes = kv1_lm::read_binary_file(f.path() / out / "log.csv");
        std::istringstream lines(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
        std::vector<std::vector<std::string>> rows;
        for (std::string line; std::getline(lines, line);) {
            rows.emplace_back();
            std::istringstream cells(line);
            for (std::string cell; std::getline(cells, cell, ',');)
                rows.back().push_back(cell);
        }
        return rows;
    };
    run(with(adapting(f, "long"), {{"--length", "64"}}));
    run(with(adapting(f, "turns"), {{"--length", "64,16"}}));
    run(with(adapting(f, "same"), {{"--length", "64,64"}}));
    const auto whole = log("long"), turns = log("turns"), same = log("same");
    REQUIRE(turns.size() == 7); // a head and six steps
    REQUIRE(turns[0][1] == "tokens");
    for (std::size_t step = 1; step <= 6; ++step)
        REQUIRE(turns[step][1] == whole[step][1]);
    REQUIRE(turns[1][4] == whole[1][4]); // the loss of the first step, whose length is that of the other run
    REQUIRE(turns[2][4] != whole[2][4]);
    REQUIRE(same_file(f.path() / "same/step-00000006/adapter_model.safetensors",
                      f.path() / "long/step-00000006/adapter_model.safetensors"));

    // What the second step sees is the same sequences in four parts: its cross entropy in plain pieces, by hand.
    run(with(adapting(f, "plain"), {{"--length", "16,64"}, {"--steps", "1"}, {"--kv", "16"}}));
    const torch::NoGradGuard no_gradient;
    const auto model = kv1_train::read_model(f.path() / "base/step-00000020", torch::kCPU, true);
    const auto text = kv1_train::token_file::open(f.path() / "tokens");
    const kv1_train::batch_reader reader(text, 64, torch::kCPU);
    const kv1_train::sample_order order{.seed = 7, .tokens = text.size() - 130, .length = 64};
    const auto s = reader.read(8, [&](std::int64_t i) { return order.start(static_cast<std::uint64_t>(i)); });
    const Tensor logits = model->logits(s.inputs.view({32, 16}), kv1_train::plain_kv, torch::kFloat32);
    const double expected =
        -torch::log_softmax(logits, 1).gather(1, s.targets.unsqueeze(1)).mean().item<double>();
    REQUIRE(std::abs(std::stod(log("plain")[1][4]) - expected) < 1e-4 * expected);

    const auto refused = kv1_test::run_kv1_train(with(adapting(f, "uneven"), {{"--length", "64,24"}}));
    REQUIRE(refused.code == 2);
    REQUIRE(refused.err.find("24 does not divide the longest, 64") != std::string::npos);
}

TEST_CASE("An adapter's folder is read back, and merged into a model that kv1-lm's cache runs", "[train]") {
    const kv1_test::training_fixture f;
    train_base(f);
    REQUIRE(kv1_test::run_kv1_train(adapting(f, "run", {"--lora-norms"})).code == 0);
    const std::filesystem::path base = f.path() / "base/step-00000020",
                                adapter = f.path() / "run/step-00000006";
    const auto kv = kv1_train::read_adapter_policy(adapter);
    REQUIRE(to_string(kv) == "c2+ls+had+mean,c2+ls+had+mean@2:8 round_metadata");

    const auto merged = kv1_test::run_kv1_train(
        {"merge", "--model", base.string(), "--adapter", adapter.string(), "--out", f.file("merged")});
    INFO(merged.err);
    REQUIRE(merged.code == 0);
    const torch::NoGradGuard no_gradient;
    const auto adapted = kv1_train::read_model(base, torch::kCPU, true);
    kv1_train::read_adapter(adapter, *adapted);
    const auto plain = kv1_train::read_model(f.path() / "merged", torch::kCPU, true);
    const Tensor ids = torch::arange(60, torch::kInt64).unsqueeze(0);
    const auto logits = [&](const auto& model) {
        return model->logits(ids, kv1_train::plain_kv, torch::kFloat32);
    };
    // Merged weights are rounded to fp16's 11 bits.
    const Tensor with = logits(adapted), without = adapted->original_logits(ids, torch::kFloat32);
    const double changed = (with - without).norm().item<double>(), size = with.norm().item<double>();
    REQUIRE(changed > 0.02 * size);
    REQUIRE((logits(plain) - with).norm().item<double>() < 0.002 * size);
    REQUIRE(torch::equal(plain->means(), adapted->means()));
    const auto config = kv1_lm::read_json_file(f.path() / "merged/config.json").value;
    REQUIRE(config.at("kv1").at("policy") == "c2+ls+had+mean,c2+ls+had+mean@2:8");
    const auto measured = kv1_test::run_kv1_train({"evaluate", "--data", f.file("tokens"), "--model",
                                                   base.string(), "--adapter", adapter.string(), "--kv",
                                                   "c2+ls+had+mean@2:8", "--length", "64"});
    INFO(measured.err);
    REQUIRE(measured.code == 0);
    // beside the original, the merged weights are the adapter within their rounding
    const auto beside = kv1_test::run_kv1_train({"evaluate", "--data", f.file("tokens"), "--model",
                                                 f.file("merged"), "--original", base.string(), "--kv",
                                                 "c2+ls+had+mean@2:8", "--length", "64"});
    INFO(beside.err);
    REQUIRE(beside.code == 0);
    const auto divergence = [](const std::string& out) {
        return std::stod(out.substr(out.find("divergence") + 10));
    };
    REQUIRE(std::abs(divergence(beside.out) - divergence(measured.out)) < 0.02 * divergence(measured.out));
}

TEST_CASE("Adapters that this trainer does not know are refused by the option", "[train]") {
    const auto golden = kv1_test::read_family_model("llama");
    const kv1_test::temporary_folder folder;
    const nlohmann::json good = kv1_lm::read_json_file(golden.folder / "adapter/adapter_config.json").value;
    const auto refused = [&](const char* key, const nlohmann::json& value) {
        nlohmann::json config = good;
        config[key] = value;
        folder.write("adapter_config.json", config.dump());
        const auto model = kv1_train::read_model(golden.folder, torch::kCPU, true);
        try {
            kv1_train::read_adapter(folder.path(), *model);
        } catch (const kv1_lm::input_error& e) {
            INFO(e.what());
            REQUIRE(std::string(e.what()).find(key) != std::string::npos);
            return;
        }
        FAIL(key);
    };
    refused("peft_type", "IA3");
    refused("use_dora", true);
    refused("use_rslora", true);
    refused("bias", "all");
    refused("r", 0);
    refused("lora_alpha", -1);
    refused("target_modules", "all-linear");
    refused("rank_pattern", {{"q_proj", 2}});
    refused("layers_to_transform", {0});
}
