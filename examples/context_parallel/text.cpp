// SPDX-License-Identifier: Apache-2.0
#include "text.hpp"

#include <algorithm>

namespace context_parallel {

std::vector<std::int32_t> continue_greedily(const kv1_lm::model& model, distributed_cache& cache,
                                            std::span<const std::int32_t> prompt, std::size_t wanted,
                                            kv1::precision precision, kv1_lm::thread_pool& pool) {
    const sequence s = cache.create_sequence();
    const kv1_lm::model::attention attend = [&](std::size_t layer, kv1::tensor_view queries,
                                                kv1::tensor_view keys, kv1::tensor_view values,
                                                kv1::mutable_tensor_view outputs) {
        cache.append_and_attend(s, layer, keys, values, queries, outputs, {.mode = precision});
    };
    const std::vector<std::int32_t>& ends = model.config().end_tokens;
    std::vector<std::int32_t> text(prompt.begin(), prompt.end());
    std::vector<float> logits(model.config().vocab_size);
    std::span<const std::int32_t> next(text);
    while (text.size() < prompt.size() + wanted) {
        const std::vector<float> states = model.forward(next, cache.length(s), attend, pool);
        cache.commit(s);
        model.logits(std::span(states).last(model.config().hidden_size), logits, pool);
        text.push_back(static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin()));
        if (std::ranges::find(ends, text.back()) != ends.end())
            break;
        next = std::span(text).last(1);
    }
    cache.destroy_sequence(s);
    return text;
}

} // namespace context_parallel
