// SPDX-License-Identifier: Apache-2.0
//
// Lists that are written by hand for readers name every enumerator there is, in its order.
#include <catch2/catch_test_macros.hpp>

#include <kv1/format.hpp>
#include <kv1/target.hpp>

#include <cctype>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace {

std::string text_of(const char* path) {
    std::ifstream file(std::string(KV1_TEST_DATA_DIR "/../../") + path);
    REQUIRE(file);
    return {std::istreambuf_iterator<char>(file), {}};
}

// What stands between the two.
std::string between(const std::string& text, std::string_view first, std::string_view last) {
    const std::size_t from = text.find(first);
    REQUIRE(from != std::string::npos);
    const std::size_t to = text.find(last, from + first.size());
    REQUIRE(to != std::string::npos);
    return text.substr(from + first.size(), to - from - first.size());
}

// Words of letters, digits and underscores, those of comments left out.
std::vector<std::string> words(const std::string& text) {
    std::vector<std::string> found;
    bool comment = false, line_comment = false, in_word = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const std::string_view two = std::string_view(text).substr(i, 2);
        comment = (comment || two == "/*") && two != "*/";
        line_comment = (line_comment || two == "//") && text[i] != '\n';
        const bool of_word = !comment && !line_comment &&
                             (std::isalnum(static_cast<unsigned char>(text[i])) != 0 || text[i] == '_');
        if (of_word && !in_word)
            found.emplace_back();
        if (of_word)
            found.back() += text[i];
        in_word = of_word;
    }
    return found;
}

std::vector<std::string> target_names() {
    std::vector<std::string> names;
    for (const kv1::target t : kv1::all_targets)
        names.emplace_back(to_string(t));
    return names;
}

std::string upper(std::string_view name) {
    std::string text;
    for (const char c : name)
        text += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    return text;
}

std::vector<std::string> without(std::vector<std::string> list, std::string_view word) {
    std::erase(list, word);
    return list;
}

} // namespace

TEST_CASE("documents name every target", "[names]") {
    CHECK(without(words(between(text_of("include/kv1/c/error.h"), "Forces one:", "Errors:")), "or") ==
          target_names());
    CHECK(without(words(between(text_of("tests/README.md"), "set `KV1_TARGET` to", ".")), "or") ==
          target_names());
    CHECK(words(between(text_of("include/kv1/target.hpp"), "The environment variable KV1_TARGET\n// (",
                        ")")) == target_names());
}

TEST_CASE("kv1.h has every format under its number", "[names]") {
    const std::vector<std::string> names =
        words(between(text_of("include/kv1/c/cache.h"), "enum kv1_format_values {", "}"));
    REQUIRE(names.size() == kv1::all_kv_formats.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
        const kv1::kv_format f = kv1::all_kv_formats[i];
        REQUIRE(static_cast<std::size_t>(f) == i);
        const std::string prefix = kv1::detail::traits_of(f).code_bits == 0 ? "KV1_PLAIN_" : "KV1_";
        CHECK(names[i] == prefix + upper(to_string(f)));
    }
    CHECK(to_string(static_cast<kv1::kv_format>(names.size())) == "unknown");
}

TEST_CASE("kv1.h has every error in its order", "[names]") {
    const std::vector<std::string> names =
        words(between(text_of("include/kv1/c/error.h"), "enum kv1_code_values {", "}"));
    std::vector<std::string> expected;
    for (const std::string& name :
         words(between(text_of("include/kv1/status.hpp"), "enum class errc : std::uint8_t {", "}")))
        expected.push_back("KV1_" + upper(name));
    CHECK(expected.front() == "KV1_OK");
    CHECK(names == expected);
}
