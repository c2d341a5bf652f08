// SPDX-License-Identifier: Apache-2.0
//
// The safetensors reader: the values of good files, and a named refusal for each way to be a bad one.
#include "compare.hpp"
#include "refusal.hpp"
#include "safetensors.hpp"
#include "safetensors_reader.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/float16.hpp>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using kv1_lm::safetensors;
using kv1_lm::tensor_type;
using kv1_test::refusal;

namespace {

template <class... Parts>
std::vector<std::byte> bytes_of(const Parts&... parts) {
    std::string all;
    const auto append = [&](std::span<const std::byte> part) {
        all.append(reinterpret_cast<const char*>(part.data()), part.size());
    };
    (append(std::as_bytes(std::span(parts))), ...);
    std::vector<std::byte> bytes(all.size());
    std::memcpy(bytes.data(), all.data(), all.size());
    return bytes;
}

// A file of that header, and `data` bytes 0, 1, 2, ...
std::vector<std::byte> file_of(const std::string& header, std::size_t data = 0) {
    const std::uint64_t length[] = {header.size()};
    std::vector<std::uint8_t> rest(data);
    std::iota(rest.begin(), rest.end(), std::uint8_t{0});
    return bytes_of(length, header, rest);
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + '}';
}

std::string refusal_of(std::vector<std::byte> file) {
    return refusal([&] { (void)safetensors::parse(std::move(file), "m.st"); });
}
// Of a file with these entries in its header.
std::string refusal_of(const std::string& entries, std::size_t data) {
    return refusal_of(file_of('{' + entries + '}', data));
}

const char* const two_tensors = R"("b":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]},)"
                                R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]})";

} // namespace

TEST_CASE("A safetensors file gives its tensors by name") {
    const auto file = safetensors::parse(
        file_of(std::string("{\"__metadata__\":{\"format\":\"pt\"},") + two_tensors + "}  ", 16), "m.st");
    CHECK(file.origin() == "m.st");
    CHECK(file.metadata().at("format") == "pt");
    REQUIRE(file.tensors().size() == 2);
    REQUIRE(file.find("a") != nullptr);
    CHECK(file.find("a")->type == tensor_type::f32);
    CHECK(file.find("a")->shape.empty());
    CHECK(file.find("a")->bytes.size() == 4);
    REQUIRE(file.find("b") != nullptr);
    CHECK(file.find("b")->type == tensor_type::f16);
    CHECK(file.find("b")->shape == std::vector<std::size_t>{2, 3});
    CHECK(file.find("b")->bytes.size() == 12);
    CHECK(file.find("b")->bytes[0] == std::byte{4});
    CHECK(file.find("b")->place == "m.st: tensor \"b\"");
    CHECK(file.find("c") == nullptr);
    CHECK(file.find("__metadata__") == nullptr);
}

TEST_CASE("Moving a safetensors leaves its tensors where they are") {
    auto first = safetensors::parse(file_of(std::string("{") + two_tensors + "}", 16), "m.st");
    const std::byte* data = first.find("b")->bytes.data();
    auto second = std::move(first);
    CHECK(second.find("b")->bytes.data() == data);
    CHECK(second.find("b")->bytes[11] == std::byte{15});
    auto third = safetensors::parse(file_of("{}"), "other");
    third = std::move(second);
    CHECK(third.find("b")->bytes.data() == data);
    CHECK(third.origin() == "m.st");
}

TEST_CASE("Empty files, empty tensors and unknown members are valid safetensors") {
    CHECK(safetensors::parse(file_of("{}"), "m.st").tensors().empty());
    CHECK(safetensors::parse(file_of(R"({"__metadata__":null})"), "m.st").metadata().empty());
    const auto file = safetensors::parse(
        file_of('{' + entry("z", "F32", "[0,5]", "[4,4]") + ',' + entry("a", "U8", "[4]", "[0,4]") + ',' +
                    entry("y", "F64", "[0]", "[0,0]") +
                    R"(,"":{"dtype":"I8","shape":[1],"data_offsets":[4,5],"note":"?"}})",
                5),
        "m.st");
    CHECK(file.tensors().size() == 4);
    CHECK(file.find("z")->bytes.empty());
    CHECK(file.find("")->bytes.size() == 1);
    CHECK(to_floats(*file.find("z")).empty());
}

