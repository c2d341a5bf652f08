// SPDX-License-Identifier: Apache-2.0
//
// The 8M model writes the same text over any number of ranks as over one cache.
#include "text.hpp"

#include "model_cache.hpp"
#include "shipped_model.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

using kv1_test::shipped_model;

namespace {

std::vector<std::int32_t> over_one_cache(const kv1::cache_description& d,
                                         const std::vector<std::int32_t>& prompt, std::size_t wanted) {
    const kv1_lm::model& model = shipped_model();
    kv1_lm::thread_pool pool(1);
    kv1::kv_cache cache(d);
    const kv1::sequence_id id = cache.create_sequence();
    std::vector<std::int32_t> text = prompt, next = prompt;
    std::vector<float> logits(model.config().vocab_size);
    while (text.size() < prompt.size() + wanted) {
        const std::vector<float> states = model.forward(next, cache, id, kv1::precision::exact, pool);
        cache.commit(id);
        model.logits(std::span(states).last(model.config().hidden_size), logits, pool);
        next = {static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin())};
        text.push_back(next[0]);
        if (std::ranges::find(model.config().end_tokens, next[0]) != model.config().end_tokens.end())
            break;
    }
    return text;
}

} // namespace

TEST_CASE("the 8M model writes what it writes over one cache", "[text]") {
    kv1_lm::use_one_blas_thread();
    const kv1_lm::model& model = shipped_model();
    const std::vector<std::int32_t> prompt = kv1_test::shipped_tokenizer().encode(
        "The history of the city begins in the 12th century, when the river was bridged. It was");
    for (const char* policy : {"2", "c3+ls+had,c2+ls+had@4:8"}) {
        kv1::cache_description d = kv1_lm::describe(model.config(), kv1_lm::parse_policy(policy), {}, 256);
        d.page_tokens = 16;
        const std::vector<std::int32_t> expected = over_one_cache(d, prompt, 40);
        kv1_lm::thread_pool pool(1);
        context_parallel::distributed_cache cache(MPI_COMM_WORLD, d);
        const std::vector<std::int32_t> text =
            context_parallel::continue_greedily(model, cache, prompt, 40, kv1::precision::exact, pool);
        INFO(policy << ": " << kv1_test::shipped_tokenizer().decode(text));
        REQUIRE(text == expected);
        REQUIRE(text.size() > prompt.size() + 20);
    }
}
