// SPDX-License-Identifier: Apache-2.0
#include "train.hpp"

#include "batch_reader.hpp"
#include "checkpoint.hpp"
#include "device.hpp"
#include "loss.hpp"
#include "language_model.hpp"
#include "progress.hpp"
#include "ranks.hpp"
#include "sampler_order.hpp"
#include "stop_signal.hpp"
#include "token_file.hpp"
#include "training_log.hpp"

#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iomanip>
#include <memory>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace kv1_train {

namespace {

using kv1_lm::input_error;
using torch::Tensor;
using clock = std::chrono::steady_clock;

std::int64_t longest(const train_options& o) { return std::ranges::max(o.lengths); }

// The options that decide a run's result. Ranks, micro-batches, device and saving do not.
nlohmann::json fingerprint(const train_options& o, const std::optional<lora_options>& adapter,
                           const calibrated_weights* weights) {
    nlohmann::json all = {
        {"model", o.model.filename().string()},
        {"init", o.init},
        {"teacher", o.teacher.filename().string()},
        {"self_teacher", o.self_teacher},
        {"teacher_weight", o.teacher.empty() && !o.self_teacher && !adapter ? 0.0 : o.teacher_weight},
        {"kv", to_string(o.kv)},
        {"steps", o.steps},
        {"batch", o.batch},
        {"length", o.lengths.size() == 1 ? nlohmann::json(o.lengths.front()) : nlohmann::json(o.lengths)},
        {"learning_rate", o.learning_rate},
        {"last_learning_rate", o.last_learning_rate},
        {"warmup", o.warmup},
        {"betas", {o.optimizer.beta1, o.optimizer.beta2}},
        {"weight_decay", o.optimizer.weight_decay},
        {"clip", o.clip},
        {"seed", o.seed},
        {"held_out", o.held_out}};
    if (adapter)
        all["lora"] = describe(*adapter);
    if (!o.init_adapter.empty())
        all["init_adapter"] = o.init_adapter.filename().string();
    if (o.kv.cache.needs_means())
        all["key_means"] = "before rotary embedding";
    if (weights != nullptr) { // a checksum of all of them
        std::ostringstream hex;
        for (const std::uint8_t byte : kv1::fingerprint_of(weights->file).bytes)
            hex << std::hex << std::setw(2) << std::setfill('0') << static_cast<int>(byte);
        all["error_weights"] = hex.str();
    }
    return all;
}

std::unique_ptr<language_model> prepare(const train_options& o, torch::Device device,
                                        torch::ScalarType type) {
    const bool adapts = o.lora.rank > 0 || !o.init_adapter.empty();
    auto model = read_model(o.model, device, o.init || adapts);
    if (!o.init_adapter.empty())
        read_adapter(o.init_adapter, *model, type);
    else if (adapts)
        model->adapt(o.lora, o.seed, type);
    else if (!o.init)
        model->initialize(o.seed);
    if (o.kv.cache.needs_error_weights()) {
        std::vector<std::filesystem::path> folders{o.model};
        if (!o.init_adapter.empty())
            folders.insert(folders.begin(), o.init_adapter);
        model->set_error_weights(read_error_weights(folders, o.model, model->config(), o.kv, device));
    }
    return model;
}

class trainer {
public:
    trainer(const train_options& options, std::ostream& out, std::ostream& err)
        : o_(options), out_(out), err_(err), device_(device_of(o_.device)), type_(type_of(o_.type, device_)),
          text_(token_file::open(o_.data)), ranks_(ranks::from_environment(device_)),
          model_(prepare(o_, device_, type_)),
          optimizer_(model_->trained().values, model_->trained().matrix_weights, o_.optimizer),
          reader_(text_, longest(o_), device_) {
        if (!o_.teacher.empty()) {
            teacher_ = read_model(o_.teacher, device_, true);
            if (teacher_->config().vocab_size != model_->config().vocab_size)
                throw input_error(o_.teacher.string(), "has another vocabulary than the model");
        }
        check();
        order_ = {o_.seed, text_.size() - held_out_, static_cast<std::size_t>(longest(o_))};
    }

