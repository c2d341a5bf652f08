// SPDX-License-Identifier: Apache-2.0
//
// KV1_CALIBRATE=FILE: what a program computes is what a calibration is taken of (kv1/calibration.hpp). Caches keep fp32
// meanwhile. The caches of a model, of which sliding windows make two, feed one calibration, and the file is written when
// the last of them goes.
#pragma once

#include "ggml.hpp"
#include "mask_texts.hpp"
#include "settings.hpp"
#include "thread_team.hpp"

#include <kv1/calibration.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

namespace kv1_ggml {

class slot_cache;

// What is known of a layer before its first token.
struct calibrated_layer {
    std::size_t of_model = 0;
    kv1::layer_description shape;
    const ggml_tensor* output_projection = nullptr; // null: not found
};

class calibration_run {
public:
    // The run that a cache belongs to: the one under way if `caches`, those of the cache's model, are its own; a new one
    // if none is under way. Null: the log says why.
    static std::shared_ptr<calibration_run> join(const settings& how,
                                                 std::span<const slot_cache* const> caches,
                                                 std::span<const calibrated_layer> layers,
                                                 const kv1::model_fingerprint& model);
    calibration_run(const calibration_run&) = delete;
    calibration_run& operator=(const calibration_run&) = delete;
    ~calibration_run(); // writes the file

    // Adds what a layer of the model attended with, queries of `part`'s tokens and keys and values of its slots.
    kv1::status add(std::size_t of_model, const text_part& part, const kv1::tensor_view& queries,
                    const kv1::tensor_view& keys, const kv1::tensor_view& values, thread_team& team);

private:
    calibration_run(kv1::calibrator&& sums, std::filesystem::path file, std::vector<const slot_cache*> caches)
        : sums_(std::move(sums)), file_(std::move(file)), caches_(std::move(caches)) {}

    kv1::calibrator sums_;
    std::filesystem::path file_;
    std::vector<const slot_cache*> caches_;
    std::size_t first_layer_ = 0, tokens_ = 0;
};

} // namespace kv1_ggml
