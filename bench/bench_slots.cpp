// SPDX-License-Identifier: Apache-2.0
//
// What attention over slots costs beside a cache's: one query token over n tokens, one thread.
//
//   slots/decode/<view and mask>/<target>/h<heads>/kv<kv_heads>/d<head_dim>/n<tokens>
//
// Both hold the same tokens in 2 bits, and a call of one follows a call of the other. Cases:
//
//   causal     a range, causal by order                          positions  a range, causal by positions
//   bytes      a range under a mask of bytes                     additive   a range under an fp16 mask of zeros
//   table      blocks in any order                               list       slots in any order
//   window     a range of which an fp16 mask shows the last eighth
//   turning    keys whose means turn, in a range                 scattered  the same, in slots in any order
//   clients    the same, where four sequences lie between each other, a token of each in turn, and the query sees one
//
// Counters: ratio, the median time of a call over that of the cache; ratio_fastest, the same of the fastest calls. The
// cache of `window` sees what the mask shows, by its own window; that of `clients` has the tokens of all four.

#include "limits.hpp"
#include "support.hpp"

#include <kv1/slot_store.hpp>

#include <cstdint>
#include <limits>
#include <numeric>

namespace {

struct slot_case {
    std::string name;
    bench::attention_shape shape;
    std::size_t tokens;
};

double median(std::vector<double> x) {
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    std::nth_element(x.begin(), middle, x.end());
    return *middle;
}

void decode(benchmark::State& state, const slot_case& c) {
    const auto& [heads, kv_heads, dim] = c.shape;
    const bool turning = c.name == "turning" || c.name == "scattered" || c.name == "clients",
               window = c.name == "window";
    kv1::layer_description l{kv_heads, dim, dim};
    if (turning) {
        l.key_format = kv1::kv_format::compact2;
        l.key_encoding.levels = kv1::level_choice::least_squares;
        l.key_encoding.means = bench::normal_values(kv_heads * dim, 7);
        l.rotary.frequencies = kv1::rotary_frequencies(1.0e6, dim);
    }
    const std::size_t page = 64, pages = c.tokens / page;
    kv1::kv_cache cache(kv1::uniform_cache(1, l, c.tokens, page));
    kv1::slot_store_description d;
    d.layers = {l};
    d.slots = c.tokens;
    kv1::slot_store store(d);

    std::mt19937 generator(5);
    std::vector<std::uint32_t> blocks(pages), slots(c.tokens);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::iota(slots.begin(), slots.end(), 0u);
    if (c.name == "table") {
        std::shuffle(blocks.begin(), blocks.end(), generator);
        for (std::size_t t = 0; t < c.tokens; ++t)
            slots[t] = static_cast<std::uint32_t>(blocks[t / page] * page + t % page);
    }
    if (c.name == "list" || c.name == "scattered")
        std::shuffle(slots.begin(), slots.end(), generator);
    std::vector<std::int32_t> positions(c.tokens);
    std::iota(positions.begin(), positions.end(), 0);
    for (std::size_t t = 0; c.name == "clients" && t < c.tokens; ++t)
        positions[t] = static_cast<std::int32_t>(t / 4);
    const kv1::target measured = kv1::current_target();
    kv1::set_target(kv1::best_target()); // filling is not measured
    const kv1::sequence_id sequence = cache.create_sequence();
    const std::vector<float> k = bench::normal_values(c.tokens * kv_heads * dim, 1),
                             v = bench::normal_values(c.tokens * kv_heads * dim, 2);
    cache.append(sequence, 0, {k.data(), c.tokens, kv_heads, dim}, {v.data(), c.tokens, kv_heads, dim});
    cache.commit(sequence);
    store.write(0, slots, positions, {k.data(), c.tokens, kv_heads, dim},
                {v.data(), c.tokens, kv_heads, dim});
    kv1::set_target(measured);

    const std::vector<std::int32_t> own{static_cast<std::int32_t>(c.tokens) - 1};
    const std::vector<std::uint8_t> visible(c.tokens, 1);
    std::vector<kv1::float16> added(c.tokens, kv1::float16(0.0f));
    for (std::size_t t = 0; window && t < c.tokens / 8 * 7; ++t)
        added[t] = kv1::float16(-std::numeric_limits<float>::infinity());
    for (std::size_t t = 0; c.name == "clients" && t < c.tokens; ++t)
        added[t] = kv1::float16(t % 4 == 1 ? 0.0f : -std::numeric_limits<float>::infinity());
    kv1::slot_stream stream{1, kv1::slot_view::range(0, c.tokens), kv1::slot_mask::causal()};
    if (c.name == "positions")
        stream.mask = kv1::slot_mask::by_position(own, positions);
    if (c.name == "bytes")
        stream.mask = kv1::slot_mask::bytes(visible, c.tokens);
    if (c.name == "additive" || c.name == "clients" || window)
        stream.mask = kv1::slot_mask::additive(added.data(), static_cast<std::ptrdiff_t>(c.tokens));
    if (c.name == "table")
        stream.slots = kv1::slot_view::table(blocks, c.tokens);
    if (c.name == "list" || c.name == "scattered")
        stream.slots = kv1::slot_view::list(slots);

    const std::vector<float> q = bench::normal_values(heads * dim, 3);
    std::vector<float> out(heads * dim);
    const kv1::tensor_view queries(q.data(), 1, heads, dim);
    const kv1::mutable_tensor_view outputs(out.data(), 1, heads, dim);
    kv1::attention_options options;
    options.window = window ? c.tokens / 8 : 0;
    std::vector<double> cache_times, slot_times;
    for (auto _ : state) {
        const double start = bench::seconds();
        cache.attend(sequence, 0, queries, outputs, options);
        benchmark::DoNotOptimize(out.data());
        const double middle = bench::seconds();
        store.attend(0, {&stream, 1}, queries, outputs);
        benchmark::DoNotOptimize(out.data());
        const double end = bench::seconds();
        cache_times.push_back(middle - start);
        slot_times.push_back(end - middle);
        state.SetIterationTime(end - middle);
    }
    state.counters["ratio"] = median(slot_times) / median(cache_times);
    state.counters["ratio_fastest"] = *std::min_element(slot_times.begin(), slot_times.end()) /
                                      *std::min_element(cache_times.begin(), cache_times.end());
}

} // namespace

int main(int argc, char** argv) {
    for (const kv1::target t : bench::supported_targets()) {
        if (t == kv1::target::scalar)
            continue; // an oracle, slow on purpose
        for (const slot_case& shape : {slot_case{"", {32, 8, 128}, 8192}, slot_case{"", {9, 3, 64}, 2048}})
            for (const char* name : {"causal", "positions", "bytes", "additive", "table", "list", "window",
                                     "turning", "scattered", "clients"}) {
                slot_case c = shape;
                c.name = name;
                bench::register_on(
                    t,
                    "slots/decode/" + c.name + "/" + bench::name_of(t) + "/h" +
                        std::to_string(c.shape.heads) + "/kv" + std::to_string(c.shape.kv_heads) + "/d" +
                        std::to_string(c.shape.head_dim) + "/n" + std::to_string(c.tokens),
                    [c](benchmark::State& state) { decode(state, c); }, true);
            }
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
