// SPDX-License-Identifier: Apache-2.0
//
// The version of kv1. CMake reads it from here.
#pragma once

/// Changes with what breaks users, from 1 on.
#define KV1_VERSION_MAJOR 0
/// Changes with what is new; before 1.0 also with what breaks users.
#define KV1_VERSION_MINOR 1
/// Changes with what is mended.
#define KV1_VERSION_PATCH 0

/// One number to compare with: 1.2.3 is 10203.
#define KV1_VERSION (KV1_VERSION_MAJOR * 10000 + KV1_VERSION_MINOR * 100 + KV1_VERSION_PATCH)
