// SPDX-License-Identifier: Apache-2.0
//
// Appending: quantize, pack and insert into pages, K and V.
//
//   append/<K>/<V>/<target>/kv<kv_heads>/d<head_dim>/t<tokens a call>[/channel]
//
// Items are values, bytes are the fp32 bytes that are read. channel: keys per channel.

#include "support.hpp"

namespace {

struct append_case {
    kv1::kv_format key, value;
    std::size_t kv_heads, head_dim, tokens;
    kv1::quantization_axis key_axis = kv1::quantization_axis::per_token;
};

void append(benchmark::State& state, const append_case& c) {
    constexpr std::size_t capacity = 8192;
    kv1::layer_description layer{c.kv_heads, c.head_dim, c.head_dim, c.key, c.value};
    layer.key_axis = c.key_axis;
    kv1::kv_cache cache(kv1::uniform_cache(1, layer, capacity));
    const std::vector<float> k = bench::normal_values(c.tokens * c.kv_heads * c.head_dim, 1);
    const std::vector<float> v = bench::normal_values(k.size(), 2);
    kv1::sequence_id sequence = cache.create_sequence();
    std::size_t length = 0;
    for (auto _ : state) {
        if (length + c.tokens > capacity) { // once in capacity / tokens calls
            cache.destroy_sequence(sequence);
            sequence = cache.create_sequence();
            length = 0;
        }
        cache.append(sequence, 0, {k.data(), c.tokens, c.kv_heads, c.head_dim},
                     {v.data(), c.tokens, c.kv_heads, c.head_dim});
        length += c.tokens;
    }
    const auto values = state.iterations() * static_cast<std::int64_t>(2 * k.size());
    state.SetItemsProcessed(values);
    state.SetBytesProcessed(values * 4);
}

} // namespace

int main(int argc, char** argv) {
    using kv1::quantization_axis;
    const auto add = [](kv1::target t, kv1::kv_format f, std::size_t tokens, quantization_axis axis) {
        const append_case c{f, f, 8, 128, tokens, axis};
        bench::register_on(t,
                           "append/" + bench::name_of(f) + "/" + bench::name_of(f) + "/" + bench::name_of(t) +
                               "/kv8/d128/t" + std::to_string(tokens) +
                               (axis == quantization_axis::per_channel ? "/channel" : ""),
                           [c](benchmark::State& state) { append(state, c); });
    };
    for (const kv1::target t : bench::supported_targets())
        for (const std::size_t tokens : {std::size_t{1}, std::size_t{512}}) {
            for (const kv1::kv_format f : kv1::all_kv_formats)
                add(t, f, tokens, quantization_axis::per_token);
            add(t, kv1::kv_format::affine2, tokens, quantization_axis::per_channel);
        }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
