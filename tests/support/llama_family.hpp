// SPDX-License-Identifier: Apache-2.0
//
// Tiny random models of the Llama family as Transformers saved them, and its logits (data/make_llama_family.py).
#pragma once

#include "safetensors.hpp"

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kv1_test {

inline constexpr std::array<const char*, 4> llama_family{"llama", "llama_tied", "qwen2", "qwen3"};

struct family_model {
    std::filesystem::path folder;
    std::vector<std::int32_t> ids;
    std::vector<float> logits;         ///< [tokens][words]
    std::vector<float> adapted_logits; ///< with the adapter in folder / "adapter"
};

inline family_model read_family_model(const std::string& name) {
    family_model m{std::filesystem::path(KV1_TEST_DATA_DIR) / "llama_family" / name, {}, {}, {}};
    const auto file = kv1_lm::safetensors::read(m.folder / "golden.safetensors");
    const auto values = [&](const char* tensor) { return kv1_lm::to_floats(*file.find(tensor)); };
    for (const float id : values("ids"))
        m.ids.push_back(static_cast<std::int32_t>(id));
    m.logits = values("logits");
    m.adapted_logits = values("adapted_logits");
    return m;
}

} // namespace kv1_test
