// SPDX-License-Identifier: Apache-2.0
//
// kv1 in a ggml graph: a node that writes and a node that attends for each layer, on ggml's public interface alone
// (ggml_custom_4d). For engines that build their graphs themselves.
//
//   kv1_ggml::graph_cache cache(std::move(description));     // kv1/slot_store_description.hpp
//
//   // building a step's graph; k, v, q are [channels][heads][tokens] in ggml's order, keys and queries after RoPE
//   ggml_tensor* written = cache.write(ctx, layer, k, v);
//   ggml_tensor* out = cache.attend(ctx, layer, q, written, options);
//
//   // computing it
//   cache.begin({slots, streams});          // where the step's tokens go, and what its queries see
//   ggml_backend_graph_compute(backend, graph);
//   kv1::status done = cache.end(sequences);
//
// Threads. ggml enters a node with all its threads at once. One of them plans the call (kv1/work_plan.hpp), all of them
// do its tasks. A graph may be computed again with another step of as many tokens.
#pragma once

#include <kv1/slot_store.hpp>

#include <ggml.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace kv1_ggml {

/// What the nodes of a graph do when it is computed. Spans are read until graph_cache::end().
struct graph_step {
    std::span<const std::uint32_t> slots;      ///< of the step's tokens
    std::span<const kv1::slot_stream> streams; ///< of the step's queries
};

class graph_cache {
public:
    /// Throws kv1::error.
    explicit graph_cache(kv1::slot_store_description description)
        : store_(std::move(description)), writes_(store_.layers()), reads_(store_.layers()) {}
    graph_cache(const graph_cache&) = delete; // graphs hold its address
    graph_cache& operator=(const graph_cache&) = delete;

    [[nodiscard]] kv1::slot_store& store() noexcept { return store_; }
    [[nodiscard]] const kv1::slot_store& store() const noexcept { return store_; }

    /// The node that stores a step's keys and values, [channels][kv heads][tokens] of fp32, fp16 or bf16 with contiguous
    /// channels. What comes back holds nothing; attend() takes it, so that it comes first. A layer is written to and
    /// read once in a graph. Throws std::out_of_range for a layer that is not there.
    [[nodiscard]] ggml_tensor* write(ggml_context* ctx, std::size_t layer, ggml_tensor* k, ggml_tensor* v) {
        node& n = place(writes_, layer);
        ggml_tensor* sources[] = {k, v};
        return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, sources, 2, run_write, GGML_N_TASKS_MAX, &n);
    }

    /// The node that attends: queries [channels][heads][tokens] to outputs [value channels][heads][tokens], fp32. options
    /// are kept for the layer until attend() is called for it again; what their spans point to is the caller's.
    [[nodiscard]] ggml_tensor* attend(ggml_context* ctx, std::size_t layer, ggml_tensor* q,
                                      ggml_tensor* written, const kv1::slot_attention_options& options = {}) {
        node& n = place(reads_, layer);
        n.options = options;
        ggml_tensor* sources[] = {q, written};
        const auto channels = static_cast<std::int64_t>(store_.description().layers[layer].value_dim);
        return ggml_custom_4d(ctx, GGML_TYPE_F32, channels, q->ne[1], q->ne[2], 1, sources, 2, run_attend,
                              GGML_N_TASKS_MAX, &n);
    }

    /// Before a graph is computed.
    void begin(const graph_step& step) {
        step_ = step;
        failure_ = {};
    }
    /// After that: the first failure of a node, whose outputs are then unspecified, or that of the step's end
    /// (slot_store::settle()). After a failure the step's slots may be written to again.
    [[nodiscard]] kv1::status end(std::span<const kv1::slot_sequence> sequences) {
        return failure_ ? store_.try_settle(sequences) : failure_;
    }

