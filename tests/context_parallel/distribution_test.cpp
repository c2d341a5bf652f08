// SPDX-License-Identifier: Apache-2.0
#include "distribution.hpp"
#include "visibility.hpp"

#include "compare.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <vector>

using context_parallel::distribution;

TEST_CASE("every position has one owner and one place, and places keep the order of positions",
          "[distribution]") {
    kv1_test::tally t;
    for (const std::size_t ranks : {1u, 2u, 3u, 5u})
        for (const std::size_t block : {1u, 4u, 16u}) {
            const distribution d = distribution::pages(ranks, block);
            std::vector<std::size_t> places(ranks, 0);
            for (std::size_t p = 0; p < 200; ++p) {
                for (std::size_t r = 0; r < ranks; ++r)
                    t.expect(d.owned_before(r, p) == places[r], "owned before", p, "by", r, "of", ranks);
                const std::size_t owner = d.owner(p);
                t.expect(d.position(owner, places[owner]) == p, "position", p, "of", ranks);
                t.expect(owner < ranks && d.owner(p / block * block) == owner, "a block has one owner", p);
                ++places[owner];
            }
        }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("no window holds more of a rank's positions than is said, and some hold as many",
          "[distribution]") {
    for (const std::size_t ranks : {1u, 2u, 3u})
        for (const std::size_t block : {1u, 4u})
            for (std::size_t window = 1; window < 40; ++window) {
                const distribution d = distribution::pages(ranks, block);
                std::size_t most = 0;
                for (std::size_t first = 0; first < 60; ++first)
                    for (std::size_t r = 0; r < ranks; ++r)
                        most = std::max(most, d.owned_before(r, first + window) - d.owned_before(r, first));
                REQUIRE(d.most_owned(window) == most);
            }
}

TEST_CASE("ranges are contiguous, of whole pages, and cover the context", "[distribution]") {
    for (const std::size_t ranks : {1u, 2u, 3u, 4u})
        for (const std::size_t tokens : {1u, 16u, 17u, 100u, 128u}) {
            const distribution d = distribution::ranges(ranks, tokens, 16);
            REQUIRE(d.block_tokens() % 16 == 0);
            std::size_t total = 0;
            for (std::size_t r = 0; r < ranks; ++r) {
                total += d.owned_before(r, tokens);
                REQUIRE(d.owned_before(r, tokens) <= d.block_tokens());
            }
            REQUIRE(total == tokens);
        }
}

TEST_CASE("a rank's calls show each query the places that it sees, once", "[visibility]") {
    kv1_test::generator g(5);
    kv1_test::tally t;
    for (int round = 0; round < 300; ++round) {
        const std::size_t ranks = g.between(1, 4), block = 4 * g.between(1, 3), length = g.between(1, 90),
                          queries = g.between(1, length), window = g.below(50);
        const distribution d = distribution::pages(ranks, block);
        kv1::attention_options options;
        options.window = window;
        if (g.chance(0.3))
            options.range = {g.below(length), g.between(1, length)};
        const context_parallel::layer_rules rules{g.chance(0.3) ? g.between(1, 60) : 0, g.below(6),
                                                  g.chance(0.5) ? g.below(30) : 0, g.below(length)};
        const context_parallel::query_sight sight(length, queries, options.mask, options, rules);
        for (std::size_t r = 0; r < ranks; ++r) {
            const auto places = [&](std::size_t i) -> context_parallel::token_span {
                const auto seen = sight.quantized(i);
                const context_parallel::token_span own{d.owned_before(r, seen.first),
                                                       d.owned_before(r, seen.last)};
                return own.empty() ? context_parallel::token_span{} : own;
            };
            std::vector<int> called(queries, 0);
            context_parallel::for_each_local_call(
                queries, 16, places, [&](const context_parallel::local_call& c) {
                    const std::size_t first_position = *c.mask.first_position();
                    for (std::size_t i = 0; i < c.count; ++i) { // what attention.hpp says of these options
                        const std::size_t end = std::min(first_position + i + 1, c.range.last);
                        std::size_t begin = c.range.first;
                        if (c.window != 0 && first_position + i + 1 > c.window)
                            begin = std::max(begin, first_position + i + 1 - c.window);
                        const auto want = places(c.first + i);
                        t.expect(begin == want.first && end == want.last, "query", c.first + i, "of",
                                 queries);
                        ++called[c.first + i];
                    }
                    t.expect(c.count <= 16, "calls are no longer than asked for");
                });
            for (std::size_t i = 0; i < queries; ++i)
                t.expect(called[i] == (places(i).empty() ? 0 : 1), "query", i, "is called once");
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("under an explicit mask a rank's calls show each query the places that it sees, once",
          "[visibility]") {
    kv1_test::generator g(6);
    kv1_test::tally t;
    for (int round = 0; round < 200; ++round) {
        const std::size_t length = g.between(1, 90), queries = g.between(1, 130),
                          masked = g.below(length + 1), most = g.chance(0.5) ? length : g.between(1, 40);
        // what each query sees, and the same as ends and a mask
        std::vector<context_parallel::token_span> ends(queries);
        std::vector<std::vector<bool>> seen(queries, std::vector<bool>(length, false));
        const std::size_t common = g.below(length);
        for (std::size_t i = 0; i < queries; ++i) {
            const std::size_t first = g.chance(0.8) ? common : g.below(length), last = g.between(0, length);
            ends[i] =
                first < last ? context_parallel::token_span{first, last} : context_parallel::token_span{};
            for (std::size_t p = ends[i].first; p < ends[i].last; ++p)
                seen[i][p] = p < masked || g.chance(0.5);
        }
        std::vector<std::uint8_t> room;
        std::vector<std::vector<int>> shown(queries, std::vector<int>(length, 0));
        context_parallel::for_each_masked_call(
            queries, length, masked, most, [&](std::size_t i) { return ends[i]; },
            [&](std::size_t i, std::size_t p) { return static_cast<bool>(seen[i][p]); }, room,
            [&](const context_parallel::local_call& c) {
                const std::size_t keys = c.mask.explicit_keys(), from = length - keys;
                t.expect(c.mask.visible().size() == keys * c.count, "a mask of", keys, "keys");
                t.expect(c.range.last - c.range.first <= most, "a range of", c.range.last - c.range.first);
                for (std::size_t i = 0; i < c.count; ++i) // what attention_mask.hpp says of it
                    for (std::size_t p = c.range.first; p < c.range.last; ++p)
                        if (p < from || c.mask.visible()[i * keys + p - from] != 0)
                            ++shown[c.first + i][p];
            });
        for (std::size_t i = 0; i < queries; ++i)
            for (std::size_t p = 0; p < length; ++p)
                t.expect(shown[i][p] == (seen[i][p] ? 1 : 0), "query", i, "and place", p, "of", length,
                         "are met", shown[i][p], "times");
    }
    KV1_REQUIRE_CLEAN(t);
}
