// SPDX-License-Identifier: Apache-2.0
//
// Time of a decoded token of the shipped 8M model at 1,000 cached tokens, on one thread, sampling excluded.
// Cache formats take turns, so that a slow moment of the machine affects all of them. Google Benchmark runs
// one after the other, so this program does without it.
//
//   bench_generate [rounds]        prints microseconds a token: the fastest and the median

#include "linear.hpp"
#include "model.hpp"
#include "thread_pool.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <vector>

namespace {

struct contender {
    const char* name;
    kv1::kv_format format;
    kv1::precision mode;
    std::vector<double> microseconds;
    std::optional<kv1::kv_cache> cache;
    kv1::sequence_id sequence;
};

} // namespace

int main(int argc, char** argv) {
    const long rounds = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 400;
    if (argc > 2 || rounds < 1) {
        std::fputs("usage: bench_generate [rounds]\n", stderr);
        return 2;
    }
    constexpr std::size_t context = 1000;
    kv1_lm::use_one_blas_thread();
    kv1_lm::thread_pool pool(1);
    const kv1_lm::model model = kv1_lm::model::read(KV1_LM_MODEL_DIR);

    std::vector<std::int32_t> ids(context);
    for (std::size_t i = 0; i < context; ++i)
        ids[i] = static_cast<std::int32_t>((i * 7919 + 13) % model.config().vocab_size);
    contender contenders[] = {{"fp32", kv1::kv_format::fp32, kv1::precision::exact, {}, {}, {}},
                              {"fp16", kv1::kv_format::fp16, kv1::precision::exact, {}, {}, {}},
                              {"2-bit, exact", kv1::kv_format::affine2, kv1::precision::exact, {}, {}, {}},
                              {"2-bit, fast", kv1::kv_format::affine2, kv1::precision::fast, {}, {}, {}}};
    for (contender& c : contenders) {
        c.cache.emplace(model.cache_shape({c.format, c.format}, context + 1));
        c.sequence = c.cache->create_sequence();
        static_cast<void>(model.forward(ids, *c.cache, c.sequence, c.mode, pool));
    }
    std::vector<float> logits(model.config().vocab_size);
    const std::vector<std::int32_t> next{ids[0]};
    for (long i = 0; i < rounds; ++i)
        for (contender& c : contenders) {
            const auto start = std::chrono::steady_clock::now();
            const std::vector<float> hidden = model.forward(next, *c.cache, c.sequence, c.mode, pool);
            model.logits(hidden, logits, pool);
            c.microseconds.push_back(
                std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
            c.cache->truncate(c.sequence, context);
        }
    for (contender& c : contenders) {
        if (c.microseconds.empty())
            return 1;
        std::ranges::sort(c.microseconds);
        std::printf("%-12s  fastest %7.1f us  median %7.1f us\n", c.name, c.microseconds.front(),
                    c.microseconds[c.microseconds.size() / 2]);
    }
}
