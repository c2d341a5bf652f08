// SPDX-License-Identifier: Apache-2.0
//
// Decode attention on several threads: threads/decode/<formats>/<target>/n<tokens>/<threads>.
//
// Times are real time, cold as in bench_attend. Counters: ns_per_token_kvhead and ns_fastest of the whole
// call, to which all threads contribute.

#include "limits.hpp"
#include "support.hpp"

#include <atomic>
#include <barrier>
#include <thread>

namespace {

// A pool of threads, which take tasks one by one.
class team {
public:
    explicit team(std::size_t threads) : gate_(static_cast<std::ptrdiff_t>(threads)) {
        for (std::size_t i = 1; i < threads; ++i)
            others_.emplace_back([this] {
                for (;;) {
                    gate_.arrive_and_wait();
                    if (task_ == nullptr)
                        return;
                    work();
                    gate_.arrive_and_wait();
                }
            });
    }
    team(const team&) = delete;
    team& operator=(const team&) = delete;
    ~team() {
        task_ = nullptr;
        gate_.arrive_and_wait();
        for (std::thread& t : others_)
            t.join();
    }

    void operator()(std::size_t count, kv1::task_view task) {
        task_ = &task;
        count_ = count;
        next_ = 0;
        gate_.arrive_and_wait();
        work();
        gate_.arrive_and_wait();
    }

private:
    void work() {
        for (std::size_t i = next_++; i < count_; i = next_++)
            (*task_)(i);
    }

    std::barrier<> gate_;
    const kv1::task_view* task_ = nullptr;
    std::size_t count_ = 0;
    std::atomic<std::size_t> next_{0};
    std::vector<std::thread> others_;
};

constexpr bench::attention_shape shape{32, 8, 128};

void decode(benchmark::State& state, std::size_t tokens, std::size_t threads) {
    const std::size_t layer_bytes =
        tokens * shape.kv_heads * 2 * kv1::row_bytes(kv1::kv_format::affine2, shape.head_dim);
    const std::size_t layers = (std::size_t{256} << 20) / layer_bytes + 1;
    kv1::kv_cache cache(kv1::uniform_cache(layers, {shape.kv_heads, shape.head_dim, shape.head_dim}, tokens));
    const kv1::sequence_id sequence = bench::fill(cache, tokens);
    const std::vector<float> q = bench::normal_values(shape.heads * shape.head_dim, 3);
    std::vector<float> out(q.size());
    team run(threads);
    std::size_t layer = 0;
    double fastest = 1e9;
    for (auto _ : state) {
        const double start = bench::seconds();
        cache.attend(sequence, layer, {q.data(), 1, shape.heads, shape.head_dim},
                     {out.data(), 1, shape.heads, shape.head_dim}, {}, run);
        benchmark::DoNotOptimize(out.data());
        fastest = std::min(fastest, bench::seconds() - start);
        layer = layer + 1 == layers ? 0 : layer + 1;
    }
    const auto vectors = static_cast<double>(tokens * shape.kv_heads);
    state.counters["ns_per_token_kvhead"] = benchmark::Counter(
        vectors * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
    state.counters["ns_fastest"] = fastest / vectors * 1e9;
}

} // namespace

int main(int argc, char** argv) {
    for (const kv1::target t : bench::supported_targets())
        for (const std::size_t tokens : {std::size_t{4096}, std::size_t{32768}})
            for (const std::size_t threads : {std::size_t{1}, std::size_t{2}, std::size_t{4}})
                if (t == kv1::best_target() || t == kv1::target::avx2)
                    benchmark::RegisterBenchmark(("threads/decode/affine2/affine2/" + bench::name_of(t) +
                                                  "/n" + std::to_string(tokens) + "/" +
                                                  std::to_string(threads))
                                                     .c_str(),
                                                 [=](benchmark::State& state) {
                                                     const kv1::target before = kv1::current_target();
                                                     kv1::set_target(t);
                                                     decode(state, tokens, threads);
                                                     kv1::set_target(before);
                                                 })
                        ->UseRealTime();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
