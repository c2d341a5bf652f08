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
#include <ostream>

namespace kv1_train {

void evaluate(const evaluate_options& options, std::ostream& out) {
    const torch::NoGradGuard no_gradient;
    const torch::Device device = device_of(options.device);
    const torch::ScalarType type = type_of(options.type, device);
    const auto model = read_model(options.model, device, true);
    if (!options.adapter.empty())
        read_adapter(options.adapter, *model);
    check_layers(options.kv, model->config().layers, "--kv");
    const token_file text = token_file::open(options.data);
    if (text.vocab_size() > model->config().vocab_size)
        throw kv1_lm::input_error(options.data.string(),
                                  "was made with a larger vocabulary than the model's");
    if (options.length < 2 || static_cast<std::size_t>(options.length) > model->config().max_positions)
        throw kv1_lm::input_error("--length: 2 to the model's " +
                                  std::to_string(model->config().max_positions) + " tokens");
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
        const comparison c = compare(model->original_logits(s.inputs, type),
                                     model->logits(s.inputs, options.kv, type), s.targets);
        const double share = static_cast<double>(count) / static_cast<double>(chunks);
        sum.reference_loss += share * c.reference_loss;
        sum.kv_loss += share * c.kv_loss;
        sum.divergence += share * c.divergence;
        at += count;
    }
    out << chunks << " chunks of " << length << " tokens, keys and values " << to_string(options.kv) << '\n'
        << std::fixed << std::setprecision(4) << "perplexity, plain  " << std::exp(sum.reference_loss)
        << "\nperplexity, kv     " << std::exp(sum.kv_loss) << std::setprecision(6) << "\nKL divergence      "
        << sum.divergence << " nats\n";
}

} // namespace kv1_train
