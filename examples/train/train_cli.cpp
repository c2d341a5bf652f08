// SPDX-License-Identifier: Apache-2.0
#include "train_cli.hpp"

#include "adapter.hpp"
#include "error.hpp"
#include "evaluate.hpp"
#include "kv_option.hpp"
#include "lora.hpp"
#include "pack.hpp"
#include "train.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <exception>
#include <new>
#include <ostream>
#include <string>
#include <thread>

#include <unistd.h>

namespace kv1_train {

namespace {

// CLI11 wraps negative numbers into unsigned ones.
void add_count(CLI::App& command, const char* name, auto& value, const char* description) {
    command.add_option(name, value, description)->check(CLI::NonNegativeNumber)->capture_default_str();
}

void add_share(CLI::App& command, const char* name, double& value, const char* description) {
    command.add_option(name, value, description)->check(CLI::Range(0.0, 1.0))->capture_default_str();
}

// Options of a cache, until they are known to be right.
struct cache_texts {
    std::string policy = "16";
    bool round_metadata = false;
};

void add_cache(CLI::App& command, cache_texts& t) {
    command
        .add_option(
            "--kv", t.policy,
            "The cache: a format (" + kv1_lm::kv_format_names() +
                ") with +ls or +cs (fitted levels), +had (rotated), +mean (centred; the means follow the "
                "model), +ew (error weights, from the folder's kv1_calibration.bin), for both or K,V such as "
                "c3+ls+had,c2+ls+had; /LAYER:K,V for a layer that differs; "
                "@SINKS:WINDOW for fp16 tokens")
        ->capture_default_str();
    command.add_flag("--round-metadata", t.round_metadata, "Scale and minimum through fp16");
}

training_policy parse(const cache_texts& t) {
    training_policy p = parse_policy(t.policy, "--kv");
    p.round_metadata = t.round_metadata;
    return p;
}

void add_device(CLI::App& command, std::string& device, std::string& type) {
    command.add_option("--device", device, "Where to compute")
        ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
        ->capture_default_str();
    command.add_option("--type", type, "Of matrix products and attention; auto is bf16 on CUDA")
        ->check(CLI::IsMember({"auto", "fp32", "bf16"}))
        ->capture_default_str();
}

int run_or_throw(int argc, const char* const* argv, std::ostream& out, std::ostream& err) {
    CLI::App app("Trains small language models under kv1's packed KV cache.", "kv1-train");
    app.require_subcommand(1);

    pack_options p;
    p.threads = std::max(1u, std::thread::hardware_concurrency());
    p.show_progress = isatty(STDERR_FILENO) == 1;
    CLI::App* pack_command = app.add_subcommand("pack", "Turn text into token ids to train on");
    pack_command->add_option("--text", p.texts, "UTF-8 texts")->required();
    pack_command->add_option("--tokenizer", p.tokenizer, "Folder with tokenizer.json")->required();
    pack_command->add_option("--out", p.out, "Folder to make")->required();
    pack_command->add_option("--document-end", p.document_end, "Token that ends a document")
        ->capture_default_str();
    pack_command->add_option("--shard-tokens", p.shard_tokens, "Tokens of a file at the most")
        ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 40))
        ->capture_default_str();
    pack_command->add_option("--threads", p.threads, "Threads")
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();

    train_options t;
    t.show_progress = p.show_progress;
    cache_texts train_cache, evaluate_cache;
    CLI::App* train_command = app.add_subcommand("train", "Train a model");
    train_command->add_option("--data", t.data, "Folder that pack made")->required();
    train_command
        ->add_option("--model", t.model, "Model folder: config.json gives the shape, the tokenizer is kept")
        ->required();
    train_command->add_flag("--init", t.init, "Start from the model's weights, not from random ones");
    train_command->add_option("--out", t.out, "Folder of the run: log.csv and checkpoints")->required();
    train_command->add_flag("--resume", t.resume, "Go on from the last checkpoint in --out, if there is one");
    add_cache(*train_command, train_cache);
    train_command->add_option("--teacher", t.teacher,
                              "Model folder to learn from, which keeps its keys and values as they are");
    train_command
        ->add_flag("--self-teacher", t.self_teacher,
                   "Learn from the model itself with plain keys and values, trained at the same time")
        ->excludes("--teacher");
    CLI::Option* rank = train_command->add_option("--lora-rank", t.lora.rank,
                                                  "Train an adapter of this rank (LoRA) and leave the "
                                                  "weights as they are; the model as it was is the teacher");
    rank->check(CLI::Range(1, 4096))->excludes("--self-teacher");
    train_command
        ->add_option("--init-adapter", t.init_adapter,
                     "Train the adapter in this PEFT folder on, with its rank, targets and means")
        ->excludes(rank)
        ->excludes("--self-teacher");
    train_command
        ->add_option("--lora-alpha", t.lora.alpha, "The adapter counts alpha / rank; 0 is twice the rank")
        ->check(CLI::NonNegativeNumber)
        ->needs(rank)
        ->capture_default_str();
    train_command->add_option("--lora-targets", t.lora.targets, "Projections to adapt")
        ->delimiter(',')
        ->check(CLI::IsMember({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}))
        ->needs(rank)
        ->capture_default_str();
    train_command->add_flag("--lora-norms", t.lora.norms, "Train the norms' weights, too")->needs(rank);
    add_share(*train_command, "--teacher-weight", t.teacher_weight,
              "Of KL(teacher || model) in the loss; cross entropy has the rest");

