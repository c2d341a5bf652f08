// SPDX-License-Identifier: Apache-2.0
//
// What encodings cost: means, means that turn with their position, and an orthogonal basis, beside none.
//
//   encodings/attend/<target>/n<tokens>/<encoding>      one query token of 8 heads on 2 KV heads of 128 channels
//   encodings/append/<target>/t<tokens a call>/<encoding>
//
// Keys and values are of compact2, fitted and rotated. Encodings:
//
//   none        nothing more
//   mean        a constant mean of keys
//   turning<p>  a mean of keys that turns (RoPE, theta 10^6), in p of 64 pairs of channels, evenly spread
//   basis       a basis for keys and one for values
//
// Counters: ns_per_token_kvhead, and ns_fastest of the fastest call. The difference to `none` is the cost.

#include "support.hpp"

#include <kv1/hadamard.hpp>

#include <algorithm>
#include <chrono>
#include <limits>

namespace {

constexpr std::size_t kv_heads = 2, heads = 8, dim = 128;

enum class extra { none, mean, turning, basis };

struct encoding_case {
    std::string name;
    extra what;
    std::size_t pairs = 0;
};

kv1::cache_description description(const encoding_case& c, std::size_t capacity) {
    kv1::layer_description l{kv_heads, dim, dim, kv1::kv_format::compact2, kv1::kv_format::compact2};
    for (kv1::vector_encoding* e : {&l.key_encoding, &l.value_encoding}) {
        e->levels = kv1::level_choice::least_squares;
        e->hadamard = kv1::rotation_width(dim);
        if (c.what == extra::basis) { // a reflection, 1 - 2 v v^T, in all heads
            std::vector<float> v = bench::normal_values(dim, 5);
            float norm = 0.0f;
            for (const float x : v)
                norm += x * x;
            for (std::size_t i = 0; i < kv_heads * dim * dim; ++i) {
                const std::size_t row = i / dim % dim, column = i % dim;
                e->basis.push_back((row == column ? 1.0f : 0.0f) - 2.0f * v[row] * v[column] / norm);
            }
        }
    }
    if (c.what == extra::mean || c.what == extra::turning)
        l.key_encoding.means = bench::normal_values(kv_heads * dim, 6);
    if (c.what == extra::turning) {
        l.rotary.frequencies = kv1::rotary_frequencies(1.0e6, dim);
        constexpr std::size_t all = dim / 2;
        for (std::size_t h = 0; h < kv_heads; ++h)
            for (std::size_t j = 0; j < all; ++j)
                if (j * c.pairs / all == (j + 1) * c.pairs / all) // one of every all / pairs stays
                    for (const std::size_t channel : {l.rotary.first_of(j), l.rotary.second_of(j)})
                        l.key_encoding.means[h * dim + channel] = 0.0f;
    }
    return kv1::uniform_cache(1, l, capacity);
}

// Runs body() once for each iteration, and counts the time of a token and KV head.
template <class Body>
void measure(benchmark::State& state, std::size_t tokens, Body body) {
    using clock = std::chrono::steady_clock;
    const auto items = static_cast<double>(tokens * kv_heads);
    double fastest = std::numeric_limits<double>::infinity(), total = 0.0;
    for (auto _ : state) {
        const auto before = clock::now();
        body();
        const double seconds = std::chrono::duration<double>(clock::now() - before).count();
        state.SetIterationTime(seconds);
        fastest = std::min(fastest, seconds);
        total += seconds;
    }
    state.counters["ns_per_token_kvhead"] = total / static_cast<double>(state.iterations()) * 1e9 / items;
    state.counters["ns_fastest"] = fastest * 1e9 / items;
}

void attend(benchmark::State& state, const encoding_case& c, std::size_t tokens) {
    kv1::kv_cache cache(description(c, tokens));
    const kv1::sequence_id sequence = bench::fill(cache, tokens);
    const std::vector<float> q = bench::normal_values(heads * dim, 3);
    std::vector<float> out(heads * dim);
    measure(state, tokens, [&] {
        cache.attend(sequence, 0, {q.data(), 1, heads, dim}, {out.data(), 1, heads, dim});
        benchmark::DoNotOptimize(out.data());
    });
}

void append(benchmark::State& state, const encoding_case& c, std::size_t tokens) {
    constexpr std::size_t capacity = 8192;
    kv1::kv_cache cache(description(c, capacity));
    const std::vector<float> k = bench::normal_values(tokens * kv_heads * dim, 1),
                             v = bench::normal_values(k.size(), 2);
    kv1::sequence_id sequence = cache.create_sequence();
    measure(state, tokens, [&] {
        if (cache.length(sequence, 0) + tokens > capacity) { // once in capacity / tokens calls
            cache.destroy_sequence(sequence);
            sequence = cache.create_sequence();
        }
        cache.append(sequence, 0, {k.data(), tokens, kv_heads, dim}, {v.data(), tokens, kv_heads, dim});
    });
}

} // namespace

int main(int argc, char** argv) {
    std::vector<encoding_case> cases{{"none", extra::none}, {"mean", extra::mean}};
    for (const std::size_t pairs : {4u, 8u, 16u, 32u, 64u})
        cases.push_back({"turning" + std::to_string(pairs), extra::turning, pairs});
    cases.push_back({"basis", extra::basis});
    for (const kv1::target t : bench::supported_targets()) {
        for (const std::size_t tokens : {std::size_t{4096}, std::size_t{32768}})
            for (const encoding_case& c : cases)
                bench::register_on(
                    t, "encodings/attend/" + bench::name_of(t) + "/n" + std::to_string(tokens) + "/" + c.name,
                    [c, tokens](benchmark::State& state) { attend(state, c, tokens); }, true);
        for (const std::size_t tokens : {std::size_t{1}, std::size_t{512}})
            for (const encoding_case& c : cases)
                bench::register_on(
                    t, "encodings/append/" + bench::name_of(t) + "/t" + std::to_string(tokens) + "/" + c.name,
                    [c, tokens](benchmark::State& state) { append(state, c, tokens); }, true);
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
