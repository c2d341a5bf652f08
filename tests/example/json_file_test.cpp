// SPDX-License-Identifier: Apache-2.0
//
// Files and JSON of a model folder: what is refused, and that the message says where.
#include "file.hpp"
#include "json_file.hpp"
#include "refusal.hpp"

#include <catch2/catch_test_macros.hpp>

#include <filesystem>
#include <fstream>
#include <string>

using kv1_lm::json;
using kv1_lm::json_view;
using kv1_lm::parse_json;
using kv1_test::refusal;

namespace {

std::string refusal_of(std::string_view text) {
    return refusal([&] { (void)parse_json(text, "c.json"); });
}

} // namespace

TEST_CASE("A JSON document gives its values with their types") {
    const json document = parse_json(
        R"({"layers": 8, "eps": 1e-5, "tied": true, "name": "x", "none": null, "list": [1, [2]], "o": {"a b": 3}})",
        "c.json");
    const json_view root(document, "c.json");
    CHECK(root.member("layers").count() == 8);
    CHECK(root.member("layers").number() == 8.0);
    CHECK(root.member("eps").number() == 1e-5);
    CHECK(root.member("tied").boolean());
    CHECK(root.member("name").string() == "x");
    CHECK(root.find("name")->string() == "x");
    CHECK_FALSE(root.find("none"));
    CHECK_FALSE(root.find("absent"));
    CHECK(root.member("list").array().size() == 2);
    CHECK(root.member("list").element(1).element(0).count(2, 2) == 2);
    CHECK(root.member("none").value().is_null());
    CHECK(root.place() == "c.json");
    CHECK(root.member("list").element(1).element(0).place() == "c.json: list[1][0]");
    CHECK(root.member("o").member("a b").place() == "c.json: o.\"a b\"");
}

TEST_CASE("A JSON value of another type is refused by its place") {
    const json document = parse_json(
        R"({"half": 0.5, "whole": 1.0, "less": -1, "huge": 18446744073709551616, "text": "1", "list": [0, true]})",
        "c.json");
    const json_view root(document, "c.json");
    const auto count = [&](const char* key) { return refusal([&] { (void)root.member(key).count(); }); };
    CHECK(count("half") == "c.json: half: is not an integer of 0 to 18446744073709551615");
    CHECK(count("whole") == "c.json: whole: is not an integer of 0 to 18446744073709551615");
    CHECK(count("less") == "c.json: less: is not an integer of 0 to 18446744073709551615");
    CHECK(count("huge") == "c.json: huge: is not an integer of 0 to 18446744073709551615");
    CHECK(count("text") == "c.json: text: is not an integer of 0 to 18446744073709551615");
    CHECK(count("absent") == "c.json: has no member \"absent\"");
    const json_view list = root.member("list");
    CHECK(refusal([&] { (void)list.element(0).count(1, 9); }) ==
          "c.json: list[0]: is not an integer of 1 to 9");
    CHECK(refusal([&] { (void)list.element(1).number(); }) == "c.json: list[1]: is not a number");
    CHECK(refusal([&] { (void)list.element(0).boolean(); }) == "c.json: list[0]: is not true or false");
    CHECK(refusal([&] { (void)list.element(0).string(); }) == "c.json: list[0]: is not a string");
    CHECK(refusal([&] { (void)list.element(0).array(); }) == "c.json: list[0]: is not an array");
    CHECK(refusal([&] { (void)list.member("x"); }) == "c.json: list: is not an object");
    CHECK(refusal([&] { (void)list.find("x"); }) == "c.json: list: is not an object");
}

