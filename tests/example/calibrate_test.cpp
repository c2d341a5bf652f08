// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm calibrate: error weights for the cache that a model's folder names.
#include "calibrate.hpp"
#include "command_line.hpp"
#include "file.hpp"
#include "float_tensors.hpp"
#include "json_file.hpp"
#include "model_cache.hpp"
#include "shipped_model.hpp"
#include "temporary_folder.hpp"
#include "thread_pool.hpp"
#include "tokenizer.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using nlohmann::json;

namespace {

// The shipped model in a folder that can be written to.
class writable_model {
public:
    explicit writable_model(const json& cache) {
        json config = kv1_lm::read_json_file(std::filesystem::path(KV1_LM_MODEL_DIR) / "config.json").value;
        if (!cache.is_null())
            config["kv1"] = cache;
        folder_.write("config.json", config.dump());
        for (const char* file : {"model.safetensors", "tokenizer.json"})
            std::filesystem::create_symlink(std::filesystem::path(KV1_LM_MODEL_DIR) / file, path() / file);
        // the test text's end, of which nothing is measured
        const std::string text = kv1_lm::read_text_file(KV1_LM_TEXT_FILE);
        folder_.write("other.txt", text.substr(text.size() - 12000));
    }

    [[nodiscard]] const std::filesystem::path& path() const noexcept { return folder_.path(); }
    [[nodiscard]] auto calibrate(const std::string& text = "other.txt",
                                 const std::vector<std::string>& more = {}) const {
        std::vector<std::string> words{
            "calibrate", "--model", path().string(), "--text", (path() / text).string(), "--tokens", "2048"};
        words.insert(words.end(), more.begin(), more.end());
        return kv1_test::run_kv1_lm(words);
    }
    [[nodiscard]] kv1_lm::model_cache cache() const {
        return kv1_lm::choose_cache(path(), kv1_lm::model_config::read(path() / "config.json"), {});
    }
    [[nodiscard]] double divergence() const {
        const std::filesystem::path report = path() / "report.json";
        const auto r = kv1_test::run_kv1_lm({"kld", "--model", path().string(), "--text", KV1_LM_TEXT_FILE,
                                             "--max-tokens", "512", "--seq-len", "512", "--threads", "1",
                                             "--json", report.string()});
        INFO(r.err);
        REQUIRE(r.code == 0);
        return kv1_lm::read_json_file(report).value.at("kld_nats_per_token").get<double>();
    }
    void write(const char* file, const std::string& text) const { folder_.write(file, text); }

private:
    kv1_test::temporary_folder folder_;
};

const json fitted{{"policy", "c2+ls+had"}};

} // namespace

TEST_CASE("calibrate adds error weights to a model's cache, which then costs less", "[calibrate]") {
    const writable_model m(fitted);
    const double before = m.divergence();
    const auto r = m.calibrate();
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK_THAT(r.out, ContainsSubstring("calibrated on 2048 tokens"));
    CHECK_THAT(r.out, ContainsSubstring("c2+ls+had+ew,c2+ls+had+ew"));
    CHECK(m.cache().calibrated.key_means[0].empty()); // the cache has no use for them

    const kv1_lm::model& shipped = kv1_test::shipped_model();
    std::vector<std::int32_t> tokens = kv1_lm::tokenizer::read(m.path() / "tokenizer.json")
                                           .encode(kv1_lm::read_text_file(m.path() / "other.txt"));
    tokens.resize(2048);
    const kv1_lm::model_cache cache = m.cache();
    kv1_lm::thread_pool pool(2);
    const kv1::calibration found = calibrate(shipped, tokens, {1024}, cache.policy, {}, pool);
    CHECK(cache.calibrated.key_weights == kv1_lm::parts_of(found).key_weights);
    CHECK(cache.calibrated.value_weights == kv1_lm::parts_of(found).value_weights);
    CHECK(kv1::kv_cache::create(describe(shipped.config(), cache.policy, cache.calibrated, 64)));
    CHECK(m.divergence() < 0.95 * before);
}

TEST_CASE("calibrate takes the means that a cache names; those that a model was trained with come first",
          "[calibrate]") {
    json centred = fitted;
    centred["policy"] = "c2+ls+had+mean/3:16,2";
    const writable_model m(centred);
    REQUIRE(m.calibrate().code == 0);
    CHECK(to_string(m.cache().policy) == "c2+ls+had+mean+ew,c2+ls+had+mean+ew/3:16,2");
    CHECK(m.cache().calibrated.value_means[0].size() == 64);
    CHECK(m.cache().calibrated.value_means[3].empty());

    const auto calibration = kv1_lm::read_binary_file(m.path() / kv1_lm::calibration_file);
    const std::string config = kv1_lm::read_text_file(m.path() / "config.json");
    m.write("third.txt", "Another text, which is short.");
    REQUIRE(m.calibrate("third.txt").code == 0);
    CHECK(kv1_lm::read_binary_file(m.path() / kv1_lm::calibration_file) != calibration);
    CHECK(kv1_lm::read_text_file(m.path() / "config.json") == config);

    std::vector<kv1_lm::float_tensor> trained;
    for (std::size_t i = 0; i < 8; ++i)
        for (const char* side : {"key", "value"})
            trained.push_back({"layers." + std::to_string(i) + "." + side + "_means",
                               {2, 32},
                               std::vector<float>(64, 0.5f)});
    m.write(kv1_lm::means_file, kv1_lm::to_safetensors(trained));
    CHECK(m.cache().calibrated.value_means[0] == std::vector<float>(64, 0.5f));
    CHECK(m.cache().calibrated.key_weights[0].size() == 2048);
}