    void run() {
        const auto& weights = model_->error_weights();
        const nlohmann::json options = fingerprint(o_, model_->adapter(), weights ? &*weights : nullptr);
        std::int64_t step = 0;
        const auto last = last_checkpoint(o_.out);
        if (o_.resume && last)
            step = load_checkpoint(*last, *model_, optimizer_, options);
        else if (last)
            throw input_error(o_.out.string(), "holds a run already: resume it, or name another folder");
        std::filesystem::create_directories(o_.out);
        std::optional<training_log> log;
        if (first_rank())
            log.emplace(o_.out / "log.csv", step);
        say("training from step " + std::to_string(step) + " to " + std::to_string(o_.steps) + ", " +
            std::to_string(model_->trained().values.numel()) + " weights, keys and values " +
            to_string(o_.kv) + ", " + std::to_string(order_.tokens) + " tokens to train on, " +
            std::to_string(held_out_) + " held out");

        const schedule rates{o_.learning_rate, o_.last_learning_rate, o_.warmup, o_.steps};
        const std::int64_t tokens_of_a_step = o_.batch * longest(o_);
        const stop_signal stop;
        std::optional<kv1_lm::progress_bar> bar;
        bar.emplace(err_, o_.show_progress && first_rank(), "steps", static_cast<std::size_t>(o_.steps));
        const clock::time_point begin = clock::now();
        clock::time_point since = begin;
        std::int64_t logged = step, saved = last && o_.resume ? step : -1;
        const auto seconds = [](clock::time_point from) {
            return std::chrono::duration<double>(clock::now() - from).count();
        };
        const auto due = [&](std::int64_t every) {
            return step == o_.steps || (every > 0 && step % every == 0);
        };
        const auto save = [&] {
            if (first_rank() && saved != step)
                save_checkpoint(o_.out, step, *model_, optimizer_, {o_.model, o_.kv, options}, o_.keep);
            saved = step;
        };

        while (step < o_.steps) {
            const step_result result = do_step(step, rates.rate(step));
            ++step;
            const bool stopping = ranks_.any(
                stop.requested() || (o_.most_seconds > 0.0 && seconds(begin) > o_.most_seconds), device_);
            if (due(o_.log_every) || due(o_.validate_every) || stopping) {
                log_entry entry;
                entry.step = step;
                entry.tokens = step * tokens_of_a_step;
                entry.learning_rate = rates.rate(step - 1);
                entry.loss = result.losses[0].item<double>(); // waits for the device
                if (has_teacher())
                    entry.divergence = result.losses[1].item<double>();
                entry.gradient_norm = result.norm.item<double>();
                if (!std::isfinite(*entry.loss) || !std::isfinite(*entry.gradient_norm))
                    throw std::runtime_error("the loss is not finite at step " + std::to_string(step));
                entry.tokens_per_second =
                    static_cast<double>((step - logged) * tokens_of_a_step) / seconds(since);
                if (due(o_.validate_every)) {
                    const comparison v = validate();
                    entry.validation_plain = v.reference_loss;
                    entry.validation_kv = v.kv_loss;
                    entry.validation_divergence = v.divergence;
                }
                entry.seconds = seconds(begin);
                logged = step;
                since = clock::now();
                if (log)
                    log->write(entry);
                report(entry, *bar);
            }
            if (stopping)
                break;
            if (due(o_.save_every))
                save();
        }
        bar.reset();
        save();
        say(std::to_string(step) + " of " + std::to_string(o_.steps) + " steps done; " +
            last_checkpoint(o_.out).value_or(o_.out).string());
    }

private:
    struct step_result {
        Tensor losses; // cross entropy and divergence, means over the step
        Tensor norm;
    };

