// SPDX-License-Identifier: Apache-2.0
//
// What libggml-kv1.so says when it is loaded where it can not serve. This program has no ggml: it is one, as far as the
// library asks.
#include <catch2/catch_test_macros.hpp>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include <dlfcn.h>

namespace {

const char* version = "9.8.7";
std::string said;

void* loaded() {
    static void* const library = [] {
        const char* const path = std::getenv("KV1_TEST_BACKEND");
        return path != nullptr ? ::dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    }();
    return library;
}

// What the library gives a ggml of this version: a registry, or null.
void* init(const char* of_version) {
    version = of_version;
    said.clear();
    const auto function = reinterpret_cast<void* (*)()>(::dlsym(loaded(), "ggml_backend_init"));
    REQUIRE(function != nullptr);
    return function();
}

} // namespace

// In place of ggml's, which the library takes where there are any.
extern "C" {
[[gnu::visibility("default")]] const char* ggml_version() { return version; }
[[gnu::visibility("default"), gnu::format(printf, 2, 3)]] void ggml_log_internal(int, const char* format,
                                                                                 ...) {
    char line[1024];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    said += line;
}
}

TEST_CASE("another ggml, a policy that is none and files that are not there are refused in a line",
          "[llama_cpp]") {
    REQUIRE(loaded() != nullptr);
    CHECK(init("9.8.7") == nullptr);
    INFO(said);
    CHECK(said.find("kv1: built for ggml " KV1_GGML_VERSION) == 0);
    CHECK(said.find("9.8.7") != std::string::npos);
    CHECK(said.find('\n') == said.size() - 1);

    const struct {
        const char *variable, *value;
    } mistakes[] = {{"KV1_POLICY", "no such policy"},
                    {"KV1_CALIBRATION", "/no/such/file"},
                    {"KV1_CALIBRATE_STRIDE", "0"},
                    {"KV1_CALIBRATE_STRIDE", "8x"},
                    {"KV1_PRECISION", "double"}};
    for (const auto& m : mistakes) {
        ::setenv(m.variable, m.value, 1);
        INFO(m.variable << "=" << m.value);
        CHECK(init(KV1_GGML_VERSION) == nullptr);
        INFO(said);
        CHECK(said.find(m.variable) != std::string::npos);
        CHECK(said.find(m.value) != std::string::npos);
        CHECK(said.find('\n') == said.size() - 1);
        ::unsetenv(m.variable);
    }
    ::setenv("KV1_POLICY", "safe", 1);
    ::setenv("KV1_CALIBRATE", "file", 1);
    CHECK(init(KV1_GGML_VERSION) == nullptr);
    CHECK(said.find("no part that is calibrated") != std::string::npos);
    ::setenv("KV1_CALIBRATION", "file", 1);
    CHECK(init(KV1_GGML_VERSION) == nullptr);
    CHECK(said.find("one of them at a time") != std::string::npos);
    ::unsetenv("KV1_CALIBRATE");
    ::unsetenv("KV1_CALIBRATION");

    CHECK(init(KV1_GGML_VERSION) != nullptr);
    CHECK(said.empty());
}
