// SPDX-License-Identifier: Apache-2.0
//
// Bits of layers under a budget: beside every combination there is, for few layers.
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/layer_choice.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using kv1::errc;
using kv1::layer_option;
using kv1_test::generator;

namespace {

constexpr const char* texts[] = {"c2+ls", "c3+ls,c2+ls", "c3+ls", "c4+ls"};

kv1::cache_description shape(std::size_t layers) { return kv1::uniform_cache(layers, {2, 32, 32}, 64); }

// Costs as they are measured, falling with bytes.
std::vector<layer_option> falling(generator& g, std::size_t layers) {
    std::vector<layer_option> options;
    for (std::size_t l = 0; l < layers; ++l) {
        double cost = 1.0 + 9.0 * g.uniform();
        for (const char* text : texts) {
            options.push_back({l, kv1::parse_policy(text).common, cost});
            cost *= 0.2 + 0.6 * g.uniform();
        }
    }
    return options;
}

struct choice_cost {
    double bytes = 0.0, cost = 0.0;
};

choice_cost cost_of(const kv1::cache_policy& p, const kv1::cache_description& d,
                    const std::vector<layer_option>& options) {
    choice_cost c;
    for (std::size_t l = 0; l < d.layers.size(); ++l) {
        const auto own = std::find_if(options.begin(), options.end(), [&](const layer_option& o) {
            return o.layer == l && o.policy == p.of(l);
        });
        REQUIRE(own != options.end());
        c.bytes += kv1::bytes_per_token(d.layers[l], own->policy);
        c.cost += own->cost;
    }
    return c;
}

} // namespace

TEST_CASE("layers are chosen within the budget, and next to the best choice there is", "[layer_choice]") {
    generator g(1);
    for (int trial = 0; trial < 50; ++trial) {
        constexpr std::size_t layers = 5, ways = 4;
        const std::vector<layer_option> options = falling(g, layers);
        const kv1::cache_description d = shape(layers);
        const double budget = 4.0 * (10.0 + 8.0 * g.uniform()) * layers;
        const choice_cost found = cost_of(kv1::choose_layers(d, options, budget), d, options);
        CHECK(found.bytes <= budget);
        double least = std::numeric_limits<double>::infinity(), largest_step = 0.0;
        for (std::size_t i = 0; i < options.size(); ++i)
            for (std::size_t j = i / ways * ways; j < i; ++j)
                largest_step = std::max(largest_step, options[j].cost - options[i].cost);
        for (std::size_t n = 0; n < 1024; ++n) { // 4^5 combinations
            choice_cost c;
            for (std::size_t l = 0; l < layers; ++l) {
                const layer_option& o = options[l * ways + (n >> 2 * l & 3)];
                c.bytes += kv1::bytes_per_token(d.layers[l], o.policy);
                c.cost += o.cost;
            }
            if (c.bytes <= budget)
                least = std::min(least, c.cost);
        }
        CHECK(found.cost >= least - 1e-12);
        CHECK(found.cost <= least + largest_step);
    }
}

TEST_CASE("a larger budget buys the steps that are worth most", "[layer_choice]") {
    const kv1::layer_policy two = kv1::parse_policy("c2+ls").common, four = kv1::parse_policy("c4+ls").common;
    const kv1::cache_description d = shape(3);
    const std::vector<layer_option> options{{0, two, 1.0},  {1, two, 5.0},  {2, two, 3.0},
                                            {0, four, 0.1}, {1, four, 0.2}, {2, four, 0.1}};
    const double narrow = kv1::bytes_per_token(d.layers[0], two),
                 wide = kv1::bytes_per_token(d.layers[0], four);
    CHECK(narrow == 4 * 10.0);
    CHECK(wide == 4 * 18.0);
    const auto chosen = [&](double budget) { return to_string(kv1::choose_layers(d, options, budget)); };
    CHECK(chosen(3 * narrow) == "c2+ls,c2+ls");
    CHECK(chosen(2 * narrow + wide) == "c2+ls,c2+ls/1:c4+ls,c4+ls");
    CHECK(chosen(narrow + 2 * wide) == "c4+ls,c4+ls/0:c2+ls,c2+ls");
    CHECK(chosen(1e9) == "c4+ls,c4+ls");
}

TEST_CASE("wider options that cost more are not taken, and free ones are", "[layer_choice]") {
    const kv1::layer_policy two = kv1::parse_policy("c2+ls").common,
                            fitted = kv1::parse_policy("c2+ls+had").common,
                            four = kv1::parse_policy("c4+ls").common;
    const kv1::cache_description d = shape(1);
    const std::vector<layer_option> options{{0, two, 2.0}, {0, fitted, 1.0}, {0, four, 1.5}};
    CHECK(kv1::choose_layers(d, options, 1e9).common == fitted);
    CHECK(kv1::choose_layers(d, options, 40.0).common == fitted);
}

TEST_CASE("what no choice can be made of is refused", "[layer_choice]") {
    const kv1::layer_policy two = kv1::parse_policy("c2+ls").common;
    const auto refused = [&](const std::vector<layer_option>& options, double budget) {
        return try_choose_layers(shape(2), options, budget).reason();
    };
    CHECK(refused({{0, two, 1.0}}, 1e9).code() == errc::invalid_argument);
    CHECK(refused({{0, two, 1.0}}, 1e9).where().layer == 1);
    CHECK(refused({{0, two, 1.0}, {1, two, 1.0}}, 79.0).code() == errc::invalid_argument);
    CHECK(refused({{0, two, 1.0}, {1, two, 1.0}}, 80.0).code() == errc::ok);
    CHECK(refused({{0, two, 1.0}, {2, two, 1.0}}, 1e9).code() == errc::out_of_range);
    CHECK(refused({{0, two, 1.0}, {1, two, std::nan("")}}, 1e9).code() == errc::non_finite);
    kv1::cache_description hollow = shape(2);
    hollow.layers[1].kv_heads = 0;
    const kv1::status none =
        try_choose_layers(hollow, std::vector<layer_option>{{0, two, 1.0}, {1, two, 1.0}}, 1e9).reason();
    CHECK(none.code() == errc::invalid_argument);
    CHECK(none.where().layer == 1);
    CHECK(refused({{0, two, 1.0}, {1, two, 1.0}}, std::numeric_limits<double>::infinity()).code() ==
          errc::non_finite);
}
