// SPDX-License-Identifier: Apache-2.0
//
// context_parallel decode     fills a cache over all ranks, decodes, and says what a token takes
// context_parallel generate   lets the 8M model write, its cache distributed
//
// Rank 0 prints. An error that the ranks agree on ends all of them with it; any other ends the whole job.
#include "cache_policy.hpp"
#include "error.hpp"
#include "measure.hpp"
#include "model_cache.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

#include <CLI/CLI.hpp>

#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <utility>

namespace {

using namespace context_parallel;

struct options {
    std::string kv = "2", join = "in_rank_order", deal = "pages";
    bool from_root = false, compare = false;
    std::size_t threads = 1, layers = 36, tokens = 16384, steps = 16, new_tokens = 60;
    double patience = 60.0;
    std::string model = KV1_LM_DEFAULT_MODEL_DIR, prompt = "The history of the city";
};

int size_of(MPI_Comm ranks) {
    int size = 1;
    MPI_Comm_size(ranks, &size);
    return size;
}

bool is_root() {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank == 0;
}

cache_options cache_options_of(const options& o, const kv1::cache_description& shape,
                               kv1_lm::thread_pool& pool) {
    cache_options how;
    if (o.deal == "ranges")
        how.positions = distribution::ranges(static_cast<std::size_t>(size_of(MPI_COMM_WORLD)),
                                             shape.capacity_tokens, shape.page_tokens);
    how.from = o.from_root ? inputs::of_root : inputs::of_every_rank;
    how.join = o.join == "reduced" ? joining::reduced : joining::in_rank_order;
    how.patience = std::chrono::duration<double>(o.patience);
    how.run = [&pool](std::size_t count, kv1::task_view task) { pool(count, task); };
    return how;
}

double least(const std::vector<double>& x) { return *std::ranges::min_element(x); }

void print(const measurement& m) {
    const auto [fewest, most] = std::ranges::minmax(m.bytes);
    std::printf("filled in %.2f s; bytes a rank: %s to %s\n", m.fill_seconds,
                kv1::human_bytes(fewest).c_str(), kv1::human_bytes(most).c_str());
    const double token = median(m.token_seconds), within = median(m.communication_seconds);
    std::printf("%.3f ms a token; within MPI %.3f ms (%.0f %%), %llu collectives, %s of rank 0's\n",
                token * 1e3, within * 1e3, 100.0 * within / token,
                static_cast<unsigned long long>(m.collectives),
                kv1::human_bytes(static_cast<std::size_t>(m.communication_bytes)).c_str());
}

// Medians of all steps, and the least.
void print_comparison(const std::vector<measurement>& all) {
    std::printf("| ranks | ms a token | least | within MPI | least | collectives | bytes a rank |\n"
                "| --- | --- | --- | --- | --- | --- | --- |\n");
    for (const measurement& m : all) {
        const std::string ranks = m.ranks == 0 ? "kv_cache alone" : std::to_string(m.ranks);
        std::printf("| %s | %.2f | %.2f | %.2f | %.2f | %llu | %s |\n", ranks.c_str(),
                    median(m.token_seconds) * 1e3, least(m.token_seconds) * 1e3,
                    median(m.communication_seconds) * 1e3, least(m.communication_seconds) * 1e3,
                    static_cast<unsigned long long>(m.collectives),
                    kv1::human_bytes(std::ranges::max(m.bytes)).c_str());
    }
}

void decode(const options& o) {
    constexpr std::size_t heads = 32, kv_heads = 8, head_dim = 128; // Qwen3-8B's attention
    const kv1::cache_policy policy = kv1_lm::parse_policy(o.kv, "--kv");
    if (policy.needs_means() || policy.needs_error_weights())
        throw kv1_lm::input_error("--kv: random tokens have no means and no error weights");
    if (o.compare && o.deal != "pages")
        throw kv1_lm::input_error("--compare deals pages");
    kv1_lm::thread_pool pool(o.threads);
    workload work;
    kv1::result<kv1::cache_description> shape = kv1::try_describe_cache(
        policy, kv1::uniform_cache(o.layers, {kv_heads, head_dim, head_dim}, o.tokens + o.steps + 1));
    if (!shape)
        throw kv1_lm::input_error("--kv: " + shape.reason().message());
    work.shape = std::move(*shape);
    work.how = cache_options_of(o, work.shape, pool);
    work.heads = heads;
    work.tokens = o.tokens;
    work.steps = o.steps;
    const std::vector<measurement> all =
        o.compare ? compare(MPI_COMM_WORLD, work) : std::vector{measure(MPI_COMM_WORLD, work)};
    if (!is_root())
        return;
    std::printf("%d ranks, %zu tokens, %zu layers, cache %s, %s, %s\n", size_of(MPI_COMM_WORLD), o.tokens,
                o.layers, o.kv.c_str(), o.deal.c_str(), o.join.c_str());
    if (o.compare)
        print_comparison(all);
    else
        print(all.front());
}

void generate(const options& o, bool own_kv) {
    const kv1_lm::model model = kv1_lm::model::read(o.model);
    const kv1_lm::tokenizer tokenizer =
        kv1_lm::tokenizer::read(std::filesystem::path(o.model) / "tokenizer.json");
    const kv1_lm::model_cache choice = kv1_lm::choose_cache(
        o.model, model.config(), own_kv ? std::nullopt : std::optional(kv1_lm::parse_policy(o.kv, "--kv")));
    const std::vector<std::int32_t> prompt = tokenizer.encode(o.prompt);
    if (prompt.empty())
        throw kv1_lm::input_error("the prompt is empty: there is nothing to continue");
    if (o.from_root || o.join != "in_rank_order")
        throw kv1_lm::input_error("generate runs the model on every rank, and needs the same bits on each");
    kv1::cache_description shape =
        kv1_lm::describe(model.config(), choice.policy, choice.calibrated, prompt.size() + o.new_tokens);
    if (choice.policy.page_tokens == 0)
        shape.page_tokens = 16; // small pages: all ranks take part in a short text
    kv1_lm::thread_pool pool(o.threads);
    distributed_cache cache(MPI_COMM_WORLD, shape, cache_options_of(o, shape, pool));
    const std::vector<std::int32_t> text =
        continue_greedily(model, cache, prompt, o.new_tokens, kv1::precision::exact, pool);
    if (is_root())
        std::cout << tokenizer.decode(text) << '\n';
}

int run(int argc, char** argv) {
    options o;
    CLI::App app("One KV cache over the ranks of an MPI job.", "context_parallel");
    app.require_subcommand(1);
    CLI::App* const decode_command =
        app.add_subcommand("decode", "Fill a cache of Qwen3-8B's shape with random tokens, and decode");
    CLI::App* const generate_command = app.add_subcommand("generate", "Continue a prompt with the 8M model");
    for (CLI::App* const c : {decode_command, generate_command}) {
        c->add_option("--kv", o.kv, "Cache: bits, or K,V, or what kv1-lm sweep --policy takes")
            ->default_str(c == decode_command ? "2" : "the model's own");
        c->add_option("--deal", o.deal, "pages: round robin; ranges: one contiguous range a rank")
            ->check(CLI::IsMember({"pages", "ranges"}))
            ->capture_default_str();
        c->add_option("--join", o.join, "in_rank_order: the same bits always; reduced: MPI's order")
            ->check(CLI::IsMember({"in_rank_order", "reduced"}))
            ->capture_default_str();
        c->add_flag("--from-root", o.from_root, "Rank 0 alone has keys, values and queries");
        c->add_option("--threads", o.threads, "Threads a rank")
            ->check(CLI::Range(1, 1024))
            ->capture_default_str();
        c->add_option("--patience", o.patience, "Seconds to wait for another rank; 0: for ever")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    }
    decode_command->add_option("--layers", o.layers, "Layers; the model has 36")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();
    decode_command->add_option("--tokens", o.tokens, "Tokens in the cache")->capture_default_str();
    decode_command->add_option("--steps", o.steps, "Decoded tokens that are timed")
        ->check(CLI::Range(1, 1000000))
        ->capture_default_str();
    decode_command->add_flag("--compare", o.compare,
                             "Take turns: one kv_cache without MPI, and 1, 2, 4, ... ranks");
    generate_command->add_option("--model", o.model, "Model folder")->capture_default_str();
    generate_command->add_option("--prompt", o.prompt, "The text to continue")->capture_default_str();
    generate_command->add_option("--max-new-tokens", o.new_tokens, "New tokens at the most")
        ->capture_default_str();
    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& e) { // --help
        return is_root() ? app.exit(e) : 0;
    } catch (const CLI::ParseError& e) {
        throw kv1_lm::input_error(std::string(e.what()) + " (see context_parallel --help)");
    }
    if (*decode_command)
        decode(o);
    else
        generate(o, generate_command->count("--kv") == 0);
    return 0;
}

} // namespace

int main(int argc, char** argv) {
    int threads = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &threads);
    int code = 1;
    try {
        kv1_lm::use_one_blas_thread();
        code = run(argc, argv);
    } catch (const rank_error& e) {
        if (is_root() || e.rank() < 0)
            std::cerr << "context_parallel: " << e.what() << '\n';
        if (e.code() == kv1::errc::io_error) // a rank that does not answer would not finalize either
            MPI_Abort(MPI_COMM_WORLD, 1);
    } catch (const kv1_lm::input_error& e) { // all ranks read the same files and arguments
        code = 2;
        if (is_root())
            std::cerr << "context_parallel: " << e.what() << '\n';
    } catch (const std::exception& e) { // of this rank alone, maybe
        std::cerr << "context_parallel: " << e.what() << '\n';
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    MPI_Finalize();
    return code;
}
