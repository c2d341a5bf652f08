// SPDX-License-Identifier: Apache-2.0
//
// The version of kv1. CMake reads it from here.
#pragma once

#define KV1_VERSION_MAJOR 0
#define KV1_VERSION_MINOR 1
#define KV1_VERSION_PATCH 0

/// One number to compare with: 1.2.3 is 10203.
#define KV1_VERSION (KV1_VERSION_MAJOR * 10000 + KV1_VERSION_MINOR * 100 + KV1_VERSION_PATCH)
