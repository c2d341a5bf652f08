// SPDX-License-Identifier: Apache-2.0
#include "info.hpp"

#include "model.hpp"

#include <iomanip>
#include <ostream>
#include <string>

namespace kv1_lm {

void info(const std::filesystem::path& folder, std::ostream& out) {
    const model m = model::read(folder);
    const model_config& c = m.config();
    const auto line = [&](const char* what, std::size_t value) {
        out << std::left << std::setw(22) << what << value << '\n';
    };
    out << folder.string() << '\n';
    line("parameters", m.parameters());
    line("layers", c.layers);
    line("hidden size", c.hidden_size);
    line("intermediate size", c.intermediate_size);
    line("query heads", c.heads);
    line("KV heads", c.kv_heads);
    line("head dim", c.head_dim);
    line("vocabulary", c.vocab_size);
    line("positions", c.max_positions);

    out << "\ncache, keys and values of all layers, metadata included:\n--kv  bytes/token  vs fp16";
    constexpr std::size_t contexts[] = {1, 4, 16, 64, 128, 256}; // K tokens
    for (const std::size_t k : contexts)
        out << std::right << std::setw(12) << std::to_string(k) + "K";
    out << '\n';
    const std::size_t fp16 = c.layers * c.kv_heads * 4 * c.head_dim;
    for (const kv1::kv_format format : kv_formats_by_size) {
        const std::size_t bytes = c.layers * c.kv_heads * 2 * kv1::row_bytes(format, c.head_dim);
        out << std::left << std::setw(6) << kv1::info_of(format).short_name << std::right << std::setw(11)
            << bytes << std::setw(8) << std::fixed << std::setprecision(2)
            << static_cast<double>(fp16) / static_cast<double>(bytes) << 'x';
        for (const std::size_t k : contexts)
            out << std::setw(12) << kv1::human_bytes(bytes * k * 1024);
        out << '\n';
    }
}

} // namespace kv1_lm
