// SPDX-License-Identifier: Apache-2.0
#include "ranks.hpp"

#include "error.hpp"

#include <charconv>
#include <cstdlib>
#include <string>

namespace kv1_train {

namespace {

std::int64_t number_from(const char* variable, std::int64_t otherwise) {
    const char* text = std::getenv(variable);
    if (text == nullptr)
        return otherwise;
    const std::string value(text);
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < 0)
        throw kv1_lm::input_error(std::string(variable) + " is no number: " + kv1_lm::quote(value));
    return number;
}

} // namespace

struct ranks::group {};

ranks ranks::from_environment(torch::Device) {
    if (number_from("WORLD_SIZE", 1) > 1)
        throw kv1_lm::input_error("WORLD_SIZE: this kv1-train trains in one process");
    return {};
}

std::int64_t ranks::local_rank() { return number_from("LOCAL_RANK", 0); }

void ranks::sum(torch::Tensor&) const {}

bool ranks::any(bool here, torch::Device) const { return here; }

} // namespace kv1_train
