// SPDX-License-Identifier: Apache-2.0
//
// Reads GGUF, the file format of llama.cpp (version 2 and 3, little-endian): a list of key-value pairs, a list of
// tensors, and the tensors' data, aligned.
//
//     const gguf file = gguf::read("SmolLM2.gguf");
//     const std::size_t layers = file.count("llama.block_count");
//     const std::vector<float> norm = file.floats("output_norm.weight");
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kv1_lm {

/// The element types that floats() decodes, by their numbers in the file. Quantized ones are blocks of 32 values.
enum class gguf_type : std::uint32_t {
    f32 = 0,
    f16 = 1,
    q4_0 = 2, ///< fp16 scale d, 16 bytes: (code - 8) d; codes 0 to 15 in the low halves, 16 to 31 in the high
    q4_1 = 3, ///< fp16 scale d, fp16 minimum m, 16 bytes: code d + m
    q8_0 = 8, ///< fp16 scale d, 32 signed bytes: code d
    bf16 = 30
};

struct gguf_tensor {
    gguf_type type;                   ///< as the file has it; floats() refuses one that is not listed above
    std::vector<std::size_t> shape;   ///< row-major, the slowest first: GGUF writes it the other way round
    std::span<const std::byte> bytes; ///< owned by the gguf
};

class gguf {
public:
    using strings = std::vector<std::string>;
    using numbers = std::vector<double>;
    /// A number or boolean, a string, an array of either. Integers above 2^53 lose bits.
    using value = std::variant<double, std::string, numbers, strings>;

    /// Throw input_error, naming the file and what is wrong: not a GGUF, cut short, an unknown kind of value,
    /// tensors that overlap the end.
    [[nodiscard]] static gguf read(const std::filesystem::path& file);
    [[nodiscard]] static gguf parse(std::vector<std::byte> contents, std::string origin);

    gguf(gguf&&) noexcept = default;
    gguf& operator=(gguf&&) noexcept = default;

    /// A value by its key; null: none, or one of another kind.
    template <class T>
    [[nodiscard]] const T* find(std::string_view key) const {
        const auto found = values_.find(key);
        return found == values_.end() ? nullptr : std::get_if<T>(&found->second);
    }
    /// A value that has to be there. Throw input_error.
    [[nodiscard]] double number(std::string_view key) const;
    [[nodiscard]] std::size_t count(std::string_view key) const; ///< a whole number from 0 to 2^32
    [[nodiscard]] const std::string& string(std::string_view key) const;
    [[nodiscard]] const strings& list(std::string_view key) const;

    [[nodiscard]] const std::map<std::string, gguf_tensor, std::less<>>& tensors() const noexcept {
        return tensors_;
    }
    /// The elements of a tensor, decoded exactly. Throws input_error for a type that is not one of gguf_type.
    [[nodiscard]] std::vector<float> floats(std::string_view tensor) const;

    [[nodiscard]] const std::string& origin() const noexcept { return origin_; }

private:
    gguf() = default;
    [[noreturn]] void lacks(std::string_view key, std::string_view what) const;

    std::vector<std::byte> contents_;
    std::string origin_;
    std::map<std::string, value, std::less<>> values_;
    std::map<std::string, gguf_tensor, std::less<>> tensors_;
};

} // namespace kv1_lm
