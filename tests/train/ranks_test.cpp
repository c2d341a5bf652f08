// SPDX-License-Identifier: Apache-2.0
//
// Two processes that share a batch train as one does with all of it.
#include "training_fixture.hpp"

#include "file.hpp"
#include "safetensors.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <thread>

namespace {

// kv1-train as a process of its own.
pid_t start(const std::vector<std::string>& arguments, int rank, const std::string& port) {
    const pid_t child = ::fork();
    if (child != 0)
        return child;
    const std::string number = std::to_string(rank);
    ::setenv("WORLD_SIZE", "2", 1);
    ::setenv("RANK", number.c_str(), 1);
    ::setenv("MASTER_ADDR", "127.0.0.1", 1);
    ::setenv("MASTER_PORT", port.c_str(), 1);
    ::setenv("GLOO_SOCKET_IFNAME", "lo", 1);
    std::vector<char*> argv{const_cast<char*>(KV1_TRAIN_PROGRAM)};
    for (const std::string& a : arguments)
        argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    ::execv(KV1_TRAIN_PROGRAM, argv.data());
    ::_exit(127);
}

bool has_logged(const std::filesystem::path& log) {
    std::error_code ignored;
    return std::filesystem::exists(log, ignored) && std::ranges::count(kv1_lm::read_text_file(log), '\n') > 1;
}

int exit_code(pid_t child) {
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

} // namespace

TEST_CASE("Two ranks reach the weights of one at the same global batch", "[train]") {
    const kv1_test::training_fixture f;
    const std::vector<std::string> options{"--kv", "2", "--steps", "4", "--micro-batch", "4"};
    REQUIRE(kv1_test::run_kv1_train(f.train("one", options)).code == 0);

    const std::string port = std::to_string(20000 + ::getpid() % 20000);
    const auto arguments = f.train("two", options);
    const pid_t first = start(arguments, 0, port), second = start(arguments, 1, port);
    const int codes[] = {exit_code(first), exit_code(second)};
    if (codes[0] == 2)
        SKIP("this LibTorch comes without Gloo");
    REQUIRE(codes[0] == 0);
    REQUIRE(codes[1] == 0);

    const auto weights = [&](const char* run) {
        const auto file =
            kv1_lm::safetensors::read(f.path() / run / "step-00000004/trainer_state.safetensors");
        return kv1_lm::to_floats(*file.find("weights"));
    };
    const auto one = weights("one"), two = weights("two");
    REQUIRE(one.size() == two.size());
    // Both add two micro-batches of four; only the place where they are added differs, and a sum of two does
    // not depend on the order.
    REQUIRE(one == two);
}

TEST_CASE("A rank whose peer dies or hangs fails, too", "[train]") {
    const kv1_test::training_fixture f;
    ::setenv("KV1_RANK_TIMEOUT", "3", 1);
    for (const int fate : {SIGKILL, SIGSTOP}) {
        const std::string run = "run" + std::to_string(fate),
                          port = std::to_string(20000 + (::getpid() + fate) % 20000);
        const auto arguments = f.train(run, {"--kv", "2", "--steps", "1000000", "--log-every", "1"});
        const pid_t first = start(arguments, 0, port), second = start(arguments, 1, port);
        const std::filesystem::path log = f.path() / run / "log.csv";
        pid_t ended = 0;
        int status = 0;
        while (ended == 0 && !has_logged(log)) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            ended = ::waitpid(first, &status, WNOHANG);
        }
        if (ended == 0)
            ::kill(second, fate);
        const int code = ended == 0 ? exit_code(first) : WEXITSTATUS(status);
        ::kill(second, SIGKILL);
        (void)exit_code(second);
        if (code == 2)
            SKIP("this LibTorch comes without Gloo");
        INFO("signal " << fate);
        REQUIRE(code == 1);
    }
    ::unsetenv("KV1_RANK_TIMEOUT");
}
