// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm kld. The full text takes minutes: that run is `cmake/setup.sh extended`'s, the first chunks are
// here.
#include "command_line.hpp"
#include "json_file.hpp"
#include "kld.hpp"
#include "shipped_model.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <cmath>
#include <numbers>
#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using kv1_test::golden;
using kv1_test::run_kv1_lm;

namespace {

kv1_lm::kld_result measure(kv1_lm::kld_options options) {
    options.model = KV1_LM_MODEL_DIR;
    options.text = KV1_LM_TEXT_FILE;
    std::ostringstream log;
    return kv1_lm::measure_kld(options, log);
}

const nlohmann::json& golden_kld(double bits) {
    for (const nlohmann::json& entry : golden().at("kld"))
        if (entry.at("bits").get<double>() == bits)
            return entry;
    throw std::runtime_error("no such golden figure");
}

} // namespace

TEST_CASE("the first chunks of WikiText-2 diverge as the reference says", "[kld]") {
    for (const auto& [bits, kv] : {std::pair{2.0, "2"}, {1.5, "1.5"}, {4.0, "4"}}) {
        const auto expected = golden_kld(bits).at("chunk_mean_kld").get<std::vector<double>>();
        const kv1_lm::kld_result r =
            measure({.kv = kv1_lm::parse_policy(kv), .max_tokens = 2048, .threads = 2});
        CHECK(r.positions == 2 * 1023);
        REQUIRE(r.chunk_means.size() == 2);
        for (std::size_t i = 0; i < 2; ++i) {
            INFO("--kv " << kv << ", chunk " << i << ": " << r.chunk_means[i] << ", not " << expected[i]);
            CHECK(std::fabs(r.chunk_means[i] - expected[i]) <= 0.005 * expected[i]);
        }
    }
}

// Another BLAS rounds otherwise, and a value between two levels then gets the other one's code: a chunk's mean
// moves though nothing is wrong. Over 16 chunks, with OpenBLAS's kernels for three processors
// (OPENBLAS_CORETYPE=SkylakeX, Haswell, Sandybridge), its standard deviation was 0.90 % of the mean with the
// shipped cache and 1.31 % with keys per channel, whose codes depend on all tokens of a page. Two runs differ by
// sqrt(2) as much; four times that is allowed.
constexpr double rounding_allows(double deviation) { return 4.0 * 1.4142136 * deviation; }

TEST_CASE("the model that runs by default costs what it was measured to cost", "[kld]") {
    // means of the four runs with OpenBLAS's kernels for SkylakeX, Haswell, Sandybridge and Prescott
    const double measured[] = {0.0749834, 0.0869422};
    const kv1_test::temporary_folder folder;
    const std::string report = (folder.path() / "report.json").string();
    const auto r = run_kv1_lm(
        {"kld", "--text", KV1_LM_TEXT_FILE, "--max-tokens", "2048", "--threads", "2", "--json", report});
    INFO(r.err);
    REQUIRE(r.code == 0);
    const nlohmann::json result = kv1_lm::read_json_file(report).value;
    CHECK_THAT(result.at("kv_policy").get<std::string>(),
               ContainsSubstring("c3+ls+had+mean+ew,c2+ls+had+mean+ew/0:c2"));
    CHECK(result.at("avg_cache_shrink_vs_fp16") == 64.0 / 12.0);
    for (std::size_t i = 0; i < 2; ++i) {
        const double found = result.at("chunk_mean_kld").at(i);
        INFO("chunk " << i << ": " << found << ", not " << measured[i]);
        CHECK(std::fabs(found - measured[i]) <= rounding_allows(0.0090) * measured[i]);
    }
}

TEST_CASE("keys per channel cost the shipped model what they were measured to cost", "[kld]") {
    // means of the four runs, with the policy that examples/evaluation/README.md names
    const double measured[] = {0.0702849, 0.0766958};
    const std::string value = "+ls+had+mean+ew", key = value + "+channel", low = "c2" + key + ",c2" + value,
                      wide = "c3" + key + ",c3" + value;
    const std::string policy = "c3" + key + ",c2" + value + "/0:" + low + "/1:" + low + "/2:" + wide +
                               "/3:" + wide + "/4:" + wide + "/7:" + wide;
    const kv1_test::temporary_folder folder;
    const std::string report = (folder.path() / "report.json").string();
    const auto r = run_kv1_lm({"kld", "--text", KV1_LM_TEXT_FILE, "--max-tokens", "2048", "--threads", "2",
                               "--kv", policy, "--json", report});
    INFO(r.err);
    REQUIRE(r.code == 0);
    const nlohmann::json result = kv1_lm::read_json_file(report).value;
    CHECK(result.at("avg_cache_shrink_vs_fp16") == 64.0 / 12.0);
    for (std::size_t i = 0; i < 2; ++i) {
        const double found = result.at("chunk_mean_kld").at(i);
        INFO("chunk " << i << ": " << found << ", not " << measured[i]);
        CHECK(std::fabs(found - measured[i]) <= rounding_allows(0.0131) * measured[i]);
    }
}

