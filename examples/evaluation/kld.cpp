// SPDX-License-Identifier: Apache-2.0
#include "kld.hpp"

#include "divergence.hpp"
#include "error.hpp"
#include "file.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "tokenizer.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <numbers>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <thread>

namespace kv1_lm {

namespace {

// Logits of so many positions are held at once.
constexpr std::size_t rows_at_once = 128;

struct chunk_result {
    std::size_t positions = 0, targets = 0;
    double kld = 0.0, worst = 0.0, reference_nll = 0.0, kv_nll = 0.0; // sums but for worst, nats
};

// What one thread measures chunks with.
class chunk_worker {
public:
    chunk_worker(const model& m, const kld_options& options, const model_cache& kv)
        : model_(m), options_(options), reference_(m.cache_shape(options.reference, options.seq_len)),
          kv_(describe(m.config(), kv.policy, kv.calibrated, options.seq_len)),
          reference_logits_(rows_at_once * m.config().vocab_size), kv_logits_(reference_logits_.size()) {}

    chunk_result measure(std::span<const std::int32_t> tokens) {
        const std::vector<float> reference = run(reference_, tokens), kv = run(kv_, tokens);
        const std::size_t hidden = model_.config().hidden_size, vocabulary = model_.config().vocab_size;
        const std::size_t rows = tokens.size() - (options_.include_last_logit ? 0 : 1);
        chunk_result total;
        for (std::size_t first = 0; first < rows; first += rows_at_once) {
            const std::size_t n = std::min(rows_at_once, rows - first);
            const auto logits = [&](const std::vector<float>& states, std::vector<float>& out) {
                model_.logits(std::span(states).subspan(first * hidden, n * hidden),
                              std::span(out).first(n * vocabulary), one_thread_);
            };
            logits(reference, reference_logits_);
            logits(kv, kv_logits_);
            for (std::size_t i = 0; i < n; ++i) {
                const auto p = std::span<const float>(reference_logits_).subspan(i * vocabulary, vocabulary);
                const auto q = std::span<const float>(kv_logits_).subspan(i * vocabulary, vocabulary);
                const double p_norm = log_sum_exp(p), q_norm = log_sum_exp(q);
                const double kld = divergence(p, p_norm, q, q_norm);
                total.kld += kld;
                total.worst = std::max(total.worst, kld);
                ++total.positions;
                if (first + i + 1 < tokens.size()) {
                    const auto target = static_cast<std::size_t>(tokens[first + i + 1]);
                    total.reference_nll += p_norm - static_cast<double>(p[target]);
                    total.kv_nll += q_norm - static_cast<double>(q[target]);
                    ++total.targets;
                }
            }
        }
        return total;
    }

private:
    std::vector<float> run(kv1::kv_cache& cache, std::span<const std::int32_t> tokens) {
        const kv1::sequence_id sequence = cache.create_sequence();
        std::vector<float> states = model_.forward(tokens, cache, sequence, options_.precision, one_thread_);
        cache.destroy_sequence(sequence);
        return states;
    }

