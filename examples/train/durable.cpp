// SPDX-License-Identifier: Apache-2.0
#include "durable.hpp"

#include "error.hpp"

#include <fcntl.h>
#include <ftw.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>

namespace kv1_train {

namespace {

[[noreturn]] void fail(const std::filesystem::path& file) {
    throw kv1_lm::input_error(file.string(), "cannot be written: " + std::generic_category().message(errno));
}

class descriptor {
public:
    descriptor(const std::filesystem::path& path, int flags) : number_(::open(path.c_str(), flags, 0644)) {
        if (number_ < 0)
            fail(path);
    }
    descriptor(const descriptor&) = delete;
    descriptor& operator=(const descriptor&) = delete;
    ~descriptor() { ::close(number_); }
    [[nodiscard]] int number() const noexcept { return number_; }

private:
    int number_;
};

// A name is durable once the folder that holds it is synced.
void sync_folder(const std::filesystem::path& folder) {
    const descriptor d(folder.empty() ? "." : folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (::fsync(d.number()) != 0)
        fail(folder);
}

} // namespace

void remove_folder(const std::filesystem::path& folder) noexcept {
    constexpr int most_descriptors = 16;
    const auto remove_entry = [](const char* path, const struct stat*, int, FTW*) {
        return std::remove(path);
    };
    static_cast<void>(::nftw(folder.c_str(), remove_entry, most_descriptors, FTW_DEPTH | FTW_PHYS));
}

durable_folder::durable_folder(std::filesystem::path target)
    : target_(std::move(target)), temporary_(target_) {
    temporary_ += ".part";
    std::error_code error;
    if (std::filesystem::exists(target_, error))
        throw kv1_lm::input_error(target_.string(), "exists already");
    remove_folder(temporary_);
    if (std::filesystem::create_directories(temporary_, error); error)
        throw kv1_lm::input_error(temporary_.string(), "cannot be made: " + error.message());
}

durable_folder::~durable_folder() {
    if (!committed_)
        remove_folder(temporary_);
}

void durable_folder::write(std::string_view name, std::span<const std::byte> contents) const {
    const std::filesystem::path file = temporary_ / name;
    const descriptor d(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC);
    while (!contents.empty()) {
        const ::ssize_t written = ::write(d.number(), contents.data(), contents.size());
        if (written < 0 && errno != EINTR)
            fail(file);
        if (written > 0)
            contents = contents.subspan(static_cast<std::size_t>(written));
    }
    if (::fsync(d.number()) != 0)
        fail(file);
}

void durable_folder::commit() {
    sync_folder(temporary_);
    std::error_code error;
    std::filesystem::rename(temporary_, target_, error);
    if (error)
        throw kv1_lm::input_error(target_.string(), "cannot be written: " + error.message());
    committed_ = true;
    sync_folder(target_.parent_path());
}

} // namespace kv1_train
