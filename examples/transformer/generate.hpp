// SPDX-License-Identifier: Apache-2.0
//
// kv1-lm generate: continues a prompt, token by token, from the packed cache.
#pragma once

#include "cache_policy.hpp"
#include "sampler.hpp"

#include <kv1/attention.hpp>

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <optional>
#include <string>

namespace kv1_lm {

struct generate_options {
    std::filesystem::path model;
    std::string prompt;
    std::size_t max_new_tokens = 100;
    std::size_t max_input_tokens = 1024; ///< a longer prompt is refused
    sampling how;
    std::optional<cache_policy> kv; ///< none: the cache that the model names
    kv1::precision precision = kv1::precision::exact;
    bool show_cache = false;
    bool interactive = false; ///< prompts come from `in`, one a line
    bool print_ids = false;
    std::size_t threads = 1;
};

/// Writes the prompt and its continuation to `out` as they come, notes about cache and speed to `log`. Throws
/// input_error.
void generate(const generate_options& options, std::istream& in, std::ostream& out, std::ostream& log);

} // namespace kv1_lm
