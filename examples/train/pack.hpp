// SPDX-License-Identifier: Apache-2.0
//
// `kv1-train pack`: from text to token ids.
#pragma once

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

namespace kv1_train {

struct pack_options {
    std::vector<std::filesystem::path> texts;   ///< UTF-8, one after the other
    std::filesystem::path tokenizer;            ///< folder with tokenizer.json
    std::filesystem::path out;                  ///< folder to make
    std::string document_end = "<|endoftext|>"; ///< a token; texts are cut after it to be encoded in parallel
    std::size_t shard_tokens = std::size_t{1} << 26;
    std::size_t threads = 1;
    bool show_progress = false;
};

/// Throws input_error. A document end is added after each text that does not end with one.
void pack(const pack_options& options, std::ostream& out, std::ostream& err);

} // namespace kv1_train