    const model& model_;
    const kld_options& options_;
    kv1::kv_cache reference_, kv_;
    thread_pool one_thread_{1}; // chunks run side by side, each on one thread
    std::vector<float> reference_logits_, kv_logits_;
};

double shrink(const kv1::cache_description& cache) {
    std::size_t fp16 = 0, packed = 0; // of a full page
    for (const kv1::layer_description& l : cache.layers) {
        fp16 += cache.page_tokens * l.kv_heads * 2 * (l.key_dim + l.value_dim);
        packed += cache.page_tokens * l.kv_heads * kv1::row_bytes(l.value_format, l.value_dim, l.value_group);
        packed +=
            l.kv_heads * (l.key_axis == kv1::quantization_axis::per_channel
                              ? kv1::channel_page_bytes(l.key_format, l.key_dim, cache.page_tokens)
                              : cache.page_tokens * kv1::row_bytes(l.key_format, l.key_dim, l.key_group));
    }
    return static_cast<double>(fp16) / static_cast<double>(packed);
}

} // namespace

kld_result measure_kld(const kld_options& options, std::ostream& log) {
    const model m = model::read(options.model);
    const model_cache kv = choose_cache(options.model, m.config(), options.kv);
    if (options.seq_len < 2 || options.seq_len > m.config().max_positions)
        throw input_error("--seq-len " + std::to_string(options.seq_len) + ": the model takes 2 to " +
                          std::to_string(m.config().max_positions) + " tokens");
    if (options.stride == 0)
        throw input_error("--stride 0: chunks have to move on");

    std::vector<std::int32_t> tokens =
        tokenizer::read(options.model / "tokenizer.json").encode(read_text_file(options.text));
    if (options.max_tokens != 0 && tokens.size() > options.max_tokens)
        tokens.resize(options.max_tokens);
    std::vector<std::span<const std::int32_t>> chunks;
    for (std::size_t at = 0; at + 1 < tokens.size(); at += std::min(options.stride, tokens.size() - at))
        chunks.push_back(std::span(tokens).subspan(at, std::min(options.seq_len, tokens.size() - at)));
    if (chunks.empty())
        throw input_error(options.text.string() + ": fewer than two tokens, nothing to measure");

    std::vector<chunk_result> results(chunks.size());
    std::atomic<std::size_t> next{0}, done{0};
    std::exception_ptr failure;
    std::mutex mutex;
    std::condition_variable changed;
    std::size_t running = std::min(options.threads, chunks.size());
    std::vector<std::thread> threads;
    const auto work = [&] {
        try {
            chunk_worker worker(m, options, kv);
            for (std::size_t i = next.fetch_add(1); i < chunks.size(); i = next.fetch_add(1)) {
                results[i] = worker.measure(chunks[i]);
                done.fetch_add(1);
            }
        } catch (...) {
            const std::lock_guard lock(mutex);
            failure = std::current_exception();
            next.store(chunks.size()); // the others stop soon
        }
        const std::lock_guard lock(mutex);
        --running;
        changed.notify_one();
    };
    {
        progress_bar bar(log, options.show_progress, "chunks", chunks.size());
        for (std::size_t i = running; i > 0; --i)
            threads.emplace_back(work);
        std::unique_lock lock(mutex);
        while (!changed.wait_for(lock, std::chrono::milliseconds(200), [&] { return running == 0; }))
            bar.show(done.load(), {});
        bar.show(done.load(), {});
    }
    for (std::thread& thread : threads)
        thread.join();
    if (failure)
        std::rethrow_exception(failure);

    kld_result r;
    r.loaded_tokens = tokens.size();
    r.kv = kv.formats();
    r.kv_policy = kv.policy.text;
    r.shrink_vs_fp16 = shrink(describe(m.config(), kv.policy, kv.calibrated, options.seq_len));
    double kld = 0.0, reference_nll = 0.0, kv_nll = 0.0;
    std::size_t targets = 0;
    for (const chunk_result& c : results) { // in order: sums do not depend on the threads
        kld += c.kld;
        reference_nll += c.reference_nll;
        kv_nll += c.kv_nll;
        targets += c.targets;
        r.positions += c.positions;
        r.max_position_nats = std::max(r.max_position_nats, c.worst);
        r.chunk_means.push_back(c.kld / static_cast<double>(c.positions));
    }
    r.max_chunk_mean_nats = *std::max_element(r.chunk_means.begin(), r.chunk_means.end());
    r.nats_per_token = kld / static_cast<double>(r.positions);
    r.reference_perplexity = std::exp(reference_nll / static_cast<double>(targets));
    r.kv_perplexity = std::exp(kv_nll / static_cast<double>(targets));
    return r;
}

void kld(const kld_options& options, std::ostream& out, std::ostream& log) {
    use_one_blas_thread();
    std::optional<output_file> json_file;
    if (!options.json.empty())
        json_file.emplace(options.json);
    const auto start = std::chrono::steady_clock::now();
    const kld_result r = measure_kld(options, log);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

    const auto line = [&](const char* what, const auto& value, const char* unit) {
        out << what << value << unit << '\n';
    };
    out.precision(7);
    line("KL(reference || kv)   ", r.nats_per_token, " nats per token");
    line("                      ", r.nats_per_token / std::numbers::ln2, " bits per token");
    line("  worst position      ", r.max_position_nats, " nats");
    line("  worst chunk         ", r.max_chunk_mean_nats, " nats per token");
    line("perplexity, reference ", r.reference_perplexity,
         (" (--reference " + to_string(options.reference) + ")").c_str());
    line("perplexity, kv        ", r.kv_perplexity, (" (--kv " + r.kv_policy + ")").c_str());
    line("positions             ", r.positions,
         (" in " + std::to_string(r.chunk_means.size()) + " chunks of " + std::to_string(r.loaded_tokens) +
          " tokens")
             .c_str());
    out.precision(4);
    line("cache                 ", r.shrink_vs_fp16, "x smaller than fp16");
    line("time                  ", seconds, " s");
    out << std::flush;

    if (!json_file)
        return;
    // a number where one width tells it all
    const auto bits = [](const kv_formats& f) -> nlohmann::ordered_json {
        const std::string text = to_string(f);
        return text.find_first_of(",c") == std::string::npos ? nlohmann::ordered_json::parse(text)
                                                             : nlohmann::ordered_json(text);
    };
    const nlohmann::ordered_json report = {
        {"metric", "KL(P_reference || P_kv)"},
        {"kv_bits", bits(r.kv)},
        {"kv_policy", r.kv_policy},
        {"reference_bits", bits(options.reference)},
        {"attention", options.precision == kv1::precision::exact ? "exact" : "fast"},
        {"kld_nats_per_token", r.nats_per_token},
        {"kld_bits_per_token", r.nats_per_token / std::numbers::ln2},
        {"positions", r.positions},
        {"chunks", r.chunk_means.size()},
        {"loaded_tokens", r.loaded_tokens},
        {"seq_len", options.seq_len},
        {"stride", options.stride},
        {"include_last_logit", options.include_last_logit},
        {"max_position_kld_nats", r.max_position_nats},
        {"max_chunk_mean_kld_nats", r.max_chunk_mean_nats},
        {"avg_cache_shrink_vs_fp16", r.shrink_vs_fp16},
        {"ppl_reference", r.reference_perplexity},
        {"ppl_quantized", r.kv_perplexity},
        {"seconds", seconds},
        {"chunk_mean_kld", r.chunk_means}};
    json_file->commit(report.dump(1) + "\n");
}

} // namespace kv1_lm