    void check() {
        check_layers(o_.kv, model_->config().layers, "--kv");
        if (text_.vocab_size() > model_->config().vocab_size)
            throw input_error(o_.data.string(), "was made with a larger vocabulary than the model's");
        for (const std::int64_t length : o_.lengths) {
            if (length < 1 || static_cast<std::size_t>(length) > model_->config().max_positions)
                throw input_error("--length: the model has positions for 1 to " +
                                  std::to_string(model_->config().max_positions) + " tokens");
            if (longest(o_) % length != 0)
                throw input_error("--length: " + std::to_string(length) + " does not divide the longest, " +
                                  std::to_string(longest(o_)));
        }
        if (o_.batch < 1 || o_.batch % ranks_.size() != 0)
            throw input_error("--batch: " + std::to_string(o_.batch) + " sequences cannot be shared among " +
                              std::to_string(ranks_.size()) + " ranks");
        rows_ = o_.batch / ranks_.size();
        micro_ = o_.micro_batch > 0 ? std::min(o_.micro_batch, rows_) : rows_;
        if (rows_ % micro_ != 0)
            throw input_error("--micro-batch: does not divide a rank's " + std::to_string(rows_) +
                              " sequences");
        const std::size_t window = static_cast<std::size_t>(longest(o_)) + 1;
        held_out_ =
            o_.held_out > 0 ? static_cast<std::size_t>(o_.held_out) : std::max(text_.size() / 100, window);
        if (text_.size() < held_out_ + window || held_out_ < window)
            throw input_error(o_.data.string(), "is too short to train on and to hold out " +
                                                    std::to_string(held_out_) + " tokens");
    }

    step_result do_step(std::int64_t step, double rate) {
        flat_parameters& trained = model_->trained();
        trained.gradients.zero_();
        const std::int64_t parts = rows_ / micro_;
        const std::int64_t length = o_.lengths[static_cast<std::size_t>(step) % o_.lengths.size()];
        const std::int64_t looked_at = sequences_seen * (longest(o_) / length);
        Tensor losses = torch::zeros({2}, torch::dtype(torch::kFloat32).device(device_));
        Tensor observed; // by the first part: the means that the next step takes a share of
        for (std::int64_t part = 0; part < parts; ++part) {
            const std::int64_t first = step * o_.batch + ranks_.rank() * rows_ + part * micro_;
            sequences s = reader_.read(
                micro_, [&](std::int64_t i) { return order_.start(static_cast<std::uint64_t>(first + i)); });
            s.inputs = s.inputs.view({-1, length});
            const double share = 1.0 / static_cast<double>(parts * ranks_.size());
            const bool observes = o_.kv.cache.needs_means() && part == 0;
            if (observes && step == 0 && !brings_means())
                find_means(s.inputs, looked_at);
            Tensor taught;
            if (teacher_) {
                const torch::NoGradGuard no_gradient;
                taught = teacher_->logits(s.inputs, plain_kv, type_);
            } else if (model_->adapter()) {
                const torch::NoGradGuard no_gradient;
                taught = model_->original_logits(s.inputs, type_);
            } else if (o_.self_teacher) {
                const Tensor plain = model_->logits(s.inputs, plain_kv, type_);
                taught = plain.detach().clone(); // a copy, since the gradient takes over its memory
                plain.backward(loss_of(plain.detach(), s.targets, {}, 0.0, share).gradient);
            }
            observed_means seen{looked_at, {}};
            const Tensor logits = model_->logits(s.inputs, o_.kv, type_, observes ? &seen : nullptr);
            if (observes)
                observed = seen.means;
            const token_loss loss = loss_of(logits.detach(), s.targets, taught,
                                            taught.defined() ? o_.teacher_weight : 0.0, share);
            logits.backward(loss.gradient);
            losses.add_(torch::stack({loss.cross_entropy, loss.divergence}), share);
        }
        ranks_.sum(trained.gradients);
        ranks_.sum(losses);
        if (observed.defined())
            update_means(observed, share_of_a_step);
        Tensor norm = clip(trained.gradients, o_.clip);
        optimizer_.update(trained.values, trained.gradients, rate, step);
        return {losses, norm};
    }

    // Updates the means by moving average: each step they take a share of the means of a few sequences, and all of
    // them at first.
    void update_means(Tensor seen, double share) {
        const torch::NoGradGuard no_gradient;
        ranks_.sum(seen);
        model_->means().lerp_(seen.div_(static_cast<double>(ranks_.size())), share);
    }

