// SPDX-License-Identifier: Apache-2.0
//
// Keeps a calibration in one file beside a model.
//
//   kv1::save_calibration(found, "model.kv1calib");
//   ...
//   const kv1::calibration known = kv1::load_calibration("model.kv1calib", fingerprint);
//   kv1::kv_cache cache(kv1::describe_cache(known, shape));
//
// The file describes itself. All numbers little-endian:
//
//   fixed part    80 bytes: "KV1CALIB", version of this form, of the library, number of layers, bytes of the
//                 policy, of tables and of values, the model's fingerprint, checksum
//   tables        the policy as text (cache_policy.hpp); each layer's KV heads, head dims, parts, and how its keys
//                 turn with their position; checksum
//   values        by layer, keys then values: means in fp16; error weights, of each KV head W = s^2 L L^T, s in
//                 fp32, and the lower triangle of L in fp16; the basis in fp32; checksum
//
// Checksums are CRC-32C. 36 layers of 8 KV heads of 128 channels take 0.1 MiB for means, 9.1 MiB for error weights and
// 36 MiB for the basis.
//
// What is loaded describes the same cache as what was saved, bit for bit, and saving it again gives the same bytes.
//
// A load checks everything: every number against the others and against the bytes that are there, checksums, and that
// stored numbers are finite. Another model's calibration is refused here, another shape's by describe_cache(), which
// says what differs. Files are written and read as cache_file.hpp says: whole or not at all.
#pragma once

#include <kv1/byte_stream.hpp>
#include <kv1/calibration.hpp>
#include <kv1/detail/calibration_form.hpp>
#include <kv1/detail/file_descriptor.hpp>
#include <kv1/detail/replaced_file.hpp>

#include <cstddef>
#include <filesystem>
#include <string>

namespace kv1::inline KV1_ABI {

/// Saves a calibration to a sink. O(bytes). Errors: io_error if the sink refuses bytes; out_of_memory.
template <byte_sink S>
status try_save_calibration(const calibration& found, S&& sink) noexcept {
    std::string policy;
    if (const status s = detail::write_policy(found.policy(), policy); !s)
        return s;
    return detail::write_calibration(found, policy, sink);
}
/// Saves a calibration to a file, which it replaces whole or not at all. O(bytes). Errors: io_error, which says
/// what the system refused; out_of_memory.
inline status try_save_calibration(const calibration& found, const std::filesystem::path& path) noexcept {
    detail::replaced_file file;
    if (const status s = file.open(path); !s)
        return s;
    if (const status s = try_save_calibration(found, file); !s)
        return s.code() == errc::io_error ? file.failure() : s;
    return file.finish();
}

/// Loads a calibration from a source, up to its last byte and no further. `model` is what it was made with
/// (calibration_options). O(bytes). Errors: bad_format, unsupported_version, checksum_mismatch, truncated,
/// different_model, non_finite, out_of_memory.
template <byte_source S>
[[nodiscard]] result<calibration> try_load_calibration(S&& source,
                                                       const model_fingerprint& model = {}) noexcept {
    return detail::read_calibration(source, model);
}
/// Loads a calibration from a file. Errors: the same; bad_format if bytes follow the end; io_error if the file
/// cannot be opened or read.
[[nodiscard]] inline result<calibration> try_load_calibration(const std::filesystem::path& path,
                                                              const model_fingerprint& model = {}) noexcept {
    const result<detail::opened_file> opened = detail::open_to_read(path.c_str());
    if (!opened)
        return opened.reason();
    detail::file_source source(opened->file);
    result<calibration> loaded = detail::read_calibration(source, model);
    if (source.failed())
        return status(errc::io_error, "the file can not be read");
    if (loaded && !source.at_end())
        return status(errc::bad_format, "bytes follow the end of the calibration");
    return loaded;
}

#if KV1_EXCEPTIONS
/// Saves a calibration to a file, which it replaces whole or not at all. Throws kv1::error, which says what the
/// system refused.
inline void save_calibration(const calibration& found, const std::filesystem::path& path) {
    detail::throw_if_error(try_save_calibration(found, path));
}
/// Loads a calibration from a file. `model` is what it was made with. Throws kv1::error for a file that is no
/// calibration or was changed, and for another model's.
[[nodiscard]] inline calibration load_calibration(const std::filesystem::path& path,
                                                  const model_fingerprint& model = {}) {
    return try_load_calibration(path, model).value();
}
#endif

} // namespace kv1::inline KV1_ABI
