// SPDX-License-Identifier: Apache-2.0
//
// The cache that a model's folder names.
#include "model_cache.hpp"

#include "calibrate.hpp"
#include "command_line.hpp"
#include "file.hpp"
#include "json_file.hpp"
#include "refusal.hpp"
#include "shipped_model.hpp"
#include "temporary_folder.hpp"
#include "thread_pool.hpp"

#include <kv1/calibration_file.hpp>
#include <kv1/hadamard.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using kv1_test::refusal;
using nlohmann::json;

namespace {

// The shipped model as if it had been trained for another cache. A test spoils its files.
struct trained_model {
    json config = kv1_lm::read_json_file(std::filesystem::path(KV1_LM_MODEL_DIR) / "config.json").value;
    std::vector<std::pair<std::string, std::vector<std::size_t>>> means;
    float value = 0.125f;       // of every mean
    std::string key_means = {}; // which keys they are of

    trained_model() {
        config["kv1"] = {{"policy", "c3+ls+had+mean,c2+ls+had+mean"}, {"round_metadata", true}};
        for (std::size_t i = 0; i < 8; ++i)
            for (const char* side : {"key", "value"})
                means.push_back({"layers." + std::to_string(i) + "." + side + "_means", {2, 32}});
    }

    void write(const kv1_test::temporary_folder& folder) const {
        folder.write("config.json", config.dump());
        json header = json::object();
        std::string data;
        for (const auto& [name, shape] : means) {
            const std::size_t from = data.size();
            for (std::size_t i = 0; i < shape[0] * shape[1]; ++i)
                data.append(reinterpret_cast<const char*>(&value), sizeof value);
            header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {from, data.size()}}};
        }
        if (!key_means.empty())
            header["__metadata__"] = {{"key_means", key_means}};
        const std::string text = header.dump();
        const auto length = static_cast<std::uint64_t>(text.size());
        std::string file(sizeof length, '\0');
        std::memcpy(file.data(), &length, sizeof length);
        folder.write("kv1_means.safetensors", file + text + data);
    }
};

// Puts the weights and a calibration of their first tokens into a folder.
kv1::calibration calibrate(const kv1_test::temporary_folder& folder, const char* policy = "c2+ls+mean+ew") {
    std::filesystem::create_symlink(std::filesystem::path(KV1_LM_MODEL_DIR) / "model.safetensors",
                                    folder.path() / "model.safetensors");
    std::vector<std::int32_t> tokens;
    for (std::int32_t i = 0; i < 48; ++i)
        tokens.push_back(100 + 37 * i);
    kv1_lm::thread_pool pool(1);
    kv1::calibration found =
        kv1_lm::calibrate(kv1_test::shipped_model(), tokens, {48}, kv1::parse_policy(policy),
                          kv1_lm::fingerprint_of_model(folder.path()), pool);
    kv1::save_calibration(found, folder.path() / kv1_lm::calibration_file);
    return found;
}

kv1_lm::model_cache cache_of(const kv1_test::temporary_folder& folder,
                             const std::optional<kv1_lm::cache_policy>& kv = {}) {
    return kv1_lm::choose_cache(folder.path(), kv1_lm::model_config::read(folder.path() / "config.json"), kv);
}

void refuses(const std::function<void(trained_model&)>& spoil, const std::string& what) {
    const kv1_test::temporary_folder folder;
    trained_model m;
    spoil(m);
    m.write(folder);
    const std::string message = refusal([&] { (void)cache_of(folder); });
    CHECK_THAT(message, ContainsSubstring(what));
    CHECK_THAT(message, ContainsSubstring(folder.path().string()));
}

} // namespace

TEST_CASE("a model's folder names its cache", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    m.write(folder);
    const kv1_lm::model_cache cache = cache_of(folder);
    CHECK(to_string(cache.policy) == "c3+ls+had+mean,c2+ls+had+mean");
    CHECK(cache.formats() == kv1_lm::parse_kv("c3,c2", "--kv"));

    const kv1::cache_description d =
        describe(kv1_test::shipped_model().config(), cache.policy, cache.calibrated, 64);
    const kv1::vector_encoding expected{.levels = kv1::level_choice::least_squares,
                                        .hadamard = kv1::rotation_width(32),
                                        .means = std::vector<float>(64, 0.125f)};
    REQUIRE(d.layers.size() == 8);
    for (const kv1::layer_description& l : d.layers) {
        CHECK(l.key_format == kv1::kv_format::compact3);
        CHECK(l.value_format == kv1::kv_format::compact2);
        CHECK(l.key_encoding == expected);
        CHECK(l.value_encoding == expected);
    }
}

