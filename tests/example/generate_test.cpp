// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm generate, run as the command line runs it.
#include "command_line.hpp"
#include "shipped_model.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <vector>

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::StartsWith;
using kv1_test::golden;
using kv1_test::run_kv1_lm;

namespace {

std::string last_line(const std::string& text) {
    const std::size_t end = text.find_last_not_of('\n');
    const std::size_t start = text.rfind('\n', end);
    return text.substr(start == std::string::npos ? 0 : start + 1,
                       end - (start == std::string::npos ? 0 : start));
}

std::vector<std::int32_t> ids_of(const std::string& out) {
    return nlohmann::json::parse(last_line(out)).get<std::vector<std::int32_t>>();
}

// The ids of a greedy continuation on a 2-bit cache, the prompt computed `piece` tokens at a time.
std::vector<std::int32_t> continued(std::vector<std::int32_t> ids, std::size_t length, std::size_t piece) {
    const kv1_lm::model& m = kv1_test::shipped_model();
    kv1_lm::thread_pool pool(1);
    kv1::kv_cache cache(m.cache_shape(kv1_lm::parse_kv("2", "--kv"), length));
    const kv1::sequence_id id = cache.create_sequence();
    std::vector<float> logits(m.config().vocab_size);
    for (std::size_t at = 0; ids.size() < length;) {
        const std::size_t n = std::min(piece, ids.size() - at);
        const std::vector<float> states =
            m.forward(std::span(ids).subspan(at, n), cache, id, kv1::precision::exact, pool);
        at += n;
        if (at < ids.size())
            continue;
        m.logits(std::span(states).last(m.config().hidden_size), logits, pool);
        ids.push_back(
            static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    }
    return ids;
}

} // namespace

TEST_CASE("greedy continuations are the reference's until a step that was nearly a draw", "[generate]") {
    for (const nlohmann::json& g : golden().at("greedy")) {
        const auto expected = g.at("ids").get<std::vector<std::int32_t>>();
        const auto prompt = g.at("prompt_tokens").get<std::size_t>();
        const auto margins = g.at("top1_margin").get<std::vector<float>>();
        const bool quantized = g.at("bits") != 0;
        const std::string kv = quantized ? "2" : "32";
        INFO("--kv " << kv << ", " << g.at("prompt"));
        const auto r = run_kv1_lm({"generate", "--model", KV1_LM_MODEL_DIR, "--prompt", g.at("prompt"),
                                   "--max-new-tokens", std::to_string(expected.size() - prompt), "--greedy",
                                   "--kv", kv, "--ids"});
        REQUIRE(r.code == 0);
        std::size_t draw = 0;
        while (draw < margins.size() && margins[draw] >= 1e-3f)
            ++draw;
        REQUIRE(draw > 0);
        const auto agrees = [&](const std::vector<std::int32_t>& found) {
            return found.size() == expected.size() &&
                   std::equal(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(prompt + draw),
                              expected.begin());
        };
        bool same = agrees(ids_of(r.out));
        if (same && draw == margins.size())
            CHECK_THAT(r.out, StartsWith(g.at("text").get<std::string>()));
        // A value on the boundary of two codes takes either, as rounding will have it, and the code moves
        // logits by more than a draw. Then another order of summation (another BLAS, or the prompt in
        // pieces) must give the reference's continuation.
        for (std::size_t piece = 1; quantized && !same && piece <= 5; ++piece)
            same =
                agrees(continued({expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(prompt)},
                                 expected.size(), piece));
        CHECK(same);
    }
}

TEST_CASE("without new tokens --ids prints the prompt's tokenization", "[generate]") {
    for (const char* text : {"", "Hello, world!", "don't  stop\n"}) {
        const auto r = run_kv1_lm({"generate", "--prompt", text, "--max-new-tokens", "0", "--ids"});
        CHECK(r.code == 0);
        CHECK(ids_of(r.out) == kv1_test::shipped_tokenizer().encode(text));
        CHECK(r.out == std::string(text) + "\n" + last_line(r.out) + "\n");
    }
}

TEST_CASE("a seed draws the same text again", "[generate]") {
    const auto run = [](const char* seed) {
        const auto r = run_kv1_lm(
            {"generate", "--prompt", "The city", "--max-new-tokens", "30", "--seed", seed, "--threads", "1"});
        REQUIRE(r.code == 0);
        return r.out;
    };
    CHECK(run("5") == run("5"));
    CHECK(run("5") != run("6"));
}

TEST_CASE("every --kv and both kinds of attention continue a prompt", "[generate]") {
    for (const char* kv : {"1", "1.5", "2", "3", "4", "8", "16", "32", "4,2", "16,1.5"})
        for (const char* attention : {"exact", "fast"}) {
            INFO(kv << ' ' << attention);
            const auto r = run_kv1_lm({"generate", "--prompt", "In the year", "--max-new-tokens", "8",
                                       "--greedy", "--kv", kv, "--attention", attention, "--ids"});
            CHECK(r.code == 0);
            CHECK(ids_of(r.out).size() == kv1_test::shipped_tokenizer().encode("In the year").size() + 8);
        }
}

TEST_CASE("--show-cache tells the size beside fp16", "[generate]") {
    const auto r = run_kv1_lm(
        {"generate", "--prompt", "In the year", "--max-new-tokens", "10", "--greedy", "--show-cache"});
    CHECK(r.code == 0);
    // 3 prompt tokens and the new ones but the last
    CHECK_THAT(r.err, ContainsSubstring("12 tokens x 8 layers in 4.50 KiB (fp16: 24.00 KiB, 5.33x smaller)"));
    CHECK(r.out.find("5.33x") == std::string::npos);
}

TEST_CASE("--interactive answers each line, a bad one too, until the input ends", "[generate]") {
    std::string long_line;
    for (int i = 0; i < 1100; ++i)
        long_line += " word";
    const auto r = run_kv1_lm({"generate", "--interactive", "--max-new-tokens", "5", "--greedy"},
                              "The city\n\n" + long_line + "\nThe river\n");
    CHECK(r.code == 0);
    CHECK_THAT(r.out, StartsWith("The city"));
    CHECK_THAT(r.out, ContainsSubstring("\nThe river"));
    CHECK_THAT(r.err, ContainsSubstring("1100 tokens"));
}

TEST_CASE("prompts that can not be run end with exit code 2 and one line", "[generate]") {
    std::string long_prompt;
    for (int i = 0; i < 1100; ++i)
        long_prompt += " word";
    const auto refused = [](std::vector<std::string> arguments, const char* what) {
        arguments.insert(arguments.begin(), "generate");
        const auto r = run_kv1_lm(arguments);
        INFO(r.err);
        CHECK(r.code == 2);
        CHECK(r.one_error_line());
        CHECK_THAT(r.err, ContainsSubstring(what));
        CHECK(r.out.empty());
    };
    refused({"--prompt", ""}, "the prompt is empty");
    refused({"--prompt", long_prompt}, "1100 tokens, --max-input-tokens allows 1024");
    refused({"--prompt", long_prompt, "--max-input-tokens", "2000"}, "longer than the model's 1024");
    refused({"--prompt", "The city", "--max-new-tokens", "1023"}, "longer than the model's 1024");
    refused({"--prompt", "The city", "--max-input-tokens", "1"}, "--max-input-tokens allows 1");
    refused({"--prompt", "bad \xff byte"}, "byte 4");
    refused({}, "--prompt");
    refused({"--prompt", "a", "--interactive"}, "--interactive");
    refused({"--prompt", "a", "--kv", "5"}, "--kv: '5'");
    refused({"--prompt", "a", "--kv", "2,"}, "--kv: '2,'");
    refused({"--prompt", "a", "--kv", "2,4,8"}, "--kv: '2,4,8'");
    refused({"--prompt", "a", "--kv", "2+g48"},
            "a group is a multiple of 32 channels that divides the head dim");
    refused({"--prompt", "a", "--kv", "2+g"}, "--kv: '2+g'");
    refused({"--prompt", "a", "--attention", "quick"}, "--attention");
    refused({"--prompt", "a", "--temperature", "0"}, "--temperature");
    refused({"--prompt", "a", "--temperature", "nan"}, "--temperature");
    refused({"--prompt", "a", "--temperature", "-1"}, "--temperature");
    refused({"--prompt", "a", "--temperature", "1", "--greedy"}, "--greedy");
    refused({"--prompt", "a", "--top-p", "0"}, "--top-p");
    refused({"--prompt", "a", "--top-p", "1.5"}, "--top-p");
    refused({"--prompt", "a", "--repeat-penalty", "0"}, "--repeat-penalty");
    refused({"--prompt", "a", "--threads", "0"}, "--threads");
    refused({"--prompt", "a", "--max-new-tokens", "-1"}, "--max-new-tokens");
    refused({"--prompt", "a", "--seed", "x"}, "--seed");
    refused({"--prompt", "a", "--model", "no/such/folder"}, "no/such/folder");
}

TEST_CASE("commands and options that do not exist are named, --help is no error", "[generate]") {
    for (const std::vector<std::string>& arguments :
         {std::vector<std::string>{}, {"guess"}, {"info", "--fast"}}) {
        const auto r = run_kv1_lm(arguments);
        CHECK(r.code == 2);
        CHECK(r.one_error_line());
    }
    const auto help = run_kv1_lm({"--help"});
    CHECK(help.code == 0);
    CHECK_THAT(help.out,
               ContainsSubstring("generate") && ContainsSubstring("kld") && ContainsSubstring("info"));
}

TEST_CASE("info counts parameters and the bytes of every width", "[generate]") {
    const auto r = run_kv1_lm({"info"});
    CHECK(r.code == 0);
    CHECK_THAT(r.out, ContainsSubstring("8130816"));
    // 8 layers, 2 KV heads, K and V, 12 bytes a vector: 384 bytes a token
    CHECK_THAT(r.out, ContainsSubstring("\n2             384    5.33x  384.00 KiB    1.50 MiB"));
    CHECK_THAT(r.out, ContainsSubstring("\n16           2048    1.00x"));
}
