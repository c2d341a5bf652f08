// SPDX-License-Identifier: Apache-2.0
//
// Decode attention: one query token over n cached tokens, softmax included, one thread.
//
//   attend/decode/<K>/<V>/<precision>/<target>/h<heads>/kv<kv_heads>/d<head_dim>/n<tokens>/<cold|warm>
//       [/g<group>][/channel/p<page_tokens>][/v<value_dim>[/in_keys]][/q<size>[/lse]]
//       [/fp16<sinks>+<window>/p<page_tokens>]
//
// warm: all calls read one layer. cold: calls rotate over so many layers that this cache, and one of the same
// shape in fp16, exceed 256 MB. q: 16 queries in turns, so many times larger than keys. Bytes are the row-format bytes
// that are read. Counters:
//
//   ns_per_token_kvhead   time / (n * kv_heads), mean of the run
//   ns_fastest            time / (n * kv_heads) of the fastest call; compare this one on a shared machine
//   fp16_limit_ratio      time to read the cache in fp16 / time of the fastest call (limits.hpp)
//   dot4_floor_ratio      time of the fastest call / time of its dot products alone; integer path only
//
// Plain formats are this library's own fp32 and fp16 caches, and affine8 is its int8 cache. All have the same
// layout, prefetch and driver. The fp16_limit_ratio of fp16/fp16 is at most 1.

#include "limits.hpp"
#include "support.hpp"

#include <utility>

namespace {

using kv1::kv_format;

struct decode_case {
    kv_format key, value;
    bench::attention_shape shape;
    std::size_t tokens;
    bool cold;
    std::size_t group = 0; // channels that share metadata
    bool per_channel = false;
    std::size_t page_tokens = 64;
    std::size_t value_dim = 0; // 0: the head dim
    bool values_in_keys = false;
    float query_size = 0.0f;  // 0: one query of unit size
    bool log_sum_exp = false; // asked for, as where parts are joined
    std::size_t fp16_sinks = 0, fp16_window = 0;

    [[nodiscard]] std::size_t outputs() const { return value_dim == 0 ? shape.head_dim : value_dim; }
    [[nodiscard]] std::size_t stored_values() const { return values_in_keys ? 0 : outputs(); }
};

std::size_t bytes_per_token(const decode_case& c) {
    return c.shape.kv_heads * (kv1::row_bytes(c.key, c.shape.head_dim, c.group) +
                               (c.values_in_keys ? 0 : kv1::row_bytes(c.value, c.outputs(), c.group)));
}

bool is_integer(kv_format f) { return f != kv_format::fp32 && f != kv_format::fp16; }

void decode(benchmark::State& state, const decode_case& c, kv1::precision mode) {
    const std::size_t layer_bytes = c.tokens * bytes_per_token(c);
    const std::size_t layers = c.cold ? (std::size_t{256} << 20) / layer_bytes + 1 : 1;
    kv1::layer_description layer_shape{c.shape.kv_heads, c.shape.head_dim, c.outputs(), c.key, c.value};
    layer_shape.values_in_keys = c.values_in_keys;
    layer_shape.key_group = layer_shape.value_group = c.group;
    if (c.per_channel)
        layer_shape.key_axis = kv1::quantization_axis::per_channel;
    kv1::cache_description shape = kv1::uniform_cache(layers, layer_shape, c.tokens, c.page_tokens);
    shape.fp16_sinks = c.fp16_sinks;
    shape.fp16_window = c.fp16_window;
    kv1::kv_cache cache(shape);
    const kv1::target measured = kv1::current_target();
    kv1::set_target(kv1::best_target()); // fills faster; filling is not measured
    const kv1::sequence_id sequence = bench::fill(cache, c.tokens);
    kv1::set_target(measured);

    const std::size_t queries = c.query_size == 0.0f ? 1 : 16,
                      query_floats = c.shape.heads * c.shape.head_dim;
    std::vector<float> q = bench::normal_values(queries * query_floats, 3);
    for (float& x : q)
        x *= c.query_size == 0.0f ? 1.0f : c.query_size;
    std::vector<float> out(c.shape.heads * c.outputs()), lse(c.log_sum_exp ? c.shape.heads : 0);
    std::size_t layer = 0, query = 0;
    double fastest = 1e9, product = 1e9, byte = bench::seconds_per_byte();
    for (auto _ : state) {
        const double start = bench::seconds();
        cache.attend(sequence, layer, {q.data() + query * query_floats, 1, c.shape.heads, c.shape.head_dim},
                     {out.data(), 1, c.shape.heads, c.outputs()}, {.mode = mode, .log_sum_exp = lse});
        benchmark::DoNotOptimize(out.data());
        fastest = std::min(fastest, bench::seconds() - start);
        layer = layer + 1 == layers ? 0 : layer + 1;
        query = query + 1 == queries ? 0 : query + 1;
    }
    for (int i = 0; i < 40; ++i)
        product = std::min(product, bench::seconds_per_product(measured));
    for (int i = 0; i < 2; ++i)
        byte = std::min(byte, bench::seconds_per_byte());

    const auto vectors = static_cast<double>(c.tokens * c.shape.kv_heads);
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(c.tokens));
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(layer_bytes));
    state.counters["ns_per_token_kvhead"] = benchmark::Counter(
        vectors * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
    state.counters["ns_fastest"] = fastest / vectors * 1e9;
    state.counters["fp16_limit_ratio"] =
        vectors * 2.0 * static_cast<double>(c.shape.head_dim + c.stored_values()) * byte / fastest;
    if (mode == kv1::precision::fast && is_integer(c.key) && is_integer(c.value) && product > 0.0) {
        const double products =
            static_cast<double>(c.shape.heads * (c.shape.head_dim + c.outputs()) * c.tokens);
        state.counters["dot4_floor_ratio"] = fastest / (products * product);
    }
}

