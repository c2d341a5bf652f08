// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm sweep and its policies, on pieces of text.
#include "command_line.hpp"
#include "error.hpp"
#include "file.hpp"
#include "kld.hpp"
#include "layer_budget.hpp"
#include "refusal.hpp"
#include "shipped_model.hpp"
#include "sweep.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using kv1::kv_format;
using kv1_lm::parse_policy;
using kv1_test::run_kv1_lm;

namespace {

std::vector<kv1_lm::sweep_row> measure(kv1_lm::sweep_options options) {
    options.models = {KV1_LM_MODEL_DIR};
    options.text = KV1_LM_TEXT_FILE;
    options.seq_len = 128;
    std::ostringstream log;
    return kv1_lm::measure_sweep(options, log);
}

// The end of the text, of which no test here measures anything.
std::string calibration_text() {
    const std::string text = kv1_lm::read_text_file(KV1_LM_TEXT_FILE);
    return text.substr(text.size() - 20000);
}

} // namespace

TEST_CASE("what is no policy is refused in one line with the place that is wrong", "[sweep]") {
    const auto refusal_of = [](const std::string& text) {
        return kv1_test::refusal([&] { static_cast<void>(parse_policy(text)); });
    };
    CHECK_THAT(refusal_of("2+lsq,2"), ContainsSubstring("policy '2+lsq,2': invalid argument: an option is") &&
                                          ContainsSubstring("(position 2)"));
    CHECK_THAT(refusal_of("c3+channel"), ContainsSubstring("channel is for keys alone"));
    const std::string control = refusal_of("2\n,\x01");
    CHECK(std::ranges::all_of(control, [](char c) { return static_cast<unsigned char>(c) >= 0x20; }));
    std::string all = "2,2"; // the text is cut, the place is not
    for (int i = 0; i < 100; ++i)
        all.append("/").append(std::to_string(i)).append(":2,2");
    CHECK_THAT(refusal_of(all + "/0:4"), ContainsSubstring("...'") && ContainsSubstring("(position 694)"));
    for (const std::string& text : kv1_lm::default_policies())
        CHECK(to_string(parse_policy(text)).starts_with(text.substr(0, text.find('@'))));
}

TEST_CASE("a policy's pages and keys per channel count in bytes", "[sweep]") {
    const kv1_lm::cache_policy p = parse_policy("c3+ls+channel,c2/2:2,2");
    const kv1::cache_description d = describe(kv1_test::shipped_model().config(), p, {}, 1024);
    CHECK(d.layers[0].key_axis == kv1::quantization_axis::per_channel);
    CHECK(d.layers[2].key_axis == kv1::quantization_axis::per_token);
    // of 1,040 tokens of a layer, 64 in a page: 14 bytes and a pair a channel, of the last 16 fp16, too
    kv1::cache_description one = d;
    one.layers.resize(1);
    CHECK(describe(kv1_test::shipped_model().config(), parse_policy("2+channel,2@1:2#256"), {}, 64)
              .page_tokens == 256);
    CHECK(d.page_tokens == 64);
    const double page = 64 * 12 + 32 * 2 + 64 * 10;
    CHECK(kv1_lm::bytes_per_vector(one, 1040) == (page / 64 + 64.0 * 16 / 1040) / 2);
}

TEST_CASE("what no cache of the model takes is refused as the cache refuses it", "[sweep]") {
    const auto refusal_of = [](const char* text) {
        return kv1_test::refusal([&] {
            static_cast<void>(describe(kv1_test::shipped_model().config(), parse_policy(text), {}, 64));
        });
    };
    CHECK_THAT(
        refusal_of("2/5:2,2+g64"),
        ContainsSubstring("policy '2,2/5:2,2+g64': invalid argument: a group is a multiple of 32 channels") &&
            ContainsSubstring("(layer 5)"));
    CHECK_THAT(refusal_of("16+g32,2"), ContainsSubstring("a group is a multiple of 32 channels"));
    CHECK_THAT(refusal_of("2,2#20"), ContainsSubstring("pages whole tiles"));
    CHECK_THAT(refusal_of("8+channel,2"), ContainsSubstring("at most 4 bits"));
    CHECK_THAT(refusal_of("c2+ls+mean,2"),
               ContainsSubstring("the calibration has to have") && ContainsSubstring("(layer 0)"));
    CHECK_THAT(refusal_of("16+ls,2"), ContainsSubstring("policy '16+ls,2': "));
    CHECK_THAT(refusal_of("2/8:2"), ContainsSubstring("a layer that the cache does not have (layer 8)"));
    CHECK(describe(kv1_test::shipped_model().config(), parse_policy("2+g32,2"), {}, 64).layers[7].key_group ==
          32);
}

