// SPDX-License-Identifier: Apache-2.0
#include "sweep.hpp"

#include "calibrate.hpp"
#include "comparison.hpp"
#include "error.hpp"
#include "file.hpp"
#include "linear.hpp"
#include "model.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "side_by_side.hpp"
#include "tokenizer.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iomanip>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <span>
#include <sstream>
#include <tuple>
#include <utility>

namespace kv1_lm {

namespace {

constexpr auto save_every = std::chrono::seconds(20);

// [policy][chunk]; empty: not measured yet.
using policy_chunks = std::vector<std::optional<comparison>>;

nlohmann::ordered_json to_json(const policy_chunks& chunks) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < chunks.size(); ++i)
        if (const auto& c = chunks[i])
            list.push_back({i, c->positions, c->agreed, c->kld, c->reference_nll, c->nll});
    return list;
}

// Reads what to_json() writes, without the chunk's number.
comparison comparison_from(const nlohmann::ordered_json& c) {
    comparison sums;
    sums.positions = sums.targets = c.at(1);
    sums.agreed = c.at(2);
    sums.kld = c.at(3);
    sums.reference_nll = c.at(4);
    sums.nll = c.at(5);
    return sums;
}

// Everything of one model.
class model_sweep {
public:
    model_sweep(const sweep_options& options, const std::filesystem::path& folder,
                const std::vector<cache_policy>& policies)
        : options_(options), name_(folder.filename().empty() ? folder.parent_path().filename().string()
                                                             : folder.filename().string()),
          policies_(policies), model_(model::read(folder)) {
        if (options.seq_len < 2 || options.seq_len > model_.config().max_positions)
            throw input_error("--seq-len " + std::to_string(options.seq_len) + ": the model takes 2 to " +
                              std::to_string(model_.config().max_positions) + " tokens");
        const tokenizer words = tokenizer::read(folder / "tokenizer.json");
        tokens_ = words.encode(read_text_file(options.text));
        for (std::size_t at = 0; at + 1 < tokens_.size(); at += options.seq_len)
            chunks_.push_back(std::span<const std::int32_t>(tokens_).subspan(
                at, std::min(options.seq_len, tokens_.size() - at)));
        wanted_ = options.chunks == 0 ? chunks_.size() : std::min(options.chunks, chunks_.size());
        if (chunks_.empty())
            throw input_error(options.text.string() + ": fewer than two tokens, nothing to measure");
        calibrate_policies(words);
        done_.assign(policies.size(), policy_chunks(chunks_.size()));
    }

    [[nodiscard]] const std::string& name() const noexcept { return name_; }

    // What identifies results of this model and text.
    [[nodiscard]] nlohmann::ordered_json settings() const {
        return {{"parameters", model_.parameters()},
                {"tokens", tokens_.size()},
                {"seq_len", options_.seq_len},
                {"attention", options_.precision == kv1::precision::exact ? "exact" : "fast"},
                {"calibration", options_.calibration_text.filename().string()},
                {"calibration_tokens", options_.calibration_tokens},
                {"error_weights_of", "quantized tokens"},
                {"means_of_keys", "before RoPE"}};
    }

    void restore(const nlohmann::ordered_json& results) {
        for (std::size_t p = 0; p < policies_.size(); ++p)
            for (const auto& r : results)
                if (r.at("policy") == to_string(policies_[p]))
                    for (const auto& c : r.at("chunk_sums"))
                        if (const auto i = c.at(0).get<std::size_t>(); i < chunks_.size())
                            done_[p][i] = comparison_from(c);
    }

    [[nodiscard]] std::size_t total() const noexcept { return wanted_; }

