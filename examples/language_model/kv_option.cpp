// SPDX-License-Identifier: Apache-2.0
#include "kv_option.hpp"

#include "error.hpp"

namespace kv1_lm {

std::string kv_format_names() {
    std::string names;
    for (const kv1::kv_format f : kv_formats_by_size)
        names.append(names.empty() ? "" : ", ").append(kv1::info_of(f).short_name);
    return names;
}

kv_formats parse_kv(std::string_view text, std::string_view option) {
    const auto parse = [&](std::string_view width) {
        const auto format = kv1::format_from_short_name(width);
        if (!format)
            throw input_error(std::string(option) + ": '" + std::string(text) + "' is none of " +
                              kv_format_names() + ", nor a pair of them such as 4,2");
        return *format;
    };
    const std::size_t comma = text.find(',');
    if (comma == std::string_view::npos)
        return {parse(text), parse(text)};
    return {parse(text.substr(0, comma)), parse(text.substr(comma + 1))};
}

std::string to_string(const kv_formats& f) {
    std::string text(kv1::info_of(f.key).short_name);
    if (f.key != f.value)
        text.append(",").append(kv1::info_of(f.value).short_name);
    return text;
}

} // namespace kv1_lm
