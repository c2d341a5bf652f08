// SPDX-License-Identifier: Apache-2.0
//
// Reads the safetensors format, as strictly as its reference implementation. A file has 8 bytes of header
// length (little-endian), a JSON header that gives each tensor its type, shape and place, and the data. The
// tensors cover the data without hole or overlap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kv1_lm {

/// Every element type of the format; the header spells them in capitals (F8_E5M2).
enum class tensor_type : std::uint8_t {
    boolean,
    f4,
    f6_e2m3,
    f6_e3m2,
    u8,
    i8,
    f8_e5m2,
    f8_e4m3,
    f8_e8m0,
    f8_e4m3fnuz,
    f8_e5m2fnuz,
    i16,
    u16,
    f16,
    bf16,
    i32,
    u32,
    f32,
    c64,
    f64,
    i64,
    u64,
};

/// The type's name in the header.
[[nodiscard]] std::string_view to_string(tensor_type type) noexcept;

struct tensor {
    tensor_type type;
    std::vector<std::size_t> shape;   ///< row-major; empty for a scalar
    std::span<const std::byte> bytes; ///< little-endian elements, not aligned; owned by the safetensors
    std::string place;                ///< file and name, for messages
};

/// The elements of an F32, F16 or BF16 tensor, in order. Throws input_error for other types.
[[nodiscard]] std::vector<float> to_floats(const tensor& t);

/// A file's contents and the tensors in it. Reading is thread-safe; a move leaves `bytes` of tensors valid.
class safetensors {
public:
    /// Read a file, or bytes. Throw input_error, naming the file and the tensor, for anything that the format
    /// forbids.
    [[nodiscard]] static safetensors read(const std::filesystem::path& file);
    [[nodiscard]] static safetensors parse(std::vector<std::byte> contents, std::string origin);

    safetensors(safetensors&&) noexcept = default;
    safetensors& operator=(safetensors&&) noexcept = default;

    /// The tensor of that name; null: none.
    [[nodiscard]] const tensor* find(std::string_view name) const;
    [[nodiscard]] const std::map<std::string, tensor, std::less<>>& tensors() const noexcept {
        return tensors_;
    }
    /// The header's `__metadata__`.
    [[nodiscard]] const std::map<std::string, std::string, std::less<>>& metadata() const noexcept {
        return metadata_;
    }
    [[nodiscard]] const std::string& origin() const noexcept { return origin_; }

private:
    safetensors() = default;

    std::vector<std::byte> contents_;
    std::string origin_;
    std::map<std::string, tensor, std::less<>> tensors_;
    std::map<std::string, std::string, std::less<>> metadata_;
};

} // namespace kv1_lm
