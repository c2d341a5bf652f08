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

// The kernels that a cache type was compiled with, without the type: nothing but its maker compiles kernels.
class kernel_set {
public:
    template <class Formats>
    [[nodiscard]] static kernel_set of() noexcept {
        return {&common_registry<>::at, &format_registry<Formats>::find};
    }

    [[nodiscard]] const target_kernels& common(target t) const noexcept { return common_(t); }
    // Null where the set does not contain the format.
    [[nodiscard]] const format_kernels* find(target t, kv_format f) const noexcept { return find_(t, f); }
    [[nodiscard]] bool contains(kv_format f) const noexcept { return find(target::scalar, f) != nullptr; }

private:
    using common_lookup = const target_kernels& (*)(target) noexcept;
    using format_lookup = const format_kernels* (*)(target, kv_format) noexcept;
    kernel_set(common_lookup common_at, format_lookup find_at) noexcept
        : common_(common_at), find_(find_at) {}

    common_lookup common_;
    format_lookup find_;
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