    // Measures chunk i for the policies that lack it. Thread-safe for different chunks.
    void measure(std::size_t i, thread_pool& pool) {
        std::vector<std::size_t> wanted;
        {
            const std::lock_guard lock(mutex_);
            for (std::size_t p = 0; p < policies_.size(); ++p)
                if (!done_[p][i])
                    wanted.push_back(p);
        }
        if (wanted.empty())
            return;
        const std::span<const std::int32_t> tokens = chunks_[i];
        const auto run = [&](const kv1::cache_description& d) {
            kv1::kv_cache cache(d);
            return model_.forward(tokens, cache, cache.create_sequence(), options_.precision, pool);
        };
        const reference_predictions reference(
            model_, tokens, 0, tokens.size() - 1,
            run(model_.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, options_.seq_len)), pool);
        for (const std::size_t p : wanted) {
            const comparison sums = reference.compare(model_, run(descriptions_[p]), pool);
            const std::lock_guard lock(mutex_);
            done_[p][i] = sums;
        }
    }

    // Describes the caches. Policies that leave the same tokens in fp16 share a calibration.
    void calibrate_policies(const tokenizer& words) {
        std::vector<std::int32_t> sample;
        if (std::ranges::any_of(policies_, &cache_policy::needs_error_weights) ||
            std::ranges::any_of(policies_, &cache_policy::needs_means) ||
            std::ranges::any_of(policies_, &cache_policy::needs_basis)) {
            if (options_.calibration_text.empty())
                throw input_error("means, bases and error weights need --calibrate FILE");
            sample = words.encode(read_text_file(options_.calibration_text));
            sample.resize(std::min(sample.size(), options_.calibration_tokens));
            if (sample.empty())
                throw input_error(options_.calibration_text.string() + ": no tokens to calibrate on");
        }
        thread_pool pool(options_.threads);
        std::map<std::pair<std::size_t, std::size_t>, calibration> found; // by fp16 sinks and window
        for (const cache_policy& p : policies_) {
            if (!p.needs_means() && !p.needs_error_weights() && !p.needs_basis()) {
                descriptions_.push_back(describe(model_.config(), p, {}, options_.seq_len));
                continue;
            }
            // without error weights, fp16 tokens do not matter
            const std::pair key = p.needs_error_weights() ? std::pair(p.fp16_sinks, p.fp16_window)
                                  : found.empty()         ? std::pair(std::size_t{0}, std::size_t{0})
                                                          : found.begin()->first;
            if (!found.contains(key)) {
                cache_policy all;
                const bool weighted = std::ranges::any_of(policies_, &cache_policy::needs_error_weights);
                for (kv1::vector_policy* side : {&all.common.key, &all.common.value}) {
                    side->means = true;
                    side->basis = std::ranges::any_of(policies_, &cache_policy::needs_basis);
                    side->error_weights = weighted;
                }
                std::tie(all.fp16_sinks, all.fp16_window) = key;
                found[key] = parts_of(calibrate(model_, sample, {options_.seq_len}, all, {}, pool));
            }
            descriptions_.push_back(describe(model_.config(), p, found[key], options_.seq_len));
        }
    }

    // Measures bytes, errors and speed, with the first chunk's keys and values.
    void measure_vectors() {
        const model_config& c = model_.config();
        thread_pool pool(1);
        kv1::kv_cache cache(
            model_.cache_shape({kv1::kv_format::fp32, kv1::kv_format::fp32}, options_.seq_len));
        std::vector<std::vector<float>> keys(c.layers), values(c.layers);
        const std::size_t n = chunks_[0].size(), width = c.kv_heads * c.head_dim;
        static_cast<void>(
            model_.forward(chunks_[0], cache, cache.create_sequence(), options_.precision, pool,
                           [&](std::size_t layer, kv1::tensor_view, kv1::tensor_view k, kv1::tensor_view v) {
                               const auto* first = static_cast<const float*>(k.data());
                               keys[layer].assign(first, first + n * width);
                               first = static_cast<const float*>(v.data());
                               values[layer].assign(first, first + n * width);
                           }));
        vectors_.clear();
        for (const kv1::cache_description& d : descriptions_) {
            kv1::cache_description room = d;
            room.capacity_tokens *= 2;
            kv1::kv_cache stored(room);
            vector_costs costs;
            double seconds = 0.0;
            const kv1::sequence_id id = stored.create_sequence();
            for (std::size_t i = 0; i < c.layers; ++i) {
                double best = 0.0; // seconds: the fastest of five appends of this layer
                for (int repeat = 0; repeat < 5; ++repeat) {
                    const kv1::sequence_id trial = repeat == 0 ? id : stored.create_sequence();
                    const auto start = std::chrono::steady_clock::now();
                    stored.append(trial, i, {keys[i].data(), n, c.kv_heads, c.head_dim},
                                  {values[i].data(), n, c.kv_heads, c.head_dim});
                    const double s =
                        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
                    best = repeat == 0 ? s : std::min(best, s);
                    if (repeat != 0)
                        stored.destroy_sequence(trial);
                }
                seconds += best;
            }
            costs = errors(stored, id, keys, values);
            costs.encode_ns = seconds * 1e9 / static_cast<double>(2 * c.layers * n * width);
            vectors_.push_back(costs);
        }
    }

    [[nodiscard]] std::vector<sweep_row> rows() const {
        std::vector<sweep_row> all;
        for (std::size_t p = 0; p < policies_.size(); ++p) {
            sweep_row r;
            r.model = name_;
            r.policy = to_string(policies_[p]);
            r.bytes_per_vector = bytes_per_vector(descriptions_[p], options_.seq_len);
            if (p < vectors_.size()) {
                r.key_mse = vectors_[p].key_mse;
                r.value_mse = vectors_[p].value_mse;
                r.encode_ns = vectors_[p].encode_ns;
            }
            double reference_nll = 0.0, nll = 0.0;
            std::size_t agreed = 0;
            for (const auto& c : std::span(done_[p]).first(wanted_))
                if (c) { // in order, so that sums do not depend on the threads
                    r.positions += c->positions;
                    agreed += c->agreed;
                    r.kld += c->kld;
                    reference_nll += c->reference_nll;
                    nll += c->nll;
                }
            const auto n = static_cast<double>(std::max<std::size_t>(r.positions, 1));
            r.kld /= n;
            r.reference_perplexity = std::exp(reference_nll / n);
            r.perplexity = std::exp(nll / n);
            r.top1 = static_cast<double>(agreed) / n;
            all.push_back(r);
        }
        return all;
    }

    [[nodiscard]] nlohmann::ordered_json report() {
        const std::lock_guard lock(mutex_);
        nlohmann::ordered_json results = nlohmann::ordered_json::array();
        const std::vector<sweep_row> all = rows();
        for (std::size_t p = 0; p < policies_.size(); ++p) {
            const sweep_row& r = all[p];
            results.push_back({{"policy", r.policy},
                               {"bytes_per_vector", r.bytes_per_vector},
                               {"key_mse", r.key_mse},
                               {"value_mse", r.value_mse},
                               {"encode_ns_per_value", r.encode_ns},
                               {"positions", r.positions},
                               {"kld", r.kld},
                               {"ppl_reference", r.reference_perplexity},
                               {"ppl", r.perplexity},
                               {"top1_agreement", r.top1},
                               {"chunk_sums", to_json(done_[p])}});
        }
        return {{"model", name_}, {"settings", settings()}, {"results", std::move(results)}};
    }

