// SPDX-License-Identifier: Apache-2.0
#include "training_log.hpp"

#include "error.hpp"
#include "file.hpp"

#include <charconv>
#include <sstream>
#include <string>
#include <system_error>

namespace kv1_train {

namespace {

constexpr const char* header =
    "step,tokens,seconds,learning_rate,loss,divergence,gradient_norm,tokens_per_second,validation_16bit,"
    "validation_kv,validation_divergence\n";

} // namespace

training_log::training_log(const std::filesystem::path& file, std::int64_t done) {
    std::string kept = header;
    std::error_code ignored;
    if (done > 0 && std::filesystem::exists(file, ignored)) {
        std::istringstream lines(kv1_lm::read_text_file(file));
        for (std::string line; std::getline(lines, line);) {
            std::int64_t step = 0;
            const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), step);
            if (error == std::errc() && end != line.data() + line.size() && step <= done)
                kept.append(line) += '\n';
        }
    }
    out_.open(file, std::ios::binary | std::ios::trunc);
    if (!(out_ << kept << std::flush))
        throw kv1_lm::input_error(file.string(), "cannot be written");
}

void training_log::write(const log_entry& e) {
    std::ostringstream line;
    line.precision(7);
    const auto field = [&](const std::optional<double>& value) {
        line << ',';
        if (value)
            line << *value;
    };
    line << e.step << ',' << e.tokens;
    for (const auto& value :
         {std::optional(e.seconds), std::optional(e.learning_rate), e.loss, e.divergence, e.gradient_norm,
          e.tokens_per_second, e.validation_plain, e.validation_kv, e.validation_divergence})
        field(value);
    if (!(out_ << line.str() << '\n' << std::flush))
        throw std::runtime_error("the log cannot be written");
}

} // namespace kv1_train
