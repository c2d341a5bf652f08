// SPDX-License-Identifier: Apache-2.0
//
// A small tokenizer.json to vary: <|end|> has id 0, byte b has id b + 1, and a few merges follow.
#pragma once

#include "byte_alphabet.hpp"
#include "json_file.hpp"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kv1_test {

using kv1_lm::json;

/// The tokens that its merges make, in the order of their ranks: ids 257 and up.
inline const std::vector<std::pair<std::string_view, std::string_view>>& tiny_merges() {
    static const std::vector<std::pair<std::string_view, std::string_view>> merges = {
        {"t", "h"},       {"th", "e"},  {" ", "the"},     {"a", "a"},      {"aa", "aa"},
        {"aaaa", "aaaa"}, {" ", "a"},   {"l", "l"},       {"'", "ll"},     {"1", "2"},
        {" ", "12"},      {" ", " "},   {"  ", "  "},     {"!", "!"},      {" ", "!!"},
        {"x", "y"},       {"xy", "xy"}, {"\xc3", "\xa9"}, {"\xe2", "\x82"}};
    return merges;
}

/// Of a vocabulary with all bytes and these merges of bytes.
inline json byte_level_tokenizer(const std::vector<std::pair<std::string_view, std::string_view>>& merges) {
    using kv1_lm::spell;
    json vocabulary = {{"<|end|>", 0}}, list = json::array();
    for (int b = 0; b < 256; ++b)
        vocabulary[spell(std::string(1, static_cast<char>(b)))] = b + 1;
    for (const auto& [left, right] : merges) {
        const std::string joined = spell(left) + spell(right);
        if (!vocabulary.contains(joined))
            vocabulary.emplace(joined, vocabulary.size());
        list.push_back({spell(left), spell(right)});
    }
    return {
        {"version", "1.0"},
        {"truncation", nullptr},
        {"padding", nullptr},
        {"added_tokens",
         {{{"id", 0},
           {"content", "<|end|>"},
           {"single_word", false},
           {"lstrip", false},
           {"rstrip", false},
           {"normalized", false},
           {"special", true}}}},
        {"normalizer", nullptr},
        {"pre_tokenizer",
         {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
        {"post_processor", nullptr},
        {"decoder",
         {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
        {"model",
         {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", std::move(vocabulary)},
          {"merges", std::move(list)}}}};
}

inline json tiny_tokenizer() { return byte_level_tokenizer(tiny_merges()); }

} // namespace kv1_test
