// SPDX-License-Identifier: Apache-2.0
//
// The version of kv1, which CMake reads from here, and what every header needs of the compiler.
#pragma once

#if defined(__cplusplus) && (defined(_MSVC_LANG) ? _MSVC_LANG : __cplusplus) < 202002L
#error "kv1 needs C++20: compile with -std=c++20 (MSVC: /std:c++20) or a later standard."
#include <kv1-needs-C++20> // ends the compilation, which #error alone does not
#endif

/// Changes with what breaks users, from 1 on.
#define KV1_VERSION_MAJOR 0
/// Changes with what is new; before 1.0 also with what breaks users.
#define KV1_VERSION_MINOR 1
/// Changes with what is mended.
#define KV1_VERSION_PATCH 0

/// One number to compare with: 1.2.3 is 10203.
#define KV1_VERSION (KV1_VERSION_MAJOR * 10000 + KV1_VERSION_MINOR * 100 + KV1_VERSION_PATCH)
