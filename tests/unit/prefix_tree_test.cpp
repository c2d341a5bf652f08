// SPDX-License-Identifier: Apache-2.0
//
// prefix_tree by itself: two pools, blocks of four tokens.
#include "failing_new.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/prefix_tree.hpp>

#include <array>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

using kv1::prefix_event;
using kv1::prefix_event_kind;
using kv1::prefix_salt;
using kv1::token_id;
using kv1::detail::page_pool;
using kv1::detail::prefix_tree;

namespace {

using tokens = std::vector<token_id>;

// Every prompt collides with every other one.
std::uint64_t one_hash(std::uint64_t, std::span<const token_id>) noexcept { return 42; }

struct world {
    page_pool first, second;
    prefix_tree index;
    explicit world(std::uint32_t capacity = 64, std::size_t events = 0,
                   kv1::detail::token_hash hash = kv1::hash_tokens)
        : first(capacity), second(capacity), index(hash) {
        const std::array<page_pool*, 2> pools{&first, &second};
        REQUIRE(index.initialize(4, pools, events));
    }

    // A prompt's pages as a sequence would hold them: allocated, stored, and let go of by the sequence.
    std::vector<std::uint32_t> store(const tokens& t, prefix_salt salt = {}, bool partial = false,
                                     bool keep = false) {
        std::vector<std::uint32_t> a((t.size() + 3) / 4), b(a.size());
        REQUIRE(first.allocate(a));
        REQUIRE(second.allocate(b));
        const auto known = index.insert(salt, t, partial, [&](std::size_t page, std::size_t group) {
            return group == 0 ? a[page] : b[page];
        });
        REQUIRE(known);
        REQUIRE(*known == (partial ? t.size() : t.size() / 4 * 4));
        if (!keep)
            for (std::size_t i = 0; i < a.size(); ++i) {
                first.release(a[i]);
                second.release(b[i]);
            }
        REQUIRE(index.valid());
        return a;
    }
    struct found {
        std::size_t tokens = 0;
        std::vector<std::uint32_t> blocks; // of the first pool
    };
    found match(const tokens& t, prefix_salt salt = {}) {
        found f;
        std::vector<std::uint32_t> second_blocks;
        f.tokens = index.match(salt, t, [&](std::size_t page, std::span<const std::uint32_t> blocks) {
            REQUIRE(page == f.blocks.size());
            f.blocks.push_back(blocks[0]);
            second_blocks.push_back(blocks[1]);
        });
        for (const std::uint32_t block : f.blocks) {
            REQUIRE(first.references(block) >= 2); // the caller's and the index's
            first.release(block);
        }
        for (const std::uint32_t block : second_blocks)
            second.release(block);
        return f;
    }
};

} // namespace

TEST_CASE("whole blocks of a prompt are found again, with references for the finder", "[prefix]") {
    world w;
    const auto blocks = w.store({1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
    REQUIRE(w.index.pages() == 2);
    REQUIRE(w.first.in_use() == 2);
    const auto all = w.match({1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
    REQUIRE(all.tokens == 8);
    REQUIRE(all.blocks == std::vector<std::uint32_t>{blocks[0], blocks[1]});
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 7, 8}).tokens == 8);
    REQUIRE(w.match({2, 2, 3, 4}).tokens == 0);
    REQUIRE(w.match({}).tokens == 0);
}

TEST_CASE("part of a block is reused where a prompt leaves it or ends in it", "[prefix]") {
    world w;
    const auto blocks = w.store({1, 2, 3, 4, 5, 6, 7, 8});
    const auto left = w.match({1, 2, 3, 4, 5, 6, 0, 0, 0, 0});
    REQUIRE(left.tokens == 6);
    REQUIRE(left.blocks == std::vector<std::uint32_t>{blocks[0], blocks[1]});
    REQUIRE(w.match({1, 2, 3, 4, 5}).tokens == 5);
    REQUIRE(w.match({1, 2}).tokens == 2);
    // of several continuations the one that agrees longest
    const auto other = w.store({1, 2, 3, 4, 5, 6, 0, 1});
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 0, 0}).tokens == 7);
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 0, 0}).blocks[1] == other[1]);
}

