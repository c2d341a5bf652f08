// SPDX-License-Identifier: Apache-2.0
//
// A slot store in the hands of several threads: what may run at once does, and gives what one thread after the other
// gives. ThreadSanitizer finds what is shared and should not be.
#include "slot_problem.hpp"
#include "thread_executor.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/slot_store.hpp>

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <thread>
#include <vector>

namespace {

using kv1::slot_mask;
using kv1::slot_stream;
using kv1::slot_view;
using kv1_test::generator;
using kv1_test::numbers_from;
using kv1_test::slot_vectors;

constexpr std::size_t kv_heads = 2, heads = 4, dim = 32, slots = 256, layers = 3, team_size = 4;

kv1::slot_store_description description() {
    kv1::layer_description turning{kv_heads, dim, dim, kv1::kv_format::compact3};
    turning.key_encoding.levels = kv1::level_choice::least_squares;
    turning.key_encoding.means.assign(kv_heads * dim, 0.5f);
    turning.rotary.frequencies = kv1::rotary_frequencies(10000.0, dim);
    kv1::slot_store_description d;
    d.layers = {turning, {kv_heads, dim, dim}, turning};
    d.slots = slots;
    d.page_tokens = 32;
    d.fp16_slots = slots;
    return d;
}

// Every thread runs f(thread).
template <class F>
void on_threads(F&& f) {
    std::vector<std::thread> team;
    for (std::size_t i = 0; i < team_size; ++i)
        team.emplace_back([&f, i] { f(i); });
    for (std::thread& t : team)
        t.join();
}

std::vector<float> attend(const kv1::slot_store& store, std::size_t layer, const std::vector<float>& q) {
    std::vector<float> out(q.size());
    const slot_stream stream{2, slot_view::range(0, slots), slot_mask::causal()};
    store.attend(layer, {&stream, 1}, {q.data(), 2, heads, dim}, {out.data(), 2, heads, dim});
    return out;
}

// Writes all slots of a layer in batches.
void fill(kv1::slot_store& store, std::size_t layer, const slot_vectors& x) {
    const std::vector<std::uint32_t> all = numbers_from(0, slots);
    for (std::size_t s = 0; s < slots; s += 64) {
        const auto some = std::span(all).subspan(s, 64);
        store.write(layer, some, kv1_test::positions_by_slot(some), x.key_view(s, 64), x.value_view(s, 64));
    }
}

} // namespace

TEST_CASE("layers are written to by one thread each, while others attend to other layers",
          "[slots][threads]") {
    generator g(4301);
    const slot_vectors first(g, description().layers[0], slots);
    const std::vector<float> q = kv1_test::normal_values(g, 2 * heads * dim);
    kv1::slot_store alone(description()), shared(description());
    for (std::size_t l = 0; l < layers; ++l)
        fill(alone, l, first);
    const std::vector<float> expected = attend(alone, 0, q);
    fill(shared, 0, first);
    std::atomic<bool> wrong{false}; // assertions of Catch2 belong to one thread
    on_threads([&](std::size_t thread) {
        if (thread + 1 < layers)
            fill(shared, thread + 1, first);
        else
            for (int i = 0; i < 8; ++i)
                if (attend(shared, 0, q) != expected)
                    wrong = true;
    });
    REQUIRE_FALSE(wrong);
    for (std::size_t l = 0; l < layers; ++l)
        REQUIRE(attend(shared, l, q) == attend(alone, l, q));
    alone.flush();
    shared.flush();
    for (std::size_t l = 0; l < layers; ++l)
        REQUIRE(attend(shared, l, q) == attend(alone, l, q));
}

TEST_CASE("a team of threads enters plans together, with nothing between phases but its barrier",
          "[slots][threads]") {
    generator g(4302);
    const slot_vectors x(g, description().layers[0], slots);
    const std::vector<std::uint32_t> all = numbers_from(0, slots);
    const std::vector<std::int32_t> positions = kv1_test::positions_by_slot(all);
    const std::vector<float> q = kv1_test::normal_values(g, 2 * heads * dim);
    kv1::slot_store alone(description()), shared(description());
    for (std::size_t l = 0; l < layers; ++l)
        alone.write(l, all, positions, x.key_view(0, slots), x.value_view(0, slots));
    alone.release_fp16(std::span(all).first(100));

    std::vector<float> out(q.size());
    const slot_stream stream{2, slot_view::range(0, slots), slot_mask::causal()};
    std::optional<kv1::work_plan> plan;
    bool failed = false;
    std::barrier step(team_size);
    on_threads([&](std::size_t thread) {
        // one thread makes a plan and ends it; all run its tasks
        const auto together = [&](auto&& make) {
            if (thread == 0)
                plan.emplace(make());
            step.arrive_and_wait();
            for (std::size_t phase = 0; phase < plan->phases(); ++phase) {
                for (std::size_t i = thread; i < plan->tasks(phase); i += team_size)
                    plan->run(phase, i);
                step.arrive_and_wait();
            }
            if (thread == 0)
                failed = failed || !plan->finish();
            step.arrive_and_wait();
        };
        for (std::size_t l = 0; l < layers; ++l)
            together([&] {
                return shared.plan_write(l, all, positions, x.key_view(0, slots), x.value_view(0, slots));
            });
        if (thread == 0)
            shared.release_fp16(std::span(all).first(100));
        step.arrive_and_wait();
        together([&] {
            return shared.plan_attention(2, {&stream, 1}, {q.data(), 2, heads, dim},
                                         {out.data(), 2, heads, dim});
        });
    });
    REQUIRE_FALSE(failed);
    REQUIRE(out == attend(alone, 2, q));
    REQUIRE(attend(shared, 1, q) == attend(alone, 1, q));
}

TEST_CASE("calls that change nothing run at once on one layer, each on threads of its own",
          "[slots][threads]") {
    generator g(4303);
    const slot_vectors x(g, description().layers[0], slots);
    const std::vector<float> q = kv1_test::normal_values(g, 2 * heads * dim);
    kv1::slot_store store(description());
    fill(store, 0, x);
    const std::vector<std::uint32_t> all = numbers_from(0, slots);
    store.release_fp16(std::span(all).first(200));
    const std::vector<float> expected = attend(store, 0, q);
    std::vector<std::byte> raw(slots * store.raw_bytes(0));
    store.export_raw(0, all, raw);
    std::vector<char> same(team_size, 0);
    on_threads([&](std::size_t thread) {
        std::vector<float> out(q.size());
        std::vector<std::byte> own(raw.size());
        const slot_stream stream{2, slot_view::range(0, slots), slot_mask::causal()};
        kv1_test::thread_executor two(2);
        store.attend(0, {&stream, 1}, {q.data(), 2, heads, dim}, {out.data(), 2, heads, dim}, {}, two);
        store.export_raw(0, all, own);
        same[thread] = out == expected && own == raw ? 1 : 0;
    });
    REQUIRE(same == std::vector<char>(team_size, 1));
}
