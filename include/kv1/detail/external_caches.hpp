// SPDX-License-Identifier: Apache-2.0
//
// Definitions of external_caches and external_slots (any_cache.hpp, any_slots.hpp), in one translation unit of a
// program.
#pragma once

#include <kv1/detail/any_cache.hpp>
#include <kv1/detail/any_slots.hpp>
#include <kv1/detail/cache_core.hpp>
#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/slot_core.hpp>
#include <kv1/format.hpp>

#include <utility>

namespace kv1::KV1_KERNELS_ABI {

template <class Tag>
void external_caches<Tag>::make(void* request) noexcept {
    auto& r = *static_cast<detail::cache_request*>(request);
    auto made = detail::cache_core::create(std::move(*r.description), std::move(r.memory),
                                           detail::kernel_set::of<all_formats>().only(r.formats));
    if (made)
        r.made = std::move(*made);
    else
        r.failure = made.reason();
}

template <class Tag>
void external_slots<Tag>::make(void* request) noexcept {
    auto& r = *static_cast<detail::slots_request*>(request);
    auto made = detail::slot_core::create(std::move(*r.description), r.memory,
                                          detail::kernel_set::of<all_formats>().only(r.formats));
    if (made)
        r.made = std::move(*made);
    else
        r.failure = made.reason();
}

template struct external_caches<>;
template struct external_slots<>;

} // namespace kv1::KV1_KERNELS_ABI
