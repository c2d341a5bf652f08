// SPDX-License-Identifier: Apache-2.0
//
// The fuzzers' bodies over their seeds, which have to keep passing without libFuzzer too.
#include "../fuzz/safetensors_body.hpp"
#include "../fuzz/tokenizer_body.hpp"
#include "file.hpp"

#include <catch2/catch_test_macros.hpp>

#include <filesystem>
#include <string>

namespace {

template <class Body>
void replay(const std::string& fuzzer, Body body) {
    std::size_t seen = 0;
    for (const auto& seed : std::filesystem::directory_iterator(KV1_FUZZ_SEED_DIR "/" + fuzzer)) {
        INFO(seed.path());
        const std::string input = kv1_lm::read_text_file(seed.path());
        CHECK_NOTHROW(body({reinterpret_cast<const std::uint8_t*>(input.data()), input.size()}));
        ++seen;
    }
    CHECK(seen >= 10);
}

} // namespace

TEST_CASE("The seeds of the safetensors fuzzer pass") { replay("safetensors", kv1_test::safetensors_body); }

TEST_CASE("The seeds of the tokenizer fuzzer pass") { replay("tokenizer", kv1_test::tokenizer_body); }
