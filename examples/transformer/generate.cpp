// SPDX-License-Identifier: Apache-2.0
#include "generate.hpp"

#include "error.hpp"
#include "model.hpp"
#include "model_cache.hpp"
#include "tokenizer.hpp"

#include <algorithm>
#include <chrono>
#include <iomanip>
#include <istream>
#include <ostream>
#include <span>
#include <vector>

namespace kv1_lm {

namespace {

using clock = std::chrono::steady_clock;

double seconds_since(clock::time_point start) {
    return std::chrono::duration<double>(clock::now() - start).count();
}

void print_rate(std::ostream& log, const char* what, std::size_t tokens, double seconds) {
    const auto flags = log.flags();
    log << what << ' ' << tokens << (tokens == 1 ? " token in " : " tokens in ") << std::fixed
        << std::setprecision(3) << seconds << " s";
    if (tokens != 0 && seconds > 0.0)
        log << " (" << std::setprecision(0) << static_cast<double>(tokens) / seconds << " tokens/s)";
    log << '\n';
    log.flags(flags);
}

class generator {
public:
    generator(const generate_options& options, std::ostream& out, std::ostream& log)
        : options_(options), out_(out), log_(log), model_(model::read(options.model)),
          cache_(choose_cache(options.model, model_.config(), options.kv)),
          tokenizer_(tokenizer::read(options.model / "tokenizer.json")), pool_(options.threads) {}

    void run(const std::string& prompt) {
        std::vector<std::int32_t> tokens = tokenizer_.encode(prompt);
        check(tokens.size());
        kv1::kv_cache cache(describe(model_.config(), cache_.policy, cache_.calibrated,
                                     std::max<std::size_t>(1, room(tokens.size()))));
        const kv1::sequence_id sequence = cache.create_sequence();
        stream_decoder text(tokenizer_);
        for (const std::int32_t token : tokens)
            out_ << text.push(token);
        out_.flush();

        const std::size_t prompt_tokens = tokens.size();
        const timing took = options_.max_new_tokens == 0 ? timing{} : extend(tokens, cache, sequence, text);
        out_ << text.finish() << '\n' << std::flush;
        if (options_.show_cache) {
            print_rate(log_, "prompt", prompt_tokens, took.prompt);
            // the run of the prompt gives the logits of the first new token
            print_rate(log_, "then", tokens.size() - std::min(tokens.size(), prompt_tokens + 1),
                       took.decoding);
            const cache_policy& policy = cache_.policy;
            log_ << "cache (" << (options_.kv ? "--kv " : "the model's own: ")
                 << (policy.layers.empty() ? to_string(policy)
                                           : to_string(policy.common) + ", " +
                                                 std::to_string(policy.layers.size()) + " layers otherwise")
                 << "): " << to_string(cache.statistics(sequence)) << '\n';
        }
        if (options_.print_ids) {
            const char* separator = "[";
            for (const std::int32_t token : tokens) {
                out_ << separator << token;
                separator = ", ";
            }
            out_ << (tokens.empty() ? "[]\n" : "]\n");
        }
        out_.flush();
    }

private:
    struct timing {
        double prompt = 0.0, decoding = 0.0; // seconds
    };

    // The last new token is printed, but not run.
    [[nodiscard]] std::size_t room(std::size_t prompt) const {
        return options_.max_new_tokens == 0 ? prompt : prompt + options_.max_new_tokens - 1;
    }

    void check(std::size_t prompt) const {
        const std::size_t positions = model_.config().max_positions;
        if (prompt > options_.max_input_tokens)
            throw input_error("the prompt has " + std::to_string(prompt) +
                              " tokens, --max-input-tokens allows " +
                              std::to_string(options_.max_input_tokens));
        if (options_.max_new_tokens != 0 && prompt == 0)
            throw input_error("the prompt is empty: there is nothing to continue");
        if (prompt > positions || options_.max_new_tokens > positions - prompt)
            throw input_error("a context of " + std::to_string(prompt) + " prompt tokens and " +
                              std::to_string(options_.max_new_tokens) +
                              " new ones is longer than the model's " + std::to_string(positions));
    }

    timing extend(std::vector<std::int32_t>& tokens, kv1::kv_cache& cache, kv1::sequence_id sequence,
                  stream_decoder& text) {
        const std::size_t prompt = tokens.size(), hidden = model_.config().hidden_size;
        sampler choice(options_.how);
        choice.note(tokens);
        std::vector<float> logits(model_.config().vocab_size);
        const std::vector<std::int32_t>& ends = model_.config().end_tokens;

        const clock::time_point start = clock::now();
        clock::time_point decoding = start;
        std::span<const std::int32_t> next(tokens);
        for (;;) {
            const std::vector<float> states =
                model_.forward(next, cache, sequence, options_.precision, pool_);
            model_.logits(std::span(states).last(hidden), logits, pool_);
            if (tokens.size() == prompt)
                decoding = clock::now();
            const std::int32_t token = choice.choose(logits);
            tokens.push_back(token);
            if (std::ranges::find(ends, token) != ends.end())
                break;
            out_ << text.push(token) << std::flush;
            if (tokens.size() == prompt + options_.max_new_tokens)
                break;
            next = std::span(tokens).last(1);
        }
        return {std::chrono::duration<double>(decoding - start).count(), seconds_since(decoding)};
    }

    const generate_options& options_;
    std::ostream &out_, &log_;
    model model_;
    model_cache cache_;
    tokenizer tokenizer_;
    thread_pool pool_;
};

} // namespace

void generate(const generate_options& options, std::istream& in, std::ostream& out, std::ostream& log) {
    use_one_blas_thread();
    generator g(options, out, log);
    if (!options.interactive)
        return g.run(options.prompt);
    std::string line;
    while (log << "> " << std::flush, std::getline(in, line))
        if (!line.empty()) {
            try {
                g.run(line);
            } catch (const input_error& e) { // concerns this prompt alone
                log << e.what() << '\n';
            }
        }
    log << '\n';
}

} // namespace kv1_lm
