// SPDX-License-Identifier: Apache-2.0
//
// Definitions of external_kernels (kernels/registry.hpp), in one translation unit of a program.
#pragma once

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/kernels/registry_impl.hpp>
#include <kv1/format.hpp>
#include <kv1/target.hpp>

#include <cstdint>

namespace kv1::KV1_KERNELS_ABI {

template <class Tag>
const void* external_kernels<Tag>::common(std::uint8_t t) noexcept {
    return &detail::compiled_kernels<Tag>(static_cast<target>(t));
}

template <class Tag>
const void* external_kernels<Tag>::of_format(std::uint8_t t, std::uint8_t f) noexcept {
    return detail::compiled_format_kernels(all_formats{}, static_cast<target>(t), static_cast<kv_format>(f));
}

template struct external_kernels<>;

} // namespace kv1::KV1_KERNELS_ABI
