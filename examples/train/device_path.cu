// SPDX-License-Identifier: Apache-2.0
//
// The CUDA side of cache_path.hpp and loss.hpp.
#include "device_path.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

namespace kv1_train::cuda {

namespace {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr float smallest_scale = 1e-6f;

__device__ float load(const float* x, std::int64_t i) { return x[i]; }
__device__ float load(const __nv_bfloat16* x, std::int64_t i) { return __bfloat162float(x[i]); }
__device__ void store(float* y, std::int64_t i, float v) { y[i] = v; }
__device__ void store(__nv_bfloat16* y, std::int64_t i, float v) { y[i] = __float2bfloat16_rn(v); }

__device__ float through_fp16(float x) { return __half2float(__float2half_rn(x)); }

template <class F>
__device__ float reduce(float v, F f) {
    for (int step = 16; step != 0; step /= 2)
        v = f(v, __shfl_xor_sync(all_lanes, v, step));
    return v;
}
__device__ float warp_sum(float v) {
    return reduce(v, [](float a, float b) { return a + b; });
}
__device__ float warp_min(float v) {
    return reduce(v, [](float a, float b) { return fminf(a, b); });
}
__device__ float warp_max(float v) {
    return reduce(v, [](float a, float b) { return fmaxf(a, b); });
}

// One vector in a warp's registers: channel lane + 32 j in v[j] of a lane. Reductions end in every lane.
template <int N>
struct vector {
    float v[N];
};

template <int N>
__device__ void turn(vector<N>& x, const float* cosines, const float* sines, std::int64_t position, int lane,
                     bool inverse) {
    const float side = ((lane & 1) != 0) != inverse ? 1.0f : -1.0f; // odd channels add, even ones take off
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const std::int64_t at = position * (16 * N) + (lane + 32 * j) / 2;
        const float other = __shfl_xor_sync(all_lanes, x.v[j], 1);
        x.v[j] = x.v[j] * cosines[at] + side * (other * sines[at]);
    }
}

// The same for pairs of channels i and 16 N + i. Channel lane + 32 j has its other half in the same lane, or, where N is
// odd, in lane ^ 16: there each lane hands over the number that the other one asks for.
template <int N>
__device__ void turn_halves(vector<N>& x, const float* cosines, const float* sines, std::int64_t position,
                            int lane, bool inverse) {
    vector<N> other;
#pragma unroll
    for (int j = 0; j < N; ++j)
        if (N % 2 == 0) {
            other.v[j] = x.v[(j + N / 2) % N];
        } else {
            const float to_low = x.v[(j + N / 2) % N], to_high = x.v[(j + N / 2 + 1) % N];
            other.v[j] = __shfl_xor_sync(all_lanes, lane >= 16 ? to_low : to_high, 16);
        }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const int channel = lane + 32 * j;
        const bool second = channel >= 16 * N;
        const std::int64_t at = position * (16 * N) + channel - (second ? 16 * N : 0);
        const float side = second != inverse ? 1.0f : -1.0f;
        x.v[j] = x.v[j] * cosines[at] + side * (other.v[j] * sines[at]);
    }
}

// Orthonormal; as the cache rotates (kv1/hadamard.hpp) channels whose largest power-of-two divisor is all of them, or
// 32 * (the power of two in N) of them.
template <int N>
__device__ void rotate_hadamard(vector<N>& x, int lane) {
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float other = __shfl_xor_sync(all_lanes, x.v[j], step);
            x.v[j] = (lane & step) != 0 ? other - x.v[j] : x.v[j] + other;
        }
    constexpr int blocks = N & -N;
#pragma unroll
    for (int step = 1; step < blocks; step *= 2)
#pragma unroll
        for (int j = 0; j < N; ++j)
            if ((j & step) == 0) {
                const float a = x.v[j], b = x.v[j + step];
                x.v[j] = a + b;
                x.v[j + step] = a - b;
            }
    const float factor = rsqrtf(32.0f * blocks);
#pragma unroll
    for (int j = 0; j < N; ++j)
        x.v[j] *= factor;
}

