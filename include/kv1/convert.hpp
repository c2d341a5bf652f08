// SPDX-License-Identifier: Apache-2.0
//
// Converts arrays between float, float16 and bfloat16, with vector instructions where the target has them.
// Rounding is that of float16.hpp. O(n), no allocation, thread-safe.
#pragma once

#include <kv1/detail/kernels/registry.hpp>
#include <kv1/float16.hpp>
#include <kv1/status.hpp>

#include <span>

namespace kv1::inline KV1_ABI {

/// Widens: out[i] = float(in[i]), exact. The spans have one size and do not overlap, unless T is float and
/// they begin at the same element. Errors: shape_mismatch.
template <scalar T>
status try_convert(std::span<const T> in, std::span<float> out) noexcept {
    if (in.size() != out.size())
        return {errc::shape_mismatch, "spans of one size are needed"};
    if (!in.empty()) // an empty span may be null
        detail::common_kernels().load_floats(scalar_type_of<T>, in.data(), in.size(), out.data());
    return {};
}

/// Narrows: out[i] = T(in[i]), rounded to nearest even; too large a number becomes infinity. The spans have
/// one size. Errors: shape_mismatch.
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
/// Widens: out[i] = float(in[i]), exact. Throws kv1::error: shape_mismatch if the spans differ in size.
template <scalar T>
void convert(std::span<const T> in, std::span<float> out) {
    detail::throw_if_error(try_convert(in, out));
}

/// Narrows: out[i] = T(in[i]), rounded to nearest even. Throws kv1::error: shape_mismatch if the spans differ
/// in size.
template <scalar T>
requires(!std::same_as<T, float>) void convert(std::span<const float> in, std::span<T> out) {
    detail::throw_if_error(try_convert(in, out));
}
#endif

} // namespace kv1::inline KV1_ABI
