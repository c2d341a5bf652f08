// SPDX-License-Identifier: Apache-2.0
//
// Pieces of work on several threads.
#include "side_by_side.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

TEST_CASE("every piece is done once, on no more threads than asked for, and watched to its end",
          "[side-by-side]") {
    for (const unsigned threads : {1u, 3u, 20u}) {
        std::vector<std::atomic<int>> times(7);
        std::atomic<std::size_t> workers{0};
        std::size_t seen = 0;
        const std::thread::id caller = std::this_thread::get_id();
        kv1_lm::run_side_by_side(
            times.size(), threads,
            [&] {
                ++workers;
                return [&, own = std::make_unique<int>()](std::size_t i) { ++times[i]; };
            },
            [&](std::size_t done) {
                CHECK(std::this_thread::get_id() == caller);
                CHECK(done >= seen);
                seen = done;
            });
        for (const std::atomic<int>& n : times)
            CHECK(n == 1);
        CHECK(workers <= std::min<std::size_t>(threads, times.size()));
        CHECK(seen == times.size());
    }
}

TEST_CASE("nothing to do is done and watched once", "[side-by-side]") {
    int watched = 0;
    kv1_lm::run_side_by_side(
        0, 4, [] { return [](std::size_t) {}; }, [&](std::size_t done) { watched += done == 0 ? 1 : 100; });
    CHECK(watched == 1);
}

TEST_CASE("a failure of a worker, of its making or of the watcher ends the run and comes out",
          "[side-by-side]") {
    const auto nothing = [](std::size_t) {};
    CHECK_THROWS_AS(kv1_lm::run_side_by_side(
                        1000, 2,
                        [&] {
                            return [&](std::size_t i) {
                                if (i == 3)
                                    throw std::out_of_range("3");
                            };
                        },
                        nothing),
                    std::out_of_range);
    CHECK_THROWS_AS(kv1_lm::run_side_by_side(
                        5, 2, []() -> decltype(nothing) { throw std::bad_alloc(); }, nothing),
                    std::bad_alloc);
    CHECK_THROWS_AS(kv1_lm::run_side_by_side(
                        5, 2, [&] { return nothing; }, [](std::size_t) { throw std::runtime_error("full"); }),
                    std::runtime_error);
}
