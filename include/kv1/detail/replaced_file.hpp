// SPDX-License-Identifier: Apache-2.0
//
// replaced_file: writes a file beside the one that it replaces, and renames it when it is whole. A pipe or a
// device is written to directly.
//
// Until it is whole the file is called <name>.kv1-partial, or <name>.<1 ... 15>.kv1-partial if several are
// written at once. Its writer holds a lock on it. The system releases the lock when the process dies, so a
// file of these names that nobody locks was left by a killed writer, and the next writer of that name removes
// it. On Windows nobody else can open the file while it is written, which serves as the lock. On a file
// system without locks nothing is removed, and each of the names can be left behind once.
#pragma once

#include <kv1/detail/arena.hpp>
#include <kv1/detail/buffer.hpp>
#include <kv1/detail/file_descriptor.hpp>
#include <kv1/status.hpp>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <span>
#include <system_error>
#include <utility>
#if !defined(_WIN32)
#include <sys/file.h>
#endif

namespace kv1::inline KV1_ABI::detail {

using file_name = buffer<path_char>; // ends with a zero

class replaced_file {
public:
    replaced_file() = default;
    replaced_file(const replaced_file&) = delete;
    replaced_file& operator=(const replaced_file&) = delete;
    ~replaced_file() {
        if (writing_)
            discard();
    }

    // Errors: io_error, out_of_memory.
    status open(const std::filesystem::path& path) noexcept;
    // A sink of bytes.
    bool operator()(std::span<const std::byte> bytes) noexcept {
        if (bytes.size() > waiting_.capacity() - waiting_.size() && !flush())
            return false;
        if (bytes.size() >= waiting_.capacity())
            return file_.write(bytes);
        const std::size_t at = waiting_.size();
        waiting_.set_size(at + bytes.size());
        if (!bytes.empty())
            std::memcpy(waiting_.data() + at, bytes.data(), bytes.size());
        return true;
    }
    // Why the last write failed, from errno.
    [[nodiscard]] static status failure() noexcept { return system_failure("the file can not be written"); }
    // Puts the file in its place. Errors: io_error.
    status finish() noexcept {
        if (!flush())
            return failure();
        return writing_ ? replace() : file_.close() ? status{} : failure();
    }

private:
    static constexpr unsigned most_writers = 16;
    static constexpr std::size_t most_waiting = 65536;
    static constexpr int most_links = 40;

    bool flush() noexcept {
        const bool fine = file_.write(waiting_.view());
        waiting_.clear();
        return fine;
    }

    // Sets partial_ to the n-th of the names that an unfinished file may have. False: no memory.
    bool name_partial(unsigned n) noexcept {
        if (!partial_.assign(target_.view().first(target_.size() - 1)))
            return false;
        std::array<char, 24> ending{};
        std::size_t length = 0;
        if (n != 0) {
            ending[length++] = '.';
            if (n >= 10)
                ending[length++] = static_cast<char>('0' + n / 10);
            ending[length++] = static_cast<char>('0' + n % 10);
        }
        for (const char c : {'.', 'k', 'v', '1', '-', 'p', 'a', 'r', 't', 'i', 'a', 'l', '\0'})
            ending[length++] = c;
        for (std::size_t i = 0; i < length; ++i)
            if (!partial_.try_push_back(static_cast<path_char>(ending[i])))
                return false;
        return true;
    }

    // Removes what killed writers left, then creates a file under one of the names that nobody else uses.
    status claim() noexcept {
        for (unsigned n = 0; n < most_writers; ++n) {
            if (!name_partial(n))
                return no_memory();
            static_cast<void>(remove_abandoned());
        }
        for (unsigned n = 0; n < most_writers; ++n) {
            static_cast<void>(name_partial(n)); // fits the memory that partial_ has
            for (int attempt = 0; attempt < 4; ++attempt) {
                file_ = create();
                if (file_ && is_ours()) {
                    writing_ = true;
                    return {};
                }
                if (!file_ && errno != EEXIST)
                    return system_failure("no file can be made beside the one to be saved");
                if (!file_)
                    break;
            }
        }
        return {errc::io_error, "files that 16 other writers have, or left, lie beside the one to be saved"};
    }

    static status no_memory() noexcept { return {errc::out_of_memory, "no memory for a file's name"}; }

    // Defined below, once for each system.
    file_descriptor create() const noexcept;
    [[nodiscard]] bool is_ours() const noexcept;
    bool remove_abandoned() const noexcept;
    status replace() noexcept;
    void discard() noexcept;

