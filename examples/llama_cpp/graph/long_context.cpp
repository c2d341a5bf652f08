// SPDX-License-Identifier: Apache-2.0
//
// The time of a decoded token, and the memory, at the end of a long context: with caches of kv1, and with ggml's own in
// f16, q8_0 or q4_0. The cache is filled with random keys and values instead of by a forward pass, which would take
// days; a layer's attention does the same work on them.
//
//   long-context MODEL.gguf --depth 131072 --cache safe --cache ggml:q4_0 --cache ggml:f16
#include "graph_cache.hpp"
#include "llama_graph.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/status.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using kv1_ggml::llama_shape;

constexpr std::size_t chunk = 1024; // tokens that are filled in at once

// Tokens at the end of a context, whatever holds it.
class long_cache {
public:
    long_cache() = default;
    long_cache(const long_cache&) = delete;
    long_cache& operator=(const long_cache&) = delete;
    virtual ~long_cache() = default;
    // Adds n <= chunk tokens to all layers: fp32 [tokens][kv heads][channels].
    virtual void fill(std::span<const float> keys, std::span<const float> values, std::size_t n) = 0;
    // Around a token's graph.
    virtual void begin() = 0;
    virtual ggml_tensor* attend(ggml_context* ctx, std::size_t layer, ggml_tensor* q, ggml_tensor* k,
                                ggml_tensor* v) = 0;
    virtual void end() = 0;
    [[nodiscard]] virtual std::size_t bytes_per_token() const = 0;
};

// Starts threads for a call: enough for filling, which is not measured.
struct fresh_threads {
    int count;
    void operator()(std::size_t tasks, kv1::task_view task) const {
        std::vector<std::thread> all;
        const auto n = static_cast<std::size_t>(count);
        for (std::size_t t = 0; t < n; ++t)
            all.emplace_back([&, t] {
                for (std::size_t i = t; i < tasks; i += n)
                    task(i);
            });
        for (std::thread& t : all)
            t.join();
    }
};

class kv1_cache final : public long_cache {
public:
    kv1_cache(const llama_shape& m, const std::string& policy, std::size_t tokens, int threads)
        : model_(m), cache_(describe(m, policy, tokens)), threads_{threads} {}

    void fill(std::span<const float> keys, std::span<const float> values, std::size_t n) override {
        std::vector<std::uint32_t> slots(n);
        std::iota(slots.begin(), slots.end(), static_cast<std::uint32_t>(length_));
        for (std::size_t l = 0; l < model_.layers; ++l)
            cache_.store().write(l, slots, {keys.data(), n, model_.kv_heads, model_.head_dim},
                                 {values.data(), n, model_.kv_heads, model_.head_dim}, threads_);
        length_ += n;
        const kv1::slot_sequence all{kv1::slot_view::range(0, length_)};
        cache_.store().settle({&all, 1});
    }
    void begin() override {
        slot_ = static_cast<std::uint32_t>(length_++);
        stream_ = {1, kv1::slot_view::range(0, length_), kv1::slot_mask::causal()};
        cache_.begin({{&slot_, 1}, {&stream_, 1}});
    }
    ggml_tensor* attend(ggml_context* ctx, std::size_t layer, ggml_tensor* q, ggml_tensor* k,
                        ggml_tensor* v) override {
        return cache_.attend(ctx, layer, q, cache_.write(ctx, layer, k, v));
    }
    void end() override {
        const kv1::slot_sequence all{stream_.slots};
        if (const kv1::status s = cache_.end({&all, 1}); !s)
            throw kv1::error(s);
    }
    [[nodiscard]] std::size_t bytes_per_token() const override {
        std::size_t bytes = 0;
        for (std::size_t l = 0; l < model_.layers; ++l)
            bytes += cache_.store().raw_bytes(l);
        return bytes;
    }

private:
    static kv1::slot_store_description describe(const llama_shape& m, const std::string& policy,
                                                std::size_t tokens) {
        const kv1::cache_description shape =
            kv1::describe_cache(kv1::parse_policy(policy),
                                kv1::uniform_cache(m.layers, {m.kv_heads, m.head_dim, m.head_dim}, tokens));
        kv1::slot_store_description d;
        d.layers = shape.layers;
        d.slots = tokens;
        d.fp16_sinks = shape.fp16_sinks;
        d.fp16_window = shape.fp16_window;
        if (d.fp16_sinks + d.fp16_window != 0)
            d.fp16_slots = d.fp16_sinks + d.fp16_window + chunk;
        return d;
    }

