// SPDX-License-Identifier: Apache-2.0
#include "safetensors_writer.hpp"

#include "float_tensors.hpp"

#include <nlohmann/json.hpp>

#include <cstring>
#include <stdexcept>

namespace kv1_train {

std::vector<std::byte> to_safetensors(const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
                                      const std::map<std::string, std::string>& metadata) {
    const auto type_of = [](const torch::Tensor& t) {
        switch (t.scalar_type()) {
        case torch::kFloat32:
            return "F32";
        case torch::kFloat16:
            return "F16";
        case torch::kBFloat16:
            return "BF16";
        default:
            throw std::invalid_argument("only floating-point tensors of 16 and 32 bits are saved");
        }
    };
    nlohmann::json header;
    if (!metadata.empty())
        header["__metadata__"] = metadata;
    std::size_t end = 0;
    for (const auto& [name, t] : tensors) {
        const std::size_t begin = end;
        end += t.nbytes();
        header[name] = {{"dtype", type_of(t)}, {"shape", t.sizes().vec()}, {"data_offsets", {begin, end}}};
    }
    const std::string head = kv1_lm::safetensors_head(header);
    std::vector<std::byte> out(head.size() + end);
    std::memcpy(out.data(), head.data(), head.size());
    std::byte* at = out.data() + head.size();
    for (const auto& [name, t] : tensors) {
        const torch::Tensor values = t.detach().to(torch::kCPU).contiguous();
        std::memcpy(at, values.data_ptr(), values.nbytes());
        at += values.nbytes();
    }
    return out;
}

} // namespace kv1_train