private:
    // One call of the store, done by all threads of ggml together.
    struct node {
        graph_cache* cache = nullptr;
        std::size_t layer = 0;
        kv1::slot_attention_options options = {};
        std::optional<kv1::work_plan> plan = {};
        std::size_t phases = 0;
        std::atomic<int> arrived{0};
        std::atomic<unsigned> passed{0}; // barriers

        // Waits until all threads are here. What they did before, all of them see afterwards.
        void wait(int threads) noexcept {
            const unsigned before = passed.load(std::memory_order_relaxed);
            if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
                arrived.store(0, std::memory_order_relaxed);
                passed.fetch_add(1, std::memory_order_release);
                return;
            }
            for (int spins = 0; passed.load(std::memory_order_acquire) == before; ++spins)
                if (spins > 1000)
                    std::this_thread::yield(); // more threads than processors
        }

        template <class MakePlan>
        void run(int thread, int threads, MakePlan make_plan) noexcept {
            if (thread == 0) {
                kv1::result<kv1::work_plan> made = make_plan();
                if (made)
                    plan.emplace(std::move(*made));
                else
                    cache->fail(made.reason());
                phases = plan ? plan->phases() : 0;
            }
            wait(threads);
            const std::size_t all = phases;
            for (std::size_t phase = 0; phase < all; ++phase) {
                const std::size_t tasks = plan->tasks(phase);
                for (auto i = static_cast<std::size_t>(thread); i < tasks;
                     i += static_cast<std::size_t>(threads))
                    plan->run(phase, i);
                wait(threads);
            }
            if (thread == 0 && plan) {
                if (const kv1::status s = plan->finish(); !s)
                    cache->fail(s);
                plan.reset();
            }
        }
    };

    [[nodiscard]] node& place(std::vector<std::unique_ptr<node>>& nodes, std::size_t layer) {
        std::unique_ptr<node>& n = nodes.at(layer);
        if (n == nullptr)
            n = std::make_unique<node>();
        n->cache = this;
        n->layer = layer;
        return *n;
    }
    void fail(const kv1::status& s) noexcept {
        if (failure_)
            failure_ = s;
    }

    // [channels][heads][tokens] as kv1 sees it
    template <class View, class Byte>
    static View view_of(const ggml_tensor* t, Byte* data) noexcept {
        const auto size = static_cast<std::ptrdiff_t>(ggml_type_size(t->type));
        const auto head = static_cast<std::ptrdiff_t>(t->nb[1]) / size,
                   token = static_cast<std::ptrdiff_t>(t->nb[2]) / size;
        const auto as = [&](auto* p) { return View(p, t->ne[2], t->ne[1], t->ne[0], token, head); };
        switch (t->type) {
        case GGML_TYPE_F16:
            return as(reinterpret_cast<scalar_like<kv1::float16, Byte>*>(data));
        case GGML_TYPE_BF16:
            return as(reinterpret_cast<scalar_like<kv1::bfloat16, Byte>*>(data));
        default:
            return as(reinterpret_cast<scalar_like<float, Byte>*>(data));
        }
    }
    template <class T, class Byte>
    using scalar_like = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    static kv1::tensor_view view(const ggml_tensor* t) noexcept {
        return view_of<kv1::tensor_view>(t, static_cast<const std::byte*>(t->data));
    }

    static void run_write(ggml_tensor* out, int thread, int threads, void* state) noexcept {
        node& n = *static_cast<node*>(state);
        n.run(thread, threads, [&] {
            return n.cache->store_.try_plan_write(n.layer, n.cache->step_.slots, view(out->src[0]),
                                                  view(out->src[1]));
        });
    }
    static void run_attend(ggml_tensor* out, int thread, int threads, void* state) noexcept {
        node& n = *static_cast<node*>(state);
        n.run(thread, threads, [&] {
            return n.cache->store_.try_plan_attention(
                n.layer, n.cache->step_.streams, view(out->src[0]),
                view_of<kv1::mutable_tensor_view>(out, static_cast<std::byte*>(out->data)), n.options);
        });
    }

    kv1::slot_store store_;
    std::vector<std::unique_ptr<node>> writes_, reads_;
    graph_step step_ = {};
    kv1::status failure_ = {};
};

} // namespace kv1_ggml
