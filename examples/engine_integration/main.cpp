// SPDX-License-Identifier: Apache-2.0
//
// An engine that replaces its fp16 cache by kv1. engine.hpp is the engine. Below is a class with the
// interface of the engine's own cache; lines that call kv1 are marked with "kv1".
//
// The same tokens run with the engine's own cache, with kv1 storing fp16, and with kv1 storing fewer bits.
// The program fails if kv1's fp16 differs from the engine's. Weights are random, so how often fewer bits
// choose the same token says nothing about a real model.
#include "engine.hpp"

#include <kv1/kv_cache.hpp> // kv1

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace {

// kv1: work runs on the engine's threads.
struct lent_threads {
    engine::thread_pool& pool;
    void operator()(std::size_t count, kv1::task_view task) const { pool.run(count, task); }
};

/// engine::fp16_cache's interface on kv1.
class packed_cache {
public:
    packed_cache(const engine::shape& s, std::size_t capacity, kv1::kv_format format)
        : head_dim_(s.head_dim),
          cache_(kv1::uniform_cache(s.layers, {s.kv_heads, s.head_dim, s.head_dim, format, format},
                                    capacity)),  // kv1
          sequence_(cache_.create_sequence()) {} // kv1: one handle per conversation

    void append(std::size_t layer, const engine::head_tensor& k, const engine::head_tensor& v,
                engine::thread_pool& pool) {
        cache_.append(sequence_, layer, view<kv1::tensor_view>(k), view<kv1::tensor_view>(v),
                      lent_threads{pool}); // kv1
    }

    void attend(std::size_t layer, const engine::head_tensor& q, const engine::head_tensor& out,
                engine::thread_pool& pool) const {
        cache_.attend(sequence_, layer, view<kv1::tensor_view>(q), view<kv1::mutable_tensor_view>(out), {},
                      lent_threads{pool}); // kv1
    }

    void end_step() { cache_.commit(sequence_); } // kv1: what rollback() returns to

    [[nodiscard]] std::size_t bytes() const { return cache_.statistics(sequence_).bytes_stored; } // kv1

private:
    // kv1: a view of the engine's tensor, with its strides; nothing is copied.
    template <class View>
    View view(const engine::head_tensor& t) const {
        return {t.data,
                t.tokens,
                t.heads,
                head_dim_,
                static_cast<std::ptrdiff_t>(t.token_stride),
                static_cast<std::ptrdiff_t>(head_dim_)};
    }

    std::size_t head_dim_;
    kv1::kv_cache cache_;       // kv1
    kv1::sequence_id sequence_; // kv1
};

struct outcome {
    std::vector<std::vector<float>> logits; // [step][word]
    std::size_t bytes = 0;
};

int best_of(const std::vector<float>& logits) {
    return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// The engine's loop: the prompt in one call, then token by token. It is the same for every cache. An empty
// `text` gets the tokens that the engine chooses.
template <class Cache>
outcome decode(const engine::model& model, Cache cache, std::vector<int>& text, std::size_t steps,
               engine::thread_pool& pool) {
    const bool generate = text.empty();
    const std::vector<int> prompt{1, 7, 42, 3, 3, 80, 11, 5, 64, 29, 17, 2, 33, 90, 8, 51, 6};
    outcome result;
    result.logits.push_back(model.forward(prompt, 0, cache, pool));
    for (std::size_t step = 0; step < steps; ++step) {
        if (generate)
            text.push_back(best_of(result.logits.back()));
        result.logits.push_back(model.forward({&text[step], 1}, prompt.size() + step, cache, pool));
    }
    result.bytes = cache.bytes();
    return result;
}

struct comparison {
    float largest = 0; // largest difference of two logits
    std::size_t same_choice = 0;
};

comparison compare(const outcome& a, const outcome& b) {
    comparison c;
    for (std::size_t i = 0; i < a.logits.size(); ++i) {
        for (std::size_t j = 0; j < a.logits[i].size(); ++j)
            c.largest = std::max(c.largest, std::fabs(a.logits[i][j] - b.logits[i][j]));
        c.same_choice += best_of(a.logits[i]) == best_of(b.logits[i]) ? 1u : 0u;
    }
    return c;
}

} // namespace

int main() {
    constexpr std::size_t steps = 120, capacity = 256;
    const engine::model model{engine::shape{}};
    engine::thread_pool pool(2);
    std::vector<int> text;
    const outcome own = decode(model, engine::fp16_cache(model.dimensions(), capacity), text, steps, pool);
    std::printf("own fp16 cache: %zu bytes\n", own.bytes);

    bool good = true;
    for (const kv1::kv_format format :
         {kv1::kv_format::fp16, kv1::kv_format::affine4, kv1::kv_format::affine2}) {
        const outcome packed =
            decode(model, packed_cache(model.dimensions(), capacity, format), text, steps, pool);
        const comparison c = compare(own, packed);
        std::printf("kv1 %-8s     : %zu bytes, %.2fx smaller; %zu of %zu choices the same, logits differ by "
                    "up to %.2g\n",
                    std::string(to_string(format)).c_str(), packed.bytes,
                    static_cast<double>(own.bytes) / static_cast<double>(packed.bytes), c.same_choice,
                    steps + 1, static_cast<double>(c.largest));
        // Both caches hold the same fp16 numbers and sum them in different orders. That may round a later key
        // or value to the next fp16 number, which changes it by 2^-11 of its size. Logits of size 4 then
        // change by less than 2^-7 in all.
        if (format == kv1::kv_format::fp16)
            good = c.largest < 0x1p-7f && packed.bytes == own.bytes;
    }
    std::puts(good ? "ok" : "FAILED: kv1's fp16 does not do what the engine's own cache does");
    return good ? 0 : 1;
}
