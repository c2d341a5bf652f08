// SPDX-License-Identifier: Apache-2.0
//
// Finds the kernels of a target and a format. These are templates, so that a program that never calls them
// compiles no kernel.
//
// With KV1_EXTERNAL_KERNELS defined, kv1's headers parse no kernel (and no xsimd): exactly one translation
// unit of the program includes <kv1/kernels.hpp>, which compiles all of them and hands them out as
// external_kernels.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/format.hpp>
#include <kv1/target.hpp>

#include <cstdint>

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

// A bit for each format of the list.
template <class Formats>
[[nodiscard]] constexpr std::uint32_t format_mask() noexcept {
    std::uint32_t mask = 0;
    for (int f = 0; f < 32; ++f)
        if (Formats::contains(static_cast<kv_format>(f)))
            mask |= std::uint32_t{1} << f;
    return mask;
}

// The kernels that a cache type was compiled with, without that type. Only the code that makes a kernel_set
// compiles kernels.
class kernel_set {
public:
    template <class Formats>
    [[nodiscard]] static kernel_set of() noexcept {
        return {&common_registry<>::at, &format_registry<Formats>::find, format_mask<Formats>()};
    }
    // This set without the formats that the mask lacks.
    [[nodiscard]] kernel_set only(std::uint32_t formats) const noexcept {
        return {common_, find_, formats_ & formats};
    }

    [[nodiscard]] const target_kernels& common(target t) const noexcept { return common_(t); }
    [[nodiscard]] bool contains(kv_format f) const noexcept {
        return static_cast<int>(f) < 32 && (formats_ >> static_cast<int>(f) & 1u) != 0;
    }
    // Null where the set does not contain the format.
    [[nodiscard]] const format_kernels* find(target t, kv_format f) const noexcept {
        return contains(f) ? find_(t, f) : nullptr;
    }

private:
    using common_lookup = const target_kernels& (*)(target) noexcept;
    using format_lookup = const format_kernels* (*)(target, kv_format) noexcept;
    kernel_set(common_lookup common_at, format_lookup find_at, std::uint32_t its_formats) noexcept
        : common_(common_at), find_(find_at), formats_(its_formats) {}

    common_lookup common_;
    format_lookup find_;
    std::uint32_t formats_;
};

// A template, so that a program that never calls it compiles no kernel.
template <class = void>
const target_kernels& common_kernels() noexcept {
    return common_registry<>::at(current_target());
}

} // namespace kv1::inline KV1_ABI::detail

// If the kernels were compiled with another -march, or with exceptions and the caller without, types on both
// sides have the same members but other names. So enumerators and tables cross as plain numbers and pointers,
// in a namespace that both sides share.
namespace kv1::KV1_KERNELS_ABI {

template <class = void>
struct external_kernels {
    /// A target_kernels.
    [[nodiscard]] static const void* common(std::uint8_t target) noexcept;
    /// A format_kernels.
    [[nodiscard]] static const void* of_format(std::uint8_t target, std::uint8_t format) noexcept;
};

} // namespace kv1::KV1_KERNELS_ABI

#if defined(KV1_EXTERNAL_KERNELS)
namespace kv1::KV1_KERNELS_ABI {
extern template struct external_kernels<>;
} // namespace kv1::KV1_KERNELS_ABI

namespace kv1::inline KV1_ABI::detail {

template <class Tag>
const target_kernels& common_registry<Tag>::at(target t) noexcept {
    return *static_cast<const target_kernels*>(
        KV1_KERNELS_ABI::external_kernels<>::common(static_cast<std::uint8_t>(t)));
}

template <class... Fs>
const format_kernels* format_registry<formats<Fs...>>::find(target t, kv_format f) noexcept {
    if (!formats<Fs...>::contains(f))
        return nullptr;
    return static_cast<const format_kernels*>(KV1_KERNELS_ABI::external_kernels<>::of_format(
        static_cast<std::uint8_t>(t), static_cast<std::uint8_t>(f)));
}

} // namespace kv1::inline KV1_ABI::detail
#else
#include <kv1/detail/kernels/registry_impl.hpp>

namespace kv1::inline KV1_ABI::detail {

template <class Tag>
const target_kernels& common_registry<Tag>::at(target t) noexcept {
    return compiled_kernels<Tag>(t);
}

template <class... Fs>
const format_kernels* format_registry<formats<Fs...>>::find(target t, kv_format f) noexcept {
    return compiled_format_kernels(formats<Fs...>{}, t, f);
}

} // namespace kv1::inline KV1_ABI::detail
#endif
