// SPDX-License-Identifier: Apache-2.0
#include "cache_policy.hpp"

#include "error.hpp"
#include "kv_option.hpp"
#include "model_config.hpp"

#include <kv1/encoding.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/kv_cache.hpp>

#include <algorithm>
#include <charconv>
#include <utility>

namespace kv1_lm {

namespace {

// A text that is parsed, and its name in messages.
struct named_text {
    std::string_view text, what;
    [[noreturn]] void refuse(const std::string& why) const {
        constexpr std::size_t most = 200; // a policy may name every layer
        throw input_error(std::string(what)
                              .append(" '")
                              .append(text.substr(0, most))
                              .append(text.size() > most ? "...'" : "'"),
                          why);
    }
};

std::size_t parse_count(std::string_view text, const named_text& whole) {
    std::size_t n = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (error != std::errc() || end != text.data() + text.size())
        whole.refuse(quote(text) + " is not a number");
    return n;
}

side_policy parse_side(std::string_view text, const named_text& whole) {
    side_policy p;
    const std::string_view width = take_until(text, '+');
    const auto format = kv1::format_from_short_name(width);
    if (!format)
        whole.refuse(quote(width) + " is none of " + kv_format_names());
    p.format = *format;
    while (!text.empty()) {
        const std::string_view option = take_until(text, '+');
        if (option.starts_with('g')) {
            p.group = parse_count(option.substr(1), whole);
            continue;
        }
        bool* flag = option == "ls"        ? &p.least_squares
                     : option == "cs"      ? &p.clip_search
                     : option == "had"     ? &p.hadamard
                     : option == "mean"    ? &p.means
                     : option == "ew"      ? &p.error_weights
                     : option == "channel" ? &p.per_channel
                                           : nullptr;
        if (flag == nullptr)
            whole.refuse(quote(option) + " is none of ls, cs, had, mean, ew, channel, g and a number");
        *flag = true;
    }
    if (p.least_squares && p.clip_search)
        whole.refuse("levels are chosen by ls or by cs");
    return p;
}

layer_policy parse_layer(std::string_view text, const named_text& whole) {
    const std::string_view key = text.find(',') == std::string_view::npos ? text : take_until(text, ',');
    const layer_policy p{parse_side(key, whole), parse_side(text, whole)};
    if (p.value.per_channel)
        whole.refuse("channel is for keys alone");
    return p;
}

bool any_side(const cache_policy& policy, bool (*wants)(const side_policy&)) {
    const auto either = [&](const layer_policy& l) { return wants(l.key) || wants(l.value); };
    return either(policy.common) ||
           std::ranges::any_of(policy.layers, [&](const auto& own) { return either(own.second); });
}

} // namespace

bool cache_policy::centred() const noexcept {
    return any_side(*this, [](const side_policy& side) { return side.means; });
}

bool cache_policy::weighted() const noexcept {
    return any_side(*this, [](const side_policy& side) { return side.error_weights; });
}

std::string to_string(const layer_policy& policy) {
    std::string text;
    for (const side_policy* side : {&policy.key, &policy.value}) {
        text.append(text.empty() ? "" : ",").append(to_string(kv_formats{side->format, side->format}));
        for (const auto& [flag, name] : {std::pair{side->least_squares, "+ls"},
                                         {side->clip_search, "+cs"},
                                         {side->hadamard, "+had"},
                                         {side->means, "+mean"},
                                         {side->error_weights, "+ew"},
                                         {side->per_channel, "+channel"}})
            text.append(flag ? name : "");
        if (side->group != 0)
            text.append("+g").append(std::to_string(side->group));
    }
    return text;
}

cache_policy parse_policy(std::string_view text, std::string_view what) {
    const named_text whole{text, what};
    cache_policy p;
    p.text = text;
    std::string_view page = text;
    std::string_view rest = take_until(page, '#');
    std::string_view layers = take_until(rest, '@');
    if (!rest.empty()) {
        p.fp16_sinks = parse_count(take_until(rest, ':'), whole);
        p.fp16_window = parse_count(rest, whole);
    }
    if (!page.empty())
        p.page_tokens = parse_count(page, whole);
    p.common = parse_layer(take_until(layers, '/'), whole);
    while (!layers.empty()) {
        std::string_view one = take_until(layers, '/');
        const std::size_t layer = parse_count(take_until(one, ':'), whole);
        p.layers[layer] = parse_layer(one, whole);
    }
    return p;
}

kv1::cache_description describe(const model_config& config, const cache_policy& policy, const calibration& c,
                                std::size_t tokens) {
    const named_text named{policy.text, "policy"};
    kv1::cache_description d =
        kv1::uniform_cache(config.layers, {config.kv_heads, config.head_dim, config.head_dim}, tokens);
    d.fp16_sinks = policy.fp16_sinks;
    d.fp16_window = policy.fp16_window;
    if (policy.page_tokens != 0)
        d.page_tokens = policy.page_tokens;
    if (!policy.layers.empty() && policy.layers.rbegin()->first >= d.layers.size())
        named.refuse("the model has " + std::to_string(d.layers.size()) + " layers");
    for (std::size_t i = 0; i < d.layers.size(); ++i) {
        kv1::layer_description& l = d.layers[i];
        const auto own = policy.layers.find(i);
        const layer_policy& p = own == policy.layers.end() ? policy.common : own->second;
        const auto encoding = [&](const side_policy& side, std::size_t dim, const auto& means,
                                  const auto& weights) {
            kv1::vector_encoding e;
            if (side.least_squares)
                e.levels = kv1::level_choice::least_squares;
            if (side.clip_search)
                e.levels = kv1::level_choice::clip_search;
            e.hadamard = side.hadamard ? kv1::hadamard_block(dim) : 0;
            if (side.means)
                e.means = means();
            if (side.error_weights)
                e.error_weights = weights();
            return e;
        };
        l.key_format = p.key.format;
        l.value_format = p.value.format;
        l.key_group = p.key.group;
        l.value_group = p.value.group;
        if (p.key.per_channel)
            l.key_axis = kv1::quantization_axis::per_channel;
        l.key_encoding = encoding(
            p.key, l.key_dim, [&] { return c.key_means.at(i); }, [&] { return c.key_weights.at(i); });
        l.value_encoding = encoding(
            p.value, l.value_dim, [&] { return c.value_means.at(i); }, [&] { return c.value_weights.at(i); });
    }
    if (const auto made = kv1::kv_cache::create(d); !made && made.code() != kv1::errc::out_of_memory)
        named.refuse(made.reason().message());
    return d;
}

double bytes_per_vector(const kv1::cache_description& d, std::size_t tokens) {
    double bytes = 0.0, vectors = 0.0;
    const auto n = static_cast<double>(tokens);
    for (const kv1::layer_description& l : d.layers) {
        const kv1::page_layout page = kv1::layout_of(l, d.page_tokens);
        const auto heads = static_cast<double>(l.kv_heads);
        const auto half = static_cast<double>(2 * (l.key_dim + l.value_dim));
        vectors += 2.0 * heads * n;
        bytes += heads * n * static_cast<double>(page.bytes()) / static_cast<double>(d.page_tokens);
        if (l.key_axis == kv1::quantization_axis::per_channel)
            bytes += heads * static_cast<double>(2 * l.key_dim * (tokens % d.page_tokens));
        bytes += 2.0 * static_cast<double>(l.key_encoding.means.size() + l.value_encoding.means.size());
        bytes += heads * half * std::min(n, static_cast<double>(d.fp16_sinks + d.fp16_window));
    }
    return bytes / vectors;
}

} // namespace kv1_lm
