// SPDX-License-Identifier: Apache-2.0
//
// Adapters in PEFT's form, merged into models: the weights are what the formula says, and the cache goes with them.
#include "adapter.hpp"

#include "calibrate.hpp"
#include "error.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "llama_family.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "model_config.hpp"
#include "refusal.hpp"
#include "safetensors.hpp"
#include "temporary_folder.hpp"
#include "thread_pool.hpp"
#include "tiny_tokenizer.hpp"

#include <kv1/calibration_file.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <cmath>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using kv1_test::refusal;

namespace {

std::vector<float> values_of(const kv1_lm::safetensors& file, const std::string& name) {
    return kv1_lm::to_floats(*file.find(name));
}

// A model of the family in a folder of its own, with a tokenizer, and its adapter beside it.
struct adapted_model {
    kv1_test::temporary_folder folder;
    std::filesystem::path model = folder.path() / "model", adapter = folder.path() / "adapter",
                          out = folder.path() / "merged";

    explicit adapted_model(const char* name) {
        const auto golden = kv1_test::read_family_model(name);
        std::filesystem::copy(golden.folder, model);
        std::filesystem::copy(golden.folder / "adapter", adapter);
        folder.write("model/tokenizer.json", kv1_test::tiny_tokenizer().dump());
    }
    std::string merge() const {
        std::ostringstream said;
        kv1_lm::merge({model, adapter, out}, said);
        return said.str();
    }
    void change_adapter(const char* key, const kv1_lm::json& value) const {
        kv1_lm::json config = kv1_lm::read_json_file(adapter / "adapter_config.json").value;
        config[key] = value;
        folder.write("adapter/adapter_config.json", config.dump());
    }
};

} // namespace

TEST_CASE("Merged weights are W + (alpha / r) B A, rounded to fp16", "[adapter]") {
    for (const char* name : kv1_test::llama_family) {
        INFO(name);
        const adapted_model m(name);
        m.merge();
        const auto config = kv1_lm::read_adapter_config(m.adapter);
        const double scale = config.alpha / static_cast<double>(config.rank);
        const auto before = kv1_lm::safetensors::read(m.model / "model.safetensors"),
                   added = kv1_lm::safetensors::read(m.adapter / "adapter_model.safetensors"),
                   after = kv1_lm::safetensors::read(m.out / "model.safetensors");
        REQUIRE(after.tensors().size() == before.tensors().size());
        std::size_t adapted = 0;
        double worst = 0.0; // in units of fp16's rounding
        for (const auto& [tensor, w] : before.tensors()) {
            REQUIRE(after.find(tensor)->type == kv1_lm::tensor_type::f16);
            const std::vector<float> old = kv1_lm::to_floats(w), now = values_of(after, tensor);
            const std::string at = "base_model.model." + tensor.substr(0, tensor.rfind('.'));
            std::vector<float> a, b;
            if (w.shape.size() == 2 && added.find(at + ".lora_A.weight") != nullptr) {
                a = values_of(added, at + ".lora_A.weight"), b = values_of(added, at + ".lora_B.weight");
                ++adapted;
            }
            const std::size_t inputs = w.shape.back(), rank = a.size() / inputs;
            for (std::size_t i = 0; i < old.size(); ++i) {
                double exact = static_cast<double>(old[i]), size = std::fabs(exact);
                for (std::size_t r = 0; r < rank; ++r) {
                    const double product = scale * static_cast<double>(b[i / inputs * rank + r]) *
                                           static_cast<double>(a[r * inputs + i % inputs]);
                    exact += product;
                    size += std::fabs(product);
                }
                // half a unit of fp16, and fp32's rounding of the sums
                const double allowed = std::ldexp(std::fabs(exact), -11) + std::ldexp(1.0, -25) +
                                       std::ldexp(size, -23) * static_cast<double>(rank + 2);
                worst = std::max(worst, std::fabs(static_cast<double>(now[i]) - exact) / allowed);
            }
        }
        REQUIRE(2 * adapted == added.tensors().size());
        REQUIRE(worst <= 1.0);
    }
}

TEST_CASE("A merged model has the cache of its adapter, with means and error weights", "[adapter]") {
    const adapted_model m("llama");
    // as a trainer leaves it: error weights are the model's, and the folder names the cache
    const std::string policy = "c2+ls+had+mean+ew,c3+ls+ew@1:4";
    kv1_lm::thread_pool pool(1);
    const auto found =
        kv1_lm::calibrate(kv1_lm::model::read(m.model), kv1_test::read_family_model("llama").ids, {8},
                          kv1_lm::parse_policy(policy), kv1_lm::fingerprint_of_model(m.model), pool);
    kv1::save_calibration(found, m.adapter / "kv1_calibration.bin");
    m.folder.write("adapter/kv1.json", R"({"policy": ")" + policy + R"(", "round_metadata": true})");
    REQUIRE_THAT(m.merge(), ContainsSubstring(policy));

    const auto config = kv1_lm::model_config::read(m.out / "config.json");
    const auto cache = kv1_lm::choose_cache(m.out, config, std::nullopt);
    REQUIRE(to_string(cache.policy) == policy);
    REQUIRE(cache.calibrated.key_weights.size() == config.layers);
    REQUIRE(kv1_lm::read_json_file(m.out / "config.json").value.at("kv_cache_bits") == "c2,c3");
    REQUIRE(std::filesystem::exists(m.out / "tokenizer.json"));

    // no other model's
    REQUIRE_THAT(refusal([&] { m.merge(); }), ContainsSubstring("exists already"));
    std::filesystem::remove_all(m.out);
    std::filesystem::remove(m.adapter / "kv1_calibration.bin");
    REQUIRE_THAT(refusal([&] { m.merge(); }), ContainsSubstring("kv1_calibration.bin"));
    // nor one without the means that its policy names
    std::filesystem::remove_all(m.out);
    m.folder.write("adapter/kv1.json", R"({"policy": "c2+ls+mean"})");
    REQUIRE_THAT(refusal([&] { m.merge(); }), ContainsSubstring("kv1_calibration.bin"));
}

TEST_CASE("An adapter that is not this model's, or not plain LoRA, is refused", "[adapter]") {
    const auto refused = [](const char* key, const kv1_lm::json& value) {
        const adapted_model m("llama");
        m.change_adapter(key, value);
        return refusal([&] { m.merge(); });
    };
    REQUIRE_THAT(refused("peft_type", "IA3"), ContainsSubstring("peft_type"));
    REQUIRE_THAT(refused("use_dora", true), ContainsSubstring("use_dora"));
    REQUIRE_THAT(refused("bias", "all"), ContainsSubstring("bias"));
    REQUIRE_THAT(refused("lora_alpha", -1), ContainsSubstring("lora_alpha"));
    REQUIRE_THAT(refused("target_modules", "all-linear"), ContainsSubstring("target_modules"));
    REQUIRE_THAT(refused("rank_pattern", {{"q_proj", 2}}), ContainsSubstring("rank_pattern"));
    REQUIRE_THAT(refused("r", 5), ContainsSubstring("another shape"));

    const adapted_model small("llama"), tied("qwen3");
    std::filesystem::copy_file(tied.adapter / "adapter_model.safetensors",
                               small.adapter / "adapter_model.safetensors",
                               std::filesystem::copy_options::overwrite_existing);
    REQUIRE_THAT(refusal([&] { small.merge(); }), ContainsSubstring("adapter_model.safetensors"));
    REQUIRE_FALSE(std::filesystem::exists(small.out / "config.json"));
}
