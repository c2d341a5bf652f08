// SPDX-License-Identifier: Apache-2.0
//
// The time to store vectors, on one thread and random data. Items are values, bytes are the fp32 bytes that
// are read.
//
//   quantize/<scheme>/<target>/d<channels>           the row format, vector by vector
//   encode/<format>/<policy>/<target>/d<head_dim>    64 tokens into a cache, K and V alike: means, rotation,
//                                                    levels, codes, insertion
//
// Policies are written as in kv1-lm sweep: ls least squares, cs clip search, had Hadamard rotation of the
// whole head, mean means taken off, ew error weights. values_per_s is the mean of the run,
// values_per_s_fastest that of the fastest call; compare the latter on a shared machine.

#include "support.hpp"

#include <kv1/hadamard.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <array>
#include <chrono>

namespace {

template <kv1::quantizer Q>
void encode(benchmark::State& state, std::size_t channels) {
    constexpr std::size_t rows = 256;
    const std::vector<float> x = bench::normal_values(rows * channels, 1);
    std::vector<std::byte> packed(kv1::packed_size<Q::bits>(channels));
    typename Q::metadata metadata{};
    for (auto _ : state)
        for (std::size_t r = 0; r < rows; ++r) {
            kv1::encode_row<Q>(std::span(x).subspan(r * channels, channels), packed, metadata);
            benchmark::DoNotOptimize(packed.data());
        }
    const auto values = state.iterations() * static_cast<std::int64_t>(rows * channels);
    state.SetItemsProcessed(values);
    state.SetBytesProcessed(values * 4);
}

template <kv1::quantizer Q>
void register_scheme(const std::string& name) {
    for (const kv1::target t : bench::supported_targets())
        for (const std::size_t channels : {std::size_t{32}, std::size_t{128}})
            bench::register_on(t,
                               "quantize/" + name + "/" + bench::name_of(t) + "/d" + std::to_string(channels),
                               [channels](benchmark::State& state) { encode<Q>(state, channels); });
}

struct policy {
    const char* name;
    kv1::level_choice levels;
    bool hadamard, means, error_weights;
};

void append(benchmark::State& state, kv1::kv_format format, const policy& p, std::size_t dim) {
    constexpr std::size_t tokens = 64, heads = 8;
    const std::vector<float> k = bench::normal_values(tokens * heads * dim, 1);
    const std::vector<float> v = bench::normal_values(tokens * heads * dim, 2);
    kv1::vector_encoding encoding{.levels = p.levels, .hadamard = p.hadamard ? kv1::rotation_width(dim) : 0};
    if (p.means)
        encoding.means = bench::normal_values(heads * dim, 3);
    if (p.error_weights) {
        kv1::moment_estimator moments(heads, dim);
        moments.add({k.data(), tokens, heads, dim});
        encoding.error_weights = moments.moments();
    }
    kv1::layer_description layer{heads, dim, dim, format, format};
    layer.key_encoding = layer.value_encoding = encoding;
    kv1::kv_cache cache(kv1::uniform_cache(1, layer, tokens));
    double fastest = 1e9;
    for (auto _ : state) {
        const kv1::sequence_id sequence = cache.create_sequence();
        const auto start = std::chrono::steady_clock::now();
        cache.append(sequence, 0, {k.data(), tokens, heads, dim}, {v.data(), tokens, heads, dim});
        const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
        state.SetIterationTime(time.count());
        fastest = std::min(fastest, time.count());
        cache.destroy_sequence(sequence);
    }
    const auto values = static_cast<double>(2 * k.size());
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(8 * k.size()));
    state.counters["values_per_s"] =
        benchmark::Counter(values, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["values_per_s_fastest"] = values / fastest;
}

void register_appends() {
    using kv1::kv_format, kv1::level_choice;
    constexpr policy policies[] = {{"min_max", level_choice::min_max, false, false, false},
                                   {"cs+had+mean", level_choice::clip_search, true, true, false},
                                   {"ls", level_choice::least_squares, false, false, false},
                                   {"ls+had+mean", level_choice::least_squares, true, true, false},
                                   {"ls+had+mean+ew", level_choice::least_squares, true, true, true}};
    for (const kv_format format : kv1::all_kv_formats) {
        if (!kv1::info_of(format).fits_levels || kv1::info_of(format).code_bits > 3)
            continue;
        for (const policy& p : policies)
            for (const kv1::target t : bench::supported_targets())
                for (const std::size_t dim : {std::size_t{32}, std::size_t{128}}) {
                    const std::string name = "encode/" + bench::name_of(format) + "/" + p.name + "/" +
                                             bench::name_of(t) + "/d" + std::to_string(dim);
                    bench::register_on(
                        t, name, [=](benchmark::State& state) { append(state, format, p, dim); }, true);
                }
    }
}

} // namespace

int main(int argc, char** argv) {
    register_scheme<kv1::affine<2>>("affine2");
    register_scheme<kv1::affine<3>>("affine3");
    register_scheme<kv1::affine<4>>("affine4");
    register_scheme<kv1::affine<8>>("affine8");
    register_scheme<kv1::scaled_binary>("scaled_binary");
    register_scheme<kv1::binary>("binary");
    register_appends();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
