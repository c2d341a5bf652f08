// SPDX-License-Identifier: Apache-2.0
//
// The tokenizer: Hugging Face's own ids for the golden texts, each part of a tokenizer.json by itself, and a
// named refusal for what is malformed or not supported.
#include "byte_pairs.hpp"
#include "compare.hpp"
#include "file.hpp"
#include "random.hpp"
#include "refusal.hpp"
#include "tiny_tokenizer.hpp"
#include "tokenizer.hpp"
#include "utf8.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using kv1_lm::json;
using namespace std::string_literals;
using namespace std::string_view_literals;
using kv1_lm::tokenizer;
using kv1_test::refusal;
using kv1_test::tiny_tokenizer;

namespace {

using strings = std::vector<std::string>;
using token_ids = std::vector<std::int32_t>;

const std::string replacement = "\xef\xbf\xbd";

tokenizer from(const json& file) { return tokenizer::parse(file.dump(), "t.json"); }

// The tiny tokenizer after a change.
template <class F>
json changed(F&& change) {
    json file = tiny_tokenizer();
    change(file);
    return file;
}

// The tiny tokenizer with these pre-tokenizers.
tokenizer splitting(const json& pre_tokenizer) {
    return from(changed([&](json& file) { file["pre_tokenizer"] = pre_tokenizer; }));
}

const tokenizer& shipped() {
    static const tokenizer t = tokenizer::read(KV1_LM_MODEL_DIR "/tokenizer.json");
    return t;
}

// What a text is cut into.
strings tokens(const tokenizer& t, std::string_view text) {
    strings list;
    for (const std::int32_t id : t.encode(text))
        list.push_back(t.bytes_of(id));
    return list;
}

std::string streamed(const tokenizer& t, const token_ids& ids) {
    kv1_lm::stream_decoder stream(t);
    std::string text;
    for (const std::int32_t id : ids)
        text += stream.push(id);
    return text + stream.finish();
}

// Bytes one by one: in the tiny tokenizer byte b has id b + 1.
token_ids byte_ids(std::string_view bytes) {
    token_ids ids;
    for (const char c : bytes)
        ids.push_back(static_cast<std::uint8_t>(c) + 1);
    return ids;
}

char32_t random_character(kv1_test::generator& g) {
    static constexpr std::u32string_view awkward =
        U"\0\t\n\v\r "
        U"\u0085\u00a0\u00ad\u180e\u200b\u2028\u3000\ufeff'12\u00bd\u0661st<|>\u0120\u010a\U0001f600"sv;
    const std::size_t kind = g.below(8);
    if (kind < 3)
        return awkward[g.below(awkward.size())];
    const char32_t code = static_cast<char32_t>(g.below(kind < 5   ? 0x80u
                                                        : kind < 6 ? 0x800u
                                                        : kind < 7 ? 0x10000u
                                                                   : 0x110000u));
    return code >= 0xd800 && code < 0xe000 ? U'\ufffd' : code;
}

std::string random_text(kv1_test::generator& g, std::size_t characters) {
    std::string text;
    for (std::size_t i = 0; i < characters; ++i)
        kv1_lm::append_utf8(text, random_character(g));
    return text;
}

} // namespace

TEST_CASE("Every golden text has the reference's ids, and they decode to its text") {
    const kv1_lm::json_document golden = kv1_lm::read_json_file(KV1_TEST_DATA_DIR "/golden.json");
    const json& cases = golden.value.at("tokenizer");
    REQUIRE(cases.size() >= 40);
    for (const json& c : cases) {
        const auto text = c.at("text").get<std::string>();
        INFO(text);
        const auto ids = shipped().encode(text);
        CHECK(ids == c.at("ids").get<token_ids>());
        CHECK(shipped().decode(ids) == c.at("decoded").get<std::string>());
        CHECK(streamed(shipped(), ids) == c.at("decoded").get<std::string>());
    }
}

TEST_CASE("The shipped vocabulary has its size and its special tokens") {
    CHECK(shipped().size() == 8192);
    CHECK(shipped().id_of("<|endoftext|>") == 0);
    CHECK(shipped().id_of("<|pad|>") == 1);
    CHECK(shipped().id_of("\u0120the") == shipped().encode(" the").front());
    CHECK(shipped().bytes_of(shipped().encode(" the").front()) == " the");
    CHECK_FALSE(shipped().id_of(" the"));
    CHECK_FALSE(shipped().id_of(""));
}