    llama_shape model_;
    kv1_ggml::graph_cache cache_;
    fresh_threads threads_;
    std::size_t length_ = 0;
    std::uint32_t slot_ = 0;
    kv1::slot_stream stream_ = {};
};

// As llama.cpp keeps it: a row for each token, written by SET_ROWS and read by FLASH_ATTN_EXT.
class ggml_cache final : public long_cache {
public:
    ggml_cache(const llama_shape& m, ggml_type type, std::size_t tokens)
        : model_(m), type_(type), rows_(static_cast<std::int64_t>((tokens + 255) / 256 * 256)),
          channels_(static_cast<std::int64_t>(m.kv_heads * m.head_dim)),
          owner_(make_context(m, type, rows_, channels_)) {
        for (std::size_t l = 0; l < m.layers; ++l) {
            keys_.push_back(ggml_new_tensor_2d(owner_.get(), type, channels_, rows_));
            values_.push_back(ggml_new_tensor_2d(owner_.get(), type, channels_, rows_));
        }
        mask_ = ggml_new_tensor_2d(owner_.get(), GGML_TYPE_F16, rows_, mask_rows);
        row_ = ggml_new_tensor_1d(owner_.get(), GGML_TYPE_I64, 1);
        const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
        std::fill_n(static_cast<ggml_fp16_t*>(mask_->data), ggml_nelements(mask_), hidden);
    }
    void fill(std::span<const float> keys, std::span<const float> values, std::size_t n) override {
        const std::size_t bytes = ggml_row_size(type_, channels_) * n;
        for (const auto& [from, to] : {std::pair(keys, &keys_), std::pair(values, &values_)}) {
            std::vector<std::byte> packed(bytes);
            ggml_quantize_chunk(type_, from.data(), packed.data(), 0, static_cast<std::int64_t>(n), channels_,
                                nullptr);
            for (ggml_tensor* t : *to)
                std::memcpy(static_cast<std::byte*>(t->data) + static_cast<std::size_t>(length_) * t->nb[1],
                            packed.data(), bytes);
        }
        for (std::size_t i = 0; i < n; ++i)
            show(length_++);
    }
    void begin() override {
        *static_cast<std::int64_t*>(row_->data) = length_;
        show(length_++);
    }
    ggml_tensor* attend(ggml_context* ctx, std::size_t layer, ggml_tensor* q, ggml_tensor* k,
                        ggml_tensor* v) override {
        const auto heads = static_cast<std::int64_t>(model_.kv_heads),
                   dim = static_cast<std::int64_t>(model_.head_dim);
        const auto all = [&](ggml_tensor* rows, ggml_tensor* added) {
            ggml_tensor* written = ggml_set_rows(ctx, rows, ggml_reshape_2d(ctx, added, channels_, 1), row_);
            return ggml_view_3d(ctx, written, dim, rows_, heads, rows->nb[1], ggml_row_size(type_, dim), 0);
        };
        const float scale = 1.0f / std::sqrt(static_cast<float>(model_.head_dim));
        ggml_tensor* out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), all(keys_[layer], k),
                                               all(values_[layer], v), mask_, scale, 0.0f, 0.0f);
        return out; // [channels][heads][tokens]
    }
    void end() override {}
    [[nodiscard]] std::size_t bytes_per_token() const override {
        return 2 * model_.layers * ggml_row_size(type_, channels_);
    }