TEST_CASE("an open last block is kept where that is asked for", "[prefix]") {
    world w;
    w.store({1, 2, 3, 4, 5, 6});
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 7, 8}).tokens == 4);
    w.store({1, 2, 3, 4, 5, 6}, {}, true);
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 7, 8}).tokens == 6);
    REQUIRE(w.match({1, 2, 3, 4, 5, 9}).tokens == 5);
    w.store({1, 2, 3, 4, 5, 6, 7, 8});
    REQUIRE(w.match({1, 2, 3, 4, 5, 6, 7, 8}).tokens == 8);
    REQUIRE(w.store({}, {}, true).empty());
}

TEST_CASE("what is stored twice is kept once", "[prefix]") {
    world w;
    const auto one = w.store({1, 2, 3, 4});
    w.store({1, 2, 3, 4});
    REQUIRE(w.index.pages() == 1);
    REQUIRE(w.first.in_use() == 1);
    REQUIRE(w.match({1, 2, 3, 4}).blocks == one);
}

TEST_CASE("salts keep equal prompts apart", "[prefix]") {
    world w;
    const prefix_salt a{1, 2}, b{1, 3}, c{2, 2};
    const auto first = w.store({1, 2, 3, 4}, a);
    REQUIRE(w.match({1, 2, 3, 4}, b).tokens == 0);
    REQUIRE(w.match({1, 2, 3, 4}, c).tokens == 0);
    REQUIRE(w.match({1, 2, 3, 4}).tokens == 0);
    const auto second = w.store({1, 2, 3, 4}, b);
    REQUIRE(w.match({1, 2, 3, 4}, a).blocks == first);
    REQUIRE(w.match({1, 2, 3, 4}, b).blocks == second);
}

TEST_CASE("prompts whose hashes all collide are still told apart", "[prefix]") {
    world w(512, 0, one_hash);
    std::map<tokens, std::vector<std::uint32_t>> stored;
    kv1_test::generator g(3);
    for (int i = 0; i < 40; ++i) {
        tokens t(4 * g.between(1, 3));
        for (token_id& x : t)
            x = static_cast<token_id>(g.below(2));
        stored[t];
    }
    for (auto& [t, blocks] : stored)
        blocks = w.store(t);
    for (const auto& [t, blocks] : stored) {
        const auto f = w.match(t);
        REQUIRE(f.tokens == t.size());
        // every block is the first one that was stored under these very tokens
        for (std::size_t i = 0; i < f.blocks.size(); ++i) {
            const tokens beginning(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(4 * (i + 1)));
            bool among = false;
            for (const auto& [other, pages] : stored)
                among |= other.size() >= beginning.size() &&
                         std::equal(beginning.begin(), beginning.end(), other.begin()) &&
                         pages[i] == f.blocks[i];
            REQUIRE(among);
        }
    }
    const std::size_t pages = w.index.pages();
    REQUIRE(w.index.evict(1000) == pages);
    REQUIRE(w.first.in_use() == 0);
}

TEST_CASE("the least recently used leaf is evicted first", "[prefix]") {
    world w;
    w.store({1, 1, 1, 1, 2, 2, 2, 2});
    w.store({3, 3, 3, 3});
    w.store({4, 4, 4, 4});
    w.match({1, 1, 1, 1, 2, 2, 2, 2});
    w.match({3, 3, 3, 3});
    REQUIRE(w.index.evict(1) == 1);
    REQUIRE(w.match({4, 4, 4, 4}).tokens == 0);
    REQUIRE(w.index.evict(1) == 1); // the leaf, before what it extends
    REQUIRE(w.match({1, 1, 1, 1, 2, 2, 2, 2}).tokens == 4);
    REQUIRE(w.index.evict(1) == 1);
    REQUIRE(w.match({3, 3, 3, 3}).tokens == 0);
    REQUIRE(w.index.evict(9) == 1);
    REQUIRE(w.index.evict(9) == 0);
    REQUIRE(w.index.valid());
    REQUIRE(w.first.in_use() == 0);
    REQUIRE(w.second.in_use() == 0);
}

