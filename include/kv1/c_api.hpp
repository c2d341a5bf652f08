// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/kv1.h. Not a header to include widely: one translation unit of the program includes it
// (or kv1_c is linked, which is just that). It translates, and decides nothing. What kv1/c/cache.h declares,
// kv1/detail/c_api/cache.hpp defines, and so on.
#pragma once

#include <kv1/kv1.h>

#include <kv1/detail/config.hpp>

#if !KV1_EXCEPTIONS
#error "kv1/c_api.hpp is compiled with exceptions; none leaves it."
#endif

#include <kv1/detail/c_api/attention.hpp>
#include <kv1/detail/c_api/cache.hpp>
#include <kv1/detail/c_api/calibration.hpp>
#include <kv1/detail/c_api/error.hpp>
#include <kv1/detail/c_api/page.hpp>
#include <kv1/detail/c_api/prefix.hpp>
#include <kv1/detail/c_api/saving.hpp>
#include <kv1/detail/c_api/sequence.hpp>
#include <kv1/detail/c_api/slots.hpp>
