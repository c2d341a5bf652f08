// SPDX-License-Identifier: Apache-2.0
//
// page_pool by itself: references, order, growth, threads.
#include "failing_new.hpp"
#include "random.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/detail/page_pool.hpp>

#include <array>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

using kv1::errc;
using kv1::detail::page_pool;

TEST_CASE("the page pool hands out each block once, last freed first", "[pool]") {
    page_pool pool(3);
    REQUIRE(pool.capacity() == 3);
    REQUIRE(pool.allocate() == 0u);
    REQUIRE(pool.allocate() == 1u);
    REQUIRE(pool.allocate() == 2u);
    REQUIRE_FALSE(pool.allocate().has_value());
    REQUIRE(pool.available() == 0);
    pool.release(0);
    pool.release(2);
    REQUIRE(pool.in_use() == 1);
    REQUIRE(pool.allocate() == 2u);
    REQUIRE(pool.allocate() == 0u);
    REQUIRE_FALSE(pool.allocate().has_value());
}

TEST_CASE("a block is free when its last reference is released", "[pool]") {
    page_pool pool(2);
    const std::uint32_t a = *pool.allocate();
    REQUIRE(pool.references(a) == 1);
    pool.retain(a);
    pool.retain(a);
    REQUIRE(pool.references(a) == 3);
    REQUIRE(pool.shared() == 2);
    REQUIRE_FALSE(pool.release(a));
    REQUIRE_FALSE(pool.release(a));
    REQUIRE(pool.in_use() == 1);
    REQUIRE(pool.shared() == 0);
    REQUIRE(pool.release(a));
    REQUIRE(pool.references(a) == 0);
    REQUIRE(pool.in_use() == 0);
    REQUIRE(pool.valid());
}

TEST_CASE("several blocks come together or not at all, in ascending order from a fresh pool", "[pool]") {
    page_pool pool(4);
    std::array<std::uint32_t, 3> three{}, more{9, 9, 9};
    REQUIRE(pool.allocate(three));
    REQUIRE(three == std::array<std::uint32_t, 3>{0, 1, 2});
    REQUIRE_FALSE(pool.allocate(more));
    REQUIRE(more == std::array<std::uint32_t, 3>{9, 9, 9});
    REQUIRE(pool.available() == 1);
    REQUIRE(pool.allocate(std::span<std::uint32_t>{}));
    REQUIRE(pool.touched() == 3);
}

TEST_CASE("a pool that grows keeps its blocks and their references", "[pool]") {
    page_pool pool(2);
    const std::uint32_t a = *pool.allocate(), b = *pool.allocate();
    pool.retain(b);
    REQUIRE_FALSE(pool.allocate().has_value());
    REQUIRE(pool.try_grow(1)); // no smaller
    REQUIRE(pool.capacity() == 2);
    REQUIRE(pool.try_grow(5));
    REQUIRE(pool.available() == 3);
    REQUIRE(pool.references(a) == 1);
    REQUIRE(pool.references(b) == 2);
    REQUIRE(*pool.allocate() == 2);
    REQUIRE(pool.valid());
    pool.limit(3);
    REQUIRE(pool.capacity() == 3);
    REQUIRE_FALSE(pool.allocate().has_value());
}

TEST_CASE("a pool moves with its blocks", "[pool]") {
    page_pool a(3);
    const std::uint32_t block = *a.allocate();
    page_pool b = std::move(a);
    REQUIRE(b.references(block) == 1);
    REQUIRE(a.capacity() == 0);
    REQUIRE_FALSE(a.allocate().has_value());
    a = std::move(b);
    REQUIRE(a.release(block));
    REQUIRE(a.valid());
}

TEST_CASE("a pool without memory says so and stays as it was", "[pool]") {
    page_pool pool(3);
    const std::uint32_t block = *pool.allocate();
    for (const std::size_t allowed : {0u, 1u}) {
        errc code{};
        {
            const kv1_test::failing_new failing(allowed);
            code = pool.try_grow(100).code();
        }
        REQUIRE(code == errc::out_of_memory);
        REQUIRE(pool.capacity() == 3);
        REQUIRE(pool.references(block) == 1);
        REQUIRE(pool.valid());
        {
            const kv1_test::failing_new failing(allowed);
            code = page_pool::create(100).code();
        }
        REQUIRE(code == errc::out_of_memory);
    }
    REQUIRE(pool.try_grow(100));
}

TEST_CASE("threads that allocate, share and release lose no block and get none twice", "[pool]") {
    page_pool pool(64);
    std::vector<std::atomic<int>> owners(64);
    std::atomic<bool> twice{false};
    const auto work = [&](std::uint64_t seed) {
        kv1_test::generator g(seed);
        std::vector<std::uint32_t> mine;
        for (int i = 0; i < 4000; ++i) {
            if (g.chance(0.5)) {
                if (const auto block = pool.allocate()) {
                    if (owners[*block].fetch_add(1) != 0)
                        twice = true;
                    mine.push_back(*block);
                    if (g.chance(0.3)) {
                        pool.retain(*block);
                        pool.release(*block);
                    }
                }
            } else if (!mine.empty()) {
                owners[mine.back()].fetch_sub(1);
                pool.release(mine.back());
                mine.pop_back();
            }
        }
        for (const std::uint32_t block : mine) {
            owners[block].fetch_sub(1);
            pool.release(block);
        }
    };
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 4; ++t)
        threads.emplace_back(work, t);
    for (std::thread& t : threads)
        t.join();
    REQUIRE_FALSE(twice);
    REQUIRE(pool.in_use() == 0);
    REQUIRE(pool.valid());
}
