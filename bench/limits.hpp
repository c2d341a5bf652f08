// SPDX-License-Identifier: Apache-2.0
//
// Limits of the hardware. They are measured in the same program and at the same time as the kernels, so that
// a slow machine cancels in the ratios.
//
//   dot4 floor   the time of a call's dot products alone: (number of dot4 instructions) / (their measured rate), with
//                all operands in registers. A dot4 multiplies and adds four bytes a lane: vpdpbusd, or pmaddubsw and
//                an addition
//   fp16 limit   the time to read the same cache in fp16 once from memory, with plain wide loads
#pragma once

#include <kv1/target.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if defined(__x86_64__) && defined(__GNUC__)
// The accumulators are named so that neither compiler merges or drops a product.
#define KV1_BENCH_DOT4(NAME, TARGET, REGISTER, CONSTRAINT, START, STEP)                                      \
    __attribute__((target(TARGET), noinline)) inline void NAME(std::size_t rounds) {                         \
        REGISTER a = START, b = START, s0 = START, s1 = START, s2 = START, s3 = START, s4 = START,           \
                 s5 = START, s6 = START, s7 = START;                                                         \
        for (std::size_t i = 0; i < rounds; ++i) {                                                           \
            STEP(s0);                                                                                        \
            STEP(s1);                                                                                        \
            STEP(s2);                                                                                        \
            STEP(s3);                                                                                        \
            STEP(s4);                                                                                        \
            STEP(s5);                                                                                        \
            STEP(s6);                                                                                        \
            STEP(s7);                                                                                        \
        }                                                                                                    \
        __asm__ volatile("" ::CONSTRAINT(s0), CONSTRAINT(s1), CONSTRAINT(s2), CONSTRAINT(s3),                \
                         CONSTRAINT(s4), CONSTRAINT(s5), CONSTRAINT(s6), CONSTRAINT(s7));                    \
    }
#define KV1_BENCH_VNNI(s) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(s) : "v"(a), "v"(b))
#define KV1_BENCH_VEX_PAIRS(s)                                                                               \
    do {                                                                                                     \
        decltype(s) t;                                                                                       \
        __asm__ volatile("vpmaddubsw %1, %2, %0" : "=v"(t) : "v"(a), "v"(b));                                \
        __asm__ volatile("vpaddw %1, %0, %0" : "+v"(s) : "v"(t));                                            \
    } while (false)
#define KV1_BENCH_SSE_PAIRS(s)                                                                               \
    do {                                                                                                     \
        decltype(s) t = a;                                                                                   \
        __asm__ volatile("pmaddubsw %1, %0" : "+x"(t) : "x"(b));                                             \
        __asm__ volatile("paddw %1, %0" : "+x"(s) : "x"(t));                                                 \
    } while (false)
KV1_BENCH_DOT4(dot4_vnni512, "avx512f,avx512bw,avx512vl,avx512vnni", __m512i, "v", _mm512_setzero_si512(),
               KV1_BENCH_VNNI)
KV1_BENCH_DOT4(dot4_pairs512, "avx512f,avx512bw,avx512vl", __m512i, "v", _mm512_setzero_si512(),
               KV1_BENCH_VEX_PAIRS)
KV1_BENCH_DOT4(dot4_pairs256, "avx2", __m256i, "x", _mm256_setzero_si256(), KV1_BENCH_VEX_PAIRS)
KV1_BENCH_DOT4(dot4_pairs128, "ssse3", __m128i, "x", _mm_setzero_si128(), KV1_BENCH_SSE_PAIRS)
#undef KV1_BENCH_DOT4
#undef KV1_BENCH_VNNI
#undef KV1_BENCH_VEX_PAIRS
#undef KV1_BENCH_SSE_PAIRS

/// Reads a buffer with the widest loads of the processor, and gives a sum of its bytes.
__attribute__((target("avx2"), noinline)) inline void stream256(const std::byte* p, std::size_t bytes) {
    __m256i sums[4] = {};
    for (std::size_t i = 0; i + 128 <= bytes; i += 128)
        for (int k = 0; k < 4; ++k)
            sums[k] =
                _mm256_add_epi32(sums[k], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i) + k));
    __asm__ volatile("" ::"x"(sums[0]), "x"(sums[1]), "x"(sums[2]), "x"(sums[3]));
}
__attribute__((target("avx512f"), noinline)) inline void stream512(const std::byte* p, std::size_t bytes) {
    __m512i sums[4] = {};
    for (std::size_t i = 0; i + 256 <= bytes; i += 256)
        for (int k = 0; k < 4; ++k)
            sums[k] = _mm512_add_epi32(sums[k], _mm512_loadu_si512(p + i + k * 64));
    __asm__ volatile("" ::"v"(sums[0]), "v"(sums[1]), "v"(sums[2]), "v"(sums[3]));
}
#endif

/// The least seconds that one product of a code and an 8-bit number takes, on average; 0: unknown for this
/// target.
inline double seconds_per_product(kv1::target t) {
#if defined(__x86_64__) && defined(__GNUC__)
    constexpr std::size_t rounds = 5000;
    const auto rate = [](void (*dot4)(std::size_t), double products) {
        const double start = seconds();
        dot4(rounds);
        return (seconds() - start) / (static_cast<double>(rounds) * 8 * products);
    };
    switch (t) {
    case kv1::target::avx512_vnni:
    case kv1::target::avx512_vbmi: // of single codes; channel pairs need fewer products
        return rate(dot4_vnni512, 64);
    case kv1::target::avx512:
        return rate(dot4_pairs512, 64);
    case kv1::target::avx2:
        return rate(dot4_pairs256, 32);
    case kv1::target::sse41:
        return rate(dot4_pairs128, 16);
    default:
        break;
    }
#else
    static_cast<void>(t);
#endif
    return 0.0;
}

/// The seconds that reading a byte from memory takes, in one run over a buffer far larger than the
/// processor's caches.
inline double seconds_per_byte() {
    static const std::vector<std::byte> buffer(std::size_t{288} << 20, std::byte{1});
    const double start = seconds();
#if defined(__x86_64__) && defined(__GNUC__)
    if (kv1::is_supported(kv1::target::avx512))
        stream512(buffer.data(), buffer.size());
    else if (kv1::is_supported(kv1::target::avx2))
        stream256(buffer.data(), buffer.size());
    else
#endif
    {
        std::uint64_t sum = 0, word = 0;
        for (std::size_t i = 0; i < buffer.size(); i += sizeof word) {
            std::memcpy(&word, buffer.data() + i, sizeof word);
            sum += word;
        }
        volatile std::uint64_t sink = sum;
        static_cast<void>(sink);
    }
    return (seconds() - start) / static_cast<double>(buffer.size());
}

} // namespace bench
