// SPDX-License-Identifier: Apache-2.0
#include "json_file.hpp"

#include "error.hpp"
#include "file.hpp"

#include <algorithm>
#include <cctype>
#include <set>
#include <utility>
#include <vector>

namespace kv1_lm {

namespace {

constexpr int deepest_level = 64;

// A key as it is written in a place: as it is if that cannot be misread, else quoted.
std::string key_name(std::string_view key) {
    const bool plain = !key.empty() && key.size() <= 60 && std::all_of(key.begin(), key.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
    });
    return plain ? std::string(key) : quote(key);
}

// nlohmann-json's message without its name, the place and the text, which may be megabytes.
std::string reason(const json::exception& e) {
    std::string text = e.what();
    for (const std::string_view before : {"] ", "column ", ": "})
        if (const std::size_t at = text.find(before); at != std::string::npos)
            text.erase(0, at + before.size());
    text.erase(std::min(text.find("; last read"), text.size()));
    text.resize(std::min<std::size_t>(text.size(), 120));
    return text;
}

} // namespace

json_view json_view::child(const json& value, std::string_view step) const {
    json_view view(value, place_);
    view.is_root_ = false;
    if (is_root_)
        view.place_.append(": ");
    else if (step.front() != '[')
        view.place_.append(".");
    view.place_.append(step);
    return view;
}

std::optional<json_view> json_view::find(std::string_view key) const {
    const json::object_t& members = object();
    const auto found = members.find(std::string(key));
    if (found == members.end() || found->second.is_null())
        return std::nullopt;
    return child(found->second, key_name(key));
}

json_view json_view::member(std::string_view key) const {
    const json::object_t& members = object();
    const auto found = members.find(std::string(key));
    if (found == members.end())
        fail("has no member " + quote(key));
    return child(found->second, key_name(key));
}

json_view json_view::element(std::size_t i) const {
    return child(array().at(i), std::string("[").append(std::to_string(i)).append("]"));
}

bool json_view::boolean() const {
    if (!value_->is_boolean())
        fail("is not true or false");
    return value_->get<bool>();
}

double json_view::number() const {
    if (!value_->is_number())
        fail("is not a number");
    return value_->get<double>();
}

std::size_t json_view::count(std::size_t low, std::size_t high) const {
    if (!value_->is_number_unsigned() || value_->get<std::uint64_t>() < low ||
        value_->get<std::uint64_t>() > high)
        fail("is not an integer of " + std::to_string(low) + " to " + std::to_string(high));
    return value_->get<std::size_t>();
}

const std::string& json_view::string() const {
    if (!value_->is_string())
        fail("is not a string");
    return value_->get_ref<const std::string&>();
}

const json::array_t& json_view::array() const {
    if (!value_->is_array())
        fail("is not an array");
    return value_->get_ref<const json::array_t&>();
}

const json::object_t& json_view::object() const {
    if (!value_->is_object())
        fail("is not an object");
    return value_->get_ref<const json::object_t&>();
}

void json_view::fail(std::string_view problem) const { throw input_error(place_, problem); }

json parse_json(std::string_view text, std::string_view origin) {
    // nlohmann-json takes a NUL for the end of its input, even if text follows.
    if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos)
        throw input_error(origin, "bad JSON at byte " + std::to_string(nul) + ": NUL");

    std::vector<std::set<std::string, std::less<>>> keys; // of each open object
    const json::parser_callback_t check = [&](int depth, json::parse_event_t event, json& value) {
        switch (event) {
        case json::parse_event_t::object_start:
            keys.emplace_back();
            [[fallthrough]];
        case json::parse_event_t::array_start:
            if (depth >= deepest_level)
                throw input_error(origin,
                                  "bad JSON: nested more than " + std::to_string(deepest_level) + " deep");
            break;
        case json::parse_event_t::key:
            if (const auto& key = value.get_ref<const std::string&>(); !keys.back().insert(key).second)
                throw input_error(origin, "bad JSON: duplicate key " + quote(key));
            break;
        case json::parse_event_t::object_end:
            keys.pop_back();
            break;
        case json::parse_event_t::array_end:
        case json::parse_event_t::value:
            break;
        }
        return true;
    };
    try {
        return json::parse(text.begin(), text.end(), check);
    } catch (const json::parse_error& e) {
        throw input_error(origin, "bad JSON at byte " +
                                      std::to_string(e.byte - std::min<std::size_t>(e.byte, 1)) + ": " +
                                      reason(e));
    } catch (const json::exception& e) {
        throw input_error(origin, "bad JSON: " + reason(e));
    }
}

json_document read_json_file(const std::filesystem::path& file) {
    return {parse_json(read_text_file(file), file.string()), file.string()};
}

} // namespace kv1_lm
