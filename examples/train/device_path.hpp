// SPDX-License-Identifier: Apache-2.0
//
// What device_path.cu launches. Pointers are to device memory; nothing here waits for the device.
#pragma once

#include <cstdint>

namespace kv1_train::cuda {

/// A vector's scheme: codes 0 .. max_code of affine and compact formats, or signs.
enum class scheme : std::int32_t { plain, affine, compact, scaled_binary, binary };

struct cache_path_job {
    const void* x = nullptr;     // [rows][channels], contiguous
    const void* added = nullptr; // alike, or null: added to x first
    void* y = nullptr;           // alike; may be x
    void* plain = nullptr;       // alike, or null: gets x, turned
    const float* cosines = nullptr;
    const float* sines = nullptr;         // [positions][channels / 2]; null: no rotation
    const float* means = nullptr;         // [heads][channels], or null
    const float* error_factors = nullptr; // [heads][channels][channels], or null
    const float* mean_cosines = nullptr;
    const float* mean_sines = nullptr; // [positions][channels / 2]: means turn; null: they do not
    std::int64_t rows = 0;             // batch * positions * heads
    std::int64_t positions = 1;
    std::int64_t heads = 1;
    std::int64_t sinks = 0;    // the first positions, which are not quantized
    std::int32_t channels = 0; // a multiple of 32, 256 at the most
    std::int32_t max_code = 0;
    scheme format = scheme::plain;
    bool bf16 = false;       // else fp32
    bool inverse = false;    // turns the other way: the rotation's gradient
    bool half_split = false; // pairs of channels i and channels / 2 + i, else 2 i and 2 i + 1
    bool least_squares = false;
    bool hadamard = false;
    bool round_metadata = false;
};

/// y = what the cache gives back of x + added, turned first.
void run(const cache_path_job& job, void* stream);

struct token_loss_job {
    void* logits = nullptr;                // [rows][words]; replaced by their gradient
    const void* teacher = nullptr;         // alike, or null
    const std::int64_t* targets = nullptr; // [rows]
    float* cross_entropy = nullptr;        // [rows]
    float* divergence = nullptr;           // [rows]; null without a teacher
    std::int64_t rows = 0;
    std::int32_t words = 0;                           // a multiple of 8
    bool bf16 = false;                                // else fp32
    float label_weight = 1.0f, teacher_weight = 0.0f; // of the two losses' gradients
};

/// See token_loss() in loss.hpp.
void run(const token_loss_job& job, void* stream);

} // namespace kv1_train::cuda