TEST_CASE("a whole chain can be evicted in one call", "[prefix]") {
    world w;
    w.store({1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3});
    REQUIRE(w.index.evict(3) == 3);
    REQUIRE(w.index.pages() == 0);
    REQUIRE(w.index.valid());
}

TEST_CASE("pages that a sequence shares are not evicted, since nothing would be free then", "[prefix]") {
    world w;
    const auto blocks = w.store({1, 2, 3, 4, 5, 6, 7, 8}, {}, false, true); // the sequence lives on
    REQUIRE(w.index.evict(2) == 0);
    w.first.release(blocks[1]);
    REQUIRE(w.index.evict(2) == 1);
    w.index.clear(); // in spite of sharing
    REQUIRE(w.index.pages() == 0);
    REQUIRE(w.first.in_use() == 1);
}

TEST_CASE("a pinned prefix stays until it is given back", "[prefix]") {
    world w;
    w.store({1, 1, 1, 1, 2, 2, 2, 2});
    w.store({3, 3, 3, 3});
    const auto pin = w.index.pin({}, tokens{1, 1, 1, 1, 2, 2, 2, 2, 9});
    REQUIRE(pin);
    REQUIRE(pin->tokens == 8);
    REQUIRE(w.index.evict(9) == 1);
    w.index.clear();
    REQUIRE(w.match({1, 1, 1, 1, 2, 2, 2, 2}).tokens == 8);
    REQUIRE(w.index.unpin(*pin));
    REQUIRE(w.index.unpin(*pin).code() == kv1::errc::out_of_range);
    REQUIRE(w.index.evict(9) == 2);
    REQUIRE(w.index.pin({}, tokens{1, 1, 1, 1}).code() == kv1::errc::out_of_range);
    // the node is used again: the old pin does not fit it
    w.store({5, 5, 5, 5});
    const auto again = w.index.pin({}, tokens{5, 5, 5, 5});
    REQUIRE(again);
    REQUIRE(w.index.unpin(*pin).code() == kv1::errc::out_of_range);
    REQUIRE(w.index.unpin(*again));
}

TEST_CASE("events tell routers what is stored and evicted, by the hashes of chains", "[prefix]") {
    world w(64, 4);
    w.store({1, 1, 1, 1, 2, 2, 2, 2}, {0, 7});
    w.index.evict(1);
    std::array<prefix_event, 8> events{};
    REQUIRE(w.index.take_events(events) == 3);
    REQUIRE(events[0].kind == prefix_event_kind::stored);
    REQUIRE(events[1].kind == prefix_event_kind::stored);
    REQUIRE(events[1].previous == events[0].hash);
    REQUIRE(events[1].tokens == 4);
    REQUIRE(events[0].hash == kv1::hash_tokens(events[0].previous, tokens{1, 1, 1, 1}));
    REQUIRE(events[2].kind == prefix_event_kind::evicted);
    REQUIRE(events[2].hash == events[1].hash);
    REQUIRE(w.index.take_events(events) == 0);
    for (token_id t = 10; t < 16; ++t)
        w.store({t, t, t, t});
    REQUIRE(w.index.lost_events() == 2);
    REQUIRE(w.index.take_events(std::span(events).first(1)) == 1);
    REQUIRE(w.index.take_events(events) == 3);
}

TEST_CASE("an index without memory says so and stays as it was", "[prefix]") {
    tokens t(400);
    std::iota(t.begin(), t.end(), 0);
    std::vector<std::uint32_t> blocks(100);
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        world fresh(128);
        REQUIRE(fresh.second.allocate(blocks));
        REQUIRE(fresh.first.allocate(blocks)); // the same numbers in both
        kv1::errc code{};
        {
            const kv1_test::failing_new failing(allowed);
            code =
                fresh.index.insert({}, t, false, [&](std::size_t page, std::size_t) { return blocks[page]; })
                    .code();
            if (!failing.failed())
                break;
        }
        REQUIRE(code == kv1::errc::out_of_memory);
        REQUIRE(fresh.index.pages() == 0);
        REQUIRE(fresh.index.valid());
        REQUIRE(fresh.first.references(blocks[0]) == 1);
        ++failures;
    }
    REQUIRE(failures >= 4);
}

