// SPDX-License-Identifier: Apache-2.0
#include "output_file.hpp"

#include "error.hpp"

#include <system_error>
#include <utility>

namespace kv1_lm {

output_file::output_file(std::filesystem::path file) : file_(std::move(file)), temporary_(file_) {
    std::error_code ignored;
    if (std::filesystem::is_directory(file_, ignored))
        throw input_error(file_.string(), "is a folder, no file can be written there");
    temporary_ += ".part";
    stream_.open(temporary_, std::ios::binary | std::ios::trunc);
    if (!stream_)
        throw input_error(file_.string(), "can not be written");
}

output_file::~output_file() {
    stream_.close();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
}

void output_file::commit(std::string_view text) {
    stream_.write(text.data(), static_cast<std::streamsize>(text.size()));
    stream_.close();
    if (!stream_)
        throw input_error(file_.string(), "writing it failed");
    std::error_code failed;
    std::filesystem::rename(temporary_, file_, failed);
    if (failed)
        throw input_error(file_.string(), "can not be written: " + failed.message());
}

} // namespace kv1_lm
