// SPDX-License-Identifier: Apache-2.0
#include "file.hpp"

#include "error.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <system_error>

namespace kv1_lm {

namespace {

[[noreturn]] void fail(const std::filesystem::path& file, int reason) {
    throw input_error(file.string(), "cannot be read: " + std::generic_category().message(reason));
}

// Reads a file into a vector or string of bytes. It uses <cstdio>, since <fstream> does not say why it fails.
template <class Bytes>
Bytes read_file(const std::filesystem::path& file) {
    errno = 0;
    struct closer {
        void operator()(std::FILE* f) const noexcept { std::fclose(f); }
    };
    const std::unique_ptr<std::FILE, closer> in(std::fopen(file.string().c_str(), "rb"));
    if (!in)
        fail(file, errno);
    // The size is a hint only: pipes have none, and a file may change while it is read.
    std::error_code ignored;
    const std::uintmax_t size =
        std::filesystem::is_regular_file(file, ignored) ? std::filesystem::file_size(file, ignored) : 0;
    constexpr std::size_t least = 1u << 16;
    Bytes bytes;
    bytes.resize(ignored || size < least ? least : static_cast<std::size_t>(size) + 1);
    std::size_t filled = 0;
    for (;;) {
        filled += std::fread(bytes.data() + filled, 1, bytes.size() - filled, in.get());
        if (std::ferror(in.get()) != 0)
            fail(file, errno);
        if (std::feof(in.get()) != 0)
            break;
        bytes.resize(bytes.size() * 2);
    }
    bytes.resize(filled);
    return bytes;
}

} // namespace

std::vector<std::byte> read_binary_file(const std::filesystem::path& file) {
    return read_file<std::vector<std::byte>>(file);
}

std::string read_text_file(const std::filesystem::path& file) { return read_file<std::string>(file); }

} // namespace kv1_lm
