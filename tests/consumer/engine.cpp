// SPDX-License-Identifier: Apache-2.0
//
// The smallest engine: it caches some tokens, attends once, and compares with the 2-bit format and attention
// as their definitions give them, in double. Every way of consuming kv1 builds it, some without exceptions.
#include <kv1/kv1.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <vector>

namespace {

constexpr std::size_t tokens = 70, kv_heads = 2, heads = 4, head_dim = 48;

// What the cache makes of a vector: codes 0 ... 3 over its range, from the unrounded scale, in fp32.
void fake_quantize(float* x) {
    const auto [low, high] = std::minmax_element(x, x + head_dim);
    const float lo = *low, scale = std::max((*high - lo) / 3.0f, 1e-6f);
    const auto stored_scale = static_cast<float>(kv1::float16(scale));
    const auto stored_lo = static_cast<float>(kv1::float16(lo));
    for (std::size_t c = 0; c < head_dim; ++c)
        x[c] = std::clamp(std::nearbyint((x[c] - lo) / scale), 0.0f, 3.0f) * stored_scale + stored_lo;
}

} // namespace

int main() {
    unsigned state = 1;
    const auto next = [&state] { // in [-1, 1)
        state = state * 1664525u + 1013904223u;
        return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    };
    std::vector<float> k(tokens * kv_heads * head_dim), v(k.size()), q(heads * head_dim), out(q.size());
    for (auto* tensor : {&k, &v, &q})
        std::generate(tensor->begin(), tensor->end(), next);

    auto cache = kv1::kv2_cache::create(kv1::uniform_cache(1, {kv_heads, head_dim, head_dim}, 128));
    if (!cache) {
        std::printf("no cache: %s\n", cache.reason().message().c_str());
        return 1;
    }
    const auto sequence = cache->try_create_sequence();
    kv1::attention_options options;
    options.mode = kv1::precision::exact;
    if (!sequence ||
        !cache->try_append(*sequence, 0, {k.data(), tokens, kv_heads, head_dim},
                           {v.data(), tokens, kv_heads, head_dim}) ||
        !cache->try_attend(*sequence, 0, {q.data(), 1, heads, head_dim}, {out.data(), 1, heads, head_dim},
                           options)) {
        std::puts("a call failed");
        return 1;
    }

    for (std::size_t i = 0; i < tokens * kv_heads; ++i) {
        fake_quantize(k.data() + i * head_dim);
        fake_quantize(v.data() + i * head_dim);
    }
    double worst = 0;
    for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t kv = h / (heads / kv_heads);
        std::vector<double> sums(head_dim, 0.0);
        double denominator = 0;
        for (std::size_t t = 0; t < tokens; ++t) {
            double score = 0;
            for (std::size_t c = 0; c < head_dim; ++c)
                score += double(q[h * head_dim + c]) * double(k[(t * kv_heads + kv) * head_dim + c]);
            const double weight = std::exp(score / std::sqrt(double(head_dim)));
            denominator += weight;
            for (std::size_t c = 0; c < head_dim; ++c)
                sums[c] += weight * double(v[(t * kv_heads + kv) * head_dim + c]);
        }
        for (std::size_t c = 0; c < head_dim; ++c)
            worst = std::max(worst, std::fabs(sums[c] / denominator - double(out[h * head_dim + c])));
    }
    // A score is 48 products of at most 1, summed in fp32 and divided by sqrt(48): its error is at most
    // 48 * 2^-24 * 48 / 6.9 = 2e-5, and twice that is the relative error of a weight. Sums of weights add
    // less.
    const bool good = worst < 1e-4;
    std::printf("%s: kv1 %d.%d.%d, largest difference %.2g\n", good ? "ok" : "FAILED", KV1_VERSION_MAJOR,
                KV1_VERSION_MINOR, KV1_VERSION_PATCH, worst);
    return good ? 0 : 1;
}