void register_decode(const decode_case& c, kv1::precision mode, kv1::target t) {
    const std::string name =
        "attend/decode/" + bench::name_of(c.key) + "/" + bench::name_of(c.value) +
        (mode == kv1::precision::fast ? "/fast/" : "/exact/") + bench::name_of(t) + "/h" +
        std::to_string(c.shape.heads) + "/kv" + std::to_string(c.shape.kv_heads) + "/d" +
        std::to_string(c.shape.head_dim) + "/n" + std::to_string(c.tokens) + (c.cold ? "/cold" : "/warm") +
        (c.group == 0 ? "" : "/g" + std::to_string(c.group)) +
        (c.per_channel ? "/channel/p" + std::to_string(c.page_tokens) : "") +
        (c.value_dim == 0 ? "" : "/v" + std::to_string(c.value_dim)) + (c.values_in_keys ? "/in_keys" : "") +
        (c.query_size == 0.0f ? "" : "/q" + std::to_string(static_cast<int>(c.query_size))) +
        (c.log_sum_exp ? "/lse" : "") +
        (c.fp16_sinks + c.fp16_window == 0
             ? ""
             : "/fp16" + std::to_string(c.fp16_sinks) + "+" + std::to_string(c.fp16_window) + "/p" +
                   std::to_string(c.page_tokens));
    bench::register_on(t, name, [c, mode](benchmark::State& state) { decode(state, c, mode); });
}

} // namespace

int main(int argc, char** argv) {
    constexpr bench::attention_shape large{32, 8, 128}, tiny{8, 2, 32};
    constexpr kv_format two = kv_format::affine2;
    for (const kv1::target t : bench::supported_targets()) {
        if (t == kv1::target::scalar)
            continue; // the scalar target is an oracle, slow on purpose
        for (const kv1::precision mode : {kv1::precision::fast, kv1::precision::exact}) {
            register_decode({two, two, large, 4096, false}, mode, t);
            register_decode({two, two, large, 32768, true}, mode, t);
            register_decode({two, two, tiny, 1024, false}, mode, t);
        }
        register_decode({two, two, large, 131072, true}, kv1::precision::fast, t);
        // one range of tokens: its log-sum-exp costs something of its own
        for (const auto& [shape, tokens] :
             {std::pair{large, std::size_t{2048}}, std::pair{tiny, std::size_t{1024}}})
            for (const float size : {1.0f, 3.0f})
                for (const bool asked : {false, true})
                    register_decode({.key = two,
                                     .value = two,
                                     .shape = shape,
                                     .tokens = tokens,
                                     .cold = false,
                                     .query_size = size,
                                     .log_sum_exp = asked},
                                    kv1::precision::fast, t);
        for (const std::size_t group :
             {std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{8}, std::size_t{16}})
            register_decode({two, two, {8 * group, 8, 128}, 4096, false}, kv1::precision::fast, t);
        for (const std::size_t dim :
             {std::size_t{64}, std::size_t{80}, std::size_t{96}, std::size_t{192}, std::size_t{256}})
            register_decode({two, two, {32, 8, dim}, 4096, false}, kv1::precision::fast, t);
        for (const std::size_t group : {std::size_t{32}, std::size_t{64}})
            register_decode({two, two, large, 4096, false, group}, kv1::precision::fast, t);
        for (const std::size_t page : {std::size_t{64}, std::size_t{256}})
            register_decode({two, two, large, 4096, false, 0, true, page}, kv1::precision::fast, t);
        register_decode({two, two, large, 32768, true, 0, true}, kv1::precision::fast, t);
        for (const kv_format f : kv1::all_kv_formats)
            if (f != two)
                for (const bool cold : {false, true})
                    register_decode({f, f, large, cold ? std::size_t{32768} : std::size_t{4096}, cold},
                                    kv1::precision::fast, t);
        register_decode({kv_format::affine4, two, large, 4096, false}, kv1::precision::fast, t);
        // the recommended cache, c3,c2@4:32, and what its parts cost
        for (const bool cold : {false, true})
            for (const std::size_t page : {std::size_t{64}, std::size_t{16}})
                for (const std::size_t window : {std::size_t{0}, std::size_t{32}})
                    if (window != 0 || page == 64)
                        register_decode({.key = kv_format::compact3,
                                         .value = kv_format::compact2,
                                         .shape = large,
                                         .tokens = cold ? std::size_t{32768} : std::size_t{4096},
                                         .cold = cold,
                                         .page_tokens = page,
                                         .fp16_sinks = window == 0 ? std::size_t{0} : std::size_t{4},
                                         .fp16_window = window},
                                        kv1::precision::fast, t);
        // DeepSeek's latent attention: stored once, and with its values apart
        for (const kv_format f : {two, kv_format::affine4, kv_format::affine8, kv_format::fp16})
            for (const bool in_keys : {true, false})
                register_decode({.key = f,
                                 .value = f,
                                 .shape = {128, 1, 576},
                                 .tokens = 4096,
                                 .cold = false,
                                 .value_dim = 512,
                                 .values_in_keys = in_keys},
                                kv1::precision::fast, t);
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