// Levels base + scale * code as they are kept.
struct levels {
    float scale, base;
};

__device__ levels keep(float scale, float base, const cache_path_job& job) {
    scale = fmaxf(scale, smallest_scale);
    if (!job.round_metadata)
        return {scale, base};
    if (job.format == scheme::affine)
        return {through_fp16(scale), through_fp16(base)};
    // as kv1::compact: four bits of the scale's mantissa, an offset of 7 bits
    const int half = __half_as_ushort(__float2half_rn(scale));
    const int rounded = max((half + 0x20) & 0x7fc0, 0x40);
    const float kept = __half2float(__ushort_as_half(static_cast<unsigned short>(rounded)));
    const float width = kept * static_cast<float>(job.max_code);
    const float steps = rintf(fminf(fmaxf(base / width * 128.0f + 64.0f, -63.0f), 63.0f));
    return {kept, width * (steps - 64.0f) / 128.0f};
}

__device__ float code_of(float x, float inverse, float base, float max_code) {
    return rintf(fminf(fmaxf((x - base) * inverse, 0.0f), max_code));
}

// Error weights of a head as a cache rounds them, [channels][channels], as kv1::try_factor_error_weights() lays them out:
// what channel i does to channel j < i is in row i and column j. A lane has the unit, the sum and the cost of its channels.
template <int N>
struct error_weights {
    const float* factors;
    vector<N> unit, sum, cost;

    __device__ error_weights(const float* rows, int lane) : factors(rows) {
        constexpr int n = 32 * N;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int channel = lane + 32 * j;
            const float* row = rows + channel * n;
            cost.v[j] = row[channel];
            unit.v[j] = channel + 1 < n ? row[channel + 1] : 0.0f;
            sum.v[j] = channel + 2 < n   ? row[channel + 2]
                       : channel + 1 < n ? 1.0f + unit.v[j] * row[n + channel]
                                         : 1.0f;
        }
    }
    // What channel `from` does to those before it: zero for the others.
    __device__ vector<N> row(int from, int lane) const {
        vector<N> r;
#pragma unroll
        for (int i = 0; i < N; ++i)
            r.v[i] = lane + 32 * i < from ? __ldg(factors + from * (32 * N) + lane + 32 * i) : 0.0f;
        return r;
    }
};

// What all candidates share: the smallest number, and what 1 / scale multiplies. Sums are of whole numbers below 2^24,
// so floats hold them.
template <int N>
__device__ vector<N> common_wanted(const vector<N>& x, float lo, float hi, const error_weights<N>& weights,
                                   int lane) {
    const float unit = fmaxf((hi - lo) / 65535.0f, 1e-30f), inverse = 1.0f / unit;
    vector<N> steps, high, low;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        steps.v[j] = rintf(fminf(fmaxf((x.v[j] - lo) * inverse, 0.0f), 65535.0f));
        high.v[j] = low.v[j] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
        for (int turn = 0; turn < 32; ++turn) {
            const auto its = static_cast<int>(__shfl_sync(all_lanes, steps.v[j], turn));
            const auto its_high = static_cast<float>(its >> 8), its_low = static_cast<float>(its & 255);
            const vector<N> row = weights.row(turn + 32 * j, lane);
#pragma unroll
            for (int i = 0; i <= j; ++i) {
                high.v[i] += row.v[i] * its_high;
                low.v[i] += row.v[i] * its_low;
            }
        }
    vector<N> wanted;
#pragma unroll
    for (int j = 0; j < N; ++j)
        wanted.v[j] = (x.v[j] - lo) + weights.unit.v[j] * (unit * (256.0f * high.v[j] + low.v[j]));
    return wanted;
}