private:
    struct vector_costs {
        double key_mse = 0.0, value_mse = 0.0, encode_ns = 0.0;
    };

    vector_costs errors(const kv1::kv_cache& cache, kv1::sequence_id id,
                        const std::vector<std::vector<float>>& keys,
                        const std::vector<std::vector<float>>& values) const {
        const model_config& c = model_.config();
        const std::size_t n = chunks_[0].size();
        vector_costs costs;
        std::vector<float> read(n * c.head_dim);
        for (std::size_t layer = 0; layer < c.layers; ++layer)
            for (std::size_t h = 0; h < c.kv_heads; ++h)
                for (const bool key : {true, false}) {
                    cache.read(id, layer, key ? kv1::kv_side::key : kv1::kv_side::value, h, 0, n, read);
                    const std::vector<float>& given = (key ? keys : values)[layer];
                    double sum = 0.0;
                    for (std::size_t t = 0; t < n; ++t)
                        for (std::size_t i = 0; i < c.head_dim; ++i) {
                            const double e =
                                static_cast<double>(given[(t * c.kv_heads + h) * c.head_dim + i]) -
                                static_cast<double>(read[t * c.head_dim + i]);
                            sum += e * e;
                        }
                    (key ? costs.key_mse : costs.value_mse) +=
                        sum / static_cast<double>(n * c.head_dim * c.layers * c.kv_heads);
                }
        return costs;
    }

    const sweep_options& options_;
    std::string name_;
    const std::vector<cache_policy>& policies_;
    model model_;
    std::vector<std::int32_t> tokens_;
    std::vector<std::span<const std::int32_t>> chunks_; // of the whole text
    std::size_t wanted_ = 0;                            // number of chunks that are asked for
    std::vector<kv1::cache_description> descriptions_;
    std::vector<policy_chunks> done_;
    std::vector<vector_costs> vectors_;
    std::mutex mutex_;
};