TEST_CASE("WikiText-2 has the reference's number of tokens and comes back from them") {
    const std::string text = kv1_lm::read_text_file(KV1_LM_TEXT_FILE);
    const token_ids ids = shipped().encode(text);
    CHECK(ids.size() == 379'687 + 372); // scored positions, and the last one of each chunk
    const bool same = shipped().decode(ids) == text;
    CHECK(same);
}

TEST_CASE("Any UTF-8 text comes back from its tokens") {
    kv1_test::generator g(7);
    const tokenizer tiny = from(tiny_tokenizer());
    kv1_test::tally t;
    for (int i = 0; i < 2000; ++i) {
        const std::string text = random_text(g, g.below(i % 100 == 0 ? 2000 : 40));
        for (const tokenizer* each : {&shipped(), &tiny}) {
            const token_ids ids = each->encode(text);
            t.expect(each->decode(ids) == text, "decode", text);
            t.expect(streamed(*each, ids) == text, "stream", text);
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("Merges join the pair of lowest rank first, and the leftmost of equals") {
    const tokenizer t = from(tiny_tokenizer());
    CHECK(tokens(t, "the the") == strings{"the", " the"});
    CHECK(tokens(t, "aaa") == strings{"aa", "a"});
    CHECK(tokens(t, "aaaaa") == strings{"aaaa", "a"});
    CHECK(tokens(t, " aaa") == strings{" ", "aa", "a"}); // aa before " a"
    CHECK(tokens(t, "xyxyxy") == strings{"xyxy", "xy"});
    CHECK(tokens(t, "lll") == strings{"ll", "l"});
    CHECK(t.size() == 257 + kv1_test::tiny_merges().size());
}

TEST_CASE("The merger agrees with trying every pair") {
    kv1_test::generator g(11);
    kv1_test::tally t;
    for (int round = 0; round < 300; ++round) {
        // A vocabulary that grows by the pair of two random tokens.
        std::vector<std::string> spelling = {"a", "b", "c"};
        std::map<std::pair<std::int32_t, std::int32_t>, kv1_lm::merge> model;
        kv1_lm::merge_table table;
        for (std::int32_t rank = 0; rank < 25; ++rank) {
            const std::pair pair{static_cast<std::int32_t>(g.below(spelling.size())),
                                 static_cast<std::int32_t>(g.below(spelling.size()))};
            const std::string joined = spelling[static_cast<std::size_t>(pair.first)] +
                                       spelling[static_cast<std::size_t>(pair.second)];
            auto place = std::find(spelling.begin(), spelling.end(), joined);
            if (place == spelling.end())
                place = spelling.insert(spelling.end(), joined);
            const kv1_lm::merge m{rank, static_cast<std::int32_t>(place - spelling.begin())};
            model[pair] = m;
            table.set(pair.first, pair.second, m);
        }
        t.expect(table.size() == model.size(), "size", round);
        kv1_lm::pair_merger merger(table);
        for (int i = 0; i < 20; ++i) {
            token_ids word(g.below(40));
            for (auto& token : word)
                token = static_cast<std::int32_t>(g.below(3));
            token_ids expected = word;
            for (;;) {
                std::size_t best = expected.size();
                kv1_lm::merge found{};
                for (std::size_t p = 0; p + 1 < expected.size(); ++p)
                    if (const auto m = model.find({expected[p], expected[p + 1]});
                        m != model.end() && (best == expected.size() || m->second.rank < found.rank)) {
                        best = p;
                        found = m->second;
                    }
                if (best == expected.size())
                    break;
                expected[best] = found.token;
                expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(best) + 1);
            }
            merger.apply(word);
            t.expect(word == expected, round, i);
        }
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("A word of a million letters is merged like any other") {
    constexpr std::size_t size = 1u << 20;
    const tokenizer t = from(tiny_tokenizer());
    const std::int32_t eight = *t.id_of("aaaaaaaa");
    CHECK(t.encode(std::string(size, 'a')) == token_ids(size / 8, eight));
    token_ids expected(size / 8 - 1, eight);
    for (const char* rest : {"aaaa", "aa", "a"})
        expected.push_back(*t.id_of(rest));
    CHECK(t.encode(std::string(size - 1, 'a')) == expected);
    // Words of the other kinds, an eighth as long: still too long for anything quadratic.
    constexpr std::size_t less = size / 8;
    CHECK(shipped().encode(std::string(less, ' ')).size() == less);
    CHECK(shipped().encode(std::string(less, '7')) == token_ids(less, *shipped().id_of("7")));
    for (const std::string_view unit : {"e", "=", "\n", "\xe6\x97\xa5", "\xcc\x81"}) {
        std::string text;
        while (text.size() < less)
            text += unit;
        const bool same = shipped().decode(shipped().encode(text)) == text;
        CHECK(same);
    }
}

TEST_CASE("GPT-2's words are letters, numbers, other characters and spaces") {
    // Whatever the words let stand together after !, a or 1, merges join: so the first token shows the class.
    std::vector<std::pair<std::string, std::string>> pairs;
    for (const std::string first : {"!", "a", "1"})
        for (int b = 0; b < 256; ++b)
            if (b != ' ' && b != '\'')
                pairs.emplace_back(first, std::string(1, static_cast<char>(b)));
    const tokenizer t = from(kv1_test::byte_level_tokenizer({pairs.begin(), pairs.end()}));
    const auto joins = [&](std::string text, char32_t code) {
        kv1_lm::append_utf8(text, code);
        return tokens(t, text).front().size() > 1;
    };
    const std::u32string spaces =
        U"\t\n\v\f\r "
        U"\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
        U"\u202f\u205f\u3000";
    kv1_test::tally tally;
    for (char32_t code = 0; code < 0x3100; ++code) {
        if (code == U'\'')
            continue;
        const int classes = joins("!", code) + joins("a", code) + joins("1", code);
        const bool is_space = spaces.find(code) != std::u32string::npos;
        tally.expect(classes == (is_space ? 0 : 1), static_cast<std::uint32_t>(code), classes);
    }
    KV1_REQUIRE_CLEAN(tally);
    for (const char32_t letter :
         U"zZ\u00e9\u00df\u01c5\u02b0\u0561\u4e00\u30c6\uac00\ufb01\U00010400\U00020000"s)
        CHECK(joins("a", letter));
    for (const char32_t number : U"0\u00b2\u00bd\u0661\u0b72\u2167\u2462\u3007\U0001d7d8"s)
        CHECK(joins("1", number));
    for (const char32_t other : U"_\u0000\u0301\u180e\u200b\u200d\u2060\ufeff\u20ac\U0001f600\U0010ffff"s)
        CHECK(joins("!", other));
}

TEST_CASE("ByteLevel cuts GPT-2's words, where use_regex says so or says nothing") {
    const tokenizer with = splitting({{"type", "ByteLevel"}, {"add_prefix_space", false}});
    CHECK(tokens(with, "!!'ll") == strings{"!!", "'", "ll"});
    CHECK(tokens(with, "a'll'LL") == strings{"a", "'ll", "'", "L", "L"});
    CHECK(tokens(with, "x 1212") == strings{"x", " 12", "12"});
    CHECK(tokens(with, "x     the") == strings{"x", "    ", " the"});
    CHECK(tokens(with, "x  ") == strings{"x", "  "});
    const tokenizer without =
        splitting({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
    CHECK(tokens(without, "!!'ll") == strings{"!!", "'ll"});
}

TEST_CASE("ByteLevel puts a space before each piece, where add_prefix_space says so") {
    const tokenizer alone = splitting({{"type", "ByteLevel"}, {"add_prefix_space", true}});
    CHECK(tokens(alone, "the<|end|>the the") == strings{" the", "<|end|>", " the", " the"});
    CHECK(tokens(alone, " the") == strings{" the"});
    CHECK(tokens(alone, "").empty());
    const tokenizer after = splitting({{"type", "Sequence"},
                                       {"pretokenizers",
                                        {{{"type", "Digits"}, {"individual_digits", true}},
                                         {{"type", "ByteLevel"}, {"add_prefix_space", true}}}}});
    CHECK(tokens(after, "12a1") == strings{" ", "1", " ", "2", " a", " ", "1"});
}

TEST_CASE("Digits cuts numbers out, one by one or together") {
    const auto digits = [](bool individual) {
        return splitting({{"type", "Sequence"},
                          {"pretokenizers",
                           {{{"type", "Digits"}, {"individual_digits", individual}},
                            {{"type", "ByteLevel"}, {"add_prefix_space", false}}}}});
    };
    CHECK(tokens(digits(true), "a 1212") == strings{"a", " ", "1", "2", "1", "2"});
    CHECK(tokens(digits(false), "a 1212 12") == strings{"a", " ", "12", "12", " ", "12"});
    // Spaces before a digit lose none to it: the look-ahead ends with the piece.
    CHECK(tokens(digits(true), "a  1") == strings{"a", "  ", "1"});
}

TEST_CASE("Split cuts out what a text or an expression matches") {
    const auto split = [](const json& pattern) {
        return splitting(
            {{"type", "Sequence"},
             {"pretokenizers",
              {{{"type", "Split"}, {"pattern", pattern}, {"behavior", "Isolated"}, {"invert", false}},
               {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}});
    };
    CHECK(tokens(split({{"String", "."}}), "aa.aa") == strings{"aa", ".", "aa"});
    CHECK(tokens(split({{"Regex", "."}}), "aa.aa") == strings{"a", "a", ".", "a", "a"});
    CHECK(tokens(split({{"String", "a"}}), "aaxy") == strings{"a", "a", "xy"});
    CHECK(tokens(split({{"Regex", "x*"}}), "aaxxaa") == strings{"a", "a", "x", "x", "a", "a"});
    CHECK(tokens(split({{"Regex", "(?=l)"}}), "xyll") == strings{"xy", "l", "l"});
    const tokenizer three = split({{"Regex", R"(\p{N}{1,3}|\s+(?!\S)|[^\s\p{N}]+|\s)"}});
    CHECK(tokens(three, "1212  the") == strings{"12", "1", "2", " ", " ", "the"});
}

TEST_CASE("Pre-tokenizers nest and follow each other") {
    const tokenizer t = splitting(
        {{"type", "Sequence"},
         {"pretokenizers",
          {{{"type", "Sequence"}, {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}}}},
           {{"type", "Split"}, {"pattern", {{"String", "th"}}}, {"behavior", "Isolated"}, {"invert", false}},
           {{"type", "ByteLevel"}, {"add_prefix_space", false}}}}});
    CHECK(tokens(t, "the12") == strings{"th", "e", "1", "2"});
}

TEST_CASE("Added tokens come before everything else, the longest first") {
    json file = tiny_tokenizer();
    const auto add = [&](const char* content, bool normalized) {
        const std::size_t id = 257 + kv1_test::tiny_merges().size() + file["added_tokens"].size() - 1;
        file["added_tokens"].push_back({{"id", id}, {"content", content}, {"normalized", normalized}});
        return static_cast<std::int32_t>(id);
    };
    const std::int32_t x = add("<x>", false), xy = add("<x><y>", false), space = add("> <", true),
                       he = add("he", true), accent = add("\u00e9\u0301", false);
    const tokenizer t = from(file);
    CHECK(t.size() == static_cast<std::size_t>(accent) + 1);
    CHECK(t.encode("<x>") == token_ids{x});
    CHECK(t.encode("<x><y><x>") == token_ids{xy, x});
    CHECK(t.encode("<x><x><y>") == token_ids{x, xy});
    CHECK(t.encode("<|end|><x") == token_ids{0, '<' + 1, 'x' + 1});
    CHECK(t.encode("the") == token_ids{'t' + 1, he});
    CHECK(tokens(t, " the<x>the") == strings{" ", "t", "he", "<x>", "t", "he"});
    // "> <" would match first, but those to be found in the normalized text are looked for second.
    CHECK(t.encode("<x> <x>") == token_ids{x, ' ' + 1, x});
    CHECK(t.encode("x> <y") == token_ids{'x' + 1, space, 'y' + 1});
    CHECK(t.id_of("<x><y>") == xy);
    // A spelling outside the byte alphabet stands for itself, one inside it for bytes: Hugging Face's
    // decoder.
    CHECK(t.decode(token_ids{space}) == "> <");
    CHECK(t.decode(token_ids{accent}) == "\u00e9\u0301");
}

TEST_CASE("Merges as strings and as pairs mean the same") {
    const json pairs = tiny_tokenizer();
    json texts = pairs;
    json& list = texts["model"]["merges"] = json::array({"#version: 0.2"});
    for (const json& pair : pairs["model"]["merges"])
        list.push_back(pair[0].get<std::string>() + ' ' + pair[1].get<std::string>());
    const tokenizer a = from(pairs), b = from(texts);
    kv1_test::generator g(3);
    for (int i = 0; i < 200; ++i) {
        std::string text;
        for (int k = 0; k < 30; ++k)
            text += "thea l'12!xy"[g.below(12)];
        CHECK(a.encode(text) == b.encode(text));
    }
    CHECK(tokens(b, " the") == strings{" the"});
}

TEST_CASE("A word of the vocabulary is taken whole, where ignore_merges says so") {
    const auto with = [](bool ignore) {
        return from(changed([&](json& file) {
            file["model"]["vocab"]["\u0120xyz"] = 1000;
            file["model"]["ignore_merges"] = ignore;
        }));
    };
    CHECK(tokens(with(false), " xyz") == strings{" ", "xy", "z"});
    CHECK(with(true).encode(" xyz") == token_ids{1000});
    CHECK(tokens(with(true), " xyzz") == strings{" ", "xy", "z", "z"});
    CHECK(with(true).size() == 1001); // with holes
}

TEST_CASE("Members that older files lack have the defaults of Hugging Face") {
    const tokenizer t = from(changed([](json& file) {
        json& model = file["model"];
        for (const char* key : {"type", "byte_fallback", "ignore_merges", "unk_token", "dropout", "fuse_unk"})
            model.erase(key);
        model["continuing_subword_prefix"] = "";
        model["end_of_word_suffix"] = "";
        for (const char* key :
             {"added_tokens", "normalizer", "post_processor", "truncation", "padding", "version"})
            file.erase(key);
    }));
    CHECK(tokens(t, "the the<|end|>") == strings{"the", " the", "<", "|", "e", "n", "d", "|", ">"});
}

TEST_CASE("Post-processors that add no token are accepted") {
    const json template_of_nothing = {{"type", "TemplateProcessing"},
                                      {"single", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
                                      {"pair", json::array()},
                                      {"special_tokens", json::object()}};
    const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", false}};
    for (const json& processor :
         {template_of_nothing, byte_level,
          json{{"type", "Sequence"}, {"processors", {byte_level, template_of_nothing}}}}) {
        const tokenizer t = from(changed([&](json& file) { file["post_processor"] = processor; }));
        CHECK(tokens(t, "the") == strings{"the"});
    }
}

TEST_CASE("Bytes without a token are dropped, as Hugging Face does without an unknown token") {
    const tokenizer t = from(changed([](json& file) { file["model"]["vocab"].erase("z"); }));
    CHECK(tokens(t, "tzhze") == strings{"the"});
    CHECK(tokens(t, "zz").empty());
}

TEST_CASE("Decoding replaces what is not UTF-8 as Python and Rust do") {
    const tokenizer t = from(tiny_tokenizer());
    const std::string r = replacement;
    const std::vector<std::pair<std::string_view, std::string>> cases = {
        {"\xff", r},
        {"\xe2\x82", r},
        {"\xe2\x82"
         "A",
         r + "A"},
        {"\xc0\x80", r + r},
        {"\xed\xa0\x80", r + r + r},
        {"\xf0\x9f\x98", r},
        {"\xf0\x9f"
         "A",
         r + "A"},
        {"\xf5\x80", r + r},
        {"\xf4\x90\x80\x80", r + r + r + r},
        {"\xe0\x80\x80", r + r + r},
        {"\xf0\x80\x80\x80", r + r + r + r},
        {"\x80\x80", r + r},
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
        {"\xf0\x9f\xe2\x82\xac", r + "\xe2\x82\xac"},
        {"a\xf0\x9f\x98\xf0\x9f\x98\x80\xc3", "a" + r + "\xf0\x9f\x98\x80" + r},
    };
    for (const auto& [bytes, text] : cases) {
        CHECK(t.decode(byte_ids(bytes)) == text);
        CHECK(streamed(t, byte_ids(bytes)) == text);
    }
}

TEST_CASE("A stream holds back a character until its last byte, and no longer") {
    const tokenizer t = from(tiny_tokenizer());
    kv1_lm::stream_decoder stream(t);
    const auto push = [&](int byte) { return stream.push(byte + 1); };
    CHECK(push('a') == "a");
    CHECK(push(0xf0).empty());
    CHECK(push(0x9f).empty());
    CHECK(push(0x98).empty());
    CHECK(push(0x80) == "\xf0\x9f\x98\x80");
    CHECK(push(0xe2).empty());
    CHECK(push('b') == replacement + "b");
    CHECK(stream.push(*t.id_of(kv1_lm::spell("\xe2\x82"))).empty()); // two bytes in one token
    CHECK(push(0xac) == "\xe2\x82\xac");
    CHECK(push(0xff) == replacement);
    CHECK(push(0xc3).empty());
    CHECK(refusal([&] { (void)stream.push(-1); }) == "t.json: no token has id -1");
    CHECK(stream.finish() == replacement); // what was held back outlives the refusal
    CHECK(stream.finish().empty());
    CHECK(push('c') == "c");
}

TEST_CASE("Streaming any ids gives what decoding them gives") {
    kv1_test::generator g(5);
    kv1_test::tally t;
    for (int i = 0; i < 2000; ++i) {
        token_ids ids(g.below(30));
        for (auto& id : ids)
            id = static_cast<std::int32_t>(g.chance(0.5) ? g.below(260) : g.below(shipped().size()));
        const std::string text = shipped().decode(ids);
        t.expect(kv1_lm::valid_prefix(text) == text.size(), "valid", i);
        t.expect(streamed(shipped(), ids) == text, "stream", i);
    }
    KV1_REQUIRE_CLEAN(t);
}

TEST_CASE("A token of any id gives its bytes, and ids without a token are refused") {
    const tokenizer t = from(tiny_tokenizer());
    for (int b = 0; b < 256; ++b)
        CHECK(t.bytes_of(b + 1) == std::string(1, static_cast<char>(b)));
    CHECK(t.bytes_of(0) == "<|end|>");
    const auto size = static_cast<std::int32_t>(t.size());
    CHECK(t.bytes_of(size - 1) == "\xe2\x82");
    CHECK(refusal([&] { (void)t.bytes_of(size); }) == "t.json: no token has id " + std::to_string(size));
    CHECK(refusal([&] { (void)t.decode(token_ids{1, -5}); }) == "t.json: no token has id -5");
    CHECK(refusal([&] {
              (void)t.decode(token_ids{1, 2'000'000'000});
          }) == "t.json: no token has id 2000000000");
}

TEST_CASE("Text that is not UTF-8 is refused with the byte") {
    const auto at = [](std::string_view text) { return refusal([&] { (void)shipped().encode(text); }); };
    CHECK(at("abc\xff") == "the text is not UTF-8 at byte 3");
    CHECK(at("\xc3") == "the text is not UTF-8 at byte 0");
    CHECK(at("\u00e9\xe2\x82") == "the text is not UTF-8 at byte 2");
    CHECK(at("\xed\xa0\x80") == "the text is not UTF-8 at byte 0"); // a surrogate
    CHECK(at("a\xc0\x80") == "the text is not UTF-8 at byte 1");    // overlong
    CHECK(at("ab\xf4\x90\x80\x80") == "the text is not UTF-8 at byte 2");
}

TEST_CASE("A copied tokenizer works from several threads") {
    const token_ids expected = shipped().encode("In the year 1912, the ship");
    std::vector<token_ids> results(4);
    std::vector<std::thread> threads;
    for (token_ids& result : results)
        threads.emplace_back([copy = shipped(), &result] {
            for (int i = 0; i < 50; ++i)
                result = copy.encode("In the year 1912, the ship");
        });
    for (std::thread& thread : threads)
        thread.join();
    for (const token_ids& result : results)
        CHECK(result == expected);
}

TEST_CASE("Unsupported parts of a tokenizer are refused by name") {
    const auto with = [](const char* pointer, const json& value) {
        const json file = changed([&](json& f) { f[json::json_pointer(pointer)] = value; });
        return refusal([&] { (void)from(file); });
    };
    CHECK(with("/normalizer", {{"type", "NFC"}}) == "t.json: normalizer: \"NFC\" is not supported");
    CHECK(with("/normalizer", {{"type", "Sequence"}, {"normalizers", json::array()}}) ==
          "t.json: normalizer: \"Sequence\" is not supported");
    CHECK(with("/model/type", "WordPiece") == "t.json: model: \"WordPiece\" is not supported");
    CHECK(with("/model/type", "Unigram") == "t.json: model: \"Unigram\" is not supported");
    CHECK(with("/model/dropout", 0.1) == "t.json: model.dropout: dropout is not supported");
    CHECK(with("/model/dropout", 0.0) == "(accepted)");
    CHECK(with("/model/unk_token", "<unk>") == "t.json: model.unk_token: \"<unk>\" is not supported");
    CHECK(with("/model/continuing_subword_prefix", "##") ==
          "t.json: model.continuing_subword_prefix: \"##\" is not supported");
    CHECK(with("/model/end_of_word_suffix", "</w>") ==
          "t.json: model.end_of_word_suffix: \"</w>\" is not supported");
    CHECK(with("/model/byte_fallback", true) == "t.json: model.byte_fallback: true is not supported");
    for (const char* flag : {"single_word", "lstrip", "rstrip"})
        CHECK(with((std::string("/added_tokens/0/") + flag).c_str(), true) ==
              std::string("t.json: added_tokens[0].") + flag + ": true is not supported");

    CHECK(with("/pre_tokenizer", {{"type", "Whitespace"}}) ==
          "t.json: pre_tokenizer: \"Whitespace\" is not supported");
    CHECK(with("/pre_tokenizer", {{"type", "Digits"}, {"individual_digits", true}}) ==
          "t.json: pre_tokenizer: does not end with ByteLevel: other vocabularies are not supported");
    CHECK(with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", json::array()}}) ==
          "t.json: pre_tokenizer: does not end with ByteLevel: other vocabularies are not supported");
    CHECK(with("/pre_tokenizer", nullptr) == "t.json: pre_tokenizer: is not an object");
    const json byte_level = tiny_tokenizer()["pre_tokenizer"];
    const auto sequence = [&](const json& first, const json& second) {
        return with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {first, second}}});
    };
    CHECK(sequence(byte_level, {{"type", "Digits"}, {"individual_digits", true}}) ==
          "t.json: pre_tokenizer.pretokenizers[1]: \"Digits\" after ByteLevel is not supported");
    CHECK(sequence({{"type", "Metaspace"}}, byte_level) ==
          "t.json: pre_tokenizer.pretokenizers[0]: \"Metaspace\" is not supported");
    const auto split = [&](const char* behavior, bool invert, const json& pattern) {
        return sequence({{"type", "Split"}, {"behavior", behavior}, {"invert", invert}, {"pattern", pattern}},
                        byte_level);
    };
    CHECK(split("Isolated", false, {{"Regex", "a+"}}) == "(accepted)");
    CHECK(split("Removed", false, {{"Regex", "a+"}}) ==
          "t.json: pre_tokenizer.pretokenizers[0].behavior: \"Removed\" is not supported");
    CHECK(split("Isolated", true, {{"Regex", "a+"}}) ==
          "t.json: pre_tokenizer.pretokenizers[0].invert: true is not supported");
    CHECK(split("Isolated", false, {{"Regex", "a(b"}}) ==
          "t.json: pre_tokenizer.pretokenizers[0].pattern.Regex: is not an expression that PCRE2 takes: "
          "missing "
          "closing parenthesis, at byte 3");
    CHECK(split("Isolated", false, {{"Glob", "a*"}}) ==
          "t.json: pre_tokenizer.pretokenizers[0].pattern: has no member \"Regex\"");

    CHECK(with("/post_processor", {{"type", "BertProcessing"}}) ==
          "t.json: post_processor: \"BertProcessing\" is not supported");
    const json sequence_a = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
               special = {{"SpecialToken", {{"id", "<|end|>"}, {"type_id", 0}}}};
    for (const json& single : {json::array({special, sequence_a}), json::array({sequence_a, sequence_a}),
                               json::array({special}), json::array()})
        CHECK(with("/post_processor", {{"type", "TemplateProcessing"}, {"single", single}}) ==
              "t.json: post_processor.single: a template that adds tokens is not supported");
    CHECK(
        with("/post_processor", {{"type", "Sequence"}, {"processors", {{{"type", "RobertaProcessing"}}}}}) ==
        "t.json: post_processor.processors[0]: \"RobertaProcessing\" is not supported");
    CHECK(with("/decoder", {{"type", "Metaspace"}}) == "t.json: decoder: \"Metaspace\" is not supported");
    CHECK(with("/decoder", nullptr) == "t.json: decoder: is not an object");
}

TEST_CASE("A malformed tokenizer is refused by the place of its fault") {
    const auto with = [](const char* pointer, const json& value) {
        const json file = changed([&](json& f) { f[json::json_pointer(pointer)] = value; });
        return refusal([&] { (void)from(file); });
    };
    const auto without = [](const char* pointer, const char* key) {
        const json file = changed([&](json& f) { f[json::json_pointer(pointer)].erase(key); });
        return refusal([&] { (void)from(file); });
    };
    CHECK(refusal([] { (void)tokenizer::parse("", "t.json"); }).starts_with("t.json: bad JSON at byte 0: "));
    CHECK(refusal([] { (void)tokenizer::parse("[]", "t.json"); }) == "t.json: is not an object");
    CHECK(without("", "model") == "t.json: has no member \"model\"");
    CHECK(without("", "pre_tokenizer") == "t.json: has no member \"pre_tokenizer\"");
    CHECK(without("", "decoder") == "t.json: has no member \"decoder\"");
    CHECK(without("/model", "vocab") == "t.json: model: has no member \"vocab\"");
    CHECK(without("/model", "merges") == "t.json: model: has no member \"merges\"");
    CHECK(without("/pre_tokenizer", "add_prefix_space") ==
          "t.json: pre_tokenizer: has no member \"add_prefix_space\"");
    CHECK(without("/added_tokens/0", "content") == "t.json: added_tokens[0]: has no member \"content\"");

    CHECK(with("/model/vocab", json::array()) == "t.json: model.vocab: is not an object");
    CHECK(with("/model/vocab/a", -1) == "t.json: model.vocab.a: is not an integer of 0 to 2147483647");
    CHECK(with("/model/vocab/a", 1.5) == "t.json: model.vocab.a: is not an integer of 0 to 2147483647");
    CHECK(with("/model/vocab/a", 2147483648u) ==
          "t.json: model.vocab.a: is not an integer of 0 to 2147483647");
    CHECK(with("/model/vocab/!", "!") == "t.json: model.vocab.\"!\": is not an integer of 0 to 2147483647");
    CHECK(with("/model/vocab/new", 'b' + 1) == "t.json: model.vocab.new: id 99 is another token's, too");

    CHECK(with("/model/merges", "t h") == "t.json: model.merges: is not an array");
    CHECK(with("/model/merges/1", 3) == "t.json: model.merges[1]: is not an array");
    CHECK(with("/model/merges/1", {"t"}) == "t.json: model.merges[1]: is not a pair");
    CHECK(with("/model/merges/1", {"t", "h", "e"}) == "t.json: model.merges[1]: is not a pair");
    CHECK(with("/model/merges/1", {"t", 1}) == "t.json: model.merges[1][1]: is not a string");
    CHECK(with("/model/merges/1", "the") ==
          "t.json: model.merges[1]: \"the\" is not two tokens with a space between them");
    CHECK(with("/model/merges/1", "t h e") ==
          "t.json: model.merges[1]: \"t h e\" is not two tokens with a space between them");
    CHECK(with("/model/merges/1", "t qq") ==
          "t.json: model.merges[1]: needs \"qq\", which the vocabulary lacks");
    CHECK(with("/model/merges/1", {"q", "t"}) ==
          "t.json: model.merges[1]: needs \"qt\", which the vocabulary lacks");

    CHECK(with("/added_tokens", json::object()) == "t.json: added_tokens: is not an array");
    CHECK(with("/added_tokens/0/id", 7) == "t.json: added_tokens[0].id: 7 but \"<|end|>\" has id 0");
    CHECK(with("/added_tokens/0/content", "") == "t.json: added_tokens[0].content: is empty");
    CHECK(with("/added_tokens/0/content", "<new>") ==
          "t.json: added_tokens[0].id: id 0 is another token's, too");
    CHECK(with("/added_tokens/0/normalized", 1) ==
          "t.json: added_tokens[0].normalized: is not true or false");
    CHECK(with("/pre_tokenizer/use_regex", "yes") == "t.json: pre_tokenizer.use_regex: is not true or false");

    const std::string twice = R"({"model": {"vocab": {"a": 1, "a": 2}}})";
    CHECK(refusal([&] { (void)tokenizer::parse(twice, "t.json"); }) ==
          "t.json: bad JSON: duplicate key \"a\"");
    CHECK(refusal([] { (void)tokenizer::read("no/tokenizer.json"); }) ==
          "no/tokenizer.json: cannot be read: No such file or directory");
}

TEST_CASE("An expression that runs away is refused, not followed") {
    const tokenizer t = splitting({{"type", "Sequence"},
                                   {"pretokenizers",
                                    {{{"type", "Split"},
                                      {"pattern", {{"Regex", "(x+x+)+y"}}},
                                      {"behavior", "Isolated"},
                                      {"invert", false}},
                                     {{"type", "ByteLevel"}, {"add_prefix_space", false}}}}});
    CHECK(tokens(t, "xxy") == strings{"x", "xy"});
    CHECK(refusal([&] { (void)t.encode(std::string(200, 'x') + "zy"); }) ==
          "t.json: pre_tokenizer.pretokenizers[0].pattern.Regex: matching failed: match limit exceeded");
}
