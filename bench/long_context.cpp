// SPDX-License-Identifier: Apache-2.0
//
// Memory and attention time of a cache of the shape of Qwen3-8B (36 layers, 8 KV heads, head_dim 128, 32
// query heads) that is filled to a context length. The time is that of a decoded token in all layers, for 2
// bits, int8 and fp16.
//
//   long_context [--layers N] [--memory GiB] [tokens...]      default: 36 layers, 131072 and 262144 tokens
//
// Prints one JSON document: {"context": [{"format", "tokens", "bytes", "seconds_per_token"}, ...]}. A cache
// larger than --memory (default: 16 GiB) is reported with its size and no time. K and V repeat a few thousand
// random vectors, in separate pages.

#include "support.hpp"

#include "limits.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace {

constexpr bench::attention_shape shape{32, 8, 128};

struct row {
    kv1::kv_format format;
    std::size_t tokens, bytes;
    std::optional<double> seconds;
};

row measure(kv1::kv_format format, std::size_t layers, std::size_t tokens, double memory) {
    const kv1::page_layout layout(format, shape.head_dim, format, shape.head_dim, 64);
    row r{format, tokens, (tokens + 63) / 64 * layout.bytes() * shape.kv_heads * layers, std::nullopt};
    if (static_cast<double>(r.bytes) > memory)
        return r;
    kv1::kv_cache cache(
        kv1::uniform_cache(layers, {shape.kv_heads, shape.head_dim, shape.head_dim, format, format}, tokens));
    const kv1::sequence_id sequence = bench::fill(cache, tokens);
    const std::vector<float> q = bench::normal_values(shape.heads * shape.head_dim, 3);
    std::vector<float> out(q.size());
    r.bytes = cache.statistics().bytes_in_use;
    r.seconds = 1e9;
    for (int repeat = 0; repeat < 3; ++repeat) {
        const double start = bench::seconds();
        for (std::size_t layer = 0; layer < layers; ++layer)
            cache.attend(sequence, layer, {q.data(), 1, shape.heads, shape.head_dim},
                         {out.data(), 1, shape.heads, shape.head_dim});
        r.seconds = std::min(*r.seconds, bench::seconds() - start);
    }
    return r;
}

} // namespace

int main(int argc, char** argv) {
    std::size_t layers = 36;
    double memory = 16.0 * (1 << 30);
    std::vector<std::size_t> lengths;
    for (int i = 1; i < argc; ++i) {
        const bool with_value = i + 1 < argc;
        if (std::strcmp(argv[i], "--layers") == 0 && with_value)
            layers = std::strtoull(argv[++i], nullptr, 10);
        else if (std::strcmp(argv[i], "--memory") == 0 && with_value)
            memory = std::strtod(argv[++i], nullptr) * (1 << 30);
        else if (const std::size_t n = std::strtoull(argv[i], nullptr, 10); n > 0)
            lengths.push_back(n);
        else {
            std::fprintf(stderr, "usage: %s [--layers N] [--memory GiB] [tokens...]\n", argv[0]);
            return 1;
        }
    }
    if (lengths.empty())
        lengths = {131072, 262144};
    if (layers == 0)
        return 1;
    std::printf("{\"layers\": %zu, \"target\": \"%s\", \"context\": [", layers,
                std::string(kv1::to_string(kv1::current_target())).c_str());
    const char* separator = "\n";
    for (const std::size_t n : lengths)
        for (const kv1::kv_format f :
             {kv1::kv_format::affine2, kv1::kv_format::affine8, kv1::kv_format::fp16}) {
            const row r = measure(f, layers, n, memory);
            std::printf("%s  {\"format\": \"%s\", \"tokens\": %zu, \"bytes\": %zu, \"seconds_per_token\": ",
                        separator, std::string(kv1::to_string(f)).c_str(), r.tokens, r.bytes);
            r.seconds ? std::printf("%.6f}", *r.seconds) : std::printf("null}");
            std::fflush(stdout);
            separator = ",\n";
        }
    std::printf("\n]}\n");
}
