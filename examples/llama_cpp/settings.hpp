// SPDX-License-Identifier: Apache-2.0
//
// What a user says, in environment variables:
//
//   KV1_POLICY       how keys and values are kept (kv1/cache_policy.hpp); "safe" where it is not set
//   KV1_CALIBRATION  a file of calibration_file.hpp, for policies with +mean, +ew or +basis. Without KV1_POLICY the
//                    file's own policy holds.
//   KV1_PRECISION    "fast" (the default) or "exact": in which arithmetic attention is computed
#pragma once

#include "ggml.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/precision.hpp>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace kv1_ggml {

struct settings {
    kv1::cache_policy policy;
    std::shared_ptr<const kv1::calibration> calibration; // null: none
    kv1::precision mode = kv1::precision::fast;

    // Nothing if a variable says what can not be had; the log then has a line about it.
    static std::optional<settings> from_environment() {
        settings own;
        const char* const policy = std::getenv("KV1_POLICY");
        if (const char* const file = std::getenv("KV1_CALIBRATION")) {
            kv1::result<kv1::calibration> loaded =
                kv1::try_load_calibration(std::filesystem::path(file), kv1::model_fingerprint{});
            if (!loaded)
                return refused("KV1_CALIBRATION", file, loaded.reason());
            own.policy = loaded->policy();
            own.calibration = std::make_shared<const kv1::calibration>(std::move(*loaded));
        }
        if (policy != nullptr || own.calibration == nullptr) {
            const char* const text = policy != nullptr ? policy : "safe";
            kv1::result<kv1::cache_policy> parsed = kv1::try_parse_policy(text);
            if (!parsed)
                return refused("KV1_POLICY", text, parsed.reason());
            own.policy = std::move(*parsed);
        }
        if (const char* const mode = std::getenv("KV1_PRECISION")) {
            if (std::string_view(mode) != "fast" && std::string_view(mode) != "exact") {
                say(GGML_LOG_LEVEL_ERROR, "KV1_PRECISION is fast or exact, not '%s'", mode);
                return std::nullopt;
            }
            own.mode = std::string_view(mode) == "exact" ? kv1::precision::exact : kv1::precision::fast;
        }
        return own;
    }

private:
    static std::optional<settings> refused(const char* variable, const char* text, const kv1::status& why) {
        say(GGML_LOG_LEVEL_ERROR, "%s=%s: %s", variable, text, kv1::to_string(why).c_str());
        return std::nullopt;
    }
};

} // namespace kv1_ggml