TEST_CASE("a cache diverges from itself by nothing", "[kld]") {
    const kv1_lm::kld_result r = measure({.kv = kv1_lm::parse_policy("2"),
                                          .reference = kv1_lm::parse_kv("2", "--reference"),
                                          .seq_len = 64,
                                          .stride = 64,
                                          .max_tokens = 128});
    // each of 8192 terms rounds: a few units in the last place of a double sum of fp32 products
    CHECK(r.max_position_nats < 1e-6);
    CHECK(r.kv_perplexity == r.reference_perplexity);
}

TEST_CASE("chunks are cut, dropped and counted as documented", "[kld]") {
    const auto shape = [](std::size_t tokens, std::size_t length, std::size_t stride, bool last) {
        return measure(
            {.seq_len = length, .stride = stride, .max_tokens = tokens, .include_last_logit = last});
    };
    const kv1_lm::kld_result plain = shape(33, 16, 16, false);
    CHECK(plain.chunk_means.size() == 2); // the third has one token
    CHECK(plain.positions == 30);
    CHECK(plain.loaded_tokens == 33);
    CHECK(shape(34, 16, 16, false).chunk_means.size() == 3);
    CHECK(shape(32, 16, 16, true).positions == 32);
    const kv1_lm::kld_result overlapping = shape(32, 16, 8, false);
    CHECK(overlapping.chunk_means.size() == 4); // at 0, 8, 16 and, short, 24
    CHECK(overlapping.positions == 15 + 15 + 15 + 7);
    // the perplexities are of the same predictions with and without the last logit
    CHECK(shape(32, 16, 16, true).reference_perplexity == shape(32, 16, 16, false).reference_perplexity);
}

TEST_CASE("positions at a chunk's start may be left out", "[kld]") {
    // caches of fp32, whose results do not depend on how many tokens a product took
    const auto chunks = [](std::size_t skip, std::size_t tokens) {
        return measure({.original = KV1_LM_DEFAULT_MODEL_DIR,
                        .kv = kv1_lm::parse_policy("32"),
                        .seq_len = 300,
                        .stride = 300,
                        .skip = skip,
                        .max_tokens = tokens});
    };
    const kv1_lm::kld_result all = chunks(0, 600), late = chunks(130, 600), early = chunks(0, 131);
    CHECK(late.positions == 2 * 169);
    // the first chunk's positions are those before 130 and those after
    CHECK(std::fabs(130 * early.nats_per_token + 169 * late.chunk_means[0] - 299 * all.chunk_means[0]) <
          1e-3 * 299 * all.chunk_means[0]);
    CHECK(early.nats_per_token != late.chunk_means[0]);
    CHECK(chunks(130, 300 + 131).chunk_means.size() == 1);
    CHECK(chunks(130, 300 + 132).chunk_means.size() == 2);
}

TEST_CASE("another model may be the reference", "[kld]") {
    const auto against = [](const char* original, const char* kv) {
        return measure({.original = original, .kv = kv1_lm::parse_policy(kv), .max_tokens = 256});
    };
    const kv1_lm::kld_result same = against(KV1_LM_MODEL_DIR, "2"), alone = against("", "2");
    CHECK(same.nats_per_token == alone.nats_per_token);
    CHECK(same.kv_perplexity == alone.kv_perplexity);

    const kv1_lm::kld_result other = against(KV1_LM_DEFAULT_MODEL_DIR, "32");
    CHECK(other.nats_per_token > 0.01);
    CHECK(other.kv_perplexity == against("", "32").reference_perplexity);
    std::ostringstream log;
    const kv1_lm::kld_result turned = kv1_lm::measure_kld({.model = KV1_LM_DEFAULT_MODEL_DIR,
                                                           .text = KV1_LM_TEXT_FILE,
                                                           .kv = kv1_lm::parse_policy("32"),
                                                           .max_tokens = 256},
                                                          log);
    CHECK(other.reference_perplexity == turned.reference_perplexity);
}