// The results file. It is read if it exists, and rewritten whole.
class results_file {
public:
    explicit results_file(std::filesystem::path file) : file_(std::move(file)) {
        if (file_.empty() || !std::filesystem::exists(file_))
            return;
        earlier_ = nlohmann::ordered_json::parse(read_text_file(file_), nullptr, false);
        if (!earlier_.is_object() || !earlier_.contains("models"))
            throw input_error(file_.string() + ": not a file that sweep wrote");
    }

    void restore(model_sweep& m) const {
        if (earlier_.is_null())
            return;
        try {
            for (const auto& e : earlier_.at("models")) {
                if (e.at("model") != m.name())
                    continue;
                if (nlohmann::json(e.at("settings")) != nlohmann::json(m.settings())) // whatever the order
                    throw input_error(file_.string() + ": holds results of other settings for " + m.name());
                m.restore(e.at("results"));
            }
        } catch (const nlohmann::json::exception& e) {
            throw input_error(file_.string() + ": not a file that sweep wrote (" + e.what() + ")");
        }
    }

    // Results of models and policies that this run does not ask for are kept.
    void save(const std::vector<std::unique_ptr<model_sweep>>& models) {
        if (file_.empty())
            return;
        nlohmann::ordered_json all =
            earlier_.is_null() ? nlohmann::ordered_json::array() : earlier_["models"];
        for (const auto& m : models) {
            nlohmann::ordered_json report = m->report();
            const auto same = std::find_if(all.begin(), all.end(),
                                           [&](const auto& e) { return e.at("model") == m->name(); });
            if (same == all.end()) {
                all.push_back(std::move(report));
                continue;
            }
            for (const auto& r : same->at("results"))
                if (std::none_of(report["results"].begin(), report["results"].end(),
                                 [&](const auto& own) { return own.at("policy") == r.at("policy"); }))
                    report["results"].push_back(r);
            *same = std::move(report);
        }
        output_file(file_).commit(nlohmann::ordered_json{{"models", std::move(all)}}.dump() + "\n");
    }

private:
    std::filesystem::path file_;
    nlohmann::ordered_json earlier_;
};

std::string csv_of(const std::vector<sweep_row>& rows) {
    std::ostringstream out;
    out.precision(8);
    out << "model,policy,bytes_per_vector,key_mse,value_mse,encode_ns_per_value,positions,kld,ppl_reference,"
           "ppl,"
           "top1_agreement\n";
    for (const sweep_row& r : rows)
        out << r.model << ",\"" << r.policy << "\"," << r.bytes_per_vector << ',' << r.key_mse << ','
            << r.value_mse << ',' << r.encode_ns << ',' << r.positions << ',' << r.kld << ','
            << r.reference_perplexity << ',' << r.perplexity << ',' << r.top1 << '\n';
    return out.str();
}

} // namespace