TEST_CASE("bytes per vector count codes, metadata, means and fp16 tokens", "[sweep]") {
    const kv1_lm::model& m = kv1_test::shipped_model();
    const kv1_lm::calibration none{std::vector<std::vector<float>>(8, std::vector<float>(64)),
                                   std::vector<std::vector<float>>(8, std::vector<float>(64)),
                                   {},
                                   {}};
    const auto bytes = [&](const char* text) {
        return kv1_lm::bytes_per_vector(kv1_lm::describe(m.config(), parse_policy(text), none, 1024), 1024);
    };
    CHECK(bytes("2,2") == 12.0);
    CHECK(bytes("c2+ls,c2+ls") == 10.0);
    CHECK(bytes("c3+ls,c2+ls") == 12.0);
    CHECK(bytes("c4+ls,c2+ls") == 14.0);
    CHECK(bytes("c3+ls,c2+ls/1:c2+ls,c2+ls") == 12.0 - 2.0 / 8.0);
    CHECK(bytes("c2+ls+mean,c2+ls+mean") == 10.0 + 2.0 * 32.0 / 1024.0);
    CHECK(bytes("2,2@8:24") == 12.0 + 32.0 * 64.0 / 1024.0);
}

TEST_CASE("a policy of a sweep costs what kld says of its formats", "[sweep]") {
    const auto rows = measure({.policies = {"2,2", "4,2", "32,32"}, .chunks = 2});
    REQUIRE(rows.size() == 3);
    std::ostringstream log;
    for (std::size_t i = 0; i < 2; ++i) {
        const kv1_lm::kld_result r = kv1_lm::measure_kld({.model = KV1_LM_MODEL_DIR,
                                                          .text = KV1_LM_TEXT_FILE,
                                                          .kv = parse_policy(i == 0 ? "2" : "4,2"),
                                                          .seq_len = 128,
                                                          .stride = 128,
                                                          .max_tokens = 256},
                                                         log);
        CHECK(rows[i].positions == r.positions);
        CHECK(std::fabs(rows[i].kld - r.nats_per_token) < 1e-6);
        CHECK(std::fabs(rows[i].perplexity - r.kv_perplexity) < 1e-4);
        CHECK(std::fabs(rows[i].reference_perplexity - r.reference_perplexity) < 1e-4);
        CHECK(rows[i].top1 > 0.5);
        CHECK(rows[i].top1 < 1.0);
        CHECK(rows[i].key_mse > 0.0);
        CHECK(rows[i].encode_ns > 0.0);
    }
    CHECK(rows[1].key_mse < rows[0].key_mse);
    CHECK(rows[1].value_mse == rows[0].value_mse);
    CHECK(rows[2].kld < 1e-6);
    CHECK(rows[2].top1 == 1.0);
    CHECK(rows[2].key_mse == 0.0);
}

TEST_CASE("fitted, rotated and centred caches cost less at the same bytes or fewer", "[sweep]") {
    const kv1_test::temporary_folder folder;
    const auto text = folder.write("calibration.txt", calibration_text());
    const auto rows =
        measure({.calibration_text = text,
                 .policies = {"2,2", "c2+ls+had+mean,c2+ls+had+mean", "c3+ls+had+mean+ew,c2+ls+had+mean+ew"},
                 .chunks = 4});
    CHECK(rows[1].bytes_per_vector < rows[0].bytes_per_vector);
    CHECK(rows[1].kld < 0.9 * rows[0].kld);
    CHECK(rows[2].kld < 0.6 * rows[0].kld);
    CHECK(rows[2].perplexity < rows[0].perplexity);
}

