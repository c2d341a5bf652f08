// SPDX-License-Identifier: Apache-2.0
//
// Prefill attention: n queries over n keys, causal, one thread, one KV head.
//
//   prefill/kv1/<format>/<target>/h<heads>/d<head_dim>/n<tokens>
//       attend() on the packed cache
//   prefill/blas/<format>/h<heads>/d<head_dim>/n<tokens>
//       the same cache decoded to fp32, then sgemm for the scores of a query head, causal softmax, sgemm with the
//       values
//
// The BLAS picks its own instruction set; compare it with the kv1 target that uses the same one. The cache is
// decoded once for all query heads, and that time counts.

#include "support.hpp"

#include <cblas.h>

#include <cmath>

namespace {

using kv1::kv_format;

struct prefill_case {
    std::size_t heads, head_dim, tokens;
};

struct prefill_cache {
    kv1::kv_cache cache;
    kv1::sequence_id sequence;
    std::vector<float> q, out;

    explicit prefill_cache(const prefill_case& c)
        : cache(kv1::uniform_cache(1, {1, c.head_dim, c.head_dim}, c.tokens)),
          sequence(bench::fill(cache, c.tokens)), q(bench::normal_values(c.tokens * c.heads * c.head_dim, 3)),
          out(q.size()) {}
};

std::string name_of(const prefill_case& c) {
    return "/h" + std::to_string(c.heads) + "/d" + std::to_string(c.head_dim) + "/n" +
           std::to_string(c.tokens);
}

void count(benchmark::State& state, const prefill_case& c) {
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(c.tokens));
    state.counters["ns_per_pair"] =
        benchmark::Counter(static_cast<double>(c.heads * c.tokens * (c.tokens + 1) / 2) * 1e-9,
                           benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void with_kv1(benchmark::State& state, const prefill_case& c) {
    prefill_cache p(c);
    for (auto _ : state) {
        p.cache.attend(p.sequence, 0, {p.q.data(), c.tokens, c.heads, c.head_dim},
                       {p.out.data(), c.tokens, c.heads, c.head_dim});
        benchmark::DoNotOptimize(p.out.data());
    }
    count(state, c);
}

void with_blas(benchmark::State& state, const prefill_case& c) {
    prefill_cache p(c);
    const std::size_t n = c.tokens, d = c.head_dim;
    const auto size = [](std::size_t x) { return static_cast<blasint>(x); };
    std::vector<float> k(n * d), v(n * d), scores(n * n);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (auto _ : state) {
        p.cache.read(p.sequence, 0, kv1::kv_side::key, 0, 0, n, k);
        p.cache.read(p.sequence, 0, kv1::kv_side::value, 0, 0, n, v);
        for (std::size_t h = 0; h < c.heads; ++h) {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, size(n), size(n), size(d), scale,
                        p.q.data() + h * d, size(c.heads * d), k.data(), size(d), 0.0f, scores.data(),
                        size(n));
            for (std::size_t i = 0; i < n; ++i) {
                float* row = scores.data() + i * n;
                const float top = *std::max_element(row, row + i + 1);
                float sum = 0.0f;
                for (std::size_t t = 0; t <= i; ++t)
                    sum += row[t] = std::exp(row[t] - top);
                for (std::size_t t = 0; t <= i; ++t)
                    row[t] /= sum;
                std::fill(row + i + 1, row + n, 0.0f);
            }
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, size(n), size(d), size(n), 1.0f,
                        scores.data(), size(n), v.data(), size(d), 0.0f, p.out.data() + h * d,
                        size(c.heads * d));
        }
        benchmark::DoNotOptimize(p.out.data());
    }
    count(state, c);
}

// The two products alone, with K and V decoded beforehand: a lower limit without softmax and decoding.
void with_blas_products(benchmark::State& state, const prefill_case& c) {
    prefill_cache p(c);
    const std::size_t n = c.tokens, d = c.head_dim;
    const auto size = [](std::size_t x) { return static_cast<blasint>(x); };
    const std::vector<float> k = bench::normal_values(n * d, 5), v = bench::normal_values(n * d, 6);
    std::vector<float> scores(n * n);
    for (auto _ : state)
        for (std::size_t h = 0; h < c.heads; ++h) {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, size(n), size(n), size(d), 1.0f,
                        p.q.data() + h * d, size(c.heads * d), k.data(), size(d), 0.0f, scores.data(),
                        size(n));
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, size(n), size(d), size(n), 1.0f,
                        scores.data(), size(n), v.data(), size(d), 0.0f, p.out.data() + h * d,
                        size(c.heads * d));
            benchmark::DoNotOptimize(p.out.data());
        }
    count(state, c);
}

} // namespace

int main(int argc, char** argv) {
    for (const prefill_case& c : {prefill_case{4, 128, 1024}, prefill_case{4, 32, 1024}}) {
        for (const kv1::target t : bench::supported_targets())
            if (t != kv1::target::scalar)
                bench::register_on(t, "prefill/kv1/affine2/" + bench::name_of(t) + name_of(c),
                                   [c](benchmark::State& state) { with_kv1(state, c); });
        bench::register_on(kv1::best_target(), "prefill/blas/affine2" + name_of(c),
                           [c](benchmark::State& state) { with_blas(state, c); });
        bench::register_on(kv1::best_target(), "prefill/blas_products" + name_of(c),
                           [c](benchmark::State& state) { with_blas_products(state, c); });
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
