// SPDX-License-Identifier: Apache-2.0
//
// What holds for the parser of cache policies (cache_policy.hpp), whatever it is given. Throws
// std::logic_error where it does not.
#pragma once

#include <kv1/cache_policy.hpp>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kv1_test {

/// A text is refused with a rule and a place within it, or means what it is written as.
inline void policy_body(std::span<const std::uint8_t> input) {
    const auto require = [](bool holds, const char* what) {
        if (!holds)
            throw std::logic_error(what);
    };
    const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
    const kv1::result<kv1::cache_policy> p = kv1::try_parse_policy(text);
    if (!p) {
        const kv1::status& s = p.reason();
        require(s.code() == kv1::errc::invalid_argument || s.code() == kv1::errc::out_of_range,
                "a text is wrong, and nothing else");
        require(*s.rule() != '\0', "an error names its rule");
        require(s.where().position >= 0 && s.where().position <= static_cast<std::int64_t>(text.size()),
                "an error points into the text or at its end");
        return;
    }
    const std::string written = to_string(*p);
    const kv1::result<kv1::cache_policy> again = kv1::try_parse_policy(written);
    require(again && *again == *p, "a policy that is written and read is the same");
    require(to_string(*again) == written, "a policy is written in one way");
    for (const kv1::layer_exception& e : p->layers)
        require(p->of(e.layer) == e.policy, "a layer that is named has its policy");
}

} // namespace kv1_test
