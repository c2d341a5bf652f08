// SPDX-License-Identifier: Apache-2.0
//
// A temporary folder for a test, which is removed with all that is in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kv1_test {

class temporary_folder {
public:
    temporary_folder() {
        std::random_device device; // tests run side by side
        do
            path_ = std::filesystem::temp_directory_path() / ("kv1_test_" + std::to_string(device()));
        while (!std::filesystem::create_directory(path_));
    }
    temporary_folder(const temporary_folder&) = delete;
    temporary_folder& operator=(const temporary_folder&) = delete;
    ~temporary_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
    /// Writes a file and gives its path.
    std::filesystem::path write(std::string_view name, std::string_view contents) const {
        const std::filesystem::path file = path_ / name;
        std::ofstream out(file, std::ios::binary);
        out.write(contents.data(), static_cast<std::streamsize>(contents.size()));
        if (!out.flush())
            throw std::runtime_error("can not write " + file.string());
        return file;
    }

private:
    std::filesystem::path path_;
};

} // namespace kv1_test
