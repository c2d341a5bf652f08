// SPDX-License-Identifier: Apache-2.0
//
// Saved sequences and prefixes in files.
//
//   kv1::save_file(cache, {&id, 1}, "session.kv1");
//   kv1::load_file(cache, "session.kv1", {&id, 1});
//
// Saving. A file is written under another name beside its own, synced, and only then renamed: whoever opens
// it finds the old contents or the new, whole. Writing the folder has to be permitted; other hard links keep
// the old contents.
//
//   mode      of a file that is replaced is kept, its owner and group where the system permits that (where
//   the
//             group is not kept, the group may do what others may); new files have what the umask leaves. Not
//             kept are access lists and extended attributes. On Windows a file has its folder's permissions.
//   links     are followed: the file that they lead to is replaced beside itself, or made.
//   devices   and pipes are written to as streams, never replaced: what a failed save wrote stays written.
//   partial   files are called <name>.kv1-partial, or <name>.<1 ... 15>.kv1-partial while several saves to
//   one
//             name are at work, of which the last to finish stays. A save that fails removes its own; one
//             that is killed leaves it, and the next save to that name removes it.
//
// Loading verifies the whole file before it changes the cache (cache_io.hpp), and refuses one that goes on
// after its end. Pipes and devices are read as streams: once, verified while they are read, up to the end.
//
// Paths are std::filesystem::path and opened by their native names, so that on Windows every path works: give
// wide or UTF-8 (char8_t) text there, since narrow text is taken to be in the system's code page.
#pragma once

#include <kv1/cache_io.hpp>
#include <kv1/detail/file_descriptor.hpp>
#include <kv1/detail/replaced_file.hpp>

#include <filesystem>

namespace kv1::inline KV1_ABI {

/// Saves sequences to a file, replacing it. Errors: as try_save; io_error, which says what the system
/// refused.
template <class F, class A>
status try_save_file(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
                     const std::filesystem::path& path, const save_options& options = {}) noexcept {
    detail::cache_saving saving(detail::cache_access::state(cache), ids);
    if (const status s = saving.collect(options.model, options.prefixes); !s)
        return s;
    detail::replaced_file file;
    if (const status s = file.open(path); !s)
        return s;
    if (const status s = saving.write(file); !s)
        return s.code() == errc::io_error ? file.failure() : s;
    return file.finish();
}

/// Loads a file. Errors: as try_load; bad_format where bytes follow the end; io_error where the file cannot
/// be opened or read.
template <class F, class A>
result<std::size_t> try_load_file(basic_kv_cache<F, A>& cache, const std::filesystem::path& path,
                                  std::span<sequence_id> out, const load_options& options = {}) noexcept {
    const result<detail::opened_file> opened = detail::open_to_read(path.c_str());
    if (!opened)
        return opened.reason();
    const auto load = [&](auto source) -> result<std::size_t> {
        const result<std::size_t> loaded = try_load(cache, source, out, options);
        if (!loaded && source.failed())
            return status{errc::io_error, "the file can not be read"};
        return loaded;
    };
    return opened->regular ? load(detail::file_source(opened->file))
                           : load(detail::stream_source(opened->file));
}

#if KV1_EXCEPTIONS
/// As the try_ forms; throw kv1::error.
/// @{
template <class F, class A>
void save_file(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
               const std::filesystem::path& path, const save_options& options = {}) {
    detail::throw_if_error(try_save_file(cache, ids, path, options));
}
template <class F, class A>
std::size_t load_file(basic_kv_cache<F, A>& cache, const std::filesystem::path& path,
                      std::span<sequence_id> out, const load_options& options = {}) {
    return try_load_file(cache, path, out, options).value();
}
/// @}
#endif

} // namespace kv1::inline KV1_ABI
