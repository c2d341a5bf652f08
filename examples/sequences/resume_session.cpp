// SPDX-License-Identifier: Apache-2.0
//
// Saves a session to disk and loads it into another cache, where it goes on exactly as it would have here.
#include "language_model.hpp"

#include <kv1/cache_file.hpp>

#include <filesystem>
#include <iostream>

int main() {
    example::language_model lm;
    const example::tokens prompt = lm.encode("During the war, the regiment was stationed near the coast");
    const std::filesystem::path file = std::filesystem::temp_directory_path() / "kv1-example-session.kv1";

    kv1::kv_cache cache = lm.make_cache(1024);
    kv1::sequence_id session = cache.create_sequence();
    const std::int32_t first = example::language_model::best(lm.run(cache, session, prompt).back());
    const example::tokens before = lm.continue_greedily(cache, session, first, 20);
    kv1::save_file(cache, {&session, 1}, file, {.model = lm.fingerprint()});
    const example::tokens here = lm.continue_greedily(cache, session, before.back(), 20);

    kv1::kv_cache other = lm.make_cache(1024);
    kv1::load_file(other, file, {&session, 1}, {.model = lm.fingerprint()});
    const example::tokens there = lm.continue_greedily(other, session, before.back(), 20);
    std::cout << std::filesystem::file_size(file) << " bytes on disk\n"
              << lm.decode(before) << " |" << lm.decode(there) << '\n';
    std::filesystem::remove(file);
    return here == there ? 0 : 1;
}
