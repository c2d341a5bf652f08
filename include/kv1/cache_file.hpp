// SPDX-License-Identifier: Apache-2.0
//
// Saves sequences and prefixes to files, and loads them.
//
//   kv1::save_file(cache, {&id, 1}, "session.kv1");
//   kv1::load_file(cache, "session.kv1", {&id, 1});
//
// Saving. A file is written under another name in its folder, synced, and then renamed. So a reader finds the
// old contents or the new ones, whole. The folder has to be writable. Other hard links to the file keep the
// old contents.
//
//   permissions    A file that is replaced keeps its mode, and its owner and group if the system permits that. If
//                  the group is not kept, it gets the rights of others. New files have what the umask leaves.
//                  Access lists and extended attributes are not kept. On Windows a file has its folder's
//                  permissions.
//   links          Links are followed. The file that they lead to is replaced in its own folder, or made there.
//   devices        Devices and pipes are written to as streams, and not replaced. What a failed save wrote stays.
//   partial files  The other name is <name>.kv1-partial, or <name>.<1 ... 15>.kv1-partial if several saves to one
//                  name run at once; the last to finish stays. A save that fails removes its partial file. The
//                  next save to that name removes one that a killed process left.
//
// Loading. The whole file is verified before the cache changes (cache_io.hpp). A file with bytes after the
// end is refused. Pipes and devices are read once, as streams, and verified as they are read.
//
// Paths are std::filesystem::path and opened by their native names, so every path works on Windows too. Give
// wide or UTF-8 (char8_t) text there: narrow text is taken to be in the system's code page.
#pragma once

#include <kv1/cache_io.hpp>
#include <kv1/detail/file_descriptor.hpp>
#include <kv1/detail/replaced_file.hpp>

#include <filesystem>

namespace kv1::inline KV1_ABI {

/// Saves sequences to a file, which it replaces. `ids` may be empty, to save prefixes alone. O(bytes).
/// Errors: invalid_sequence, layers_disagree, out_of_memory; io_error, which says what the system refused.
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

/// Loads the sequences and prefixes of a file into the cache. Writes the sequences' handles to `out`, in the
/// order of saving, and gives their number. O(bytes). Errors: those of try_load(); bad_format if bytes follow
/// the end; io_error if the file cannot be opened or read.
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
/// Saves sequences to a file, which it replaces whole or not at all. Throws kv1::error: invalid_sequence;
/// layers_disagree between commit points; out_of_memory; io_error, which says what the system refused.
template <class F, class A>
void save_file(const basic_kv_cache<F, A>& cache, std::span<const sequence_id> ids,
               const std::filesystem::path& path, const save_options& options = {}) {
    detail::throw_if_error(try_save_file(cache, ids, path, options));
}
/// Loads the sequences and prefixes of a file into the cache. Writes the sequences' handles to `out`, in the
/// order of saving, and gives their number. Throws kv1::error: as load(); io_error if the file cannot be
/// opened or read.
template <class F, class A>
std::size_t load_file(basic_kv_cache<F, A>& cache, const std::filesystem::path& path,
                      std::span<sequence_id> out, const load_options& options = {}) {
    return try_load_file(cache, path, out, options).value();
}
#endif

} // namespace kv1::inline KV1_ABI
