// SPDX-License-Identifier: Apache-2.0
//
// What a user says, in environment variables:
//
//   KV1_POLICY       how keys and values are kept (kv1/cache_policy.hpp); "safe" where it is not set
//   KV1_CALIBRATION  a file of calibration_file.hpp, for policies with +mean, +ew or +basis. Without KV1_POLICY the
//                    file's own policy holds.
//   KV1_CALIBRATE    a file to write: a calibration of what the program computes, for KV1_POLICY ("balanced" where it is
//                    not set). KV1_CALIBRATE_STRIDE: every such query is taken, 8 where it is not set and a cache has
//                    more than 4,096 cells, else 1 (calibration.hpp).
//   KV1_PRECISION    "fast" (the default) or "exact": in which arithmetic attention is computed
#pragma once

#include "ggml.hpp"

#include <kv1/cache_policy.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/precision.hpp>

#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
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
    std::optional<std::filesystem::path> calibrate; // to be written
    std::size_t calibration_stride = 0;             // 0: not said

    // Nothing if a variable says what can not be had; the log then has a line about it. Whose the cache is, which a
    // calibration has to be of; null: not known yet.
    static std::optional<settings> from_environment(const kv1::model_fingerprint* model) {
        settings own;
        const char* const policy = std::getenv("KV1_POLICY");
        if (const char* const file = std::getenv("KV1_CALIBRATE"))
            own.calibrate = file;
        if (const char* const file = std::getenv("KV1_CALIBRATION")) {
            if (own.calibrate) {
                say(GGML_LOG_LEVEL_ERROR,
                    "KV1_CALIBRATION is read, KV1_CALIBRATE written: one of them at a time");
                return std::nullopt;
            }
            if (!own.load(file, model))
                return std::nullopt;
        }
        if (policy != nullptr || own.calibration == nullptr) {
            const char* const text = policy != nullptr ? policy : own.calibrate ? "balanced" : "safe";
            kv1::result<kv1::cache_policy> parsed = kv1::try_parse_policy(text);
            if (!parsed)
                return refused("KV1_POLICY", text, parsed.reason());
            own.policy = std::move(*parsed);
        }
        if (own.calibrate && !own.takes_calibration()) {
            say(GGML_LOG_LEVEL_ERROR,
                "KV1_CALIBRATE: %s has no part that is calibrated: +mean, +ew or +basis",
                kv1::to_string(own.policy).c_str());
            return std::nullopt;
        }
        if (const char* const text = std::getenv("KV1_CALIBRATE_STRIDE")) {
            const std::string_view digits(text);
            const auto [end, error] =
                std::from_chars(digits.data(), digits.data() + digits.size(), own.calibration_stride);
            if (error != std::errc{} || end != digits.data() + digits.size() || own.calibration_stride == 0) {
                say(GGML_LOG_LEVEL_ERROR, "KV1_CALIBRATE_STRIDE is a number from 1, not '%s'", text);
                return std::nullopt;
            }
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
    bool load(const char* file, const kv1::model_fingerprint* model) {
        const kv1::model_fingerprint none;
        kv1::result<kv1::calibration> loaded =
            kv1::try_load_calibration(std::filesystem::path(file), model != nullptr ? *model : none);
        if (!loaded && loaded.reason().code() == kv1::errc::different_model) {
            if (model == nullptr)
                return true;       // it says whose it is, which is compared when the model is known
            if (!model->empty()) { // files that do not say whose they are serve any model of their shape
                kv1::result<kv1::calibration> of_any =
                    kv1::try_load_calibration(std::filesystem::path(file), none);
                if (of_any)
                    loaded = std::move(of_any);
            }
        }
        if (!loaded)
            return refused("KV1_CALIBRATION", file, loaded.reason()).has_value();
        policy = loaded->policy();
        calibration = std::make_shared<const kv1::calibration>(std::move(*loaded));
        return true;
    }
    [[nodiscard]] bool takes_calibration() const {
        const auto takes = [](const kv1::layer_policy& p) {
            for (const kv1::vector_policy* v : {&p.key, &p.value})
                if (v->means || v->error_weights || v->basis)
                    return true;
            return false;
        };
        bool any = takes(policy.common);
        for (const kv1::layer_exception& e : policy.layers)
            any = any || takes(e.policy);
        return any;
    }
    static std::optional<settings> refused(const char* variable, const char* text, const kv1::status& why) {
        say(GGML_LOG_LEVEL_ERROR, "%s=%s: %s", variable, text, kv1::to_string(why).c_str());
        return std::nullopt;
    }
};

} // namespace kv1_ggml
