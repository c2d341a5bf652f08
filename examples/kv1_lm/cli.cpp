// SPDX-License-Identifier: Apache-2.0
#include "cli.hpp"

#include "adapter.hpp"
#include "calibrate.hpp"
#include "error.hpp"
#include "generate.hpp"
#include "gguf_model.hpp"
#include "info.hpp"
#include "kld.hpp"
#include "layer_budget.hpp"
#include "sweep.hpp"

#include <CLI/CLI.hpp>

#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace kv1_lm {

namespace {

bool error_output_is_a_terminal() {
#if defined(__unix__) || defined(__APPLE__)
    return isatty(STDERR_FILENO) == 1;
#else
    return false;
#endif
}

// Texts of options, until they are known to be given and right.
struct texts {
    std::string kv, reference = "32", attention = "exact";
};

kv1::precision parse_attention(const std::string& text) {
    return text == "fast" ? kv1::precision::fast : kv1::precision::exact;
}

// None where the option is not given: the model's own cache.
std::optional<cache_policy> parse_own_kv(const CLI::App& command, const std::string& text) {
    return command.count("--kv") == 0 ? std::nullopt : std::optional(parse_policy(text, "--kv:"));
}

void add_common(CLI::App& command, std::filesystem::path& model) {
    command
        .add_option("--model", model,
                    "Model folder as Transformers saves it: config.json, model.safetensors, tokenizer.json")
        ->capture_default_str();
}

void add_cache(CLI::App& command, texts& t, std::size_t& threads) {
    command.add_option(
        "--kv", t.kv,
        "Bits of the cache: " + kv_format_names() +
            " (c: compact, cb: codebook), or K,V such as 4,2, or a preset (safe, balanced, small, "
            "near-lossless, reference), or what sweep --policy takes, "
            "with the model's own means and error weights; not given: the cache that the "
            "model was trained for, or 2");
    command
        .add_option("--attention", t.attention,
                    "exact: fp32 on decoded values; fast: integer arithmetic on the codes")
        ->check(CLI::IsMember({"exact", "fast"}))
        ->capture_default_str();
    command.add_option("--threads", threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
}

// CLI11 wraps negative numbers into unsigned ones.
void add_count(CLI::App& command, const char* name, auto& value, const char* description) {
    command.add_option(name, value, description)->check(CLI::NonNegativeNumber)->capture_default_str();
}

// No bound but what is said here: CLI11's own PositiveNumber lets infinities and NaN through.
CLI::Validator between(double low, double high, std::string name) {
    return CLI::Validator(
        [low, high](const std::string& text) {
            char* end = nullptr;
            const double value = std::strtod(text.c_str(), &end);
            if (!text.empty() && *end == '\0' && value > low && value <= high)
                return std::string();
            std::ostringstream why;
            why << text << " is not above " << low << " and at most " << high;
            return why.str();
        },
        std::move(name));
}

// In the source tree, or where it was installed.
std::filesystem::path default_model() {
    const std::filesystem::path built = KV1_LM_DEFAULT_MODEL_DIR;
    std::error_code unreadable;
    return std::filesystem::exists(built, unreadable) ? built : KV1_LM_INSTALLED_MODEL_DIR;
}

int run_or_throw(int argc, const char* const* argv, std::istream& in, std::ostream& out, std::ostream& err) {
    CLI::App app("A small language model whose attention runs on kv1's packed KV cache.", "kv1-lm");
    app.require_subcommand(1);

    generate_options g;
    kld_options k;
    std::filesystem::path info_model = default_model();
    g.model = k.model = info_model;
    k.threads = std::max(1u, std::thread::hardware_concurrency());
    texts generate_texts, kld_texts;

    CLI::App* generate_command = app.add_subcommand("generate", "Continue a prompt");
    add_common(*generate_command, g.model);
    CLI::Option* prompt = generate_command->add_option("--prompt", g.prompt, "The text to continue");
    add_count(*generate_command, "--max-new-tokens", g.max_new_tokens, "New tokens at the most");
    add_count(*generate_command, "--max-input-tokens", g.max_input_tokens, "A longer prompt is refused");
    CLI::Option* greedy =
        generate_command->add_flag("--greedy", g.how.greedy, "Always take the likeliest token");
    generate_command->add_option("--temperature", g.how.temperature, "Of the softmax that is drawn from")
        ->check(between(0.0, 1e6, "above 0"))
        ->excludes(greedy)
        ->capture_default_str();
    generate_command->add_option("--top-p", g.how.top_p, "Draw from the likeliest tokens that have this mass")
        ->check(between(0.0, 1.0, "(0, 1]"))
        ->excludes(greedy)
        ->capture_default_str();
    generate_command
        ->add_option("--repeat-penalty", g.how.repeat_penalty, "Divides the logits of tokens seen; 1 is none")
        ->check(between(0.0, 1e6, "above 0"))
        ->capture_default_str();
    add_count(*generate_command, "--seed", g.how.seed, "Of the draws");
    add_cache(*generate_command, generate_texts, g.threads);
    generate_command->add_flag("--show-cache", g.show_cache, "Print cache size and speed to standard error");
    CLI::Option* interactive = generate_command->add_flag("--interactive", g.interactive,
                                                          "Read prompts from standard input, one a line");
    generate_command->add_flag("--ids", g.print_ids,
                               "End with a line that holds all token ids as a JSON array");
    prompt->excludes(interactive);

    CLI::App* kld_command =
        app.add_subcommand("kld", "Measure what a cache format costs: KL(P_reference || P_kv)");
    add_common(*kld_command, k.model);
    kld_command->add_option("--original", k.original,
                            "Model folder to compare with, such as the one that this one was adapted from; "
                            "not given: the model itself");
    kld_command->add_option("--text", k.text, "UTF-8 text to measure on")->required();
    add_cache(*kld_command, kld_texts, k.threads);
    kld_command->add_option("--reference", kld_texts.reference, "Bits of the cache to compare with")
        ->capture_default_str();
    add_count(*kld_command, "--seq-len", k.seq_len, "Tokens of a chunk");
    add_count(*kld_command, "--stride", k.stride, "Tokens from one chunk to the next");
    add_count(*kld_command, "--skip", k.skip, "Positions at each chunk's start that are not counted");
    add_count(*kld_command, "--max-tokens", k.max_tokens, "Tokens of the text to use; 0 is all");
    kld_command->add_flag("--include-last-logit", k.include_last_logit,
                          "Count the last position of each chunk too");
    kld_command->add_option("--json", k.json, "File to write the result to");

    sweep_options s;
    texts sweep_texts;
    s.threads = k.threads;
    CLI::App* sweep_command =
        app.add_subcommand("sweep", "Measure many cache policies at once: bytes, errors, KLD, perplexity");
    sweep_command->add_option("--model", s.models, "Model folders")->expected(1, -1);
    sweep_command->add_option("--text", s.text, "UTF-8 text to measure on")->required();
    sweep_command->add_option(
        "--calibrate", s.calibration_text,
        "UTF-8 text that means and error weights are taken from; not the one measured on");
    add_count(*sweep_command, "--calibration-tokens", s.calibration_tokens, "Tokens of it to use");
    sweep_command
        ->add_option(
            "--policy", s.policies,
            "KEYS,VALUES such as c3+ls+had+mean+ew,c2+ls+had+mean: a width (c: compact), least "
            "squares (or cs, clip search), Hadamard rotation, centring, error weights, +g32 for a "
            "scale and minimum every 32 channels, +channel for those of keys by channel; "
            "/LAYER:KEYS,VALUES for one layer, @SINKS:WINDOW for fp16 tokens, #256 for pages of 256. "
            "Or a preset: safe, balanced, small, near-lossless, reference. "
            "Several may be given; none: those of examples/evaluation/README.md")
        ->expected(1, -1);
    double budget = 0.0;
    sweep_command
        ->add_option("--budget", budget,
                     "Bytes of a vector: measure each layer alone in each policy, and choose among them")
        ->check(CLI::PositiveNumber);
    add_count(*sweep_command, "--chunks", s.chunks, "The first so many chunks; 0 is all");
    add_count(*sweep_command, "--seq-len", s.seq_len, "Tokens of a chunk");
    sweep_command->add_option("--attention", sweep_texts.attention, "exact or fast; see kld")
        ->check(CLI::IsMember({"exact", "fast"}))
        ->capture_default_str();
    sweep_command->add_option("--threads", s.threads, "Threads")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();
    sweep_command->add_option("--json", s.json, "File of results; one that is there is continued");
    sweep_command->add_option("--csv", s.csv, "File to write the table to");

    calibrate_options c;
    CLI::App* calibrate_command = app.add_subcommand(
        "calibrate", "Take what a model folder's cache wants to know of the model from a text");
    add_common(*calibrate_command, c.model);
    calibrate_command->get_option("--model")->required();
    calibrate_command->add_option("--text", c.text, "UTF-8 text; not one to measure on")->required();
    std::string calibrated_policy;
    calibrate_command->add_option(
        "--policy", calibrated_policy,
        "The folder's cache from now on, such as balanced; none: the one that it names, with error weights");
    add_count(*calibrate_command, "--tokens", c.tokens, "Tokens of the text to use");
    calibrate_command
        ->add_option("--seq-len", c.chunk_tokens,
                     "Tokens of a chunk; several share the text. None: as many as the model can read")
        ->expected(1, -1);
    add_count(*calibrate_command, "--query-stride", c.query_stride,
              "4: every fourth query counts for error weights and bases");
    c.threads = k.threads;
    calibrate_command->add_option("--threads", c.threads, "Threads")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();

    convert_options v;
    CLI::App* convert_command = app.add_subcommand(
        "convert",
        "Make a model folder of a GGUF file of the Llama family (F32, F16, BF16, Q8_0, Q4_0, Q4_1)");
    convert_command->add_option("--gguf", v.gguf, "GGUF file")->required();
    convert_command->add_option("--out", v.out, "Folder to make")->required();

    merge_options m;
    CLI::App* merge_command =
        app.add_subcommand("merge", "Make a model folder of a model and a LoRA for it, with its cache");
    merge_command->add_option("--model", m.model, "Model folder")->required();
    merge_command->add_option("--adapter", m.adapter, "PEFT folder")->required();
    merge_command->add_option("--out", m.out, "Folder to make")->required();

    CLI::App* info_command = app.add_subcommand("info", "Show a model's shape and what its cache costs");
    add_common(*info_command, info_model);

    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& e) { // --help
        return app.exit(e, out, err);
    } catch (const CLI::ParseError& e) {
        throw input_error(std::string(e.what()) + " (see kv1-lm --help)");
    }

    if (*generate_command) {
        if (prompt->count() == 0 && !g.interactive)
            throw input_error("generate needs --prompt TEXT or --interactive");
        g.kv = parse_own_kv(*generate_command, generate_texts.kv);
        g.precision = parse_attention(generate_texts.attention);
        generate(g, in, out, err);
    } else if (*kld_command) {
        k.kv = parse_own_kv(*kld_command, kld_texts.kv);
        k.reference = parse_kv(kld_texts.reference, "--reference");
        k.precision = parse_attention(kld_texts.attention);
        k.show_progress = error_output_is_a_terminal();
        kld(k, out, err);
    } else if (*sweep_command) {
        if (s.models.empty())
            s.models.push_back(info_model);
        s.precision = parse_attention(sweep_texts.attention);
        s.show_progress = error_output_is_a_terminal();
        if (budget > 0.0) {
            const layer_budget chosen = choose_layers(s, budget, err);
            out << to_string(chosen.policy) << "\nlayers alone: " << chosen.expected_kld
                << " nats together\n";
        } else {
            sweep(s, out, err);
        }
    } else if (*calibrate_command) {
        if (calibrate_command->count("--policy") != 0)
            c.policy = parse_policy(calibrated_policy, "--policy");
        calibrate_folder(c, out);
    } else if (*convert_command) {
        convert(v, out);
    } else if (*merge_command) {
        merge(m, out);
    } else if (*info_command) {
        info(info_model, out);
    }
    return 0;
}

} // namespace

int run(int argc, const char* const* argv, std::istream& in, std::ostream& out, std::ostream& err) {
    try {
        return run_or_throw(argc, argv, in, out, err);
    } catch (const input_error& e) {
        err << "kv1-lm: " << e.what() << '\n';
        return 2;
    } catch (const std::bad_alloc&) {
        err << "kv1-lm: out of memory\n";
    } catch (const std::exception& e) {
        err << "kv1-lm: " << e.what() << '\n';
    }
    return 1;
}

} // namespace kv1_lm
