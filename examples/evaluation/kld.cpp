// SPDX-License-Identifier: Apache-2.0
#include "kld.hpp"

#include "comparison.hpp"
#include "error.hpp"
#include "file.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "side_by_side.hpp"
#include "tokenizer.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numbers>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

namespace kv1_lm {

namespace {

// What one thread needs to measure chunks.
class chunk_worker {
public:
    chunk_worker(const model& m, const model& original, const kld_options& options, const model_cache& kv)
        : model_(m), original_(original), options_(options),
          reference_(original.cache_shape(options.reference, options.seq_len)),
          kv_(describe(m.config(), kv.policy, kv.calibrated, options.seq_len)) {}

    comparison measure(std::span<const std::int32_t> tokens) {
        const std::size_t end = tokens.size() - (options_.include_last_logit ? 0 : 1);
        const reference_predictions reference(original_, tokens, options_.skip, end - options_.skip,
                                              run(original_, reference_, tokens), one_thread_);
        return reference.compare(model_, run(model_, kv_, tokens), one_thread_);
    }

private:
    std::vector<float> run(const model& m, kv1::kv_cache& cache, std::span<const std::int32_t> tokens) {
        const kv1::sequence_id sequence = cache.create_sequence();
        std::vector<float> states = m.forward(tokens, cache, sequence, options_.precision, one_thread_);
        cache.destroy_sequence(sequence);
        return states;
    }

    const model &model_, &original_;
    const kld_options& options_;
    kv1::kv_cache reference_, kv_;
    thread_pool one_thread_{1}; // each chunk runs on one thread, beside others
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
    std::optional<model> other;
    if (!options.original.empty())
        other.emplace(model::read(options.original));
    const model& original = other ? *other : m;
    if (original.config().vocab_size != m.config().vocab_size)
        throw input_error(options.original.string(), "has another vocabulary than the model");
    const model_cache kv = choose_cache(options.model, m.config(), options.kv);
    if (options.seq_len < 2 || options.seq_len > m.config().max_positions)
        throw input_error("--seq-len " + std::to_string(options.seq_len) + ": the model takes 2 to " +
                          std::to_string(m.config().max_positions) + " tokens");
    if (options.stride == 0)
        throw input_error("--stride 0: chunks have to move on");
    if (options.skip > options.seq_len - 2)
        throw input_error("--skip " + std::to_string(options.skip) + ": nothing is left of a chunk");

    std::vector<std::int32_t> tokens =
        tokenizer::read(options.model / "tokenizer.json").encode(read_text_file(options.text));
    if (options.max_tokens != 0 && tokens.size() > options.max_tokens)
        tokens.resize(options.max_tokens);
    std::vector<std::span<const std::int32_t>> chunks;
    for (std::size_t at = 0; at + options.skip + 1 < tokens.size();
         at += std::min(options.stride, tokens.size() - at))
        chunks.push_back(std::span(tokens).subspan(at, std::min(options.seq_len, tokens.size() - at)));
    if (chunks.empty())
        throw input_error(options.text.string() + ": fewer than " +
                          (options.skip == 0 ? "two" : std::to_string(options.skip + 2)) +
                          " tokens, nothing to measure");

    std::vector<comparison> results(chunks.size());
    {
        progress_bar bar(log, options.show_progress, "chunks", chunks.size());
        run_side_by_side(
            chunks.size(), options.threads,
            [&] {
                return [&, worker = std::make_unique<chunk_worker>(m, original, options, kv)](std::size_t i) {
                    results[i] = worker->measure(chunks[i]);
                };
            },
            [&](std::size_t done) { bar.show(done, {}); });
    }

    kld_result r;
    r.loaded_tokens = tokens.size();
    r.kv = kv.formats();
    r.kv_policy = to_string(kv.policy);
    r.shrink_vs_fp16 = shrink(describe(m.config(), kv.policy, kv.calibrated, options.seq_len));
    double kld = 0.0, reference_nll = 0.0, kv_nll = 0.0;
    std::size_t targets = 0;
    for (const comparison& c : results) { // in order, so that sums do not depend on the threads
        kld += c.kld;
        reference_nll += c.reference_nll;
        kv_nll += c.nll;
        targets += c.targets;
        r.positions += c.positions;
        r.max_position_nats = std::max(r.max_position_nats, c.worst_kld);
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
    // a number if K and V have one width
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
        {"skip", options.skip},
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
