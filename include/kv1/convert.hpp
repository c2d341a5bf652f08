// SPDX-License-Identifier: Apache-2.0
//
// Bulk conversion between float, float16 and bfloat16, vectorized where the target has the instructions.
// Rounds as the scalars do. O(n), no allocation, thread-safe.
#pragma once

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/float16.hpp>
#include <kv1/status.hpp>

#include <span>

namespace kv1::inline KV1_ABI {

/// out[i] = float(in[i]). The spans have one size and do not overlap unless they begin at the same float.
template <scalar T>
status try_convert(std::span<const T> in, std::span<float> out) noexcept {
    if (in.size() != out.size())
        return {errc::shape_mismatch, "spans of one size are needed"};
    if (!in.empty()) // an empty span may be null
        detail::common_kernels().load_floats(scalar_type_of<T>, in.data(), in.size(), out.data());
    return {};
}

/// out[i] = T(in[i]), round to nearest even.
template <scalar T>
requires(!std::same_as<T, float>) status try_convert(std::span<const float> in, std::span<T> out)
noexcept {
    if (in.size() != out.size())
        return {errc::shape_mismatch, "spans of one size are needed"};
    if (!in.empty()) // an empty span may be null
        detail::common_kernels().store_floats(scalar_type_of<T>, in.data(), in.size(), out.data());
    return {};
}

#if KV1_EXCEPTIONS
/// As try_convert; throws kv1::error.
template <scalar T>
void convert(std::span<const T> in, std::span<float> out) {
    detail::throw_if_error(try_convert(in, out));
}

/// As try_convert; throws kv1::error.
template <scalar T>
requires(!std::same_as<T, float>) void convert(std::span<const float> in, std::span<T> out) {
    detail::throw_if_error(try_convert(in, out));
}
#endif

} // namespace kv1::inline KV1_ABI
