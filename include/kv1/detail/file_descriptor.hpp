// SPDX-License-Identifier: Apache-2.0
//
// file_descriptor: an open file, closed when it goes out of scope. Names are the system's own (wide
// characters on Windows), so that every path can be opened. file_source and stream_source read from a
// descriptor.
#pragma once

#include <kv1/detail/config.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <span>
#include <utility>
#include <fcntl.h>
#include <sys/stat.h>
#if defined(_WIN32)
#include <io.h>
#include <share.h>
#else
#include <unistd.h>
#endif

namespace kv1::inline KV1_ABI::detail {

using path_char = std::filesystem::path::value_type;

// A status for errno: its own rule for errors that a user can mend (no space, no permission), else
// `otherwise`.
inline status system_failure(const char* otherwise) noexcept {
    switch (errno) {
    case ENOMEM:
        return {errc::out_of_memory, "the system has no memory for a file"};
    case ENOSPC:
#if defined(EDQUOT)
    case EDQUOT:
#endif
        return {errc::io_error, "no space is left for the file"};
    case EACCES:
    case EPERM:
    case EROFS:
        return {errc::io_error, "the system does not permit it"};
    case ENOENT:
        return {errc::io_error, "there is no such file or folder"};
    default:
        return {errc::io_error, otherwise};
    }
}

class file_descriptor {
public:
    file_descriptor() = default;
    explicit file_descriptor(int number) noexcept : number_(number) {}
    file_descriptor(file_descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
    file_descriptor& operator=(file_descriptor&& other) noexcept {
        std::swap(number_, other.number_);
        return *this;
    }
    ~file_descriptor() { static_cast<void>(close()); }

    [[nodiscard]] explicit operator bool() const noexcept { return number_ >= 0; }
    [[nodiscard]] int number() const noexcept { return number_; }

    bool close() noexcept {
        const int number = std::exchange(number_, -1);
#if defined(_WIN32)
        return number < 0 || ::_close(number) == 0;
#else
        return number < 0 || ::close(number) == 0;
#endif
    }

    // Writes all of the bytes. False: errno says why.
    [[nodiscard]] bool write(std::span<const std::byte> bytes) const noexcept {
        while (!bytes.empty()) {
            const std::size_t some = (std::min)(bytes.size(), most_at_once);
#if defined(_WIN32)
            const auto n = ::_write(number_, bytes.data(), static_cast<unsigned>(some));
#else
            const auto n = ::write(number_, bytes.data(), some);
#endif
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return false;
            bytes = bytes.subspan(static_cast<std::size_t>(n));
        }
        return true;
    }
    // Reads at least one byte if any is left, and gives the number of bytes read. 0: the end. -1: errno says
    // why.
    [[nodiscard]] std::ptrdiff_t read(std::span<std::byte> bytes) const noexcept {
        const std::size_t some = (std::min)(bytes.size(), most_at_once);
        for (;;) {
#if defined(_WIN32)
            const std::ptrdiff_t n = ::_read(number_, bytes.data(), static_cast<unsigned>(some));
#else
            const std::ptrdiff_t n = ::read(number_, bytes.data(), some);
#endif
            if (n >= 0 || errno != EINTR)
                return n;
        }
    }
    bool rewind() const noexcept {
#if defined(_WIN32)
        return ::_lseeki64(number_, 0, SEEK_SET) == 0;
#else
        return ::lseek(number_, 0, SEEK_SET) == 0;
#endif
    }
    // Waits until the file's bytes are on the disk. False: errno says why.
    [[nodiscard]] bool sync() const noexcept {
#if defined(_WIN32)
        return ::_commit(number_) == 0;
#else
        return ::fsync(number_) == 0;
#endif
    }

private:
    static constexpr std::size_t most_at_once = std::size_t{1} << 30; // what every system takes

    int number_ = -1;
};

// A source that reads a pipe or a device, and no byte more than it is asked for.
class stream_source {
public:
    explicit stream_source(const file_descriptor& file) noexcept : file_(file) {}
    bool operator()(std::span<std::byte> out) noexcept {
        while (!out.empty()) {
            const std::size_t n = some(out);
            if (n == 0)
                return false;
            out = out.subspan(n);
        }
        return true;
    }
    // Whether the system refused to read.
    [[nodiscard]] bool failed() const noexcept { return failed_; }

protected:
    std::size_t some(std::span<std::byte> out) noexcept {
        const std::ptrdiff_t n = file_.read(out);
        failed_ = failed_ || n < 0;
        return n < 0 ? 0 : static_cast<std::size_t>(n);
    }
    const file_descriptor& file_;

private:
    bool failed_ = false;
};

// A source that reads a file on a disk. Small requests are served from 4096 bytes that it reads ahead.
class file_source : public stream_source {
public:
    using stream_source::stream_source;
    bool operator()(std::span<std::byte> out) noexcept {
        while (!out.empty()) {
            if (at_ == have_) {
                if (out.size() >= ahead_.size())
                    return stream_source::operator()(out);
                if (!fill())
                    return false;
            }
            const std::size_t n = (std::min)(out.size(), have_ - at_);
            std::memcpy(out.data(), ahead_.data() + at_, n);
            at_ += n;
            out = out.subspan(n);
        }
        return true;
    }
    bool rewind() noexcept {
        at_ = have_ = 0;
        return file_.rewind();
    }
    bool at_end() noexcept { return at_ == have_ && !fill() && !failed(); }

private:
    bool fill() noexcept {
        at_ = 0;
        have_ = some(ahead_);
        return have_ != 0;
    }

    std::array<std::byte, 4096> ahead_;
    std::size_t at_ = 0, have_ = 0;
};

struct opened_file {
    file_descriptor file;
    bool regular = false; // no pipe, no device
};

inline result<opened_file> open_to_read(const path_char* path) noexcept {
    opened_file o;
#if defined(_WIN32)
    int number = -1;
    static_cast<void>(::_wsopen_s(&number, path, _O_RDONLY | _O_BINARY | _O_NOINHERIT, _SH_DENYNO, 0));
    o.file = file_descriptor(number);
    struct _stat64 about {};
    const bool known = o.file && ::_fstat64(number, &about) == 0;
    o.regular = known && (about.st_mode & _S_IFMT) == _S_IFREG;
    const bool folder = known && (about.st_mode & _S_IFMT) == _S_IFDIR;
#else
    o.file = file_descriptor(::open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY));
    struct stat about {};
    const bool known = o.file && ::fstat(o.file.number(), &about) == 0;
    o.regular = known && S_ISREG(about.st_mode);
    const bool folder = known && S_ISDIR(about.st_mode);
#endif
    if (!known)
        return system_failure("the file can not be opened");
    if (folder)
        return status{errc::io_error, "the path is a folder's"};
    return o;
}

} // namespace kv1::inline KV1_ABI::detail