// Codes of K candidates under error weights, as a cache chooses them: values into y, costs into `costs`. Channel `turn`
// + 32 j is quantized in lane `turn`, which hands its code to the others.
template <int N, int K>
__device__ void weighted_codes(const vector<N>& wanted, float lo, const levels (&candidates)[K],
                               float max_code, const error_weights<N>& weights, int lane, vector<N> (&y)[K],
                               float (&costs)[K]) {
    vector<N> sums[K]; // of factors and codes
    float inverse[K], shift[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        inverse[k] = 1.0f / candidates[k].scale;
        shift[k] = (candidates[k].base - lo) * inverse[k];
        costs[k] = 0.0f;
#pragma unroll
        for (int j = 0; j < N; ++j)
            sums[k].v[j] = 0.0f;
    }
#pragma unroll
    for (int j = N - 1; j >= 0; --j)
        for (int turn = 31; turn >= 0; --turn) {
            const vector<N> row = weights.row(turn + 32 * j, lane);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float own =
                    wanted.v[j] * inverse[k] - weights.sum.v[j] * shift[k] - weights.unit.v[j] * sums[k].v[j];
                const float code = rintf(fminf(fmaxf(own, 0.0f), max_code)), rest = own - code;
                if (lane == turn) {
                    y[k].v[j] = code * candidates[k].scale + candidates[k].base;
                    costs[k] += weights.cost.v[j] * rest * rest;
                }
                const float its = __shfl_sync(all_lanes, code, turn);
#pragma unroll
                for (int i = 0; i <= j; ++i)
                    sums[k].v[i] += row.v[i] * its;
            }
        }
#pragma unroll
    for (int k = 0; k < K; ++k)
        costs[k] = warp_sum(costs[k]) * (candidates[k].scale * candidates[k].scale);
}

// The nearest levels into y; their squared error.
template <int N>
__device__ float nearest(const vector<N>& x, levels l, float max_code, vector<N>& y) {
    const float inverse = 1.0f / l.scale;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        y.v[j] = code_of(x.v[j], inverse, l.base, max_code) * l.scale + l.base;
        const float e = x.v[j] - y.v[j];
        sum += e * e;
    }
    return warp_sum(sum);
}

// As the cache fits levels (kv1/quantizers/least_squares.hpp); sums are a warp's, not channel by channel.
template <int N>
__device__ levels refine(const vector<N>& x, float lo, float hi, const cache_path_job& job) {
    constexpr float n = 32.0f * N;
    const auto max_code = static_cast<float>(job.max_code);
    const float middle = 0.5f * lo + 0.5f * hi;
    float scale = fmaxf((hi - lo) * (0.8f / max_code), smallest_scale);
    float base = scale * (-0.5f * max_code);
    float sum_x = 0.0f, sum_c = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j)
        sum_x += x.v[j] - middle;
    sum_x = warp_sum(sum_x);
    for (int round = 0; round < 3; ++round) {
        const float inverse = 1.0f / scale;
        unsigned codes = 0, squares = 0;
        float products = 0.0f;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float v = x.v[j] - middle;
            const float c = code_of(v, inverse, base, max_code);
            const auto code = static_cast<unsigned>(c);
            codes += code;
            squares += code * code;
            products += v * c;
        }
        sum_c = static_cast<float>(__reduce_add_sync(all_lanes, codes));
        const auto sum_cc = static_cast<float>(__reduce_add_sync(all_lanes, squares));
        products = warp_sum(products);
        const float variance = n * sum_cc - sum_c * sum_c;
        if (variance > 0.0f)
            scale = fmaxf((n * products - sum_x * sum_c) / variance, smallest_scale);
        base = (sum_x - scale * sum_c) / n;
    }
    const levels kept = keep(scale, base + middle, job);
    return keep(kept.scale, (sum_x - kept.scale * sum_c) / n + middle, job);
}

// The cheapest so far: its cost, levels and values.
template <int N>
struct cheapest {
    float cost;
    levels chosen;
    vector<N> values;

    template <int K>
    __device__ void take(const vector<N>& wanted, float lo, const levels (&candidates)[K],
                         const error_weights<N>& weights, int lane, const cache_path_job& job) {
        vector<N> y[K];
        float costs[K];
        weighted_codes(wanted, lo, candidates, static_cast<float>(job.max_code), weights, lane, y, costs);
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (costs[k] < cost) {
                cost = costs[k];
                chosen = candidates[k];
                values = y[k];
            }
    }
};

