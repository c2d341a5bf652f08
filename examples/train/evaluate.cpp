// SPDX-License-Identifier: Apache-2.0
#include "evaluate.hpp"

#include "batch_reader.hpp"
#include "checkpoint.hpp"
#include "device.hpp"
#include "lora.hpp"
#include "loss.hpp"

#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

namespace kv1_train {

void evaluate(const evaluate_options& options, std::ostream& out) {
    const torch::NoGradGuard no_gradient;
    const torch::Device device = device_of(options.device);
    const torch::ScalarType type = type_of(options.type, device);
    const auto model = read_model(options.model, device, true);
    if (!options.adapter.empty())
        read_adapter(options.adapter, *model, type);
    check_layers(options.kv, model->config().layers, "--kv");
    if (options.kv.cache.needs_error_weights()) {
        std::vector<std::filesystem::path> folders{options.model};
        if (!options.adapter.empty())
            folders.insert(folders.begin(), options.adapter);
        model->set_error_weights(
            read_error_weights(folders, options.model, model->config(), options.kv, device));
    }
    std::unique_ptr<language_model> other;
    if (!options.original.empty()) {
        other = read_model(options.original, device, true);
        if (other->config().vocab_size != model->config().vocab_size)
            throw kv1_lm::input_error(options.original.string(), "has another vocabulary than the model");
    }
    const language_model& original = other ? *other : *model;
    const token_file text = token_file::open(options.data);
    if (text.vocab_size() > model->config().vocab_size)
        throw kv1_lm::input_error(options.data.string(),
                                  "was made with a larger vocabulary than the model's");
    if (options.length < 2 || static_cast<std::size_t>(options.length) > model->config().max_positions)
        throw kv1_lm::input_error("--length: 2 to the model's " +
                                  std::to_string(model->config().max_positions) + " tokens");
    if (options.skip > options.length - 2)
        throw kv1_lm::input_error("--skip " + std::to_string(options.skip) + ": nothing is left of a chunk");
    const auto length = static_cast<std::size_t>(options.length);
    const std::size_t chunks = text.size() / length;
    if (chunks == 0)
        throw kv1_lm::input_error(options.data.string(), "is shorter than a chunk");

    const batch_reader reader(text, options.length - 1, device);
    comparison sum;
    for (std::size_t at = 0; at < chunks;) {
        const std::size_t count = std::min(chunks - at, static_cast<std::size_t>(options.batch));
        const sequences s = reader.read(static_cast<std::int64_t>(count), [&](std::int64_t i) {
            return (at + static_cast<std::size_t>(i)) * length;
        });
        const auto counted = [&](const torch::Tensor& rows) {
            const torch::Tensor chunk = rows.unflatten(0, {static_cast<std::int64_t>(count), -1});
            return chunk.narrow(1, options.skip, chunk.size(1) - options.skip).flatten(0, 1);
        };
        const comparison c = compare(counted(original.original_logits(s.inputs, type)),
                                     counted(model->logits(s.inputs, options.kv, type)), counted(s.targets));
        const double share = static_cast<double>(count) / static_cast<double>(chunks);
        sum.reference_loss += share * c.reference_loss;
        sum.kv_loss += share * c.kv_loss;
        sum.divergence += share * c.divergence;
        at += count;
    }
    out << chunks << " chunks of " << length << " tokens";
    if (options.skip > 0)
        out << " without their first " << options.skip;
    out << ", keys and values " << to_string(options.kv) << '\n'
        << std::fixed << std::setprecision(4) << "perplexity, plain  " << std::exp(sum.reference_loss)
        << "\nperplexity, kv     " << std::exp(sum.kv_loss) << std::setprecision(6) << "\nKL divergence      "
        << sum.divergence << " nats\n";
}

} // namespace kv1_train