TEST_CASE("Text that is not one JSON value is refused with the byte") {
    CHECK(refusal_of("").starts_with(
        "c.json: bad JSON at byte 0: syntax error while parsing value - unexpected end of input"));
    CHECK(refusal_of("{\"a\": tru}").starts_with("c.json: bad JSON at byte 9: "));
    CHECK(refusal_of("{\"a\": 1").starts_with("c.json: bad JSON at byte 7: "));
    CHECK(refusal_of("{} {}").starts_with("c.json: bad JSON at byte 3: "));
    CHECK(refusal_of("[1,]").starts_with("c.json: bad JSON at byte 3: "));
    CHECK(refusal_of("[1] // no").starts_with("c.json: bad JSON at byte 4: "));
    CHECK(refusal_of("[\"\xff\"]").starts_with("c.json: bad JSON at byte 2: "));
    CHECK(refusal_of("[\"a\nb\"]").starts_with("c.json: bad JSON at byte 3: "));
    CHECK(refusal_of("[NaN]").starts_with("c.json: bad JSON at byte 1: "));
    CHECK(refusal_of("[1e999]").starts_with("c.json: bad JSON: number overflow"));
    CHECK(refusal_of(std::string_view("{}\0{", 4)) == "c.json: bad JSON at byte 2: NUL");
    CHECK(refusal_of(std::string_view("{}\0", 3)) == "c.json: bad JSON at byte 2: NUL");
}

TEST_CASE("A key that appears twice in one JSON object is refused") {
    CHECK(refusal_of(R"({"a": 1, "b": {"a": 2}, "a": 3})") == "c.json: bad JSON: duplicate key \"a\"");
    CHECK(refusal_of(R"([{"x": [{"k": 1, "\u006b": 2}]}])") == "c.json: bad JSON: duplicate key \"k\"");
    CHECK(parse_json(R"([{"a": 1}, {"a": {"a": 2}}])", "c.json").size() == 2);
}

TEST_CASE("JSON nested deeper than 64 levels is refused") {
    CHECK(parse_json(std::string(64, '[') + std::string(64, ']'), "c.json").size() == 1);
    CHECK(refusal_of(std::string(65, '[') + std::string(65, ']')) ==
          "c.json: bad JSON: nested more than 64 deep");
    std::string objects;
    for (int i = 0; i < 100'000; ++i)
        objects += "{\"a\":";
    CHECK(refusal_of(objects) == "c.json: bad JSON: nested more than 64 deep");
}

TEST_CASE("Messages stay one short line, whatever the input") {
    CHECK(kv1_lm::quote("a\nb\x7f\x01") == "\"a\\x0ab\\x7f\\x01\"");
    CHECK(kv1_lm::quote(std::string(100, 'x')) == '"' + std::string(60, 'x') + "\"...");
    CHECK(kv1_lm::quote(std::string(59, 'x') + "\xc3\xa9") == '"' + std::string(59, 'x') + "\"...");
    CHECK(std::string(kv1_lm::input_error("a\nb", "c\r\n").what()) == "a b: c  ");
    const std::string message = refusal_of("[" + std::string(1'000'000, 'x') + "]");
    CHECK(message.size() < 200);
}

TEST_CASE("A file is read whole, and one that can not be is named") {
    const std::filesystem::path folder = std::filesystem::temp_directory_path() / "kv1_lm_file_test";
    std::filesystem::create_directories(folder);
    const std::filesystem::path file = folder / "text";
    for (const std::size_t size : {0u, 1u, 65535u, 65536u, 65537u, 1'000'000u}) {
        std::string text(size, '\r');
        for (std::size_t i = 0; i < size; i += 3)
            text[i] = static_cast<char>(i);
        std::ofstream(file, std::ios::binary) << text;
        CHECK(kv1_lm::read_text_file(file) == text);
        CHECK(kv1_lm::read_binary_file(file).size() == size);
    }
    const std::string missing = (folder / "missing").string();
    CHECK(refusal([&] { (void)kv1_lm::read_text_file(missing); }) ==
          missing + ": cannot be read: No such file or directory");
    CHECK(refusal([&] { (void)kv1_lm::read_json_file(missing); }).starts_with(missing + ": "));
    CHECK(refusal([&] {
              (void)kv1_lm::read_text_file(folder);
          }).starts_with(folder.string() + ": cannot be read"));
    std::ofstream(file, std::ios::binary) << R"({"a": [7]})";
    const kv1_lm::json_document document = kv1_lm::read_json_file(file);
    CHECK(document.root().member("a").element(0).count() == 7);
    CHECK(document.root().member("a").place() == file.string() + ": a");
    std::filesystem::remove_all(folder);
}