    file_name target_, partial_;
    file_descriptor file_;
    bool writing_ = false; // the partial file exists, and is this writer's
    buffer<std::byte> waiting_;

#if !defined(_WIN32)
    status resolve(const char* path) noexcept;
    static status keep_owner_and_mode(int file, const struct stat& before) noexcept;
    struct stat before_ {}; // of the file that is replaced
    bool replaces_ = false; // a file of that name was there at the beginning
#endif
};

#if defined(_WIN32)

// On Windows std::filesystem follows links and replaces files.
inline status replaced_file::open(const std::filesystem::path& path) noexcept {
    if (!waiting_.reserve(most_waiting))
        return {errc::out_of_memory, "no memory to write a file"};
    status outcome;
    const status had_memory = guarded([&] {
        std::error_code failed;
        const std::filesystem::file_type type = std::filesystem::status(path, failed).type();
        if (type == std::filesystem::file_type::directory) {
            outcome = {errc::io_error, "the path is a folder's"};
            return;
        }
        if (type != std::filesystem::file_type::regular && type != std::filesystem::file_type::not_found) {
            int number = -1;
            static_cast<void>(
                ::_wsopen_s(&number, path.c_str(), _O_WRONLY | _O_BINARY | _O_NOINHERIT, _SH_DENYNO, 0));
            file_ = file_descriptor(number);
            if (!file_)
                outcome = system_failure("the device can not be opened");
            return;
        }
        std::filesystem::path target = path;
        for (int links = 0; std::filesystem::is_symlink(target, failed); ++links) {
            if (links == most_links) {
                outcome = {errc::io_error, "the path's links lead nowhere"};
                return;
            }
            target = target.parent_path() / std::filesystem::read_symlink(target, failed);
        }
        outcome = target_.assign({target.c_str(), target.native().size() + 1}) ? claim() : no_memory();
    });
    return had_memory ? outcome : had_memory;
}

inline file_descriptor replaced_file::create() const noexcept {
    int number = -1;
    static_cast<void>(::_wsopen_s(&number, partial_.data(),
                                  _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT, _SH_DENYRW,
                                  _S_IREAD | _S_IWRITE));
    return file_descriptor(number);
}
// Nobody else can open or remove it.
inline bool replaced_file::is_ours() const noexcept { return true; }
inline bool replaced_file::remove_abandoned() const noexcept { return ::_wremove(partial_.data()) == 0; }

inline status replaced_file::replace() noexcept {
    if (!file_.sync())
        return system_failure("the file can not be synced");
    if (!file_.close())
        return failure();
    std::error_code failed;
    const status s = guarded([&] {
        std::filesystem::rename(std::filesystem::path(partial_.data()), std::filesystem::path(target_.data()),
                                failed);
    });
    if (!s)
        return s;
    if (failed)
        return {errc::io_error, "the file can not be renamed"};
    writing_ = false;
    return {};
}
inline void replaced_file::discard() noexcept {
    static_cast<void>(file_.close());
    static_cast<void>(remove_abandoned());
}

#else

inline status replaced_file::open(const std::filesystem::path& path) noexcept {
    if (!waiting_.reserve(most_waiting))
        return {errc::out_of_memory, "no memory to write a file"};
    if (path.empty())
        return {errc::io_error, "the path is empty"};
    replaces_ = ::stat(path.c_str(), &before_) == 0;
    if (!replaces_ && errno != ENOENT)
        return system_failure("the path can not be followed");
    if (replaces_ && S_ISDIR(before_.st_mode))
        return {errc::io_error, "the path is a folder's"};
    if (replaces_ && !S_ISREG(before_.st_mode)) {
        file_ = file_descriptor(::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY));
        return file_ ? status{} : system_failure("the pipe or device can not be opened");
    }
    if (const status s = resolve(path.c_str()); !s)
        return s;
    struct stat there {}; // of the file that has the name now, which another writer may have put there
    if (replaces_ && (::lstat(target_.data(), &there) != 0 || !S_ISREG(there.st_mode)))
        return {errc::io_error, "the path leads to a file that has no name"};
    return claim();
}