// Values under error weights (kv1/encoding.hpp). Candidates are `start`, seven scales about its middle,
// and four moves of the cheapest of these. lo, hi: the smallest and the largest number.
template <int N>
__device__ void weigh_errors(vector<N>& x, float lo, float hi, levels start, const float* factors, int lane,
                             const cache_path_job& job) {
    const auto max_code = static_cast<float>(job.max_code);
    const float middle = start.base + start.scale * (0.5f * max_code);
    const auto wider = [&](float by) {
        const float scale = keep(start.scale * by, 0.0f, job).scale;
        return keep(scale, middle - scale * (0.5f * max_code), job);
    };
    const error_weights<N> weights(factors, lane);
    const vector<N> wanted = common_wanted(x, lo, hi, weights, lane);
    cheapest<N> best{INFINITY, start, x};
    const levels scales[] = {start, wider(0.94f), wider(1.04f), wider(1.12f)};
    best.take(wanted, lo, scales, weights, lane, job);
    const levels more[] = {wider(0.88f), wider(1.08f), wider(1.16f), wider(1.24f)};
    best.take(wanted, lo, more, weights, lane, job);
    const levels from = best.chosen;
    const auto moved = [&](float by) { return keep(from.scale, from.base + from.scale * by, job); };
    const levels moves[] = {moved(-0.2f), moved(-0.1f), moved(0.1f), moved(0.2f)};
    best.take(wanted, lo, moves, weights, lane, job);
    x = best.values;
}

// As kv1's quantizers of the two kinds, with their encoders. factors: of the head's error weights, or null.
template <int N>
__device__ void evenly_spaced(vector<N>& x, const float* factors, int lane, const cache_path_job& job) {
    const auto max_code = static_cast<float>(job.max_code);
    float lo = x.v[0], hi = x.v[0];
#pragma unroll
    for (int j = 1; j < N; ++j) {
        lo = fminf(lo, x.v[j]);
        hi = fmaxf(hi, x.v[j]);
    }
    lo = warp_min(lo);
    hi = warp_max(hi);
    const bool about_zero = job.format == scheme::compact;
    const float low = about_zero ? fminf(lo, 0.0f) : lo, high = about_zero ? fmaxf(hi, 0.0f) : hi;
    const levels ends{fmaxf((high - low) / max_code, smallest_scale), low};
    const levels range = keep(ends.scale, ends.base, job);
    if (job.least_squares) {
        vector<N> fitted;
        const float range_error = nearest(x, range, max_code, fitted);
        const levels refined = refine(x, lo, hi, job);
        vector<N> refitted;
        const float error = nearest(x, refined, max_code, refitted);
        if (factors != nullptr)
            weigh_errors(x, lo, hi, error < range_error ? refined : range, factors, lane, job);
        else
            x = error < range_error ? refitted : fitted;
    } else if (about_zero) {
        vector<N> fitted;
        nearest(x, range, max_code, fitted);
        x = fitted;
    } else { // codes of the unrounded metadata, valued with the stored
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float code = fminf(fmaxf(rintf((x.v[j] - ends.base) / ends.scale), 0.0f), max_code);
            x.v[j] = code * range.scale + range.base;
        }
    }
}

template <int N>
__device__ void scaled_binary(vector<N>& x, const cache_path_job& job) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j)
        sum += fabsf(x.v[j]);
    float scale = fmaxf(warp_sum(sum) / (32.0f * N), smallest_scale);
    if (job.round_metadata)
        scale = through_fp16(scale);
#pragma unroll
    for (int j = 0; j < N; ++j)
        x.v[j] = x.v[j] >= 0.0f ? scale : -scale;
}

