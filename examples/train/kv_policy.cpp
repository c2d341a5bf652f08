// SPDX-License-Identifier: Apache-2.0
#include "kv_policy.hpp"

#include "error.hpp"

#include <charconv>
#include <system_error>
#include <utility>

namespace kv1_train {

kv_policy parse_formats(std::string_view text, std::string_view option) {
    const auto refuse = [&](std::string_view part, const char* why) {
        throw kv1_lm::input_error(std::string(option) + ": " + kv1_lm::quote(part) + why);
    };
    std::string_view rest = text;
    kv_policy p;
    p.formats = kv1_lm::parse_kv(kv1_lm::take_until(rest, '/'), option);
    if (text.ends_with('/'))
        refuse(text, " ends with a slash");
    while (!rest.empty()) {
        const std::string_view part = kv1_lm::take_until(rest, '/');
        std::string_view formats = part;
        const std::string_view number = kv1_lm::take_until(formats, ':');
        std::size_t layer = 0;
        const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), layer);
        if (error != std::errc() || end != number.data() + number.size() || number.size() == part.size())
            refuse(part, " is no LAYER:FORMATS");
        if (!p.layers.emplace(layer, kv1_lm::parse_kv(formats, option)).second)
            refuse(part, " names a layer again");
    }
    return p;
}

void check_layers(const kv_policy& p, std::size_t layers, std::string_view option) {
    if (!p.layers.empty() && p.layers.rbegin()->first >= layers)
        throw kv1_lm::input_error(std::string(option), "layer " + std::to_string(p.layers.rbegin()->first) +
                                                           ": the model has layers 0 to " +
                                                           std::to_string(layers - 1));
}

std::string to_string(const kv_policy& p) {
    std::string text = kv1_lm::to_string(p.formats);
    for (const auto& [layer, formats] : p.layers)
        text.append("/").append(std::to_string(layer)).append(":").append(kv1_lm::to_string(formats));
    for (const auto& [flag, name] : {std::pair{p.least_squares, " least_squares"},
                                     {p.hadamard, " hadamard"},
                                     {p.centre, " centre"},
                                     {p.round_metadata, " round_metadata"}})
        text.append(flag ? name : "");
    return text;
}

} // namespace kv1_train