TEST_CASE("a model's folder names any cache: layers of their own, keys per channel, fp16 tokens, presets",
          "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    for (const char* text : {"c3+ls+had+mean,c2+ls+had+mean/0:c2+ls+had+mean,c2/7:16,c4+cs@4:32#128",
                             "c3+ls+had+mean+channel,c2+ls+had+mean/2:2+g32,c4", "safe", "reference"}) {
        INFO(text);
        m.config["kv1"]["policy"] = text;
        m.write(folder);
        const kv1_lm::model_cache cache = cache_of(folder);
        CHECK(cache.policy == kv1_lm::parse_policy(text));
        CHECK(kv1::kv_cache::create(
            describe(kv1_test::shipped_model().config(), cache.policy, cache.calibrated, 64)));
    }
}

TEST_CASE("a model's folder names error weights", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    m.config["kv1"]["policy"] = "c3+ls+had+mean+ew,c2+ls+had+mean+ew/3:16,c2+ls+had+mean+ew";
    m.write(folder);
    const kv1::calibration found = calibrate(folder);
    const kv1_lm::model_cache cache = cache_of(folder);
    const kv1_lm::model& shipped = kv1_test::shipped_model();
    const kv1::cache_description d = describe(shipped.config(), cache.policy, cache.calibrated, 64);
    CHECK(kv1::kv_cache::create(d));
    for (const std::size_t i : {0u, 7u}) {
        CHECK(d.layers[i].key_encoding.error_weights == found.error_weights(i, kv1::kv_side::key));
        CHECK(d.layers[i].value_encoding.error_weights == found.error_weights(i, kv1::kv_side::value));
        CHECK(d.layers[i].key_encoding.means == std::vector<float>(64, m.value)); // it was trained with them
    }
    CHECK(d.layers[3].key_encoding == kv1::vector_encoding{});
    std::filesystem::remove(folder.path() / kv1_lm::means_file);
    CHECK(cache_of(folder).calibrated.key_means[5] == found.means(5, kv1::kv_side::key));
}

TEST_CASE("a calibration that is not this model's is refused", "[model_cache]") {
    const auto refused =
        [](const std::function<void(const kv1_test::temporary_folder&, trained_model&)>& spoil) {
            const kv1_test::temporary_folder folder;
            trained_model m;
            m.config["kv1"]["policy"] = "c3+ls+ew,c2+ls+ew";
            calibrate(folder);
            spoil(folder, m);
            m.write(folder);
            return refusal([&] {
                (void)describe(kv1_lm::model_config::read(folder.path() / "config.json"),
                               cache_of(folder).policy, cache_of(folder).calibrated, 64);
            });
        };
    CHECK_THAT(refused([](auto& folder, auto&) {
                   std::filesystem::remove(folder.path() / kv1_lm::calibration_file);
               }),
               ContainsSubstring("kv1_calibration.bin") && ContainsSubstring("no such file"));
    CHECK_THAT(refused([](auto& folder, auto&) {
                   std::filesystem::remove(folder.path() / "model.safetensors");
                   folder.write("model.safetensors", "other weights");
               }),
               ContainsSubstring("kv1_calibration.bin") && ContainsSubstring("of another model"));
    CHECK_THAT(refused([](auto& folder, auto&) { folder.write(kv1_lm::calibration_file, "KV1CALIB"); }),
               ContainsSubstring("truncated"));
    CHECK_THAT(refused([](auto&, auto& m) { m.config["num_hidden_layers"] = 7; }),
               ContainsSubstring("more layers, or fewer"));
    CHECK_THAT(refused([](auto&, auto& m) { m.config["num_key_value_heads"] = 4; }),
               ContainsSubstring("KV heads") && ContainsSubstring("layer 0"));
    CHECK_THAT(refused([](auto& folder, auto&) {
                   std::filesystem::remove(folder.path() / "model.safetensors");
                   calibrate(folder, "c2+ls+mean");
               }),
               ContainsSubstring("error weights") && ContainsSubstring("layer 0"));
}

TEST_CASE("--kv takes the place of the cache that a model names", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    m.means.clear(); // nobody asks for them
    m.write(folder);
    CHECK(to_string(cache_of(folder, kv1_lm::parse_policy("4,2")).policy) == "4,2");
    m.config.erase("kv1");
    m.write(folder);
    CHECK(to_string(cache_of(folder).policy) == "2,2");
}

TEST_CASE("--kv may name any cache; means and error weights are the folder's", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    m.write(folder);
    const kv1::calibration found = calibrate(folder);
    const kv1_lm::model_cache cache = cache_of(folder, kv1_lm::parse_policy("c2+ls+mean,c2+ls+ew@2:6"));
    const kv1::cache_description d =
        describe(kv1_test::shipped_model().config(), cache.policy, cache.calibrated, 64);
    CHECK(d.layers[5].key_encoding.means == std::vector<float>(64, m.value));
    CHECK(d.layers[5].value_encoding.error_weights == found.error_weights(5, kv1::kv_side::value));
    CHECK(d.fp16_window == 6);
    std::filesystem::remove(folder.path() / kv1_lm::calibration_file);
    CHECK_THAT(refusal([&] { (void)cache_of(folder, kv1_lm::parse_policy("c2+ls+ew")); }),
               ContainsSubstring("kv1_calibration.bin"));
    CHECK(to_string(cache_of(folder, kv1_lm::parse_policy("2+ls+had")).policy) == "2+ls+had,2+ls+had");
}

