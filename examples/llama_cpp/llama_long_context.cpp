// SPDX-License-Identifier: Apache-2.0
//
// The time of a decoded token, and the memory, at the end of a long context under libllama: with kv1's cache where
// GGML_BACKEND_PATH names libggml-kv1.so, or with llama.cpp's own. The context is not computed, which would take days
// for a large model. A short text is, and its saved state is restored over and over, each time at other positions: so
// keys are turned for positions that they do not stand at. A token's attention does the same work on them.
//
//   GGML_BACKEND_PATH=.../libggml-kv1.so llama-long-context MODEL.gguf --depth 131072
//   llama-long-context MODEL.gguf --depth 131072 --type q4_0
#include <ggml-backend.h>
#include <llama.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

struct free_model {
    void operator()(llama_model* m) const { llama_model_free(m); }
};
struct free_context {
    void operator()(llama_context* c) const { llama_free(c); }
};

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// GiB of the process that are in memory: all of it, and without files, such as the model's.
struct memory_use {
    double all = 0.0, own = 0.0;
};
memory_use resident() {
    memory_use use;
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
        double* const out = word == "VmRSS:" ? &use.all : word == "RssAnon:" ? &use.own : nullptr;
        if (out != nullptr && status >> *out)
            *out /= 1024.0 * 1024.0;
    }
    return use;
}

class long_context {
public:
    long_context(const std::string& file, ggml_type type, std::uint32_t cells, int threads) {
        ggml_backend_load_all();
        ggml_backend_dev_t devices[] = {ggml_backend_dev_by_name("KV1"), nullptr};
        on_kv1_ = devices[0] != nullptr;
        llama_model_params m = llama_model_default_params();
        m.devices = devices;
        m.use_extra_bufts = false; // weights as they are in the file
        m.n_gpu_layers = on_kv1_ ? 999 : 0;
        m.progress_callback = [](float, void*) { return true; }; // instead of dots
        model_.reset(llama_model_load_from_file(file.c_str(), m));
        if (model_ == nullptr)
            throw std::runtime_error("the model is not loaded");
        llama_context_params c = llama_context_default_params();
        c.n_ctx = cells;
        c.n_batch = c.n_ubatch = piece;
        c.n_seq_max = 2;
        c.kv_unified = true;
        c.n_threads = c.n_threads_batch = threads;
        c.type_k = c.type_v = type;
        c.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        c.offload_kqv = on_kv1_;
        context_.reset(llama_init_from_model(model_.get(), c));
        if (context_ == nullptr)
            throw std::runtime_error("there is no context");
    }
    [[nodiscard]] bool on_kv1() const { return on_kv1_; }