    // The first means, from a pass with plain keys and values.
    void find_means(const Tensor& inputs, std::int64_t sequences) {
        const torch::NoGradGuard no_gradient;
        observed_means seen{sequences, {}};
        training_policy plain;
        plain.cache.fp16_sinks = o_.kv.cache.fp16_sinks;
        const Tensor few = inputs.narrow(0, 0, std::min(inputs.size(0), sequences));
        (void)model_->logits(few, plain, type_, &seen);
        model_->set_means_turn(true);
        update_means(seen.means, 1.0);
    }

    // An adapter to go on with may have means of its own, which many sequences were seen for.
    [[nodiscard]] bool brings_means() const {
        return !o_.init_adapter.empty() && model_->means_turn() && model_->means().any().item<bool>();
    }

    [[nodiscard]] bool has_teacher() const noexcept {
        return teacher_ != nullptr || o_.self_teacher || model_->adapter();
    }

    // Measures the model with plain keys and values and through its cache, on the same windows of the held-out text
    // every time. With an adapter, the first is the model as it was.
    comparison validate() const {
        const torch::NoGradGuard no_gradient;
        const auto length = static_cast<std::size_t>(longest(o_));
        const std::size_t windows = (held_out_ - 1) / length;
        const std::size_t wanted =
            static_cast<std::size_t>(std::max<std::int64_t>(o_.validation_batches, 1) * micro_);
        const std::size_t n = std::min(windows, wanted);
        comparison sum;
        for (std::size_t at = 0; at < n;) {
            const std::size_t count = std::min(n - at, static_cast<std::size_t>(micro_));
            const sequences s = reader_.read(static_cast<std::int64_t>(count), [&](std::int64_t i) {
                return order_.tokens + (at + static_cast<std::size_t>(i)) * (windows / n) * length;
            });
            const comparison c = compare(model_->original_logits(s.inputs, type_),
                                         model_->logits(s.inputs, o_.kv, type_), s.targets);
            const double share = static_cast<double>(count) / static_cast<double>(n);
            sum.reference_loss += share * c.reference_loss;
            sum.kv_loss += share * c.kv_loss;
            sum.divergence += share * c.divergence;
            at += count;
        }
        return sum;
    }

    void report(const log_entry& e, kv1_lm::progress_bar& bar) {
        std::ostringstream note;
        note << std::fixed << std::setprecision(4) << "loss " << *e.loss;
        if (e.divergence)
            note << "  KL " << *e.divergence;
        note << std::setprecision(0) << "  " << *e.tokens_per_second << " tokens/s";
        if (e.validation_kv)
            note << std::setprecision(4) << "  held out: " << *e.validation_plain << " plain, "
                 << *e.validation_kv << " kv, KLD " << *e.validation_divergence;
        if (o_.show_progress)
            bar.show(static_cast<std::size_t>(e.step), note.str());
        if (!o_.show_progress || e.validation_kv)
            say("step " + std::to_string(e.step) + "/" + std::to_string(o_.steps) + "  " + note.str());
    }

    void say(const std::string& line) const {
        if (first_rank())
            out_ << line << std::endl;
    }
    [[nodiscard]] bool first_rank() const noexcept { return ranks_.rank() == 0; }

    static constexpr std::int64_t sequences_seen = 4; // of the longest
    static constexpr double share_of_a_step = 0.02;

    const train_options& o_;
    std::ostream& out_;
    std::ostream& err_;
    torch::Device device_;
    torch::ScalarType type_;
    token_file text_;
    ranks ranks_;
    std::unique_ptr<language_model> model_, teacher_;
    adamw optimizer_;
    batch_reader reader_;
    sample_order order_;
    std::size_t held_out_ = 0;
    std::int64_t rows_ = 0, micro_ = 0; // sequences of this rank in a step; in a micro-batch
};

} // namespace

void train(const train_options& options, std::ostream& out, std::ostream& err) {
    trainer(options, out, err).run();
}

} // namespace kv1_train
