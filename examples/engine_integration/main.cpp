// SPDX-License-Identifier: Apache-2.0
//
// An engine with a block manager of its own replaces its fp16 cache by kv1's slots. engine.hpp is the engine. Below is a
// class with the interface of the engine's own cache; lines that call kv1 are marked with "kv1". The engine's blocks are
// kv1's blocks, and its slots kv1's slots, so there is nothing to translate and nothing to keep beside them.
//
// Two requests run in the same steps. When one ends, its blocks go to a third. The same tokens run with the engine's own
// cache, with kv1 storing fp16, and with kv1 storing fewer bits, with fp16 sinks and a window. The program fails if kv1's
// fp16 differs from the engine's. Weights are random, so how often fewer bits choose the same token says nothing about a
// real model.
#include "engine.hpp"

#include <kv1/slot_store.hpp> // kv1

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

namespace {

constexpr std::size_t block_tokens = 32, blocks = 14, slots = blocks * block_tokens;

// kv1: work runs on the engine's threads.
struct lent_threads {
    engine::thread_pool& pool;
    void operator()(std::size_t count, kv1::task_view task) const { pool.run(count, task); }
};

/// engine::fp16_cache's interface on kv1.
class packed_cache {
public:
    packed_cache(const engine::shape& s, kv1::kv_format format)
        : head_dim_(s.head_dim), store_(describe(s, format)) {}

    void write(std::size_t layer, std::span<const std::uint32_t> to, const engine::head_tensor& k,
               const engine::head_tensor& v, engine::thread_pool& pool) {
        store_.write(layer, to, view<kv1::tensor_view>(k), view<kv1::tensor_view>(v),
                     lent_threads{pool}); // kv1
    }

    void attend(std::size_t layer, std::span<const engine::rows_of_request> rows,
                const engine::head_tensor& q, const engine::head_tensor& out,
                engine::thread_pool& pool) const {
        std::vector<kv1::slot_stream> streams; // kv1: one a request
        for (const engine::rows_of_request& r : rows)
            streams.push_back({r.tokens, kv1::slot_view::table(r.of->blocks, r.of->length),
                               kv1::slot_mask::causal()}); // kv1
        store_.attend(layer, streams, view<kv1::tensor_view>(q), view<kv1::mutable_tensor_view>(out), {},
                      lent_threads{pool}); // kv1
    }

    void end_step(std::span<const engine::rows_of_request> rows) {
        std::vector<kv1::slot_sequence> sequences;
        for (const engine::rows_of_request& r : rows)
            sequences.push_back({kv1::slot_view::table(r.of->blocks, r.of->length)}); // kv1
        store_.settle(sequences); // kv1: tokens that left the window are seen as codes from now on
    }

    [[nodiscard]] std::size_t bytes_of(std::size_t tokens) const {
        std::size_t bytes = 0;
        for (std::size_t layer = 0; layer < store_.layers(); ++layer)
            bytes += tokens * store_.raw_bytes(layer); // kv1
        return bytes;
    }

private:
    static kv1::slot_store_description describe(const engine::shape& s, kv1::kv_format format) {
        kv1::slot_store_description d;
        d.layers.assign(s.layers, {s.kv_heads, s.head_dim, s.head_dim, format, format}); // kv1
        d.slots = slots;
        d.page_tokens = block_tokens; // kv1: the engine's blocks are kv1's
        d.fp16_slots = 128;           // kv1: three requests' sinks and windows, and a prompt
        d.fp16_sinks = 4;
        d.fp16_window = 16;
        return d;
    }

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
    kv1::slot_store store_; // kv1
};

struct outcome {
    std::vector<std::vector<float>> logits; // of every step and request
    std::size_t bytes = 0;                  // of a thousand tokens
};

int best_of(const std::vector<float>& logits) {
    return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// The engine's loop. It is the same for every cache. `text` has the tokens that requests go on with, in the order in
// which they are needed; where it ends, the engine chooses, and writes them there.
template <class Cache>
outcome serve(const engine::model& model, Cache cache, std::vector<int>& text, engine::thread_pool& pool) {
    const std::vector<int> prompts[] = {{1, 7, 42, 3, 3, 80, 11, 5, 64, 29, 17, 2, 33, 90, 8, 51, 6},
                                        {5, 5, 20, 71, 9},
                                        {88, 12, 30, 4, 61, 2, 2, 19, 77}};
    engine::block_manager manager(blocks, block_tokens);
    engine::request requests[3];
    std::vector<int> next[3] = {prompts[0], prompts[1], prompts[2]}; // tokens that the next step computes
    std::size_t at = 0;
    outcome result;
    for (std::size_t step = 0; step < 90; ++step) {
        if (step == 50)
            manager.release(requests[0]); // its blocks go to the third request
        engine::step now;
        std::vector<std::size_t> running;
        for (const std::size_t r : {std::size_t{0}, std::size_t{1}, std::size_t{2}}) {
            if (r == 0 ? step >= 50 : r == 2 && step < 50)
                continue;
            now.add(requests[r], next[r], manager);
            running.push_back(r);
        }
        std::vector<std::vector<float>> logits = model.forward(now, cache, pool);
        for (std::size_t i = 0; i < running.size(); ++i) {
            if (at == text.size())
                text.push_back(best_of(logits[i]));
            next[running[i]] = {text[at++]};
            result.logits.push_back(std::move(logits[i]));
        }
    }
    result.bytes = cache.bytes_of(1000);
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
    const engine::model model{engine::shape{}};
    engine::thread_pool pool(2);
    std::vector<int> text;
    const outcome own = serve(model, engine::fp16_cache(model.dimensions(), slots, block_tokens), text, pool);
    std::printf("own fp16 cache: %zu bytes for 1000 tokens\n", own.bytes);

    bool good = true;
    for (const kv1::kv_format format :
         {kv1::kv_format::fp16, kv1::kv_format::affine4, kv1::kv_format::affine2}) {
        const outcome packed = serve(model, packed_cache(model.dimensions(), format), text, pool);
        const comparison c = compare(own, packed);
        std::printf("kv1 %-8s     : %zu bytes, %.2fx smaller; %zu of %zu choices the same, logits differ by "
                    "up to %.2g\n",
                    std::string(to_string(format)).c_str(), packed.bytes,
                    static_cast<double>(own.bytes) / static_cast<double>(packed.bytes), c.same_choice,
                    own.logits.size(), static_cast<double>(c.largest));
        // Both caches hold the same fp16 numbers and sum them in different orders. That may round a later key
        // or value to the next fp16 number, which changes it by 2^-11 of its size. Logits of size 4 then
        // change by less than 2^-7 in all.
        if (format == kv1::kv_format::fp16)
            good = c.largest < 0x1p-7f && packed.bytes == own.bytes;
    }
    std::puts(good ? "ok" : "FAILED: kv1's fp16 does not do what the engine's own cache does");
    return good ? 0 : 1;
}