private:
    static constexpr std::int64_t mask_rows = 64; // ggml wants them padded

    struct deleter {
        void operator()(ggml_context* c) const noexcept { ggml_free(c); }
    };
    static ggml_context* make_context(const llama_shape& m, ggml_type type, std::int64_t rows,
                                      std::int64_t channels) {
        const std::size_t bytes = 2 * m.layers *
                                      (ggml_row_size(type, channels) * static_cast<std::size_t>(rows) +
                                       ggml_tensor_overhead() + 64) +
                                  static_cast<std::size_t>(rows * mask_rows) * 2 +
                                  4 * ggml_tensor_overhead() + 4096;
        ggml_context* c = ggml_init({.mem_size = bytes, .mem_buffer = nullptr, .no_alloc = false});
        if (c == nullptr)
            throw std::runtime_error("no memory for ggml's cache");
        return c;
    }
    void show(std::int64_t row) const {
        static_cast<ggml_fp16_t*>(mask_->data)[row] = 0; // zero in fp16, too
    }

    llama_shape model_;
    ggml_type type_;
    std::int64_t rows_, channels_, length_ = 0;
    std::unique_ptr<ggml_context, deleter> owner_;
    std::vector<ggml_tensor*> keys_, values_;
    ggml_tensor *mask_ = nullptr, *row_ = nullptr;
};

std::unique_ptr<long_cache> make_cache(const llama_shape& m, const std::string& name, std::size_t tokens,
                                       int threads) {
    if (name.rfind("ggml:", 0) != 0)
        return std::make_unique<kv1_cache>(m, name, tokens, threads);
    for (const ggml_type t : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0})
        if (name.substr(5) == ggml_type_name(t))
            return std::make_unique<ggml_cache>(m, t, tokens);
    throw std::runtime_error("ggml's caches are ggml:f16, ggml:q8_0 and ggml:q4_0");
}

// Of this process, in GiB; 0 where the system does not say.
double resident() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (word == "VmRSS:") {
            double kib = 0.0;
            status >> kib;
            return kib / (1024.0 * 1024.0);
        }
    return 0.0;
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void measure(kv1_ggml::llama_graph& model, const std::string& name, std::size_t depth, std::size_t tokens,
             int threads) {
    const llama_shape& m = model.shape();
    const double before = resident();
    const std::unique_ptr<long_cache> cache = make_cache(m, name, depth + tokens + 1, threads);
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    std::vector<float> keys(chunk * m.kv_heads * m.head_dim), values(keys.size());
    for (float& x : keys)
        x = normal(bits);
    for (float& x : values)
        x = normal(bits);
    for (std::size_t i = 0; i < depth; i += chunk)
        cache->fill(keys, values, std::min(chunk, depth - i));
    std::vector<double> times;
    for (std::size_t i = 0; i <= tokens; ++i) {
        const auto word = static_cast<std::int32_t>(i % m.words);
        const double start = seconds();
        cache->begin();
        const auto logits =
            model.run([&](auto... nodes) { return cache->attend(nodes...); }, {&word, 1}, depth + i);
        cache->end();
        if (i != 0) // the first meets cold memory
            times.push_back(seconds() - start);
    }
    std::sort(times.begin(), times.end());
    std::printf("%s,%zu,%zu,%.3f,%.2f,%.2f\n", name.c_str(), depth, cache->bytes_per_token(),
                times[times.size() / 2], resident() - before, resident());
    std::fflush(stdout);
}

} // namespace

int main(int argc, char** argv) {
    std::string file;
    std::vector<std::string> caches{"safe"};
    std::vector<std::size_t> depths{131072};
    std::size_t tokens = 5;
    int threads = static_cast<int>(std::thread::hardware_concurrency());
    CLI::App app("Measures a decoded token at the end of a long context");
    app.add_option("model", file, "A GGUF file")->required();
    app.add_option("--cache", caches, "A policy of kv1, or ggml:TYPE");
    app.add_option("--depth", depths, "Tokens that are there");
    app.add_option("--tokens", tokens, "Tokens to measure")->check(CLI::PositiveNumber);
    app.add_option("--threads", threads, "Of ggml")->check(CLI::PositiveNumber);
    CLI11_PARSE(app, argc, argv);
    try {
        kv1_ggml::llama_graph model(file, threads);
        std::puts("cache,depth,bytes per token,seconds per token,GiB of cache,GiB of process");
        measure(model, "ggml:f16", 0, tokens, threads); // what the model alone takes
        for (const std::size_t depth : depths)
            for (const std::string& name : caches)
                measure(model, name, depth, tokens, threads);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "long-context: %s\n", e.what());
        return 1;
    }
}
