// SPDX-License-Identifier: Apache-2.0
//
// Compiles the kernels of all formats, and the cache, in one translation unit of a program that defines
// KV1_EXTERNAL_KERNELS. Exactly one translation unit includes this header, before kv1's other headers unless it
// defines KV1_EXTERNAL_KERNELS itself. Its flags may differ from those of the others in -march and in exceptions;
// target::baseline is then the instruction set of this translation unit. KV1_STATIC_DISPATCH is defined in all
// translation units or in none, or linking fails for want of external_kernels. A program without KV1_EXTERNAL_KERNELS
// does not need this header. kv1's own build compiles its two parts side by side.
#pragma once

#if !defined(KV1_EXTERNAL_KERNELS)
#if defined(KV1_ABI)
#error "define KV1_EXTERNAL_KERNELS before the first of kv1's headers, or include kv1/kernels.hpp first"
#endif
#define KV1_EXTERNAL_KERNELS
#endif

#include <kv1/detail/config.hpp>

#include <kv1/detail/external_caches.hpp>
#include <kv1/detail/external_kernels.hpp>