TEST_CASE("F32, F16 and BF16 tensors convert to floats, aligned or not") {
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> singles;
    std::vector<kv1::float16> halves;
    std::vector<kv1::bfloat16> brains;
    for (std::uint32_t bits = 0; bits < 0x10000;
         ++bits) { // more than one part of the conversion, and no multiple
        halves.push_back(kv1::float16::from_bits(static_cast<std::uint16_t>(bits)));
        brains.push_back(kv1::bfloat16::from_bits(static_cast<std::uint16_t>(bits)));
        if (bits < 5000)
            singles.push_back(
                std::ldexp(static_cast<float>(bits) - 2500.0f, static_cast<int>(bits % 200) - 100));
    }
    singles.push_back(-infinity);
    for (const std::size_t padding : {0u, 1u, 2u, 3u}) {
        const std::size_t one = padding + 4 * singles.size(), two = one + 2 * halves.size(),
                          three = two + 2 * brains.size();
        const auto range = [](std::size_t a, std::size_t b) {
            return '[' + std::to_string(a) + ',' + std::to_string(b) + ']';
        };
        const std::string header =
            '{' + entry("pad", "U8", '[' + std::to_string(padding) + ']', range(0, padding)) + ',' +
            entry("f32", "F32", '[' + std::to_string(singles.size()) + ']', range(padding, one)) + ',' +
            entry("f16", "F16", "[256,256]", range(one, two)) + ',' +
            entry("bf16", "BF16", "[65536]", range(two, three)) + '}';
        const std::uint64_t length[] = {header.size()};
        const auto file = safetensors::parse(
            bytes_of(length, header, std::vector<std::byte>(padding), singles, halves, brains), "m.st");
        CHECK(kv1_test::same_bits(to_floats(*file.find("f32")), singles));
        kv1_test::tally t;
        const std::vector<float> from_half = to_floats(*file.find("f16")),
                                 from_brain = to_floats(*file.find("bf16"));
        REQUIRE(from_half.size() == halves.size());
        REQUIRE(from_brain.size() == brains.size());
        const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
        for (std::size_t i = 0; i < halves.size(); ++i) {
            t.expect(same(from_half[i], halves[i]), "F16", i);
            t.expect(same(from_brain[i], brains[i]), "BF16", i);
        }
        KV1_REQUIRE_CLEAN(t);
    }
}

TEST_CASE("Every element type of the format is known by its name and size") {
    const std::vector<std::tuple<std::string, tensor_type, std::size_t>> all = {
        {"BOOL", tensor_type::boolean, 8},
        {"F4", tensor_type::f4, 4},
        {"F6_E2M3", tensor_type::f6_e2m3, 6},
        {"F6_E3M2", tensor_type::f6_e3m2, 6},
        {"U8", tensor_type::u8, 8},
        {"I8", tensor_type::i8, 8},
        {"F8_E5M2", tensor_type::f8_e5m2, 8},
        {"F8_E4M3", tensor_type::f8_e4m3, 8},
        {"F8_E8M0", tensor_type::f8_e8m0, 8},
        {"F8_E4M3FNUZ", tensor_type::f8_e4m3fnuz, 8},
        {"F8_E5M2FNUZ", tensor_type::f8_e5m2fnuz, 8},
        {"I16", tensor_type::i16, 16},
        {"U16", tensor_type::u16, 16},
        {"F16", tensor_type::f16, 16},
        {"BF16", tensor_type::bf16, 16},
        {"I32", tensor_type::i32, 32},
        {"U32", tensor_type::u32, 32},
        {"F32", tensor_type::f32, 32},
        {"C64", tensor_type::c64, 64},
        {"F64", tensor_type::f64, 64},
        {"I64", tensor_type::i64, 64},
        {"U64", tensor_type::u64, 64},
    };
    for (const auto& [name, type, bits] : all) {
        INFO(name);
        CHECK(to_string(type) == name);
        const std::string right = entry("t", name, "[3,8]", "[0," + std::to_string(3 * bits) + ']');
        const auto file = safetensors::parse(file_of('{' + right + '}', 3 * bits), "m.st");
        CHECK(file.find("t")->type == type);
        const std::string wrong = entry("t", name, "[3,8]", "[0," + std::to_string(3 * bits + 1) + ']');
        CHECK(refusal_of(wrong, 3 * bits + 1) == "m.st: tensor \"t\": " + std::to_string(3 * bits) +
                                                     " bytes by shape and dtype, but " +
                                                     std::to_string(3 * bits + 1) + " by data_offsets");
        if (name != "F32" && name != "F16" && name != "BF16")
            CHECK(refusal([&] { (void)to_floats(*file.find("t")); }) ==
                  "m.st: tensor \"t\": holds " + name + ", where F32, F16 or BF16 is needed");
    }
}