TEST_CASE("the number of threads changes no figure", "[kld]") {
    const auto with = [](std::size_t threads) {
        return measure({.seq_len = 48, .stride = 48, .max_tokens = 480, .threads = threads});
    };
    const kv1_lm::kld_result one = with(1), three = with(3);
    CHECK(one.nats_per_token == three.nats_per_token);
    CHECK(one.chunk_means == three.chunk_means);
    CHECK(one.kv_perplexity == three.kv_perplexity);
}

TEST_CASE("the JSON report has the reference's keys and the printed figures", "[kld]") {
    const kv1_test::temporary_folder folder;
    const std::filesystem::path file = folder.path() / "report.json";
    const auto r = run_kv1_lm({"kld", "--text", KV1_LM_TEXT_FILE, "--max-tokens", "200", "--seq-len", "64",
                               "--stride", "64", "--kv", "4,2", "--json", file.string()});
    INFO(r.err);
    REQUIRE(r.code == 0);
    const auto report = nlohmann::json::parse(kv1_lm::read_text_file(file));
    CHECK(report.at("kv_bits") == "4,2");
    CHECK(report.at("positions") == 3 * 63 + 7);
    CHECK(report.at("chunks") == 4);
    CHECK(report.at("loaded_tokens") == 200);
    CHECK(report.at("seq_len") == 64);
    CHECK(report.at("stride") == 64);
    CHECK(report.at("include_last_logit") == false);
    CHECK(report.at("chunk_mean_kld").size() == 4);
    CHECK(report.at("kld_bits_per_token").get<double>() ==
          report.at("kld_nats_per_token").get<double>() / std::numbers::ln2);
    CHECK(report.at("avg_cache_shrink_vs_fp16") == 128.0 / (20 + 12));
    for (const char* key :
         {"metric", "max_position_kld_nats", "max_chunk_mean_kld_nats", "ppl_reference", "ppl_quantized"})
        CHECK(report.contains(key));
    CHECK_THAT(r.out, ContainsSubstring("196 in 4 chunks"));
    CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) ==
          1); // nothing temporary is left
}

TEST_CASE("what kld can not do ends with exit code 2 and one line, before any work", "[kld]") {
    const kv1_test::temporary_folder folder;
    const std::string one_token = folder.write("one.txt", "a").string(),
                      empty = folder.write("empty.txt", "").string(),
                      broken = folder.write("broken.txt", "abc\xc3(").string();
    const auto refused = [](std::vector<std::string> arguments, const std::string& what) {
        arguments.insert(arguments.begin(), "kld");
        const auto r = run_kv1_lm(arguments);
        INFO(r.err);
        CHECK(r.code == 2);
        CHECK(r.one_error_line());
        CHECK_THAT(r.err, ContainsSubstring(what));
        CHECK(r.out.empty());
    };
    const std::string text = KV1_LM_TEXT_FILE;
    refused({}, "--text");
    refused({"--text", (folder.path() / "none.txt").string()}, "none.txt");
    refused({"--text", folder.path().string()}, folder.path().string());
    refused({"--text", one_token}, "one.txt");
    refused({"--text", empty}, "empty.txt");
    refused({"--text", broken}, "3"); // the byte
    refused({"--text", text, "--max-tokens", "1"}, "fewer than two tokens");
    refused({"--text", text, "--seq-len", "1"}, "--seq-len 1");
    refused({"--text", text, "--seq-len", "1025"}, "--seq-len 1025");
    refused({"--text", text, "--stride", "0"}, "--stride 0");
    refused({"--text", text, "--seq-len", "64", "--skip", "63"}, "--skip 63");
    refused({"--text", text, "--skip", "100", "--max-tokens", "101"}, "fewer than 102 tokens");
    refused({"--text", text, "--original", folder.path().string()}, "config.json");
    refused({"--text", text, "--reference", "7"}, "--reference: '7'");
    refused({"--text", text, "--json", (folder.path() / "no" / "report.json").string()}, "report.json");
    refused({"--text", text, "--json", folder.path().string()}, folder.path().string());
    refused({"--text", text, "--kv", "x"}, "--kv: 'x'");
}
