// SPDX-License-Identifier: Apache-2.0
//
// For programs that define KV1_EXTERNAL_KERNELS: include this in exactly one translation unit, before kv1's other
// headers where it does not define it, too, and the kernels of all formats and the cache itself are compiled there and
// only there. Its flags may differ from the others', in -march and in exceptions: what target::baseline is, is what
// this translation unit is compiled for. KV1_STATIC_DISPATCH must be defined for all or for none of them, or
// external_kernels is not found when they are linked. Without KV1_EXTERNAL_KERNELS there is no need for this header.
// kv1's own build compiles the two parts of it side by side.
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