std::vector<std::string> default_policies() {
    return {"2,2",
            "2+cs,2+cs",
            "2+ls,2+ls",
            "2+ls+had,2+ls+had",
            "2+ls+mean,2+ls+mean",
            "2+ls+had+mean,2+ls+had+mean",
            "c2+ls+had+mean,c2+ls+had+mean",
            "cb2+ls+had+mean,cb2+ls+had+mean",
            "c2+ls+had+mean+ew,c2+ls+had+mean+ew",
            "cb2+ls+had+mean+ew,cb2+ls+had+mean+ew",
            "cb2+ls+had+mean+ew+channel,cb2+ls+had+mean+ew",
            "c3+ls+had+mean,c2+ls+had+mean",
            "c3+ls+had+mean+ew,c2+ls+had+mean+ew",
            "c3+ls+had+mean+ew,cb2+ls+had+mean+ew",
            "c3+ls+had+mean+ew+channel,c2+ls+had+mean+ew",
            "c3+ls+had+mean+ew,2",
            "c4+ls+had+mean+ew,c2+ls+had+mean+ew",
            "c3+ls+had+mean+ew,c3+ls+had+mean+ew",
            "c3+ls+had+mean+ew,c2+ls+had+mean+ew@4:32",
            "c4+ls+had+mean+ew,c4+ls+had+mean+ew",
            "3,3",
            "4,4",
            "8,8"};
}

std::vector<sweep_row> measure_sweep(const sweep_options& options, std::ostream& log) {
    std::vector<cache_policy> policies;
    for (const std::string& text : options.policies.empty() ? default_policies() : options.policies)
        policies.push_back(parse_policy(text));
    results_file file(options.json);
    std::vector<std::unique_ptr<model_sweep>> models;
    std::size_t total = 0;
    for (const std::filesystem::path& folder : options.models) {
        models.push_back(std::make_unique<model_sweep>(options, folder, policies));
        for (std::size_t i = 0; i + 1 < models.size(); ++i)
            if (models[i]->name() == models.back()->name())
                throw input_error("two models are called " + models.back()->name());
        file.restore(*models.back());
        models.back()->measure_vectors();
        total += models.back()->total();
    }

    const auto measure = [&](std::size_t i, thread_pool& pool) { // i counts the chunks of all models
        std::size_t m = 0;
        for (; i >= models[m]->total(); ++m)
            i -= models[m]->total();
        models[m]->measure(i, pool);
    };
    progress_bar bar(log, options.show_progress, "chunks", total);
    auto saved = std::chrono::steady_clock::now();
    const auto watch = [&](std::size_t done) {
        bar.show(done, {});
        if (const auto now = std::chrono::steady_clock::now(); now - saved > save_every || done == total) {
            file.save(models);
            saved = now;
        }
    };
    try {
        run_side_by_side(
            total, options.threads,
            [&] { // each chunk runs on one thread, beside others
                return [&, pool = std::make_unique<thread_pool>(1)](std::size_t i) { measure(i, *pool); };
            },
            watch);
    } catch (...) {
        file.save(models); // keep what was measured before the exception
        throw;
    }
    std::vector<sweep_row> rows;
    for (const auto& m : models)
        for (sweep_row& r : m->rows())
            rows.push_back(std::move(r));
    return rows;
}

void sweep(const sweep_options& options, std::ostream& out, std::ostream& log) {
    use_one_blas_thread();
    std::optional<output_file> csv;
    if (!options.csv.empty())
        csv.emplace(options.csv);
    const std::vector<sweep_row> rows = measure_sweep(options, log);
    std::string model;
    for (const sweep_row& r : rows) {
        if (r.model != model) {
            model = r.model;
            out << model << ", " << r.positions << " positions, perplexity " << std::fixed
                << std::setprecision(2) << r.reference_perplexity << " with an fp32 cache\n"
                << "  bytes     KLD     ppl   top-1   K mse    V mse   ns/value  policy\n";
        }
        out << std::fixed << std::setw(7) << std::setprecision(2) << r.bytes_per_vector << std::setw(9)
            << std::setprecision(5) << r.kld << std::setw(8) << std::setprecision(2) << r.perplexity
            << std::setw(7) << std::setprecision(1) << 100.0 * r.top1 << '%' << std::setw(9)
            << std::setprecision(5) << r.key_mse << std::setw(9) << r.value_mse << std::setw(8)
            << std::setprecision(2) << r.encode_ns << "    " << r.policy << '\n';
    }
    out << std::flush;
    if (csv)
        csv->commit(csv_of(rows));
}

} // namespace kv1_lm
