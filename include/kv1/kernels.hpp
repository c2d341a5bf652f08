// SPDX-License-Identifier: Apache-2.0
//
// For programs that define KV1_EXTERNAL_KERNELS: include this in exactly one translation unit, and the
// kernels of all formats are compiled there and only there. Its flags may differ from the others', in -march
// and in exceptions: what target::baseline is, is what this translation unit is compiled for.
// KV1_STATIC_DISPATCH must be defined for all or for none of them, or external_kernels is not found when they
// are linked. Without KV1_EXTERNAL_KERNELS there is no need for this header.
#pragma once

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/detail/kernels/registry_impl.hpp>

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
