// SPDX-License-Identifier: Apache-2.0
//
// libggml-kv1.so under libllama, with every model of a folder (KV1_TEST_MODELS). Plain formats give the logits of
// llama.cpp's own f16 cache, whatever is done to the cache; coded ones are compared with themselves, where cells, states
// and streams must make no difference.
#include "client.hpp"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

namespace {

using client::divergence;
using client::options;
using client::place;
using client::session;
using client::tokens;

std::vector<std::string> models() {
    std::vector<std::string> files;
    const char* const folder = std::getenv("KV1_TEST_MODELS");
    REQUIRE(folder != nullptr);
    REQUIRE(std::getenv("KV1_TEST_BACKEND") != nullptr);
    REQUIRE(client::kv1_device() != nullptr);
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        if (entry.path().extension() == ".gguf")
            files.push_back(entry.path().string());
    std::sort(files.begin(), files.end());
    REQUIRE(!files.empty());
    return files;
}

tokens text(std::size_t n, std::uint32_t seed = 1) {
    std::mt19937 random(seed);
    tokens t(n);
    for (llama_token& x : t)
        x = static_cast<llama_token>(3 + random() % 200);
    return t;
}

void add(std::vector<float>& all, const std::vector<float>& more) {
    all.insert(all.end(), more.begin(), more.end());
}

// Between two ways to add up the same products: fp16 keys, values and queries round by 2^-11 of their size, and models of
// few layers with weights in fp32 make little of it.
constexpr double same = 1e-4;

template <class Use>
void compare(const char* policy, const options& o, Use&& use) {
    for (const std::string& file : models()) {
        INFO(file);
        session plain(file, nullptr, o), coded(file, policy, o);
        const std::vector<float> expected = use(plain), got = use(coded);
        const double d = divergence(expected, got, plain.vocabulary());
        INFO("KL divergence " << d);
        CHECK(d < same);
    }
}

} // namespace

TEST_CASE("a prompt and decoded tokens", "[llama_cpp]") {
    const auto use = [](session& s) {
        const tokens t = text(120);
        std::vector<float> all = s.decode(std::span(t).first(100), 0);
        for (std::size_t i = 100; i < t.size(); ++i) {
            const std::vector<float> one = s.decode(std::span(t).subspan(i, 1), static_cast<llama_pos>(i));
            all.insert(all.end(), one.begin(), one.end());
        }
        return all;
    };
    compare("16", {}, use);
    compare("32", {}, use);
}

TEST_CASE("a long prompt, in several batches, with a quantized nominal type", "[llama_cpp]") {
    const auto use = [](session& s) { return s.decode(text(300), 0); };
    compare("16", {}, use);
    // llama.cpp turns keys, values and queries by a Hadamard transform for such types. Its own cache is compared as f16.
    for (const std::string& file : models()) {
        if (file.find("bloom") != std::string::npos || file.find("deepseek2") != std::string::npos ||
            file.find("lfm2") != std::string::npos || file.find("qwen2") != std::string::npos)
            continue; // heads of 32 channels, which it does not turn; keys with values in them
        INFO(file);
        session plain(file, nullptr), coded(file, "16", {.keys = GGML_TYPE_Q8_0, .values = GGML_TYPE_Q8_0});
        CHECK(divergence(use(plain), use(coded), plain.vocabulary()) < same);
    }
    for (const ggml_type nominal :
         {GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL}) {
        INFO("nominal type " << nominal);
        const std::string file = models().back(); // qwen3
        session plain(file, nullptr), coded(file, "16", {.keys = nominal, .values = nominal});
        CHECK(divergence(use(plain), use(coded), plain.vocabulary()) < same);
    }
}

TEST_CASE("cells that are dropped and used again", "[llama_cpp]") {
    compare("16", {.cells = 256}, [](session& s) {
        const tokens t = text(200);
        (void)s.decode(t, 0);
        // States of recurrent layers do not go back: everything is dropped there.
        const llama_pos kept = llama_memory_seq_rm(s.memory(), 0, 20, -1) ? 20 : 0;
        if (kept == 0)
            llama_memory_clear(s.memory(), true);
        return s.decode(text(150, 2), kept);
    });
}

