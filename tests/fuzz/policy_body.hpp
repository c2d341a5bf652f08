// SPDX-License-Identifier: Apache-2.0
//
// What holds for the parser of cache policies (--kv, --policy), whatever it is given. Throws std::logic_error
// where it does not.
#pragma once

#include "safetensors_body.hpp"

#include "cache_policy.hpp"

#include <string>

namespace kv1_test {

/// A text is refused in one line that names it, or means what it is written as.
inline void policy_body(std::span<const std::uint8_t> input) {
    const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
    try {
        const kv1_lm::cache_policy p = kv1_lm::parse_policy(text);
        require(p.text == text, "a policy keeps its text");
        std::string written = to_string(p.common);
        for (const auto& [layer, own] : p.layers)
            written.append("/").append(std::to_string(layer)).append(":").append(to_string(own));
        written.append("@")
            .append(std::to_string(p.fp16_sinks))
            .append(":")
            .append(std::to_string(p.fp16_window));
        const kv1_lm::cache_policy again = kv1_lm::parse_policy(written);
        require(again.common == p.common && again.layers == p.layers && again.fp16_sinks == p.fp16_sinks &&
                    again.fp16_window == p.fp16_window,
                "a policy that is written and read is the same");
    } catch (const kv1_lm::input_error& e) {
        check_message(e.what(), "policy '");
    }
}

} // namespace kv1_test
