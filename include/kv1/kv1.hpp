// SPDX-License-Identifier: Apache-2.0
//
// Includes all public headers.
#pragma once

#include <kv1/cache_file.hpp>
#include <kv1/cache_io.hpp>
#include <kv1/cache_policy.hpp>
#include <kv1/calibration_file.hpp>
#include <kv1/convert.hpp>
#include <kv1/fake_quantize.hpp>
#include <kv1/kv_cache.hpp>
#include <kv1/layer_choice.hpp>
#include <kv1/packed_vector.hpp>
#include <kv1/rotary_embedding.hpp>
#include <kv1/row.hpp>
#include <kv1/slot_store.hpp>
#include <kv1/version.hpp>

/// The library. What is in kv1::detail is not part of the interface.
namespace kv1 {}
