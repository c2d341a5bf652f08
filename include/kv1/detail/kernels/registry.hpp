// SPDX-License-Identifier: Apache-2.0
//
// From (target, format) to kernels. Class templates, so that their instantiation can be confined to one
// translation unit: with KV1_EXTERNAL_KERNELS defined, kv1's headers parse no kernel (and no xsimd), and
// exactly one translation unit of the program includes <kv1/kernels.hpp>, which instantiates them.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/target.hpp>

namespace kv1::inline KV1_ABI::detail {

template <class = void>
struct common_registry {
    [[nodiscard]] static const target_kernels& at(target t) noexcept;
};

template <class Formats>
struct format_registry;

template <class... Fs>
struct format_registry<formats<Fs...>> {
    /// Null where Formats does not contain the format.
    [[nodiscard]] static const format_kernels* find(target t, kv_format f) noexcept;
};

// A template, too: who never calls it compiles no kernel.
template <class = void>
const target_kernels& common_kernels() noexcept {
    return common_registry<>::at(current_target());
}

} // namespace kv1::inline KV1_ABI::detail

#if defined(KV1_EXTERNAL_KERNELS)
namespace kv1::inline KV1_ABI::detail {
extern template struct common_registry<>;
extern template struct format_registry<all_formats>;
extern template struct format_registry<formats<affine<2>>>;
} // namespace kv1::inline KV1_ABI::detail
#else
#include <kv1/detail/kernels/registry_impl.hpp>
#endif