TEST_CASE("sequences side by side, one of them copied", "[llama_cpp]") {
    for (const bool unified : {true, false}) {
        INFO("unified " << unified);
        compare("16", {.cells = 1024, .sequences = 3, .unified = unified}, [](session& s) {
            const tokens a = text(40, 3), b = text(30, 4);
            std::vector<place> both;
            for (std::size_t i = 0; i < a.size(); ++i)
                both.push_back({a[i], static_cast<llama_pos>(i), {0}});
            for (std::size_t i = 0; i < b.size(); ++i)
                both.push_back({b[i], static_cast<llama_pos>(i), {1}});
            std::vector<float> all = s.decode(both);
            llama_memory_seq_cp(s.memory(), 0, 2, -1, -1);
            for (llama_pos i = 0; i < 10; ++i) {
                const std::vector<float> next =
                    s.decode({{5, 40 + i, {0}}, {6, 30 + i, {1}}, {7, 40 + i, {2}}});
                all.insert(all.end(), next.begin(), next.end());
            }
            return all;
        });
    }
}

TEST_CASE("sinks and window are a sequence's own, whatever cells it has", "[llama_cpp]") {
    ::setenv("KV1_PRECISION", "exact", 1);
    const tokens first = text(40, 3), second = text(58, 4), third = text(45, 6);
    int telling = 0; // models whose predictions such tokens matter to
    for (const std::string& file : models()) {
        INFO(file);
        const auto alone = [&](const char* policy, const tokens& t) {
            session s(file, policy);
            std::vector<float> all;
            for (std::size_t i = 0; i < t.size(); ++i)
                add(all, s.decode(std::span(t).subspan(i, 1), static_cast<llama_pos>(i)));
            return all;
        };
        const char* const policy = "2,2@3:6";
        const std::vector<float> of_second = alone(policy, second), of_third = alone(policy, third);
        // What it would be if no token were a sink or in the window. Sums in another order make next to nothing.
        const double without = divergence(of_third, alone("2,2@0:1", third), client::tiny_vocabulary);
        const double bound = std::max(without, 1e-9) / 100;
        telling += without > same ? 1 : 0;
        for (const bool unified : {true, false}) {
            session s(file, policy, {.sequences = 3, .unified = unified});
            const auto one = [&](const tokens& t, std::size_t i, llama_seq_id sequence) {
                return s.decode(std::span(t).subspan(i, 1), static_cast<llama_pos>(i), sequence);
            };
            std::vector<float> got, again;
            for (std::size_t i = 0; i < first.size(); ++i) { // cells of two sequences, in turns
                (void)one(first, i, 0);
                add(got, one(second, i, 1));
            }
            llama_memory_seq_rm(s.memory(), 0, -1, -1);
            for (std::size_t i = 0; i < third.size(); ++i) { // goes to cells that were left, and to others
                add(again, one(third, i, 0));
                if (i % 4 == 3 && got.size() < 50 * s.vocabulary())
                    add(got, one(second, got.size() / s.vocabulary(), 1));
            }
            llama_memory_seq_cp(s.memory(), 1, 2, -1, -1);
            while (got.size() < second.size() * s.vocabulary())
                add(got, one(second, got.size() / s.vocabulary(), 2));
            INFO("unified " << unified);
            const double d = divergence(of_second, got, s.vocabulary()),
                         e = divergence(of_third, again, s.vocabulary());
            INFO("KL divergences " << d << " and " << e);
            CHECK(d < bound);
            CHECK(e < bound);
        }
    }
    CHECK(telling > 3);
    ::unsetenv("KV1_PRECISION");
}

TEST_CASE("a context is shifted", "[llama_cpp]") {
    for (const ggml_type nominal : {GGML_TYPE_F16, GGML_TYPE_Q8_0})
        for (const std::string& file : models()) {
            INFO(file << ", nominal type " << nominal);
            const auto use = [](session& s) {
                (void)s.decode(text(120), 0);
                (void)llama_memory_seq_rm(s.memory(), 0, 10, 50);
                llama_memory_seq_add(s.memory(), 0, 50, -1, -40);
                return s.decode(text(20, 2), 80);
            };
            session plain(file, nullptr), coded(file, "16", {.keys = nominal, .values = nominal});
            if (!llama_memory_can_shift(plain.memory()) || file.find("lfm2") != std::string::npos)
                continue;
            if (nominal != GGML_TYPE_F16 &&
                (file.find("bloom") != std::string::npos || file.find("deepseek2") != std::string::npos ||
                 file.find("qwen2") != std::string::npos))
                continue;
            const double d = divergence(use(plain), use(coded), plain.vocabulary());
            INFO("KL divergence " << d);
            CHECK(d < 10 * same); // turned keys are rounded to fp16 again, in both
        }
}

