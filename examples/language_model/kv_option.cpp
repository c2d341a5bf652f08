// SPDX-License-Identifier: Apache-2.0
#include "kv_option.hpp"

#include "error.hpp"

#include <algorithm>

namespace kv1_lm {

namespace {

using kv1::kv_format;

// in the order of kv_widths
constexpr std::array formats{kv_format::binary,   kv_format::scaled_binary, kv_format::affine2,
                             kv_format::affine3,  kv_format::affine4,       kv_format::affine8,
                             kv_format::fp16,     kv_format::fp32,          kv_format::compact2,
                             kv_format::compact3, kv_format::compact4,      kv_format::codebook2};
static_assert(formats.size() == kv_widths.size());

std::string_view width_of(kv_format format) {
    return kv_widths[static_cast<std::size_t>(std::find(formats.begin(), formats.end(), format) -
                                              formats.begin())];
}

} // namespace

std::string_view take_until(std::string_view& text, char mark) {
    const std::size_t at = std::min(text.find(mark), text.size());
    const std::string_view part = text.substr(0, at);
    text.remove_prefix(std::min(at + 1, text.size()));
    return part;
}

std::optional<kv_format> format_of(std::string_view width) noexcept {
    const auto found = std::find(kv_widths.begin(), kv_widths.end(), width);
    if (found == kv_widths.end())
        return std::nullopt;
    return formats[static_cast<std::size_t>(found - kv_widths.begin())];
}

kv_formats parse_kv(std::string_view text, std::string_view option) {
    const auto parse = [&](std::string_view width) {
        const auto format = format_of(width);
        if (!format)
            throw input_error(
                std::string(option) + ": '" + std::string(text) +
                "' is none of 1, 1.5, 2, 3, 4, 8, 16, 32, c2, c3, c4, cb2, nor a pair of them such as 4,2");
        return *format;
    };
    const std::size_t comma = text.find(',');
    if (comma == std::string_view::npos)
        return {parse(text), parse(text)};
    return {parse(text.substr(0, comma)), parse(text.substr(comma + 1))};
}

std::string to_string(const kv_formats& f) {
    std::string text(width_of(f.key));
    if (f.key != f.value)
        text.append(",").append(width_of(f.value));
    return text;
}

} // namespace kv1_lm