// What is taken off the vector of a row, as kv1::turn_mean() has it: no operation is fused.
template <int N>
__device__ vector<N> mean_of(const cache_path_job& job, std::int64_t head, std::int64_t position, int lane) {
    const float* means = job.means + head * (32 * N);
    vector<N> m;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const int channel = lane + 32 * j;
        if (job.mean_cosines == nullptr) {
            m.v[j] = means[channel];
            continue;
        }
        const int pair = job.half_split ? channel % (16 * N) : channel / 2;
        const bool is_second = job.half_split ? channel >= 16 * N : channel % 2 != 0;
        const float first = means[job.half_split ? pair : 2 * pair],
                    second = means[job.half_split ? pair + 16 * N : 2 * pair + 1];
        const float cosine = job.mean_cosines[position * (16 * N) + pair],
                    sine = job.mean_sines[position * (16 * N) + pair];
        m.v[j] = is_second ? __fadd_rn(__fmul_rn(first, sine), __fmul_rn(second, cosine))
                           : __fsub_rn(__fmul_rn(first, cosine), __fmul_rn(second, sine));
    }
    return m;
}

// A warp takes a vector.
template <int N, class T>
__global__ void cache_path_kernel(cache_path_job job) {
    const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (row >= job.rows)
        return;
    const std::int64_t position = row / job.heads % job.positions, at = row * (32 * N);
    const auto* in = static_cast<const T*>(job.x) + at;
    auto* out = static_cast<T*>(job.y) + at;
    vector<N> x;
#pragma unroll
    for (int j = 0; j < N; ++j)
        x.v[j] = load(in, lane + 32 * j);
    if (job.added != nullptr)
#pragma unroll
        for (int j = 0; j < N; ++j)
            x.v[j] += load(static_cast<const T*>(job.added) + at, lane + 32 * j);
    if (job.cosines != nullptr && job.half_split)
        turn_halves(x, job.cosines, job.sines, position, lane, job.inverse);
    else if (job.cosines != nullptr)
        turn(x, job.cosines, job.sines, position, lane, job.inverse);
    if (job.plain != nullptr)
#pragma unroll
        for (int j = 0; j < N; ++j)
            store(static_cast<T*>(job.plain) + at, lane + 32 * j, x.v[j]);
    if (job.format != scheme::plain && position >= job.sinks) {
        vector<N> mean;
        if (job.means != nullptr) {
            mean = mean_of<N>(job, row % job.heads, position, lane);
#pragma unroll
            for (int j = 0; j < N; ++j)
                x.v[j] -= mean.v[j];
        }
        if (job.hadamard)
            rotate_hadamard(x, lane);
        if (job.format == scheme::affine || job.format == scheme::compact) {
            evenly_spaced(x,
                          job.error_factors == nullptr
                              ? nullptr
                              : job.error_factors + row % job.heads * (32 * N) * (32 * N),
                          lane, job);
        } else if (job.format == scheme::scaled_binary) {
            scaled_binary(x, job);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j)
                x.v[j] = x.v[j] >= 0.0f ? 1.0f : 0.0f;
        }
        if (job.hadamard)
            rotate_hadamard(x, lane);
        if (job.means != nullptr)
#pragma unroll
            for (int j = 0; j < N; ++j)
                x.v[j] += mean.v[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
        store(out, lane + 32 * j, x.v[j]);
}

void check(const char* what) {
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <int N>
void launch(const cache_path_job& job, cudaStream_t stream) {
    constexpr int warps = 8;
    const auto blocks = static_cast<unsigned>((job.rows + warps - 1) / warps);
    if (job.bf16)
        cache_path_kernel<N, __nv_bfloat16><<<blocks, 32 * warps, 0, stream>>>(job);
    else
        cache_path_kernel<N, float><<<blocks, 32 * warps, 0, stream>>>(job);
}

// A block takes a row of logits, eight words of a thread at a time.
constexpr int loss_threads = 256;

template <class F>
__device__ float block_reduce(float v, F f, float* shared) {
    v = reduce(v, f);
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = shared[threadIdx.x % (loss_threads / 32)];
    for (int step = loss_threads / 64; step != 0; step /= 2)
        v = f(v, __shfl_xor_sync(all_lanes, v, step));
    __syncthreads();
    return v;
}

template <class T>
struct alignas(16) eight {
    T v[8];
};

// max and sum of exp(x - max) of a row
template <class T>
__device__ float2 softmax_sums(const T* row, int words, float* shared) {
    float largest = -INFINITY, sum = 0.0f;
    for (int at = static_cast<int>(threadIdx.x) * 8; at < words; at += loss_threads * 8) {
        const auto part = *reinterpret_cast<const eight<T>*>(row + at);
        float part_largest = largest;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            part_largest = fmaxf(part_largest, load(part.v, i));
        sum *= __expf(largest - part_largest);
        largest = part_largest;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            sum += __expf(load(part.v, i) - largest);
    }
    const float all = block_reduce(
        largest, [](float a, float b) { return fmaxf(a, b); }, shared);
    sum = largest == -INFINITY ? 0.0f : sum * __expf(largest - all);
    sum = block_reduce(
        sum, [](float a, float b) { return a + b; }, shared);
    return {all, sum};
}

template <class T>
__global__ void token_loss_kernel(token_loss_job job) {
    __shared__ float shared[loss_threads / 32];
    const std::int64_t row = blockIdx.x;
    T* logits = static_cast<T*>(job.logits) + row * job.words;
    const T* teacher =
        job.teacher != nullptr ? static_cast<const T*>(job.teacher) + row * job.words : nullptr;
    const auto target = static_cast<int>(job.targets[row]);

    const float2 model = softmax_sums(logits, job.words, shared);
    const float log_sum = model.x + __logf(model.y);
    float teacher_log_sum = 0.0f;
    if (teacher != nullptr) {
        const float2 sums = softmax_sums(teacher, job.words, shared);
        teacher_log_sum = sums.x + __logf(sums.y);
    }
    if (threadIdx.x == 0)
        job.cross_entropy[row] = log_sum - load(logits, target);
    __syncthreads(); // the target's logit is read before it is replaced

    const float weight = job.label_weight + job.teacher_weight;
    float divergence = 0.0f;
    for (int at = static_cast<int>(threadIdx.x) * 8; at < job.words; at += loss_threads * 8) {
        auto part = *reinterpret_cast<const eight<T>*>(logits + at);
        eight<T> teacher_part;
        if (teacher != nullptr)
            teacher_part = *reinterpret_cast<const eight<T>*>(teacher + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float log_p = load(part.v, i) - log_sum;
            float gradient = weight * __expf(log_p);
            if (at + i == target)
                gradient -= job.label_weight;
            if (teacher != nullptr) {
                const float log_t = load(teacher_part.v, i) - teacher_log_sum;
                const float t = __expf(log_t);
                divergence += t * (log_t - log_p);
                gradient -= job.teacher_weight * t;
            }
            store(part.v, i, gradient);
        }
        *reinterpret_cast<eight<T>*>(logits + at) = part;
    }
    if (teacher != nullptr) {
        divergence = block_reduce(
            divergence, [](float a, float b) { return a + b; }, shared);
        if (threadIdx.x == 0)
            job.divergence[row] = divergence;
    }
}

} // namespace

void run(const cache_path_job& job, void* stream) {
    if (job.rows == 0)
        return;
    const auto on = static_cast<cudaStream_t>(stream);
    switch (job.channels / 32) {
    case 1:
        launch<1>(job, on);
        break;
    case 2:
        launch<2>(job, on);
        break;
    case 3:
        launch<3>(job, on);
        break;
    case 4:
        launch<4>(job, on);
        break;
    case 6:
        launch<6>(job, on);
        break;
    case 8:
        launch<8>(job, on);
        break;
    default:
        throw std::invalid_argument("head_dim is none of 32, 64, 96, 128, 192, 256");
    }
    check("cache_path_kernel");
}

void run(const token_loss_job& job, void* stream) {
    if (job.rows == 0)
        return;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto rows = static_cast<unsigned>(job.rows);
    if (job.bf16)
        token_loss_kernel<__nv_bfloat16><<<rows, loss_threads, 0, on>>>(job);
    else
        token_loss_kernel<float><<<rows, loss_threads, 0, on>>>(job);
    check("token_loss_kernel");
}

} // namespace kv1_train::cuda
