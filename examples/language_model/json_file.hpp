// SPDX-License-Identifier: Apache-2.0
//
// Strict parsing of JSON files, and typed access to their values. Errors are input_errors that name the file
// and the key.
//
//     const json_document config = read_json_file(folder / "config.json");
//     const std::size_t layers = config.root().member("num_hidden_layers").count();
//     if (const auto theta = config.root().find("rope_theta"))
//         rope_theta = theta->number();
#pragma once

#include <nlohmann/json.hpp>

#include <cstddef>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

namespace kv1_lm {

using json = nlohmann::json;

/// A view of a value in a document, which knows its place there, such as `dir/config.json:
/// rope_scaling.factor`. The document has to outlive it. Making one builds the text of its place, so walk
/// long arrays by array(), and make a view of an element only to report it.
class json_view {
public:
    /// A view of a whole document; `origin` names its file.
    json_view(const json& value, std::string_view origin) : value_(&value), place_(origin) {}

    /// The member `key` of an object. Throws input_error if it is missing.
    [[nodiscard]] json_view member(std::string_view key) const;
    /// The member `key` of an object; nothing if it is missing or null.
    [[nodiscard]] std::optional<json_view> find(std::string_view key) const;
    /// Element i of an array. Precondition: i < array().size().
    [[nodiscard]] json_view element(std::size_t i) const;

    /// The value as the type that is named. Throws input_error for another type: 1.0 is no count, 1 is no
    /// boolean.
    [[nodiscard]] bool boolean() const;
    [[nodiscard]] double number() const; ///< an integer or a fraction, finite
    [[nodiscard]] std::size_t count(std::size_t low = 0,
                                    std::size_t high = std::numeric_limits<std::size_t>::max()) const;
    [[nodiscard]] const std::string& string() const;
    [[nodiscard]] const json::array_t& array() const;
    [[nodiscard]] const json::object_t& object() const;

    [[nodiscard]] const json& value() const noexcept { return *value_; }
    [[nodiscard]] const std::string& place() const noexcept { return place_; }
    /// Throws input_error: place, colon, problem.
    [[noreturn]] void fail(std::string_view problem) const;

private:
    [[nodiscard]] json_view child(const json& value, std::string_view step) const;

    const json* value_;
    std::string place_;
    bool is_root_ = true;
};

struct json_document {
    json value;
    std::string origin;
    [[nodiscard]] json_view root() const { return {value, origin}; }
};

/// Parses strict JSON (RFC 8259) in UTF-8. Throws input_error, also for duplicate keys, more than 64 levels,
/// and anything after the value.
[[nodiscard]] json parse_json(std::string_view text, std::string_view origin);

[[nodiscard]] json_document read_json_file(const std::filesystem::path& file);

} // namespace kv1_lm