TEST_CASE("kld and generate run the cache that a model names", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model{}.write(folder);
    for (const char* file : {"model.safetensors", "tokenizer.json"})
        std::filesystem::create_symlink(std::filesystem::path(KV1_LM_MODEL_DIR) / file, folder.path() / file);
    const auto run = [&](std::vector<std::string> arguments) {
        arguments.insert(arguments.end(), {"--model", folder.path().string(), "--threads", "1"});
        const auto r = kv1_test::run_kv1_lm(arguments);
        INFO(r.err);
        REQUIRE(r.code == 0);
        return r;
    };
    const std::vector<std::string> kld{"kld", "--text", KV1_LM_TEXT_FILE, "--max-tokens", "64"};
    const std::filesystem::path report = folder.path() / "report.json";
    const auto measured = [&](std::vector<std::string> more) {
        more.insert(more.begin(), kld.begin(), kld.end());
        more.insert(more.end(), {"--json", report.string()});
        (void)run(more);
        return kv1_lm::read_json_file(report).value;
    };
    const json own = measured({}), two = measured({"--kv", "2"});
    CHECK(own.at("kv_policy") == "c3+ls+had+mean,c2+ls+had+mean");
    CHECK(own.at("kv_bits") == "c3,c2");
    CHECK(own.at("avg_cache_shrink_vs_fp16") == 128.0 / (14 + 10));
    CHECK(two.at("kv_policy") == "2,2");
    CHECK(own.at("kld_nats_per_token") != two.at("kld_nats_per_token"));
    const std::vector<std::string> generate{"generate", "--prompt", "The city",    "--max-new-tokens",
                                            "4",        "--greedy", "--show-cache"};
    CHECK_THAT(run(generate).err, ContainsSubstring("the model's own: c3+ls+had+mean,c2+ls+had+mean"));
    std::vector<std::string> grouped = generate;
    grouped.insert(grouped.end(), {"--kv", "2+ls+g32,c2/0:4"});
    CHECK_THAT(run(grouped).err, ContainsSubstring("cache (--kv 2+ls+g32,c2, 1 layers otherwise)"));
}

TEST_CASE("means of keys before rotary embedding turn with the keys", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model m;
    m.write(folder);
    CHECK_FALSE(cache_of(folder).calibrated.means_turn);
    m.key_means = "before rotary embedding";
    m.write(folder);
    const kv1_lm::model_cache cache = cache_of(folder);
    CHECK(cache.calibrated.means_turn);
    auto config = kv1_lm::model_config::read(folder.path() / "config.json");
    for (const kv1::rotary_pairs pairs : {kv1::rotary_pairs::interleaved, kv1::rotary_pairs::half_split}) {
        config.rotary_pairs = pairs;
        const auto d = kv1_lm::describe(config, cache.policy, cache.calibrated, 64);
        CHECK(d.layers[0].rotary.frequencies.size() == 16);
        CHECK(d.layers[0].rotary.pairs == pairs);
    }
    refuses([](trained_model& other) { other.key_means = "of some keys"; }, "key_means");
}

TEST_CASE("a folder that names what is no cache is refused", "[model_cache]") {
    const auto set = [](const char* key, const json& value) {
        return [key, value](trained_model& m) { m.config["kv1"][key] = value; };
    };
    refuses([](trained_model& m) { m.config["kv1"] = "compact3"; }, "config.json: kv1");
    refuses([](trained_model& m) { m.config["kv1"].erase("policy"); }, "policy");
    refuses(set("policy", 3), "kv1.policy");
    refuses(set("policy", "c3+ls,c9"), "kv1.policy: 'c3+ls,c9': invalid argument: a format is");
    refuses(set("policy", "c3+ls,c9"), "(position 6)");
    refuses(set("policy", "2/8:4"), "kv1.policy: the model has layers 0 to 7");
    refuses([](trained_model& m) { m.means.pop_back(); }, "tensor layers.7.value_means is missing");
    refuses([](trained_model& m) { m.means[3].second = {32, 2}; }, "layers.1.value_means");
    refuses(
        [](trained_model& m) {
            m.means.push_back({"layers.8.key_means", {2, 32}});
        },
        "has tensors that are not this model's");
    refuses([](trained_model& m) { m.value = std::numeric_limits<float>::infinity(); }, "not finite");
}

TEST_CASE("a folder without the means that its cache needs is refused", "[model_cache]") {
    const kv1_test::temporary_folder folder;
    trained_model{}.write(folder);
    folder.write("kv1_means.safetensors", "not what it was");
    CHECK_THAT(refusal([&] { (void)cache_of(folder); }), ContainsSubstring("kv1_means.safetensors"));
    std::filesystem::remove(folder.path() / "kv1_means.safetensors");
    CHECK_THAT(refusal([&] { (void)cache_of(folder); }), ContainsSubstring("kv1_means.safetensors"));
}