    // Fills cells with a text of `depth` tokens, in pieces.
    void fill(std::size_t depth) {
        std::vector<llama_token> text(piece);
        for (std::size_t i = 0; i < text.size(); ++i)
            text[i] = token(i);
        decode(text, 0, 1);
        std::vector<std::uint8_t> state(llama_state_seq_get_size(context_.get(), 1));
        if (llama_state_seq_get_data(context_.get(), state.data(), state.size(), 1) != state.size())
            throw std::runtime_error("the state is not saved");
        const std::size_t cells = first_cell(state);
        llama_memory_t memory = llama_get_memory(context_.get());
        for (std::size_t first = 0; first < depth; first += piece) {
            for (std::size_t i = 0; i < piece; ++i) {
                const auto at = static_cast<llama_pos>(first + i);
                std::memcpy(state.data() + cells + i * sizeof(saved_cell), &at, sizeof at);
            }
            if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), 1) != state.size())
                throw std::runtime_error("the state is not restored");
            llama_memory_seq_cp(memory, 1, 0, -1, -1);
        }
        llama_memory_seq_rm(memory, 1, -1, -1);
    }

    // The median time of tokens at positions from `depth` on.
    double time_of(std::size_t depth, std::size_t tokens) {
        std::vector<double> times;
        for (std::size_t i = 0; i <= tokens; ++i) {
            const double start = seconds();
            decode({token(i)}, static_cast<llama_pos>(depth + i), 0);
            if (i != 0) // the first meets cold memory
                times.push_back(seconds() - start);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }

    static constexpr std::size_t piece = 256;

private:
    // How libllama saves a cell of one sequence.
    struct saved_cell {
        llama_pos position;
        std::uint32_t sequences;
        llama_seq_id sequence;
    };

    [[nodiscard]] llama_token token(std::size_t i) const {
        const int words = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
        return static_cast<llama_token>(i * 7919 % static_cast<std::size_t>(words));
    }
    void decode(const std::vector<llama_token>& text, llama_pos first, llama_seq_id sequence) {
        llama_batch b = llama_batch_init(static_cast<int>(text.size()), 0, 1);
        b.n_tokens = static_cast<int>(text.size());
        for (std::size_t i = 0; i < text.size(); ++i) {
            b.token[i] = text[i];
            b.pos[i] = first + static_cast<llama_pos>(i);
            b.n_seq_id[i] = 1;
            b.seq_id[i][0] = sequence;
            b.logits[i] = i + 1 == text.size();
        }
        const int status = llama_decode(context_.get(), b);
        llama_batch_free(b);
        if (status != 0)
            throw std::runtime_error("llama_decode fails");
    }
    // Where the cells of a saved state begin, in it: the first place where `piece` of them follow each other.
    static std::size_t first_cell(const std::vector<std::uint8_t>& state) {
        for (std::size_t from = 0; from + piece * sizeof(saved_cell) <= state.size() && from < 256; ++from) {
            std::size_t i = 0;
            for (; i < piece; ++i) {
                saved_cell cell;
                std::memcpy(&cell, state.data() + from + i * sizeof cell, sizeof cell);
                if (cell.position != static_cast<llama_pos>(i) || cell.sequences != 1 || cell.sequence != 1)
                    break;
            }
            if (i == piece)
                return from;
        }
        throw std::runtime_error("this libllama saves states in another form");
    }

    bool on_kv1_ = false;
    std::unique_ptr<llama_model, free_model> model_;
    std::unique_ptr<llama_context, free_context> context_;
};

} // namespace

int main(int argc, char** argv) {
    const std::map<std::string, ggml_type> types{
        {"f16", GGML_TYPE_F16}, {"q8_0", GGML_TYPE_Q8_0}, {"q4_0", GGML_TYPE_Q4_0}};
    std::string file, type = "f16";
    std::size_t depth = 131072, tokens = 3;
    int threads = static_cast<int>(std::thread::hardware_concurrency());
    CLI::App app("Measures a decoded token at the end of a long context under libllama");
    app.add_option("model", file, "A GGUF file")->required();
    app.add_option("--depth", depth, "Tokens that are there, a multiple of 256")->check(CLI::PositiveNumber);
    app.add_option("--type", type, "Of llama.cpp's own cache; f16 with kv1's")
        ->check(CLI::IsMember({"f16", "q8_0", "q4_0"}));
    app.add_option("--tokens", tokens, "Tokens to measure")->check(CLI::PositiveNumber);
    app.add_option("--threads", threads, "Of ggml")->check(CLI::PositiveNumber);
    CLI11_PARSE(app, argc, argv);
    try {
        depth = (depth + long_context::piece - 1) / long_context::piece * long_context::piece;
        llama_log_set(
            [](ggml_log_level level, const char* text, void*) {
                if (level >= GGML_LOG_LEVEL_ERROR || std::strncmp(text, "kv1:", 4) == 0)
                    std::fputs(text, stderr);
            },
            nullptr);
        long_context context(file, types.at(type),
                             static_cast<std::uint32_t>(depth + 2 * long_context::piece), threads);
        const double start = seconds();
        context.fill(depth);
        const double filled = seconds();
        const double time = context.time_of(depth, tokens);
        const memory_use use = resident();
        std::puts("cache,depth,seconds to fill,seconds per token,GiB but files,GiB of process");
        std::printf("%s,%zu,%.0f,%.3f,%.2f,%.2f\n", context.on_kv1() ? "kv1" : type.c_str(), depth,
                    filled - start, time, use.own, use.all);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "llama-long-context: %s\n", e.what());
        return 1;
    }
}