TEST_CASE("the index equals a list of prompts under random changes", "[prefix]") {
    for (std::uint64_t seed = 0; seed < 60; ++seed) {
        kv1_test::generator g(seed);
        world w(400, 0, seed % 2 == 0 ? kv1::hash_tokens : one_hash);
        std::set<tokens> known; // beginnings in whole blocks
        for (int step = 0; step < 60; ++step) {
            tokens t(g.below(16));
            for (token_id& x : t)
                x = static_cast<token_id>(g.below(2));
            if (g.chance(0.6) && w.first.available() >= 4) {
                w.store(t);
                for (std::size_t n = 4; n <= t.size(); n += 4)
                    known.insert(tokens(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(n)));
            } else if (g.chance(0.2)) {
                w.index.evict(1000);
                known.clear();
            }
            std::size_t longest = 0; // the longest common beginning with anything known
            for (const tokens& k : known) {
                const auto at = std::mismatch(k.begin(), k.end(), t.begin(), t.end());
                longest = std::max(longest, static_cast<std::size_t>(at.first - k.begin()));
            }
            REQUIRE(w.match(t).tokens == longest);
            REQUIRE(w.index.pages() == known.size());
            REQUIRE(w.index.valid());
            REQUIRE(w.first.valid());
        }
    }
}

TEST_CASE("an index and one that took in its snapshot know the same, in the same order of use", "[prefix]") {
    for (std::uint64_t seed = 0; seed < 40; ++seed) {
        kv1_test::generator g(seed);
        world w(800);
        prefix_tree copy(seed % 2 == 0 ? kv1::hash_tokens : one_hash); // hashes are not part of it
        const std::array<page_pool*, 2> pools{&w.first, &w.second};
        REQUIRE(copy.initialize(4, pools));
        std::vector<tokens> prompts(12);
        for (tokens& t : prompts) {
            t.resize(1 + g.below(16));
            for (token_id& x : t)
                x = static_cast<token_id>(g.below(2));
            w.store(t, {0, g.below(2)}, g.chance(0.3));
        }
        for (int i = 0; i < 5; ++i)
            w.match(prompts[g.below(12)], {0, g.below(2)});
        kv1::detail::prefix_snapshot all;
        REQUIRE(w.index.snapshot(all));
        REQUIRE(copy.merge(all));
        REQUIRE(copy.merge(all)); // nothing new
        w.index.release(all);
        REQUIRE(copy.valid());
        REQUIRE(copy.pages() == w.index.pages());
        kv1::detail::prefix_snapshot again;
        REQUIRE(copy.snapshot(again));
        copy.release(again);
        REQUIRE(std::equal(again.tokens.begin(), again.tokens.end(), all.tokens.begin(), all.tokens.end()));
        REQUIRE(std::equal(again.blocks.begin(), again.blocks.end(), all.blocks.begin(), all.blocks.end()));
        for (const tokens& t : prompts)
            for (const prefix_salt salt : {prefix_salt{0, 0}, prefix_salt{0, 1}}) {
                std::vector<std::uint32_t> blocks;
                const std::size_t known =
                    copy.match(salt, t, [&](std::size_t, std::span<const std::uint32_t> b) {
                        blocks.push_back(b[0]);
                        w.first.release(b[0]);
                        w.second.release(b[1]);
                    });
                const auto original = w.match(t, salt);
                REQUIRE(known == original.tokens);
                REQUIRE(blocks.size() == original.blocks.size());
            }
        w.index.clear();
        REQUIRE(w.first.in_use() != 0);
        copy.clear();
        REQUIRE(w.first.in_use() == 0);
        REQUIRE(w.second.in_use() == 0);
    }
}
