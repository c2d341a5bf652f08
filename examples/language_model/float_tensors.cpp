// SPDX-License-Identifier: Apache-2.0
#include "float_tensors.hpp"

#include <nlohmann/json.hpp>

#include <bit>
#include <cstdint>

namespace kv1_lm {

namespace {

void append_little_endian(std::string& out, std::uint64_t value, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i)
        out += static_cast<char>(static_cast<unsigned char>(value >> (8 * i)));
}

} // namespace

std::string safetensors_head(const nlohmann::json& header) {
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' '); // data aligned to 8 bytes
    std::string head;
    append_little_endian(head, text.size(), 8);
    return head + text;
}

std::string to_safetensors(std::span<const float_tensor> tensors) {
    nlohmann::json header = nlohmann::json::object();
    std::size_t end = 0;
    for (const float_tensor& t : tensors) {
        const std::size_t begin = end;
        end += t.values.size() * sizeof(float);
        header[t.name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {begin, end}}};
    }
    std::string file = safetensors_head(header);
    file.reserve(file.size() + end);
    for (const float_tensor& t : tensors)
        if constexpr (std::endian::native == std::endian::little)
            file.append(reinterpret_cast<const char*>(t.values.data()), t.values.size() * sizeof(float));
        else
            for (const float value : t.values)
                append_little_endian(file, std::bit_cast<std::uint32_t>(value), sizeof value);
    return file;
}

} // namespace kv1_lm
