// SPDX-License-Identifier: Apache-2.0
//
// libllama as its users call it, with its cache on a device or on none. Errors end a test.
#pragma once

#include <ggml-backend.h>
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace client {

using tokens = std::vector<llama_token>;

struct free_model {
    void operator()(llama_model* m) const { llama_model_free(m); }
};
struct free_context {
    void operator()(llama_context* c) const { llama_free(c); }
};

/// The backend's device, null where it did not load.
inline ggml_backend_dev_t kv1_device() {
    static ggml_backend_dev_t device = [] {
        llama_log_set(
            [](ggml_log_level level, const char* text, void*) {
                if (level >= GGML_LOG_LEVEL_ERROR || std::getenv("KV1_TEST_LOG") != nullptr ||
                    std::string(text).starts_with("kv1:"))
                    std::fputs(text, stderr);
            },
            nullptr);
        llama_backend_init();
        ggml_backend_load(std::getenv("KV1_TEST_BACKEND"));
        return ggml_backend_dev_by_name("KV1");
    }();
    return device;
}

/// KV1_TEST_THREADS, for tests that do not say how many: 1 where it is not set.
inline int default_threads() {
    const char* const text = std::getenv("KV1_TEST_THREADS");
    return text != nullptr ? std::max(1, std::atoi(text)) : 1;
}

struct options {
    std::uint32_t cells = 512, sequences = 1, ubatch = 64;
    bool unified = true;
    int threads = default_threads();
    ggml_type keys = GGML_TYPE_F16, values = GGML_TYPE_F16;
    llama_flash_attn_type flash = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    ggml_backend_sched_eval_callback callback = nullptr;
    void* user = nullptr;
};

/// A token of a batch.
struct place {
    llama_token token;
    llama_pos position;
    std::vector<llama_seq_id> sequences = {0};
};

class session {
public:
    /// policy: of KV1_POLICY; null: llama.cpp's own cache on the CPU.
    session(const std::string& file, const char* policy, options o = {}) {
        ggml_backend_dev_t devices[] = {policy != nullptr ? kv1_device() : nullptr, nullptr};
        (void)kv1_device();
        llama_model_params m = llama_model_default_params();
        m.devices = devices;
        // weights as they are in the file: the same products on both sides
        m.use_extra_bufts = false;
        m.n_gpu_layers = policy != nullptr ? 999 : 0;
        model_.reset(llama_model_load_from_file(file.c_str(), m));
        if (model_ == nullptr)
            throw std::runtime_error("the model is not loaded: " + file);
        if (policy != nullptr)
            ::setenv("KV1_POLICY", policy, 1);
        llama_context_params c = llama_context_default_params();
        c.n_ctx = o.cells;
        c.n_batch = o.cells;
        c.n_ubatch = o.ubatch;
        c.n_seq_max = o.sequences;
        c.kv_unified = o.unified;
        c.n_threads = c.n_threads_batch = o.threads;
        c.type_k = o.keys;
        c.type_v = o.values;
        c.flash_attn_type = o.flash;
        c.offload_kqv = policy != nullptr;
        c.cb_eval = o.callback;
        c.cb_eval_user_data = o.user;
        context_.reset(llama_init_from_model(model_.get(), c));
        if (context_ == nullptr)
            throw std::runtime_error("no context");
    }

    [[nodiscard]] llama_context* context() { return context_.get(); }
    [[nodiscard]] llama_memory_t memory() { return llama_get_memory(context_.get()); }
    [[nodiscard]] std::size_t vocabulary() const {
        return static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model_.get())));
    }

    int try_decode(const std::vector<place>& places) {
        llama_batch b = llama_batch_init(static_cast<int>(places.size()), 0, 8);
        b.n_tokens = static_cast<int>(places.size());
        for (std::size_t i = 0; i < places.size(); ++i) {
            b.token[i] = places[i].token;
            b.pos[i] = places[i].position;
            b.n_seq_id[i] = static_cast<int>(places[i].sequences.size());
            for (std::size_t s = 0; s < places[i].sequences.size(); ++s)
                b.seq_id[i][s] = places[i].sequences[s];
            b.logits[i] = 1;
        }
        const int status = llama_decode(context_.get(), b);
        llama_batch_free(b);
        count_ = places.size();
        return status;
    }
    /// Logits of all tokens of the batch.
    std::vector<float> decode(const std::vector<place>& places) {
        if (try_decode(places) != 0)
            throw std::runtime_error("llama_decode");
        std::vector<float> all;
        for (std::size_t i = 0; i < count_; ++i) {
            const float* const row = llama_get_logits_ith(context_.get(), static_cast<int>(i));
            all.insert(all.end(), row, row + vocabulary());
        }
        return all;
    }
    /// A run of tokens of one sequence.
    std::vector<float> decode(std::span<const llama_token> run, llama_pos first, llama_seq_id sequence = 0) {
        std::vector<place> places;
        for (std::size_t i = 0; i < run.size(); ++i)
            places.push_back({run[i], first + static_cast<llama_pos>(i), {sequence}});
        return decode(places);
    }
    std::vector<std::uint8_t> save(llama_seq_id sequence = 0) {
        std::vector<std::uint8_t> state(llama_state_seq_get_size(context_.get(), sequence));
        state.resize(llama_state_seq_get_data(context_.get(), state.data(), state.size(), sequence));
        return state;
    }
    bool restore(const std::vector<std::uint8_t>& state, llama_seq_id sequence = 0) {
        return llama_state_seq_set_data(context_.get(), state.data(), state.size(), sequence) != 0;
    }

private:
    std::unique_ptr<llama_model, free_model> model_;
    std::unique_ptr<llama_context, free_context> context_;
    std::size_t count_ = 0;
};

/// Of a tensor of fp32 numbers that lie in a row: these numbers.
inline std::vector<float> floats_of(const ggml_tensor* t) {
    const auto* const data = static_cast<const float*>(t->data);
    return {data, data + ggml_nelements(t)};
}
/// The name of the cache's tensor that a tensor is a view of, such as "cache_k_l2".
inline std::string viewed_name(const ggml_tensor* t) {
    while (t->view_src != nullptr)
        t = t->view_src;
    return t->name;
}

/// Tokens of the models that tiny_models.py writes.
constexpr std::size_t tiny_vocabulary = 256;

/// The mean KL divergence of rows of logits from those of a reference, in nats.
inline double divergence(const std::vector<float>& reference, const std::vector<float>& other,
                         std::size_t width) {
    if (reference.size() != other.size())
        throw std::runtime_error("logits of other sizes");
    double sum = 0;
    const auto log_sum = [&](const float* row) {
        const float top = *std::max_element(row, row + width);
        double total = 0;
        for (std::size_t i = 0; i < width; ++i)
            total += std::exp(static_cast<double>(row[i] - top));
        return static_cast<double>(top) + std::log(total);
    };
    for (std::size_t at = 0; at < reference.size(); at += width) {
        const double a = log_sum(reference.data() + at), b = log_sum(other.data() + at);
        for (std::size_t i = 0; i < width; ++i) {
            const double p = reference[at + i] - a, q = other[at + i] - b;
            sum += std::exp(p) * (p - q);
        }
    }
    return sum / static_cast<double>(reference.size() / width);
}

} // namespace client