// Follows the links of a path to a name, whether a file of that name exists or not.
inline status replaced_file::resolve(const char* path) noexcept {
    if (!target_.assign({path, std::strlen(path) + 1}))
        return no_memory();
    file_name to;
    if (!to.resize(4096)) // the longest that systems take
        return no_memory();
    for (int links = 0; links < most_links; ++links) {
        const ::ssize_t n = ::readlink(target_.data(), to.data(), to.size() - 1);
        if (n < 0)
            return errno == EINVAL || errno == ENOENT ? status{}
                                                      : system_failure("the path can not be followed");
        const auto length = static_cast<std::size_t>(n);
        to[length] = '\0';
        std::size_t folder = 0; // characters of the link's folder, which a relative target is relative to
        for (std::size_t i = 0; to[0] != '/' && i < target_.size(); ++i)
            if (target_[i] == '/')
                folder = i + 1;
        if (!target_.reserve(folder + length + 1))
            return no_memory();
        target_.set_size(folder + length + 1);
        std::memcpy(target_.data() + folder, to.data(), length + 1);
    }
    return {errc::io_error, "the path's links lead nowhere"};
}

// Whether an open file still has this name.
inline bool is_file_of(int file, const char* name) noexcept {
    struct stat own {
    }, named{};
    return ::fstat(file, &own) == 0 && ::lstat(name, &named) == 0 && own.st_dev == named.st_dev &&
           own.st_ino == named.st_ino;
}

// Creates the partial file. If it replaces a file, nobody else may read it until it has that file's mode.
inline file_descriptor replaced_file::create() const noexcept {
    const ::mode_t mode = replaces_ ? 0600 : 0666;
    return file_descriptor(
        ::open(partial_.data(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode));
}

// Locks the file. False if another writer took it for an abandoned one, and removed it, before that.
inline bool replaced_file::is_ours() const noexcept {
    if (::flock(file_.number(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return false;
    return is_file_of(file_.number(), partial_.data());
}

inline bool replaced_file::remove_abandoned() const noexcept {
    const file_descriptor file(::open(partial_.data(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    struct stat about {};
    return file && ::fstat(file.number(), &about) == 0 && S_ISREG(about.st_mode) &&
           ::flock(file.number(), LOCK_EX | LOCK_NB) == 0 && is_file_of(file.number(), partial_.data()) &&
           ::unlink(partial_.data()) == 0;
}

// Gives the file the mode and owner of the one that it replaces. If the group cannot be kept, the new group
// gets the rights of others.
inline status replaced_file::keep_owner_and_mode(int file, const struct stat& before) noexcept {
    struct stat own {};
    if (::fstat(file, &own) != 0)
        return system_failure("the file's owner can not be read");
    bool same_group = own.st_gid == before.st_gid;
    if (own.st_uid != before.st_uid || !same_group)
        same_group = ::fchown(file, before.st_uid, before.st_gid) == 0 || same_group ||
                     ::fchown(file, static_cast<::uid_t>(-1), before.st_gid) == 0;
    ::mode_t mode = before.st_mode & 0777;
    if (!same_group)
        mode = (mode & ~::mode_t{070}) | (mode & 007) << 3;
    if ((own.st_mode & 0777) != mode && ::fchmod(file, mode) != 0)
        return system_failure("the file's mode can not be kept");
    return {};
}

inline status replaced_file::replace() noexcept {
    struct stat there {};
    if (::lstat(target_.data(), &there) == 0) {
        if (!S_ISREG(there.st_mode))
            return {errc::io_error, "the path became something else while the file was written"};
        before_ = there; // the mode may have changed since the beginning
        replaces_ = true;
    }
    if (replaces_)
        if (const status s = keep_owner_and_mode(file_.number(), before_); !s)
            return s;
    if (!file_.sync())
        return system_failure("the file can not be synced");
    if (::rename(partial_.data(), target_.data()) != 0)
        return system_failure("the file can not be renamed");
    writing_ = false;
    // syncs the folder, so that the new name lasts; file systems that cannot do that are left alone
    std::size_t folder = 0;
    for (std::size_t i = 0; i < target_.size(); ++i)
        if (target_[i] == '/')
            folder = i + 1;
    target_.set_size(folder); // within the name
    for (const char c : {'.', '\0'})
        if (!target_.try_push_back(c))
            return {};
    if (const file_descriptor f(::open(target_.data(), O_RDONLY | O_CLOEXEC)); f)
        static_cast<void>(f.sync());
    return {};
}
// The lock is held until the name is gone.
inline void replaced_file::discard() noexcept { static_cast<void>(::unlink(partial_.data())); }

#endif

} // namespace kv1::inline KV1_ABI::detail
