// SPDX-License-Identifier: Apache-2.0
//
// Decode attention: one query token over n cached tokens, softmax included, one thread.
//
//   attend/decode/<K>/<V>/<precision>/<target>/h<heads>/kv<kv_heads>/d<head_dim>/n<tokens>/<cold|warm>
//
// cold: calls rotate over enough layers that the cache exceeds 256 MB; warm: one layer. ns_per_token_kvhead
// is time / (n * kv_heads); bytes are row-format bytes read.

#include "support.hpp"

namespace {

using kv1::kv_format;

struct decode_case {
    kv_format key, value;
    bench::attention_shape shape;
    std::size_t tokens;
    bool cold;
};

std::size_t bytes_per_token(const decode_case& c) {
    return c.shape.kv_heads *
           (kv1::row_bytes(c.key, c.shape.head_dim) + kv1::row_bytes(c.value, c.shape.head_dim));
}

void decode(benchmark::State& state, const decode_case& c, kv1::precision mode) {
    const std::size_t layer_bytes = c.tokens * bytes_per_token(c);
    const std::size_t layers = c.cold ? (std::size_t{256} << 20) / layer_bytes + 1 : 1;
    kv1::kv_cache cache(kv1::uniform_cache(
        layers, {c.shape.kv_heads, c.shape.head_dim, c.shape.head_dim, c.key, c.value}, c.tokens));
    const kv1::target measured = kv1::current_target();
    kv1::set_target(kv1::best_target()); // filling is not what is measured
    const kv1::sequence_id sequence = bench::fill(cache, c.tokens);
    kv1::set_target(measured);

    const std::vector<float> q = bench::normal_values(c.shape.heads * c.shape.head_dim, 3);
    std::vector<float> out(q.size());
    std::size_t layer = 0;
    for (auto _ : state) {
        cache.attend(sequence, layer, {q.data(), 1, c.shape.heads, c.shape.head_dim},
                     {out.data(), 1, c.shape.heads, c.shape.head_dim}, {.mode = mode});
        benchmark::DoNotOptimize(out.data());
        layer = layer + 1 == layers ? 0 : layer + 1;
    }
    const auto vectors = static_cast<double>(c.tokens * c.shape.kv_heads);
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(c.tokens));
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(layer_bytes));
    state.counters["ns_per_token_kvhead"] = benchmark::Counter(
        vectors * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void register_decode(const decode_case& c, kv1::precision mode, kv1::target t) {
    const std::string name = "attend/decode/" + bench::name_of(c.key) + "/" + bench::name_of(c.value) +
                             (mode == kv1::precision::fast ? "/fast/" : "/exact/") + bench::name_of(t) +
                             "/h" + std::to_string(c.shape.heads) + "/kv" + std::to_string(c.shape.kv_heads) +
                             "/d" + std::to_string(c.shape.head_dim) + "/n" + std::to_string(c.tokens) +
                             (c.cold ? "/cold" : "/warm");
    bench::register_on(t, name, [c, mode](benchmark::State& state) { decode(state, c, mode); });
}

} // namespace

int main(int argc, char** argv) {
    constexpr bench::attention_shape large{32, 8, 128}, tiny{8, 2, 32};
    for (const kv1::target t : bench::supported_targets()) {
        if (t == kv1::target::scalar)
            continue; // an oracle, not a competitor
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
            register_decode({kv_format::affine2, kv_format::affine2, large, 4096, false}, mode, t);
            register_decode({kv_format::affine2, kv_format::affine2, large, 32768, true}, mode, t);
            register_decode({kv_format::affine2, kv_format::affine2, tiny, 1024, false}, mode, t);
        }
        for (const kv_format f : kv1::all_kv_formats)
            if (f != kv_format::affine2)
                register_decode({f, f, large, 4096, false}, kv1::precision::fast, t);
        register_decode({kv_format::affine4, kv_format::affine2, large, 4096, false}, kv1::precision::fast,
                        t);
        register_decode({kv_format::fp16, kv_format::fp16, large, 32768, true}, kv1::precision::fast, t);
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
