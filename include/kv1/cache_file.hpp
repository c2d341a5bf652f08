// SPDX-License-Identifier: Apache-2.0
//
// Saved sequences in files. A file is written under another name beside its own, synced, and only then
// renamed: whoever opens it finds the old contents or the new, whole. Where that fails the other name is
// removed. Loading verifies the whole file before it changes the cache (cache_io.hpp).
//
//   kv1::save_file(cache, {&id, 1}, "session.kv1");
//   kv1::load_file(cache, "session.kv1", {&id, 1});
#pragma once

#include <kv1/cache_io.hpp>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#if defined(_WIN32)
#include <io.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif

namespace kv1::inline KV1_ABI {

namespace detail {

struct file_closer {
    void operator()(std::FILE* f) const noexcept { static_cast<void>(std::fclose(f)); }
};
using file_handle = std::unique_ptr<std::FILE, file_closer>;

inline bool sync_file(std::FILE* f) noexcept {
    if (std::fflush(f) != 0)
        return false;
#if defined(_WIN32)
    return ::_commit(::_fileno(f)) == 0;
#else
    return ::fsync(::fileno(f)) == 0;
#endif
}

// That a rename lasts; file systems that cannot sync a folder are let be.
inline void sync_folder([[maybe_unused]] const std::filesystem::path& folder) noexcept {
#if !defined(_WIN32)
    const int f = ::open(folder.c_str(), O_RDONLY);
    if (f >= 0) {
        static_cast<void>(::fsync(f));
        static_cast<void>(::close(f));
    }
#endif
}

class file_source {
public:
    explicit file_source(std::FILE* f) noexcept : file_(f) {}
    bool operator()(std::span<std::byte> out) noexcept {
        return std::fread(out.data(), 1, out.size(), file_) == out.size();
    }
    bool rewind() noexcept { return std::fseek(file_, 0, SEEK_SET) == 0; }

private:
    std::FILE* file_;
};

} // namespace detail

/// Saves sequences to a file, replacing it. Errors: as try_save.
template <class F, class A>
status try_save_file(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
                     const std::filesystem::path& path) noexcept {
    status outcome;
    const status had_memory = detail::guarded([&] {
        const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
        std::filesystem::path other;
        detail::file_handle file;
        std::random_device number;
        for (int attempt = 0; file == nullptr && attempt < 16; ++attempt) { // names that others write to
            other = path;
            for (const std::string& part :
                 {std::string("."), std::to_string(number()), std::string(".partial")})
                other += part;
            file.reset(std::fopen(other.string().c_str(), "wbx"));
        }
        if (file == nullptr) {
            outcome = {errc::io_error, "no file can be made beside the one to be saved"};
            return;
        }
        outcome = try_save(cache, ids, [&](std::span<const std::byte> bytes) {
            return std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
        });
        if (outcome && !detail::sync_file(file.get()))
            outcome = {errc::io_error, "the file can not be synced"};
        if (std::fclose(file.release()) != 0 && outcome)
            outcome = {errc::io_error, "the file can not be closed"};
        std::error_code failed;
        if (outcome) {
            std::filesystem::rename(other, path, failed);
            if (failed)
                outcome = {errc::io_error, "the file can not be renamed"};
            else
                detail::sync_folder(folder);
        }
        if (!outcome)
            std::filesystem::remove(other, failed);
    });
    return had_memory ? outcome : had_memory;
}

/// Loads a file. Errors: as try_load; io_error where it cannot be opened.
template <class F, class A>
result<std::size_t> try_load_file(basic_kv_cache<F, A>& cache, const std::filesystem::path& path,
                                  std::span<sequence_id> out) noexcept {
    detail::file_handle file;
    if (const status s = detail::guarded([&] { file.reset(std::fopen(path.string().c_str(), "rb")); }); !s)
        return s;
    if (file == nullptr)
        return status{errc::io_error, "the file can not be opened"};
    return try_load(cache, detail::file_source(file.get()), out);
}

#if KV1_EXCEPTIONS
/// As the try_ forms; throw kv1::error.
/// @{
template <class F, class A>
void save_file(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
               const std::filesystem::path& path) {
    detail::throw_if_error(try_save_file(cache, ids, path));
}
template <class F, class A>
std::size_t load_file(basic_kv_cache<F, A>& cache, const std::filesystem::path& path,
                      std::span<sequence_id> out) {
    return try_load_file(cache, path, out).value();
}
/// @}
#endif

} // namespace kv1::inline KV1_ABI
