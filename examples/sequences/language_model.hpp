// SPDX-License-Identifier: Apache-2.0
//
// What these examples share: the small model, its tokenizer, and how to run it over a cache.
#pragma once

#include "model.hpp"
#include "model_cache.hpp"
#include "thread_pool.hpp"
#include "tokenizer.hpp"

#include <kv1/kv_cache.hpp>
#include <kv1/model_fingerprint.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace example {

using tokens = std::vector<std::int32_t>;

class language_model {
public:
    [[nodiscard]] kv1::kv_cache make_cache(std::size_t capacity_tokens) const {
        kv1::cache_description shape =
            describe(model_.config(), cache_.policy, cache_.calibrated, capacity_tokens);
        shape.page_tokens = 16; // small pages share more of a short text
        return kv1::kv_cache(shape);
    }
    /// The fingerprint of the model's weights. A cache saved with it is not loaded by another model of this
    /// shape.
    [[nodiscard]] kv1::model_fingerprint fingerprint() const {
        std::ifstream weights(folder_ / "model.safetensors", std::ios::binary);
        return kv1::fingerprint_of(std::string(std::istreambuf_iterator<char>(weights), {}));
    }
    [[nodiscard]] tokens encode(std::string_view text) const { return tokenizer_.encode(text); }
    [[nodiscard]] std::string decode(const tokens& t) const { return tokenizer_.decode(t); }

    /// Runs tokens that follow those of the sequence. Gives the logits after each of the last `wanted` of
    /// them.
    std::vector<std::vector<float>> run(kv1::kv_cache& cache, kv1::sequence_id sequence,
                                        std::span<const std::int32_t> t, std::size_t wanted = 1) {
        const std::vector<float> states = model_.forward(t, cache, sequence, kv1::precision::exact, pool_);
        const std::size_t width = model_.config().hidden_size;
        std::vector<std::vector<float>> all(wanted, std::vector<float>(model_.config().vocab_size));
        for (std::size_t i = 0; i < wanted; ++i)
            model_.logits(std::span(states).subspan((t.size() - wanted + i) * width, width), all[i], pool_);
        return all;
    }
    /// Chooses the n likeliest tokens after `last`, one by one. The sequence does not hold `last` yet.
    tokens continue_greedily(kv1::kv_cache& cache, kv1::sequence_id sequence, std::int32_t last,
                             std::size_t n) {
        tokens out;
        for (; out.size() < n; out.push_back(last))
            last = best(run(cache, sequence, {&last, 1})[0]);
        return out;
    }

    static std::int32_t best(std::span<const float> logits) {
        return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }

private:
    std::filesystem::path folder_ = KV1_LM_DEFAULT_MODEL_DIR;
    kv1_lm::model model_ = kv1_lm::model::read(folder_);
    kv1_lm::model_cache cache_ = kv1_lm::choose_cache(folder_, model_.config(), {});
    kv1_lm::tokenizer tokenizer_ = kv1_lm::tokenizer::read(folder_ / "tokenizer.json");
    kv1_lm::thread_pool pool_{1};
};

} // namespace example