TEST_CASE("a sweep goes on from its file: chunks and policies that are there are not measured again",
          "[sweep]") {
    const kv1_test::temporary_folder folder;
    const auto file = folder.path() / "sweep.json";
    const auto first = measure({.policies = {"2,2"}, .chunks = 1, .json = file});
    const auto more = measure({.policies = {"2,2", "4,4"}, .chunks = 2, .json = file});
    const auto alone = measure({.policies = {"2,2", "4,4"}, .chunks = 2, .threads = 2});
    REQUIRE(more.size() == 2);
    for (std::size_t i = 0; i < 2; ++i) {
        CHECK(more[i].kld == alone[i].kld);
        CHECK(more[i].perplexity == alone[i].perplexity);
        CHECK(more[i].positions == 2 * 127);
    }
    // a number that was put into the file comes out again
    std::string text = kv1_lm::read_text_file(file);
    nlohmann::json document = nlohmann::json::parse(text);
    document["models"][0]["results"][0]["chunk_sums"][0][3] = 1270.0;
    folder.write("sweep.json", document.dump());
    const auto edited = measure({.policies = {"2,2"}, .chunks = 1, .json = file});
    CHECK(edited[0].kld == 10.0);
    // and what this run does not ask for stays
    CHECK(nlohmann::json::parse(kv1_lm::read_text_file(file))["models"][0]["results"].size() == 2);

    kv1_lm::sweep_options other{
        .policies = {"2,2"}, .chunks = 1, .precision = kv1::precision::fast, .json = file};
    CHECK_THROWS_AS(measure(other), kv1_lm::input_error);
    folder.write("sweep.json", "{}");
    CHECK_THROWS_AS(measure({.policies = {"2,2"}, .chunks = 1, .json = file}), kv1_lm::input_error);
}

TEST_CASE("a budget of bytes gives wider codes to the layers that need them", "[sweep]") {
    const std::vector<std::string> ways{"c2+ls+had", "c4+ls+had"};
    std::ostringstream log;
    const kv1_lm::sweep_options options{.models = {KV1_LM_MODEL_DIR},
                                        .text = KV1_LM_TEXT_FILE,
                                        .policies = ways,
                                        .chunks = 1,
                                        .seq_len = 128,
                                        .threads = 2};
    const auto bytes = [](const kv1_lm::layer_budget& b) {
        return kv1_lm::bytes_per_vector(
            kv1_lm::describe(kv1_test::shipped_model().config(), b.policy, {}, 1024), 1024);
    };
    const kv1_lm::layer_budget half = kv1_lm::choose_layers(options, 14.0, log);
    CHECK(bytes(half) <= 14.0);
    CHECK(bytes(half) > 12.9); // less than one more layer
    CHECK_FALSE(half.policy.layers.empty());
    // chosen layers cost less together than any others, as many of them: the first four, here
    const auto rows = measure(
        {.policies = {to_string(half.policy), "c2+ls+had/0:c4+ls+had/1:c4+ls+had/2:c4+ls+had/3:c4+ls+had"},
         .chunks = 1});
    CHECK(rows[0].kld <= rows[1].kld);
    CHECK_THAT(kv1_test::refusal([&] { (void)kv1_lm::choose_layers(options, 9.0, log); }),
               ContainsSubstring("--budget"));
    kv1_lm::sweep_options named = options;
    named.policies = {"c2/3:c4"};
    CHECK_THAT(kv1_test::refusal([&] { (void)kv1_lm::choose_layers(named, 14.0, log); }),
               ContainsSubstring("layers of their own"));
}

TEST_CASE("sweep prints a table and writes CSV; means without a calibration text are refused", "[sweep]") {
    const kv1_test::temporary_folder folder;
    const std::string csv = (folder.path() / "sweep.csv").string();
    const auto r = run_kv1_lm({"sweep", "--model", KV1_LM_MODEL_DIR, "--text", KV1_LM_TEXT_FILE, "--seq-len",
                               "64", "--chunks", "1", "--policy", "2,2", "2+ls+had,2+ls+had", "--csv", csv});
    INFO(r.err);
    CHECK(r.code == 0);
    CHECK_THAT(r.out, ContainsSubstring("kv1-8m, 63 positions"));
    CHECK_THAT(r.out, ContainsSubstring("2+ls+had,2+ls+had"));
    const std::string table = kv1_lm::read_text_file(csv);
    CHECK(std::count(table.begin(), table.end(), '\n') == 3);

    const auto refused = run_kv1_lm(
        {"sweep", "--text", KV1_LM_TEXT_FILE, "--seq-len", "64", "--chunks", "1", "--policy", "2+ls+mean,2"});
    CHECK(refused.code == 2);
    CHECK(refused.one_error_line());
    CHECK_THAT(refused.err, ContainsSubstring("--calibrate"));
}