TEST_CASE("The shipped checkpoint reads as an independent reader has it") {
    const std::string path = KV1_LM_MODEL_DIR "/model.safetensors";
    const auto file = safetensors::read(path);
    const kv1_test::safetensors_file expected(path);
    CHECK(file.metadata().at("format") == "pt");
    REQUIRE(file.tensors().size() + 1 == expected.tensors().size()); // which counts __metadata__
    for (const auto& [name, tensor] : file.tensors()) {
        INFO(name);
        CHECK(tensor.type == tensor_type::f16);
        CHECK(tensor.shape == expected.at(name).shape);
        const auto halves = expected.values<kv1::float16>(name);
        CHECK(kv1_test::same_bits(to_floats(tensor), std::vector<float>(halves.begin(), halves.end())));
    }
    CHECK(file.find("embed_tokens.weight")->shape == std::vector<std::size_t>{8192, 256});
}

TEST_CASE("A safetensors file cut short anywhere, or with a byte too many, is refused") {
    const std::vector<std::byte> whole = file_of(std::string("{") + two_tensors + "}", 16);
    (void)safetensors::parse(whole, "m.st");
    for (std::size_t size = 0; size < whole.size(); ++size) {
        INFO(size);
        const std::string message =
            refusal_of({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
        CHECK(message.starts_with("m.st: t"));
    }
    CHECK(refusal_of({whole.begin(), whole.begin() + 5}) ==
          "m.st: truncated: 5 bytes, less than the 8 of the header's length");
    CHECK(refusal_of({whole.begin(), whole.begin() + 20}) == "m.st: truncated: a header of " +
                                                                 std::to_string(whole.size() - 24) +
                                                                 " bytes, of which the file has 12");
    CHECK(refusal_of({whole.begin(), whole.end() - 1}) ==
          "m.st: tensor \"b\": data_offsets: ends at 16, past the 15 bytes of data");
    std::vector<std::byte> longer = whole;
    longer.push_back(std::byte{0});
    CHECK(refusal_of(longer) == "m.st: the tensors' data ends at byte " + std::to_string(whole.size()) +
                                    " of " + std::to_string(longer.size()));
}

TEST_CASE("A safetensors header length that lies is refused") {
    const auto with_length = [](std::uint64_t length) {
        std::vector<std::byte> file = file_of("{}");
        std::memcpy(file.data(), &length, sizeof length);
        return refusal_of(file);
    };
    CHECK(with_length(3) == "m.st: truncated: a header of 3 bytes, of which the file has 2");
    CHECK(with_length(100'000'000) ==
          "m.st: truncated: a header of 100000000 bytes, of which the file has 2");
    CHECK(with_length(100'000'001) ==
          "m.st: a header of 100000001 bytes, more than the 100000000 that are allowed");
    CHECK(with_length(std::numeric_limits<std::uint64_t>::max()) ==
          "m.st: a header of 18446744073709551615 bytes, more than the 100000000 that are allowed");
    CHECK(with_length(1).starts_with("m.st: header: bad JSON at byte 1: "));
    CHECK(with_length(0) == "m.st: header: does not begin with {");
}

TEST_CASE("A safetensors header that is not a JSON object of tensors is refused") {
    CHECK(refusal_of(file_of("[]")) == "m.st: header: does not begin with {");
    CHECK(refusal_of(file_of(" {}")) == "m.st: header: does not begin with {");
    CHECK(refusal_of(file_of("\xef\xbb\xbf{}")) == "m.st: header: does not begin with {");
    CHECK(refusal_of(file_of("{\"a\":}")).starts_with("m.st: header: bad JSON at byte 5: "));
    CHECK(refusal_of(file_of("{}x")).starts_with("m.st: header: bad JSON at byte 2: "));
    CHECK(refusal_of(file_of(std::string("{}\0\0", 4))) == "m.st: header: bad JSON at byte 2: NUL");
    const std::string a = entry("a", "U8", "[1]", "[0,1]");
    CHECK(refusal_of(a + ',' + a, 1) == "m.st: header: bad JSON: duplicate key \"a\"");
    CHECK(refusal_of(R"("a":1)", 0) == "m.st: tensor \"a\": is not an object");
    CHECK(refusal_of(R"("a":["F32",[0],[0,0]])", 0) == "m.st: tensor \"a\": is not an object");
    CHECK(refusal_of(R"("a":null)", 0) == "m.st: tensor \"a\": is not an object");
    CHECK(refusal_of(R"("a\n":{})", 0) == "m.st: tensor \"a\\x0a\": has no member \"dtype\"");
    CHECK(refusal_of(R"("a":{"dtype":"F32"})", 0) == "m.st: tensor \"a\": has no member \"shape\"");
    CHECK(refusal_of(R"("a":{"dtype":"F32","shape":[0]})", 0) ==
          "m.st: tensor \"a\": has no member \"data_offsets\"");
    CHECK(refusal_of(R"("__metadata__":[])", 0) == "m.st: header: __metadata__: is not an object");
    CHECK(refusal_of(R"("__metadata__":{"n":1})", 0) == "m.st: header: __metadata__: n: is not a string");
    CHECK(refusal_of(R"("__metadata__":{"n":null})", 0) == "m.st: header: __metadata__: n: is not a string");
}

TEST_CASE("A tensor whose type, shape or offsets make no sense is refused") {
    CHECK(refusal_of(entry("a", "F33", "[0]", "[0,0]"), 0) ==
          "m.st: tensor \"a\": dtype: unknown element type \"F33\"");
    CHECK(refusal_of(entry("a", "f32", "[0]", "[0,0]"), 0) ==
          "m.st: tensor \"a\": dtype: unknown element type \"f32\"");
    CHECK(refusal_of(R"("a":{"dtype":4,"shape":[0],"data_offsets":[0,0]})", 0) ==
          "m.st: tensor \"a\": dtype: is not a string");

    const auto of_shape = [](const std::string& shape) {
        return refusal_of(entry("a", "F32", shape, "[0,8]"), 8);
    };
    const std::string no_count = "is not an integer of 0 to 18446744073709551615";
    CHECK(of_shape("2") == "m.st: tensor \"a\": shape: is not an array");
    CHECK(of_shape("[2,-1]") == "m.st: tensor \"a\": shape[1]: " + no_count);
    CHECK(of_shape("[-0]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[2.0]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[0.5]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[2e0]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[\"2\"]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[18446744073709551616]") == "m.st: tensor \"a\": shape[0]: " + no_count);
    CHECK(of_shape("[18446744073709551615]") == "m.st: tensor \"a\": shape: overflows");
    CHECK(of_shape("[4294967296,4294967296]") == "m.st: tensor \"a\": shape: overflows");
    CHECK(of_shape("[4294967296,4294967296,0]") == "m.st: tensor \"a\": shape: overflows");
    // Elements that fit, bits that do not; and a product that wraps round to the right size.
    CHECK(of_shape("[576460752303423488]") == "m.st: tensor \"a\": shape: overflows");
    CHECK(of_shape("[2,9223372036854775809]") == "m.st: tensor \"a\": shape: overflows");
    CHECK(of_shape("[3]") == "m.st: tensor \"a\": 12 bytes by shape and dtype, but 8 by data_offsets");
    CHECK(of_shape("[]") == "m.st: tensor \"a\": 4 bytes by shape and dtype, but 8 by data_offsets");
    CHECK(refusal_of(entry("a", "F4", "[3]", "[0,2]"), 2) ==
          "m.st: tensor \"a\": shape: does not fill whole bytes of F4");

    const auto of_offsets = [](const std::string& offsets) {
        return refusal_of(entry("a", "F32", "[2]", offsets), 8);
    };
    CHECK(of_offsets("[0]") == "m.st: tensor \"a\": data_offsets: is not a pair");
    CHECK(of_offsets("[0,8,8]") == "m.st: tensor \"a\": data_offsets: is not a pair");
    CHECK(of_offsets("{}") == "m.st: tensor \"a\": data_offsets: is not an array");
    CHECK(of_offsets("[-8,0]") == "m.st: tensor \"a\": data_offsets[0]: " + no_count);
    CHECK(of_offsets("[0,8.0]") == "m.st: tensor \"a\": data_offsets[1]: " + no_count);
    CHECK(of_offsets("[8,0]") == "m.st: tensor \"a\": data_offsets: ends before it begins");
    CHECK(of_offsets("[1,9]") == "m.st: tensor \"a\": data_offsets: ends at 9, past the 8 bytes of data");
    CHECK(of_offsets("[18446744073709551608,18446744073709551615]") ==
          "m.st: tensor \"a\": data_offsets: ends at 18446744073709551615, past the 8 bytes of data");
}

TEST_CASE("Tensors that overlap, leave holes or leave the end uncovered are refused") {
    const auto pair = [](const std::string& a, const std::string& b, std::size_t data) {
        return refusal_of(entry("a", "U8", "[4]", a) + ',' + entry("b", "U8", "[4]", b), data);
    };
    CHECK(pair("[0,4]", "[4,8]", 8) == "(accepted)");
    CHECK(pair("[4,8]", "[0,4]", 8) == "(accepted)");
    CHECK(pair("[0,4]", "[3,7]", 7) ==
          "m.st: tensor \"b\": data begins at 3, inside another tensor's, which ends at 4");
    CHECK(pair("[0,4]", "[0,4]", 4).ends_with("data begins at 0, inside another tensor's, which ends at 4"));
    CHECK(pair("[0,4]", "[5,9]", 9) == "m.st: tensor \"b\": data begins at 5, after a hole that begins at 4");
    CHECK(pair("[5,9]", "[1,5]", 9) == "m.st: tensor \"b\": data begins at 1, after a hole that begins at 0");
    CHECK(pair("[0,4]", "[4,8]", 10) == "m.st: the tensors' data ends at byte 121 of 123");
    CHECK(refusal_of("", 3) == "m.st: the tensors' data ends at byte 10 of 13");
    // An empty tensor in the middle of another one overlaps it, as in the reference implementation.
    CHECK(refusal_of(entry("a", "U8", "[4]", "[0,4]") + ',' + entry("b", "U8", "[0]", "[2,2]"), 4) ==
          "m.st: tensor \"b\": data begins at 2, inside another tensor's, which ends at 4");
}

TEST_CASE("A safetensors file that can not be opened is named") {
    CHECK(refusal([] { (void)safetensors::read("no/such/model.safetensors"); }) ==
          "no/such/model.safetensors: cannot be read: No such file or directory");
}