TEST_CASE("a state is saved and restored", "[llama_cpp]") {
    // fp32 sums on the stored values: other cells change their order alone
    ::setenv("KV1_PRECISION", "exact", 1);
    for (const char* policy : {"safe", "c4+ls+had@2:8", "16", "2,2"})
        for (const std::string& file : models()) {
            INFO(file << ", " << policy);
            session s(file, policy, {.sequences = 2});
            (void)s.decode(text(90), 0);
            const std::vector<std::uint8_t> state = s.save();
            const tokens more = text(10, 2);
            std::vector<float> expected, got;
            for (std::size_t i = 0; i < more.size(); ++i) {
                const std::vector<float> next =
                    s.decode(std::span(more).subspan(i, 1), static_cast<llama_pos>(90 + i));
                expected.insert(expected.end(), next.begin(), next.end());
            }
            llama_memory_clear(s.memory(), true);
            (void)s.decode(text(33, 5), 0, 1); // it goes to other cells
            REQUIRE(s.restore(state));
            CHECK(s.save() == state);
            for (std::size_t i = 0; i < more.size(); ++i) {
                const std::vector<float> next =
                    s.decode(std::span(more).subspan(i, 1), static_cast<llama_pos>(90 + i));
                got.insert(got.end(), next.begin(), next.end());
            }
            const double d = divergence(expected, got, s.vocabulary());
            INFO("KL divergence " << d);
            CHECK(d < same);
        }
    ::unsetenv("KV1_PRECISION");
}

TEST_CASE("a state of more rows than are moved at once", "[llama_cpp]") {
    ::setenv("KV1_PRECISION", "exact", 1);
    constexpr std::size_t length = 300;
    const std::string file = models()[6];
    for (const char* policy : {"safe", "2,2@4:280", "16"}) {
        INFO(file << ", " << policy);
        session s(file, policy, {.sequences = 2});
        (void)s.decode(text(length), 0);
        const std::vector<std::uint8_t> state = s.save();
        const tokens next = text(1, 2);
        const std::vector<float> expected = s.decode(next, length);
        llama_memory_clear(s.memory(), true);
        (void)s.decode(text(33, 5), 0, 1);
        REQUIRE(s.restore(state));
        CHECK(s.save() == state);
        CHECK(divergence(expected, s.decode(next, length), s.vocabulary()) < same);
    }
    ::unsetenv("KV1_PRECISION");
}

TEST_CASE("states are restored one after the other, more than there is room for in fp16", "[llama_cpp]") {
    ::setenv("KV1_PRECISION", "exact", 1);
    const std::string file = models()[6];
    INFO(file);
    constexpr llama_seq_id sequences = 200;
    constexpr std::size_t length = 64; // in fp16, all of it
    session s(file, "2,2@4:61", {.cells = sequences * (length + 2), .sequences = sequences});
    (void)s.decode(text(length), 0);
    const std::vector<std::uint8_t> state = s.save();
    const tokens next = text(1, 2);
    const std::vector<float> expected = s.decode(next, length);
    for (llama_seq_id i = 1; i < sequences; ++i)
        REQUIRE(s.restore(state, i));
    // The same bytes but for the number of the sequence, which each of the cells in front has.
    const auto is_there = [&](llama_seq_id sequence) {
        const std::vector<std::uint8_t> own = s.save(sequence);
        constexpr std::ptrdiff_t cells = 1024;
        return own.size() == state.size() &&
               std::equal(own.begin() + cells, own.end(), state.begin() + cells);
    };
    CHECK(is_there(sequences - 1));
    CHECK(is_there(sequences / 2));
    CHECK(!is_there(1));
    CHECK(divergence(expected, s.decode(next, length, sequences - 1), s.vocabulary()) < same);
    // Those that were restored first are seen as their codes, as they would be in the end.
    const std::vector<float> coded = s.decode(next, length, 1);
    CHECK(divergence(expected, coded, s.vocabulary()) < 0.1);
    ::unsetenv("KV1_PRECISION");
}

TEST_CASE("what can not work is refused", "[llama_cpp]") {
    const std::string file = models()[6];
    INFO(file);
    session off(file, "safe", {.flash = LLAMA_FLASH_ATTN_TYPE_DISABLED});
    CHECK(off.try_decode({{5, 0, {0}}}) != 0);
    CHECK_THROWS(session(file, "safe", {.keys = GGML_TYPE_F32, .values = GGML_TYPE_F32}));
    session unknown(file, "no such policy");
    CHECK(unknown.try_decode({{5, 0, {0}}}) != 0);
    session calibrated(file, "balanced");
    CHECK(calibrated.try_decode({{5, 0, {0}}}) != 0);
}
