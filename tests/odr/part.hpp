// SPDX-License-Identifier: Apache-2.0
//
// What each of the differently compiled translation units offers; its own types stay inside.
#pragma once

#include <string>
#include <vector>

/// The outcome of attending over the same tokens.
struct outcome {
    std::vector<float> out;
    std::vector<unsigned char> bytes; // exported rows
    bool good = false;                // every call did what it should
    std::string abi;                  // mangled type of the cache
    int batch_bytes = 0;              // of the user's own xsimd batch, where the part uses one
};

outcome run_default();
outcome run_xsimd_before();
outcome run_xsimd_after();
outcome run_v3();
outcome run_no_exceptions();
