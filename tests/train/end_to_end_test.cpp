// SPDX-License-Identifier: Apache-2.0
//
// Text to tokens to a model to text again, with no Python on the way: a model that has learnt a few kilobytes
// by heart under a 2-bit cache, run by kv1-lm from the cache that its folder names.
#include "command_line.hpp"
#include "training_fixture.hpp"

#include "json_file.hpp"

#include <fstream>

TEST_CASE("A model that learnt a text under a 2-bit cache recites it from one", "[train]") {
    const kv1_test::training_fixture f;
    const auto trained =
        kv1_test::run_kv1_train(f.train("run", {"--kv", "c2+ls+had+mean/1:c3+ls+had+mean,c2+ls+had+mean",
                                                "--round-metadata", "--steps", "500", "--log-every", "100"}));
    INFO(trained.out << trained.err);
    REQUIRE(trained.code == 0);
    const std::string model = f.file("run/step-00000500");

    const auto measured =
        kv1_test::run_kv1_lm({"kld", "--model", model, "--text", f.file("text.txt"), "--seq-len", "128",
                              "--stride", "128", "--threads", "1", "--json", f.file("kld.json")});
    INFO(measured.err);
    REQUIRE(measured.code == 0);
    const auto result = kv1_lm::read_json_file(f.path() / "kld.json");
    INFO(result.value.dump(1));
    REQUIRE(result.value.at("kv_policy") == "c2+ls+had+mean,c2+ls+had+mean/1:c3+ls+had+mean,c2+ls+had+mean");
    // the 288 words at random are at 288; a text known by heart is near 1
    REQUIRE(result.value.at("ppl_quantized").get<double>() < 2.0);

    const auto recited =
        kv1_test::run_kv1_lm({"generate", "--model", model, "--greedy", "--threads", "1", "--max-new-tokens",
                              "40", "--prompt", "The cat sat on the mat, and"});
    INFO(recited.out << recited.err);
    REQUIRE(recited.code == 0);
    REQUIRE(recited.out.find(" the dog lay by the door. Rain fell") != std::string::npos);
}
