// SPDX-License-Identifier: Apache-2.0
//
// A run that was stopped and taken up again ends where one that was not ends: bit for bit.
#include "training_fixture.hpp"

#include "file.hpp"

#include <csignal>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iterator>
#include <thread>

namespace {

std::vector<std::byte> state_of(const kv1_test::training_fixture& f, const std::string& folder) {
    return kv1_lm::read_binary_file(f.path() / folder / "trainer_state.safetensors");
}

const std::vector<std::string> options{"--kv", "2+ls+had",     "--steps", "12",          "--micro-batch",
                                       "4",    "--save-every", "5",       "--log-every", "1"};

// Steps that a log tells of.
std::ptrdiff_t logged(const std::filesystem::path& log) {
    std::error_code ignored;
    if (!std::filesystem::exists(log, ignored))
        return 0;
    return std::ranges::count(kv1_lm::read_text_file(log), '\n') - 1;
}

} // namespace

TEST_CASE("A run resumed from a checkpoint equals one that was not interrupted", "[train]") {
    const kv1_test::training_fixture f;
    auto arguments = f.train("whole", options);
    REQUIRE(kv1_test::run_kv1_train(arguments).code == 0);
    // of all that were saved, the last two are kept
    REQUIRE(std::filesystem::exists(f.path() / "whole/step-00000010"));
    REQUIRE(std::distance(std::filesystem::directory_iterator(f.path() / "whole"), {}) == 3); // with log.csv

    // as a machine that failed after step 5 left it
    std::filesystem::create_directory(f.path() / "resumed");
    auto first = f.train("first", options);
    first.insert(first.end(), {"--keep", "5"});
    REQUIRE(kv1_test::run_kv1_train(first).code == 0);
    std::filesystem::copy(f.path() / "first/step-00000005", f.path() / "resumed/step-00000005");
    std::filesystem::copy(f.path() / "first/log.csv", f.path() / "resumed/log.csv");

    auto second = f.train("resumed", options);
    second.push_back("--resume");
    const auto resumed = kv1_test::run_kv1_train(second);
    INFO(resumed.out << resumed.err);
    REQUIRE(resumed.code == 0);
    REQUIRE(resumed.out.starts_with("training from step 5 to 12"));
    REQUIRE(state_of(f, "resumed/step-00000012") == state_of(f, "whole/step-00000012"));
    REQUIRE(logged(f.path() / "resumed/log.csv") == 12);
}

TEST_CASE("SIGTERM saves and stops, and the run goes on from there", "[train]") {
    const kv1_test::training_fixture f;
    REQUIRE(kv1_test::run_kv1_train(f.train("whole", options)).code == 0);

    // once a step is logged the handler is in place
    std::jthread killer([log = f.path() / "stopped/log.csv"] {
        while (logged(log) < 1)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::raise(SIGTERM);
    });
    auto arguments = f.train("stopped", options);
    arguments.push_back("--resume"); // of nothing: starts
    const auto stopped = kv1_test::run_kv1_train(arguments);
    killer.join();
    INFO(stopped.out << stopped.err);
    REQUIRE(stopped.code == 0);

    const auto resumed = kv1_test::run_kv1_train(arguments);
    INFO(resumed.out << resumed.err);
    REQUIRE(resumed.code == 0);
    REQUIRE(state_of(f, "stopped/step-00000012") == state_of(f, "whole/step-00000012"));
}

TEST_CASE("A run is neither overwritten nor taken up under other options", "[train]") {
    const kv1_test::training_fixture f;
    const std::vector<std::string> two{"--steps", "2"}, three{"--steps", "3", "--resume"};
    REQUIRE(kv1_test::run_kv1_train(f.train("run", two)).code == 0);
    const auto again = kv1_test::run_kv1_train(f.train("run", two));
    REQUIRE(again.code == 2);
    REQUIRE(again.err.find("holds a run already") != std::string::npos);
    const auto other = kv1_test::run_kv1_train(f.train("run", three));
    REQUIRE(other.code == 2);
    REQUIRE(other.err.find("another steps: 2, not 3") != std::string::npos);
}
