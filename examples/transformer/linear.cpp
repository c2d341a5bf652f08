// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include <kv1/convert.hpp>
#include <kv1/target.hpp>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include <cblas.h>
#if defined(__x86_64__) && defined(__GNUC__)
#define KV1_LM_X86 1
#include <immintrin.h>
#endif

namespace kv1_lm {

namespace {

// Computes the dot products of x with `outputs` rows of fp16 weights.
using half_product = void (*)(const kv1::float16* w, std::size_t outputs, const float* x, std::size_t inputs,
                              float* y);

void half_product_plain(const kv1::float16* w, std::size_t outputs, const float* x, std::size_t inputs,
                        float* y) {
    for (std::size_t o = 0; o < outputs; ++o, w += inputs) {
        float sum = 0.0f;
        for (std::size_t i = 0; i < inputs; ++i)
            sum += static_cast<float>(w[i]) * x[i];
        y[o] = sum;
    }
}

#if KV1_LM_X86

constexpr std::size_t prefetch_distance = 8192; // bytes

// Four outputs at a time share the loads of x and make four chains of additions. Memory limits the speed, so
// 512-bit registers would gain nothing.
__attribute__((target("avx2,fma,f16c"))) void
half_product_avx2(const kv1::float16* w, std::size_t outputs, const float* x, std::size_t inputs, float* y) {
    const std::size_t whole = inputs / 8 * 8;
    std::size_t o = 0;
    for (; o + 4 <= outputs; o += 4) {
        __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (std::size_t i = 0; i < whole; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            // rows are too short for the hardware's prefetcher; one line a step, in the order of memory
            _mm_prefetch(reinterpret_cast<const char*>(w + o * inputs) + 8 * i + prefetch_distance,
                         _MM_HINT_T0);
            for (std::size_t k = 0; k < 4; ++k) {
                const auto* p = reinterpret_cast<const __m128i*>(w + (o + k) * inputs + i);
                sum[k] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(p)), v, sum[k]);
            }
        }
        const __m256 t0 = _mm256_hadd_ps(sum[0], sum[1]), t1 = _mm256_hadd_ps(sum[2], sum[3]);
        const __m256 t = _mm256_hadd_ps(t0, t1);
        _mm_storeu_ps(y + o, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
        for (std::size_t i = whole; i < inputs; ++i)
            for (std::size_t k = 0; k < 4; ++k)
                y[o + k] += static_cast<float>(w[(o + k) * inputs + i]) * x[i];
    }
    half_product_plain(w + o * inputs, outputs - o, x, inputs, y + o);
}

#endif

half_product best_half_product() {
#if KV1_LM_X86
    if (kv1::is_supported(kv1::target::avx2))
        return half_product_avx2;
#endif
    return half_product_plain;
}

} // namespace

linear::linear(std::vector<float> weights, std::size_t outputs, std::size_t inputs)
    : weights_(std::move(weights)), outputs_(outputs), inputs_(inputs) {
    assert(weights_.size() == outputs * inputs);
    std::vector<kv1::float16> halves(weights_.size());
    kv1::convert(std::span<const float>(weights_), std::span(halves));
    if (std::equal(halves.begin(), halves.end(), weights_.begin(),
                   [](kv1::float16 half, float full) { return static_cast<float>(half) == full; }))
        halves_ = std::move(halves);
}

void linear::operator()(std::span<const float> x, std::span<float> y, thread_pool& pool) const {
    const std::size_t rows = x.size() / inputs_;
    assert(x.size() == rows * inputs_ && y.size() == rows * outputs_);
    if (rows == 1) {
        static const half_product product = best_half_product();
        // a task should read several pages of weights, to be worth handing to a thread
        const std::size_t blocks = std::min(pool.size(), outputs_ * inputs_ / 65536 + 1);
        const std::size_t step = (outputs_ / blocks + 4) / 4 * 4;
        auto task = [&](std::size_t block) {
            const std::size_t first = block * step;
            if (first >= outputs_)
                return;
            const std::size_t some = std::min(step, outputs_ - first);
            if (!halves_.empty())
                product(halves_.data() + first * inputs_, some, x.data(), inputs_, y.data() + first);
            else // sgemm would copy all weights, for a single row
                cblas_sgemv(CblasRowMajor, CblasNoTrans, static_cast<int>(some), static_cast<int>(inputs_),
                            1.0f, weights_.data() + first * inputs_, static_cast<int>(inputs_), x.data(), 1,
                            0.0f, y.data() + first, 1);
        };
        pool(blocks, kv1::task_view(task));
        return;
    }
    const std::size_t step = (rows + pool.size() - 1) / pool.size();
    auto task = [&](std::size_t block) {
        const std::size_t first = block * step;
        if (first >= rows)
            return;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(std::min(step, rows - first)),
                    static_cast<int>(outputs_), static_cast<int>(inputs_), 1.0f, x.data() + first * inputs_,
                    static_cast<int>(inputs_), weights_.data(), static_cast<int>(inputs_), 0.0f,
                    y.data() + first * outputs_, static_cast<int>(outputs_));
    };
    pool(pool.size(), kv1::task_view(task));
}

void use_one_blas_thread() {
#if defined(OPENBLAS_VERSION)
    openblas_set_num_threads(1);
#endif
}

} // namespace kv1_lm
