// SPDX-License-Identifier: Apache-2.0
//
// Prompts with a common beginning. The second prompt starts from the pages of the first, and so does the
// third, after a restart.
#include "language_model.hpp"

#include <kv1/cache_file.hpp>

#include <chrono>
#include <filesystem>
#include <iostream>
#include <string>

int main() {
    example::language_model lm;
    kv1::kv_cache cache = lm.make_cache(4096);
    std::string common = "The following article is about the history of the region.";
    for (int i = 1; i <= 24; ++i)
        common += " In the year 18" + std::to_string(10 + i) + ", settlers built a new road along the river.";
    const example::tokens prompts[] = {lm.encode(common + " The first of them"),
                                       lm.encode(common + " Later, the railway")};
    const std::filesystem::path file = std::filesystem::temp_directory_path() / "kv1-example-prefixes.kv1";

    // Runs the tokens of a prompt that no prefix has. The last token is always run, since its logits are
    // wanted.
    double seconds = 0.0;
    std::size_t known = 0;
    const auto prefill = [&](const example::tokens& prompt) {
        const auto start = std::chrono::steady_clock::now();
        const kv1::prefix_match match = cache.create_from_prefix(std::span(prompt).first(prompt.size() - 1));
        const auto logits = lm.run(cache, match.sequence, std::span(prompt).subspan(match.tokens)).back();
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        known = match.tokens;
        cache.store_prefix(match.sequence, prompt, {}, true);
        const std::int32_t first = example::language_model::best(logits);
        example::tokens text = lm.continue_greedily(cache, match.sequence, first, 11);
        text.insert(text.begin(), first);
        cache.destroy_sequence(match.sequence);
        std::cout << prompt.size() << " tokens, " << known << " of them known: " << seconds * 1e3 << " ms\n";
        return text;
    };
    prefill(prompts[0]);
    const example::tokens shared = prefill(prompts[1]);
    const double with = seconds;
    const std::size_t reused = known;
    kv1::save_file(cache, {}, file, {.model = lm.fingerprint(), .prefixes = true});
    cache.prefixes().clear();
    const example::tokens alone = prefill(prompts[1]);
    std::cout << "prefill of the second prompt: " << seconds * 1e3 << " ms alone, " << with * 1e3
              << " ms sharing\n"
              << lm.decode(shared) << '\n';

    cache = lm.make_cache(4096); // an empty cache, as after a restart
    kv1::load_file(cache, file, {}, {.model = lm.fingerprint()});
    std::cout << "after a restart, with " << std::filesystem::file_size(file) << " bytes from disk: ";
    const example::tokens restarted = prefill(prompts[1]);
    std::filesystem::remove(file);
    return shared == alone && restarted == alone && reused > prompts[1].size() / 2 && known >= reused ? 0 : 1;
}
