// SPDX-License-Identifier: Apache-2.0
//
// The checkpoint that the project ships, read once a process, and the reference's results for it.
#pragma once

#include "file.hpp"
#include "model.hpp"
#include "tokenizer.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_test {

inline const kv1_lm::model& shipped_model() {
    static const kv1_lm::model m = kv1_lm::model::read(KV1_LM_MODEL_DIR);
    return m;
}

inline const kv1_lm::tokenizer& shipped_tokenizer() {
    static const kv1_lm::tokenizer t =
        kv1_lm::tokenizer::read(std::filesystem::path(KV1_LM_MODEL_DIR) / "tokenizer.json");
    return t;
}

inline const nlohmann::json& golden() {
    static const nlohmann::json document =
        nlohmann::json::parse(kv1_lm::read_text_file(KV1_TEST_DATA_DIR "/golden.json"));
    return document;
}

} // namespace kv1_test
