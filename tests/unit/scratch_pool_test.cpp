// SPDX-License-Identifier: Apache-2.0
//
// Blocks that tasks work in: who has them, that calls use them again, and what happens where there is none.
#include "failing_new.hpp"
#include "random.hpp"
#include "small_cache.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_io.hpp>
#include <kv1/detail/cache_state.hpp>
#include <kv1/detail/scratch_pool.hpp>
#include <kv1/kv_cache.hpp>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <thread>
#include <vector>

using kv1::errc;
using kv1::detail::scratch_pool;
using kv1_test::batch;
using kv1_test::failing_new;
using kv1_test::normal_values;

TEST_CASE("blocks are used again, and nobody else has them meanwhile", "[scratch]") {
    scratch_pool pool;
    REQUIRE(pool.begin());
    std::set<void*> blocks;
    for (int i = 0; i < 200; ++i) { // more than are kept
        void* block = pool.take();
        REQUIRE(block != nullptr);
        REQUIRE(reinterpret_cast<std::uintptr_t>(block) % 64 == 0);
        blocks.insert(block);
    }
    REQUIRE(blocks.size() == 200);
    for (void* block : blocks)
        pool.give(block);
    std::array<void*, 128> again{};
    void* one_more = nullptr;
    {
        const failing_new none(0);
        for (void*& block : again)
            block = pool.take();
        one_more = pool.take();
    }
    REQUIRE(one_more == nullptr);
    for (void* block : again)
        REQUIRE(blocks.erase(block) == 1);
    for (void* block : again)
        pool.give(block);
}

TEST_CASE("threads that take and give at once never share a block", "[scratch]") {
    scratch_pool pool;
    std::atomic<bool> shared{false};
    const auto work = [&] {
        for (std::size_t i = 0; i < 2000; ++i) {
            const kv1::detail::scratch_lease lease(pool);
            auto& owner =
                *reinterpret_cast<std::atomic<const void*>*>(lease.as<kv1::detail::append_scratch>().page);
            owner.store(&lease, std::memory_order_relaxed);
            if (i % 16 == 0)
                std::this_thread::yield();
            if (owner.load(std::memory_order_relaxed) != &lease)
                shared = true;
        }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i)
        threads.emplace_back(work);
    for (std::thread& t : threads)
        t.join();
    REQUIRE_FALSE(shared);
}

TEST_CASE("appending to an open page and attending allocate nothing", "[scratch][cache]") {
    kv1::cache_description d = kv1_test::small_cache();
    d.layers[0].key_encoding.levels = kv1::level_choice::least_squares;
    d.layers.push_back({2, 20, 24, kv1::kv_format::compact3, kv1::kv_format::affine2});
    d.layers.back().key_axis = kv1::quantization_axis::per_channel;
    kv1::kv_cache cache(d);
    const kv1::sequence_id id = cache.create_sequence();
    const batch b(17), one(1), seven(7);
    for (std::size_t layer = 0; layer < d.layers.size(); ++layer)
        for (const batch* some : {&b, &one}) // page tables grow, too
            cache.append(id, layer, some->keys(), some->values());
    kv1_test::generator g(7);
    const std::vector<float> q = normal_values(g, 7 * 4 * 20);
    std::vector<float> out(7 * 4 * 24);
    kv1::status refused;
    bool asked = false;
    {
        const failing_new none(0);
        for (std::size_t layer = 0; layer < d.layers.size(); ++layer)
            for (const batch* some : {&one, &seven})
                for (const kv1::status& s : {cache.try_append(id, layer, some->keys(), some->values()),
                                             cache.try_attend(id, layer, {q.data(), some->tokens, 4, 20},
                                                              {out.data(), some->tokens, 4, 24})})
                    if (!s && refused)
                        refused = s;
        asked = none.failed();
    }
    INFO(refused.message());
    REQUIRE(refused);
    REQUIRE_FALSE(asked);
}

namespace {

// A layer whose appending needs a block, with a block that everybody waits for.
struct starving {
    kv1::kv_cache cache{[] {
        kv1::cache_description d = kv1_test::small_cache();
        d.layers = {{2, 20, 24, kv1::kv_format::compact2, kv1::kv_format::fp16}};
        return d;
    }()};
    kv1::sequence_id id = cache.create_sequence();
    scratch_pool& pool = kv1::detail::cache_access::state(cache).scratches;
};

} // namespace

TEST_CASE("a task without a block fails its call, which leaves the cache as it was", "[scratch][cache]") {
    starving s;
    const batch b(5), more(3, 2);
    s.cache.append(s.id, 0, b.keys(), b.values());
    kv1_test::generator g(8);
    const std::vector<float> q = normal_values(g, 4 * 20);
    std::vector<float> out(4 * 24);
    const std::array<std::size_t, 2> indptr{0, 3};
    void* only = s.pool.take();
    kv1::status one, several, attended;
    {
        const failing_new none(0);
        one = s.cache.try_append(s.id, 0, more.keys(), more.values());
        several = s.cache.try_append(std::span(&s.id, 1), 0, indptr, more.keys(), more.values());
        attended = s.cache.try_attend(s.id, 0, {q.data(), 1, 4, 20}, {out.data(), 1, 4, 24});
    }
    s.pool.give(only);
    REQUIRE(one.code() == errc::out_of_memory);
    REQUIRE(several.code() == errc::out_of_memory);
    REQUIRE(several.where().token == 0); // its row
    REQUIRE(attended.code() == errc::out_of_memory);
    REQUIRE(s.cache.length(s.id) == 5);
    s.cache.validate();
    s.cache.append(s.id, 0, more.keys(), more.values());
    s.cache.attend(s.id, 0, {q.data(), 1, 4, 20}, {out.data(), 1, 4, 24});
}

TEST_CASE("an append whose tasks were short of memory for a while is whole or fails", "[scratch][cache]") {
    starving s, fed;
    const batch b(5), more(3, 2);
    for (starving* each : {&s, &fed})
        each->cache.append(each->id, 0, b.keys(), b.values());
    // tasks find no block, but when all of them are done it is there
    const auto short_of_memory = [&](std::size_t count, kv1::task_view task) {
        void* only = s.pool.take();
        {
            const failing_new none(0);
            for (std::size_t i = 0; i < count; ++i)
                task(i);
        }
        s.pool.give(only);
    };
    const std::array<std::size_t, 2> indptr{0, 3};
    REQUIRE(s.cache.try_append(s.id, 0, more.keys(), more.values(), short_of_memory));
    REQUIRE(s.cache.try_append(std::span(&s.id, 1), 0, indptr, more.keys(), more.values(), short_of_memory));
    for (int i = 0; i < 2; ++i)
        fed.cache.append(fed.id, 0, more.keys(), more.values());
    for (const kv1::kv_side side : {kv1::kv_side::key, kv1::kv_side::value})
        for (std::size_t head = 0; head < 2; ++head) {
            const std::size_t n = 11 * (side == kv1::kv_side::key ? 20 : 24);
            std::vector<float> found(n), expected(n);
            s.cache.read(s.id, 0, side, head, 0, 11, found);
            fed.cache.read(fed.id, 0, side, head, 0, 11, expected);
            REQUIRE(found == expected);
        }
}