TEST_CASE("calibrate takes what a policy names, from chunks of several lengths", "[calibrate]") {
    const writable_model m(nullptr); // whose folder names no cache
    const double before = m.divergence();
    REQUIRE(
        m.calibrate("other.txt", {"--policy", "balanced", "--seq-len", "256", "1024", "--query-stride", "2"})
            .code == 0);
    const kv1_lm::model_cache cache = m.cache();
    CHECK(cache.policy == kv1::parse_policy("balanced"));
    std::vector<std::int32_t> tokens = kv1_lm::tokenizer::read(m.path() / "tokenizer.json")
                                           .encode(kv1_lm::read_text_file(m.path() / "other.txt"));
    tokens.resize(2048);

    // the same by hand: 1,024 tokens in four chunks, then 1,024 in one
    const kv1_lm::model& shipped = kv1_test::shipped_model();
    kv1_lm::thread_pool pool(1);
    kv1::cache_description shape = shipped.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, 1024);
    for (kv1::layer_description& layer : shape.layers)
        layer.rotary = kv1_lm::rotary_of(shipped.config());
    kv1::calibrator by_hand(cache.policy, shape, {.query_stride = 2});
    for (std::size_t i = 0; i < shape.layers.size(); ++i)
        by_hand.set_output_projection(i, shipped.output_projection(i));
    kv1::kv_cache plain(shape);
    std::span<const std::int32_t> rest(tokens);
    for (const std::size_t n : std::initializer_list<std::size_t>{256, 256, 256, 256, 1024}) {
        const kv1::sequence_id sequence = plain.create_sequence();
        (void)shipped.forward(rest.first(n), plain, sequence, kv1::precision::exact, pool,
                              [&](std::size_t layer, kv1::tensor_view q, kv1::tensor_view k,
                                  kv1::tensor_view v) { by_hand.add(layer, q, k, v); });
        plain.destroy_sequence(sequence);
        rest = rest.subspan(n);
    }
    const kv1_lm::calibration expected = kv1_lm::parts_of(by_hand.finish());
    CHECK(cache.calibrated.key_means == expected.key_means);
    CHECK(cache.calibrated.key_weights == expected.key_weights);
    CHECK(cache.calibrated.value_weights == expected.value_weights);
    CHECK(m.divergence() < 0.2 * before); // of two bits, minimum and maximum

    for (const auto& [more, why] :
         {std::pair<std::vector<std::string>, const char*>{{"--policy", "safe"}, "takes nothing from a text"},
          {{"--policy", "balanced/8:c4+ls"}, "the model has layers 0 to 7"},
          {{"--policy", "balancd"}, "--policy"},
          {{"--policy", "small", "--seq-len", "1025"}, "--seq-len 1025: the model takes 1 to 1024 tokens"},
          {{"--policy", "small", "--query-stride", "0"}, "stride"}}) {
        const auto r = m.calibrate("other.txt", more);
        CHECK(r.code == 2);
        CHECK_THAT(r.err, ContainsSubstring(why));
    }
    CHECK(m.cache().policy == cache.policy);
}

TEST_CASE("calibrate refuses a cache that has no use for weights, and an empty text", "[calibrate]") {
    const auto refused = [](const json& cache, const char* text, const char* why) {
        const writable_model m(cache);
        m.write("empty.txt", "");
        const std::string config = kv1_lm::read_text_file(m.path() / "config.json");
        const auto r = m.calibrate(text);
        CHECK(r.code == 2);
        CHECK_THAT(r.err, ContainsSubstring(why));
        CHECK(kv1_lm::read_text_file(m.path() / "config.json") == config);
        CHECK_FALSE(std::filesystem::exists(m.path() / kv1_lm::calibration_file));
    };
    refused(nullptr, "other.txt", "config.json: kv1 names no cache");
    json min_max = fitted;
    min_max["policy"] = "2+had";
    refused(min_max, "other.txt", "config.json: kv1.policy: error weights are for levels by least squares");
    refused(fitted, "empty.txt", "empty.txt: no tokens to calibrate on");
    refused(fitted, "none.txt", "none.txt");
}