    add_count(*train_command, "--steps", t.steps, "Steps");
    add_count(*train_command, "--batch", t.batch, "Sequences of a step, over all ranks");
    add_count(*train_command, "--micro-batch", t.micro_batch, "Sequences at a time; 0 is all of a rank's");
    train_command
        ->add_option("--length", t.lengths,
                     "Tokens of a sequence; with several, such as 8192,1024, steps take turns and cut the "
                     "longest, which --batch counts")
        ->delimiter(',')
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    add_count(*train_command, "--lr", t.learning_rate, "Learning rate after the warm-up");
    add_count(*train_command, "--last-lr", t.last_learning_rate, "Learning rate at the end");
    add_count(*train_command, "--warmup", t.warmup, "Steps of the warm-up");
    add_count(*train_command, "--weight-decay", t.optimizer.weight_decay, "Of matrices");
    add_share(*train_command, "--beta1", t.optimizer.beta1, "AdamW's");
    add_share(*train_command, "--beta2", t.optimizer.beta2, "AdamW's");
    add_count(*train_command, "--clip", t.clip, "Largest norm of the gradient; 0 is none");
    add_count(*train_command, "--seed", t.seed, "Of the weights and of the data's order");

    add_device(*train_command, t.device, t.type);
    add_count(*train_command, "--held-out", t.held_out,
              "Tokens at the data's end to validate on; 0 is a hundredth");
    add_count(*train_command, "--validation-batches", t.validation_batches, "Micro-batches to validate on");
    add_count(*train_command, "--validate-every", t.validate_every, "Steps; 0 is at the end");
    add_count(*train_command, "--save-every", t.save_every, "Steps; 0 is at the end");
    add_count(*train_command, "--log-every", t.log_every, "Steps; 0 is at the end");
    add_count(*train_command, "--max-seconds", t.most_seconds, "Then save and stop; 0 is no limit");
    train_command->add_option("--keep", t.keep, "Checkpoints to keep")
        ->check(CLI::Range(1, 1000000))
        ->capture_default_str();

    evaluate_options e;
    CLI::App* evaluate_command =
        app.add_subcommand("evaluate", "Measure what a cache format costs a model, as training sees it");
    evaluate_command->add_option("--data", e.data, "Folder that pack made")->required();
    evaluate_command->add_option("--model", e.model, "Model folder")->required();
    evaluate_command->add_option("--adapter", e.adapter,
                                 "PEFT folder of an adapter for it, to compare with the model without it");
    evaluate_command
        ->add_option("--original", e.original,
                     "Model folder to compare with, such as the one that this one was trained from")
        ->excludes("--adapter");
    add_cache(*evaluate_command, evaluate_cache);
    evaluate_command->add_option("--length", e.length, "Tokens of a chunk")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    add_count(*evaluate_command, "--skip", e.skip, "Positions at each chunk's start that are not counted");
    evaluate_command->add_option("--batch", e.batch, "Chunks at a time")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    add_device(*evaluate_command, e.device, e.type);

    kv1_lm::merge_options m;
    CLI::App* merge_command =
        app.add_subcommand("merge", "Make a model folder of a model and an adapter for it");
    merge_command->add_option("--model", m.model, "Model folder")->required();
    merge_command->add_option("--adapter", m.adapter, "PEFT folder")->required();
    merge_command->add_option("--out", m.out, "Folder to make")->required();

    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& success) { // --help
        return app.exit(success, out, err);
    } catch (const CLI::ParseError& failure) {
        throw kv1_lm::input_error(std::string(failure.what()) + " (see kv1-train --help)");
    }
    if (*pack_command) {
        pack(p, out, err);
    } else if (*evaluate_command) {
        e.kv = parse(evaluate_cache);
        evaluate(e, out);
    } else if (*merge_command) {
        kv1_lm::merge(m, out);
    } else {
        t.kv = parse(train_cache);
        train(t, out, err);
    }
    return 0;
}

} // namespace

int run(int argc, const char* const* argv, std::ostream& out, std::ostream& err) {
    const auto report = [&](const char* what) {
        // LibTorch's messages go on with a stack trace
        const std::string text(what);
        err << "kv1-train: " << text.substr(0, text.find('\n')) << '\n';
    };
    try {
        return run_or_throw(argc, argv, out, err);
    } catch (const kv1_lm::input_error& e) {
        report(e.what());
        return 2;
    } catch (const std::bad_alloc&) {
        report("out of memory");
    } catch (const std::exception& e) {
        report(e.what());
    }
    return 1;
}

} // namespace kv1_train
