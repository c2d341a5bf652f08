// SPDX-License-Identifier: Apache-2.0
//
// Finds the first occurrence of any of many strings in a text. Of strings that begin at the same place it
// finds the longest.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kv1_lm {

class literal_finder {
public:
    struct hit {
        std::size_t begin, end;
        std::int32_t token;
    };

    /// Adds a string, and the value to give when it is found. Precondition: the string is not empty.
    void add(std::string literal, std::int32_t token) {
        auto& others = by_first_byte_[static_cast<std::uint8_t>(literal.front())];
        const auto place = std::find_if(others.begin(), others.end(),
                                        [&](const entry& e) { return e.first.size() <= literal.size(); });
        others.insert(place, {std::move(literal), token});
    }

    [[nodiscard]] std::optional<hit> find(std::string_view text, std::size_t from) const {
        for (std::size_t at = from; at < text.size(); ++at)
            for (const auto& [literal, token] : by_first_byte_[static_cast<std::uint8_t>(text[at])])
                if (text.substr(at).starts_with(literal))
                    return hit{at, at + literal.size(), token};
        return std::nullopt;
    }

private:
    using entry = std::pair<std::string, std::int32_t>;
    std::array<std::vector<entry>, 256> by_first_byte_; // longest first
};

} // namespace kv1_lm
