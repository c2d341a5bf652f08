// SPDX-License-Identifier: Apache-2.0
#include "sampler.hpp"

#include <catch2/catch_test_macros.hpp>

#include <array>
#include <cmath>
#include <set>
#include <vector>

using kv1_lm::sampler;

namespace {

std::int32_t once(const kv1_lm::sampling& how, std::vector<float> logits) {
    return sampler(how).choose(logits);
}

} // namespace

TEST_CASE("greedy takes the largest logit, the first of equals", "[sampler]") {
    CHECK(once({.greedy = true}, {1.0f, 3.0f, 2.0f, 3.0f}) == 1);
}

TEST_CASE("the penalty divides positive and multiplies negative logits of tokens seen, once", "[sampler]") {
    sampler s({.greedy = true, .repeat_penalty = 2.0f});
    s.note(std::array<std::int32_t, 3>{0, 2, 0});
    std::vector<float> logits{4.0f, 1.5f, -1.0f, -3.0f};
    CHECK(s.choose(logits) == 0);
    CHECK(logits == std::vector<float>{2.0f, 1.5f, -2.0f, -3.0f});

    std::vector<float> next{2.5f, 1.5f, 0.0f, 0.0f};
    CHECK(s.choose(next) == 1); // 2.5 / 2 is less
    std::vector<float> after{0.0f, 3.0f, 0.0f, 1.6f};
    CHECK(s.choose(after) == 3); // the token just chosen counts as seen
}

TEST_CASE("top-p keeps the token that passes the mass and drops what follows", "[sampler]") {
    // probabilities 0.5, 0.3, 0.15, 0.05, not in order
    const std::vector<float> logits{std::log(0.15f), std::log(0.5f), std::log(0.05f), std::log(0.3f)};
    const auto drawn = [&](float top_p) {
        std::set<std::int32_t> seen;
        sampler s({.temperature = 1.0f, .top_p = top_p, .seed = 3});
        for (int i = 0; i < 2000; ++i) {
            std::vector<float> copy = logits;
            seen.insert(s.choose(copy));
        }
        return seen;
    };
    CHECK(drawn(0.01f) == std::set<std::int32_t>{1}); // the first is always kept
    CHECK(drawn(0.4f) == std::set<std::int32_t>{1});
    CHECK(drawn(0.6f) == std::set<std::int32_t>{1, 3});
    CHECK(drawn(0.9f) == std::set<std::int32_t>{0, 1, 3});
    CHECK(drawn(1.0f) == std::set<std::int32_t>{0, 1, 2, 3});
}

TEST_CASE("draws follow softmax(logits / temperature)", "[sampler]") {
    const std::vector<float> logits{0.0f, 1.0f, 2.0f};
    constexpr int draws = 40000;
    for (const float temperature : {0.5f, 1.0f, 2.0f}) {
        std::array<int, 3> count{};
        sampler s({.temperature = temperature, .top_p = 1.0f, .seed = 11});
        for (int i = 0; i < draws; ++i) {
            std::vector<float> copy = logits;
            ++count[static_cast<std::size_t>(s.choose(copy))];
        }
        double total = 0.0;
        for (const float l : logits)
            total += std::exp(static_cast<double>(l / temperature));
        for (std::size_t i = 0; i < 3; ++i) {
            const double p = std::exp(static_cast<double>(logits[i] / temperature)) / total;
            const double deviation = std::sqrt(p * (1.0 - p) * draws);
            CHECK(std::fabs(count[i] - p * draws) <
                  5.0 * deviation); // a fixed seed: passes or fails for good
        }
    }
}

TEST_CASE("a seed gives the same tokens again, another seed others", "[sampler]") {
    const auto run = [](std::uint64_t seed) {
        std::vector<std::int32_t> tokens;
        sampler s({.temperature = 1.0f, .top_p = 1.0f, .seed = seed});
        for (int i = 0; i < 50; ++i) {
            std::vector<float> flat(1000, 0.0f);
            tokens.push_back(s.choose(flat));
        }
        return tokens;
    };
    CHECK(run(1) == run(1));
    CHECK(run(1) != run(2));
}
