// SPDX-License-Identifier: Apache-2.0
//
// What holds for the safetensors reader whatever it is given. Throws std::logic_error where it does not.
#pragma once

#include "error.hpp"
#include "safetensors.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kv1_test {

inline void require(bool holds, const char* rule) {
    if (!holds)
        throw std::logic_error(rule);
}

/// A refusal is one line that begins with the place.
inline void check_message(std::string_view message, std::string_view place) {
    require(message.starts_with(place), "a message names its place");
    require(message.size() < 1000, "a message is short");
    require(std::none_of(message.begin(), message.end(),
                         [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == '\x7f'; }),
            "a message is one line of text");
}

inline void check_safetensors(std::vector<std::byte> contents) {
    using kv1_lm::tensor_type;
    std::uint64_t header_size = 0;
    if (contents.size() >= sizeof header_size)
        std::memcpy(&header_size, contents.data(), sizeof header_size);
    const std::size_t file_size = contents.size();
    try {
        const auto file = kv1_lm::safetensors::parse(std::move(contents), "f");
        require(file_size >= sizeof header_size && header_size <= file_size - sizeof header_size,
                "the header lies in the file");
        std::size_t covered = 0;
        std::vector<std::span<const std::byte>> extents;
        for (const auto& [name, tensor] : file.tensors()) {
            require(file.find(name) == &tensor, "a tensor is found by its name");
            covered += tensor.bytes.size();
            extents.push_back(tensor.bytes);
            const bool converts = tensor.type == tensor_type::f32 || tensor.type == tensor_type::f16 ||
                                  tensor.type == tensor_type::bf16;
            try {
                std::size_t elements = 1;
                for (const std::size_t extent : tensor.shape)
                    elements *= extent;
                require(kv1_lm::to_floats(tensor).size() == elements, "a float for each element");
                require(converts, "floats of floats only");
            } catch (const kv1_lm::input_error& e) {
                require(!converts, "float types convert");
                check_message(e.what(), tensor.place);
            }
        }
        require(covered == file_size - sizeof header_size - header_size, "the tensors cover the data");
        std::sort(extents.begin(), extents.end(), [](const auto& a, const auto& b) {
            return std::pair(a.data(), a.size()) < std::pair(b.data(), b.size());
        });
        for (std::size_t i = 1; i < extents.size(); ++i)
            require(extents[i].data() == extents[i - 1].data() + extents[i - 1].size(),
                    "no hole and no overlap");
    } catch (const kv1_lm::input_error& e) {
        check_message(e.what(), "f: ");
    }
}

/// The input as a file, and as a header up to its first NUL with data after it.
inline void safetensors_body(std::span<const std::uint8_t> input) {
    const auto bytes = std::as_bytes(input);
    check_safetensors({bytes.begin(), bytes.end()});

    const auto nul = std::find(bytes.begin(), bytes.end(), std::byte{0});
    const std::uint64_t header_size = static_cast<std::uint64_t>(nul - bytes.begin());
    std::vector<std::byte> framed(sizeof header_size);
    std::memcpy(framed.data(), &header_size, sizeof header_size);
    framed.insert(framed.end(), bytes.begin(), nul);
    framed.insert(framed.end(), nul == bytes.end() ? nul : nul + 1, bytes.end());
    check_safetensors(std::move(framed));
}

} // namespace kv1_test
