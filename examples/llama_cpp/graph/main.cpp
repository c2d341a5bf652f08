// SPDX-License-Identifier: Apache-2.0
//
// An engine on ggml with a cache of kv1: it reads a GGUF file of the Llama family and writes a text.
//
//   llama-graph MODEL.gguf --kv c3+ls+had,c2+ls+had@4:32 --prompt "The history of the city"
#include "gguf_model.hpp"
#include "graph_cache.hpp"
#include "llama_graph.hpp"
#include "tokenizer.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/status.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iostream>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

struct options {
    std::string model, policy = "safe", prompt = "The history of the city";
    std::size_t tokens = 60, context = 4096, batch = 256;
    int threads = static_cast<int>(std::thread::hardware_concurrency());
};

kv1::slot_store_description describe(const kv1_ggml::llama_shape& m, const options& o) {
    const kv1::cache_description shape =
        kv1::describe_cache(kv1::parse_policy(o.policy),
                            kv1::uniform_cache(m.layers, {m.kv_heads, m.head_dim, m.head_dim}, o.context));
    kv1::slot_store_description d;
    d.layers = shape.layers;
    d.slots = o.context;
    d.fp16_sinks = shape.fp16_sinks;
    d.fp16_window = shape.fp16_window;
    if (d.fp16_sinks + d.fp16_window != 0)
        d.fp16_slots = d.fp16_sinks + d.fp16_window + o.batch;
    return d;
}

// One sequence, whose token at position p lies in slot p.
class session {
public:
    session(const options& o)
        : batch_(o.batch), model_(o.model, o.threads), cache_(describe(model_.shape(), o)) {}

    [[nodiscard]] std::int32_t next_after(std::span<const std::int32_t> ids) {
        std::vector<float> logits;
        for (std::size_t i = 0; i < ids.size(); i += batch_) {
            const std::span<const std::int32_t> some = ids.subspan(i, std::min(batch_, ids.size() - i));
            std::vector<std::uint32_t> slots(some.size());
            std::iota(slots.begin(), slots.end(), static_cast<std::uint32_t>(length_));
            const kv1::slot_view seen = kv1::slot_view::range(0, length_ + some.size());
            const kv1::slot_stream stream{some.size(), seen, kv1::slot_mask::causal()};
            const kv1::slot_sequence all{seen};
            cache_.begin({slots, {&stream, 1}});
            logits = model_.run(
                [&](ggml_context* ctx, std::size_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
                    return cache_.attend(ctx, layer, q, cache_.write(ctx, layer, k, v));
                },
                some, length_);
            if (const kv1::status done = cache_.end({&all, 1}); !done)
                throw kv1::error(done);
            length_ += some.size();
        }
        return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    [[nodiscard]] std::size_t length() const noexcept { return length_; }
    [[nodiscard]] std::size_t bytes_per_token() const {
        std::size_t bytes = 0;
        for (std::size_t l = 0; l < cache_.store().layers(); ++l)
            bytes += cache_.store().raw_bytes(l);
        return bytes;
    }
    [[nodiscard]] std::size_t fp16_bytes_per_token() const {
        const kv1_ggml::llama_shape& m = model_.shape();
        return m.layers * m.kv_heads * m.head_dim * 2 * 2;
    }

private:
    std::size_t batch_, length_ = 0;
    kv1_ggml::llama_graph model_;
    kv1_ggml::graph_cache cache_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void generate(const options& o) {
    const kv1_lm::gguf file = kv1_lm::gguf::read(o.model);
    const kv1_lm::tokenizer words = kv1_lm::tokenizer::parse(kv1_lm::tokenizer_of(file).dump(), o.model);
    session s(o);
    const std::vector<std::int32_t> prompt = words.encode(o.prompt);
    if (prompt.empty() || prompt.size() + o.tokens > o.context)
        throw std::runtime_error("the prompt is empty, or longer than the context");
    std::cout << o.prompt << std::flush;
    kv1_lm::stream_decoder text(words);
    const auto start = std::chrono::steady_clock::now();
    std::int32_t word = s.next_after(prompt);
    const double prefill = seconds_since(start);
    for (std::size_t i = 0; i < o.tokens; ++i) {
        std::cout << text.push(word) << std::flush;
        word = s.next_after({&word, 1});
    }
    const double decode = seconds_since(start) - prefill;
    std::cout << "\n\n"
              << prompt.size() << " tokens of prompt in " << prefill << " s, then "
              << static_cast<double>(o.tokens) / decode << " tokens/s; " << s.bytes_per_token()
              << " bytes a token, fp16 takes " << s.fp16_bytes_per_token() << '\n';
}

} // namespace

int main(int argc, char** argv) {
    options o;
    CLI::App app("Runs a GGUF model of the Llama family on ggml, with a cache of kv1");
    app.add_option("model", o.model, "A GGUF file")->required();
    app.add_option("--kv", o.policy, "The cache's policy, or a preset that needs no calibration");
    app.add_option("--prompt", o.prompt, "What the text begins with");
    app.add_option("--tokens", o.tokens, "How many to write");
    app.add_option("--context", o.context, "Room for so many tokens");
    app.add_option("--batch", o.batch, "Tokens of a prompt that are run at once")->check(CLI::PositiveNumber);
    app.add_option("--threads", o.threads, "Of ggml")->check(CLI::PositiveNumber);
    CLI11_PARSE(app, argc, argv);
    try {
        generate(o);
    } catch (const std::exception& e) {
        std::cerr << "llama-graph: " << e.what() << '\n';
        return 1;
    }
}
