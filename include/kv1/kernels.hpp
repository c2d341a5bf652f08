// SPDX-License-Identifier: Apache-2.0
//
// For programs that define KV1_EXTERNAL_KERNELS: include this in exactly one translation unit, compiled with
// the same -march as the others, and the kernels of kv_cache and kv2_cache are instantiated there and only
// there. Without KV1_EXTERNAL_KERNELS there is no need for it.
#pragma once

#include <kv1/detail/kernels/registry.hpp>

#include <kv1/detail/kernels/registry_impl.hpp>

namespace kv1::inline KV1_ABI::detail {
template struct common_registry<>;
template struct format_registry<all_formats>;
template struct format_registry<formats<affine<2>>>;
} // namespace kv1::inline KV1_ABI::detail
