// SPDX-License-Identifier: Apache-2.0
//
// Where a cache gets its memory, and what happens where there is none.
#include "compare.hpp"
#include "failing_new.hpp"
#include "recording_allocator.hpp"
#include "small_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/kv1.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

using kv1::errc;
using kv1::kv2_cache;
using kv1::kv_cache;
using kv1::sequence_id;
using kv1_test::allocation_log;
using kv1_test::batch;
using kv1_test::everything;
using kv1_test::open_cache;
using kv1_test::small_cache;

TEST_CASE("arenas come from the given allocator, one a layer, and go back to it", "[cache]") {
    allocation_log log;
    {
        open_cache cache(small_cache(), kv1_test::recording_allocator<std::byte>(log));
        REQUIRE(log.living.size() == 2);
        REQUIRE(kv1_test::arena_bytes(log).size() == cache.statistics().bytes_reserved);
        for (const std::span<std::byte> arena : log.living)
            REQUIRE(reinterpret_cast<std::uintptr_t>(arena.data()) % 64 == 0);
        open_cache moved = std::move(cache);
        REQUIRE(log.living.size() == 2);
    }
    REQUIRE(log.living.empty());
    REQUIRE(log.made == log.freed);
}

TEST_CASE("an allocator that fails at any layer gives out_of_memory and no leak", "[cache]") {
    for (std::size_t allowed = 0; allowed < 2; ++allowed) {
        allocation_log log;
        log.allowed = allowed;
        const auto cache = open_cache::create(small_cache(), kv1_test::recording_allocator<std::byte>(log));
        REQUIRE(cache.code() == errc::out_of_memory);
        REQUIRE(cache.reason().where().layer == static_cast<std::int64_t>(allowed));
        REQUIRE(log.living.empty());
        REQUIRE(log.made == log.freed);
        REQUIRE_THROWS_AS(open_cache(small_cache(), kv1_test::recording_allocator<std::byte>(log)),
                          kv1::error);
    }
}

TEST_CASE("operator new that fails at any point of making a cache gives out_of_memory", "[cache]") {
    const kv1::cache_description d = small_cache();
    std::size_t failures = 0;
    for (std::size_t allowed = 0;; ++allowed) {
        REQUIRE(allowed < 100);
        errc code{};
        bool failed = false;
        {
            const kv1_test::failing_new failing(allowed);
            const auto cache = kv_cache::create(d);
            code = cache.code();
            failed = failing.failed();
        }
        REQUIRE(code == (failed ? errc::out_of_memory : errc::ok));
        if (!failed)
            break;
        ++failures;
    }
    REQUIRE(failures >= 4); // description, page list, layers, an arena a layer
}

TEST_CASE("operator new that fails in a call leaves the cache as it was", "[cache]") {
    kv_cache cache(small_cache(256));
    const batch b(20, 1), more(90, 2);
    std::vector<sequence_id> living;
    const auto failing_call = [&](auto&& call) { // the call, failing at its first, second, ... allocation
        for (std::size_t allowed = 0;; ++allowed) {
            REQUIRE(allowed < 100);
            errc code{};
            bool failed = false;
            {
                const kv1_test::failing_new failing(allowed);
                code = call();
                failed = failing.failed();
            }
            if (!failed) {
                REQUIRE(code == errc::ok);
                return allowed;
            }
            REQUIRE(code == errc::out_of_memory);
            REQUIRE(cache.statistics().sequences == living.size());
        }
    };
    for (int i = 0; i < 5; ++i) {
        sequence_id made;
        REQUIRE(failing_call([&] {
                    const auto id = cache.try_create_sequence();
                    if (id)
                        made = *id;
                    return id.code();
                }) >= 1);
        living.push_back(made);
        cache.append(made, 0, b.keys(), b.values());
    }
    const std::size_t free_pages = cache.available_pages();
    const std::vector<float> kept = everything(cache, living[2]);
    REQUIRE(failing_call([&] {
                if (cache.length(living[2], 0) != 20 || cache.available_pages() != free_pages)
                    return errc::invalid_argument; // a failed call left a trace
                return cache.try_append(living[2], 0, more.keys(), more.values()).code();
            }) >= 1);
    REQUIRE(cache.length(living[2], 0) == 110);
    // reading, attending over few tokens and destroying allocate nothing at all
    const kv1_test::failing_new failing(0);
    std::array<float, 2 * 20> q{};
    std::array<float, 2 * 24> out{};
    const errc attended = cache.try_attend(living[2], 0, {q.data(), 1, 2, 20}, {out.data(), 1, 2, 24}).code();
    std::size_t destroyed = 0;
    for (const sequence_id id : living)
        destroyed += cache.try_destroy_sequence(id) ? 1u : 0u;
    const bool failed = failing.failed();
    REQUIRE(attended == errc::ok);
    REQUIRE(destroyed == living.size());
    REQUIRE_FALSE(failed);
}

TEST_CASE("attention over a long sequence reports missing memory for its partial results", "[cache]") {
    kv2_cache cache(kv1::uniform_cache(1, {1, 8, 8}, 8192));
    const sequence_id id = cache.create_sequence();
    const std::vector<float> x(6000 * 8, 1.0f);
    cache.append(id, 0, {x.data(), 6000, 1, 8}, {x.data(), 6000, 1, 8});
    std::array<float, 8> q{}, out{};
    errc code{};
    {
        const kv1_test::failing_new failing(0);
        code = cache.try_attend(id, 0, {q.data(), 1, 1, 8}, {out.data(), 1, 1, 8}).code();
    }
    REQUIRE(code == errc::out_of_memory);
    REQUIRE(cache.try_attend(id, 0, {q.data(), 1, 1, 8}, {out.data(), 1, 1, 8}));
    REQUIRE(std::fabs(out[0] - 1.0f) <= kv1_test::gamma(6010)); // a mean of ones
}
