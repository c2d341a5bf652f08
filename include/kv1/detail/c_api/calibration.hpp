// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/calibration.h.
#pragma once

#include <kv1/c/calibration.h>
#include <kv1/detail/c_api/support.hpp>

#include <kv1/detail/arena.hpp>
#include <kv1/encoding.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

/// The handles of kv1/kv1.h.
/// @{
struct kv1_mean_estimator {
    std::size_t heads, channels;   ///< of a sample
    kv1::mean_estimator estimator; ///< of these
};
struct kv1_moment_estimator {
    std::size_t heads, channels;     ///< KV heads, and channels of a query
    kv1::moment_estimator estimator; ///< of these
};
/// @}

namespace kv1::inline KV1_ABI::detail {

template <class Estimator>
kv1_code c_create_estimator(std::size_t heads, std::size_t channels, Estimator** out,
                            kv1_error* error) noexcept {
    if (out == nullptr)
        return c_refuse_null(error);
    *out = nullptr;
    if (heads == 0 || channels == 0 || channels > max_vector_length ||
        heads > SIZE_MAX / sizeof(double) / (max_vector_length * max_vector_length))
        return c_report({errc::invalid_argument, "heads and channels are positive, channels at most 4096"},
                        error);
    return c_report(guarded([&] { *out = new Estimator{heads, channels, {heads, channels}}; }), error);
}

// grouped: several heads of a sample go to each of the estimator's.
template <class Estimator>
kv1_code c_add_sample(Estimator* to, const kv1_tensor& sample, bool grouped, kv1_error* error) noexcept {
    if (to == nullptr || (sample.data == nullptr && sample.tokens != 0))
        return c_refuse_null(error);
    if (const status s = c_check_types(sample); !s)
        return c_report(s, error);
    const bool heads_fit = grouped ? sample.heads % to->heads == 0 : sample.heads == to->heads;
    if (!heads_fit || sample.channels != to->channels)
        return c_report({errc::shape_mismatch, "a sample has the estimator's heads and channels"}, error);
    return c_report(guarded([&] { to->estimator.add(c_view(sample)); }), error);
}

// take() gives a vector, which may find no memory.
template <class Take>
kv1_code c_give_values(float* out, kv1_error* error, Take&& take) noexcept {
    return c_report(guarded([&] {
                        const std::vector<float> values = take();
                        std::copy(values.begin(), values.end(), out);
                    }),
                    error);
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_mean_estimator_create(size_t heads, size_t channels, kv1_mean_estimator** estimator,
                                   kv1_error* error) {
    return kv1::detail::c_create_estimator(heads, channels, estimator, error);
}

void kv1_mean_estimator_destroy(kv1_mean_estimator* estimator) { delete estimator; }

kv1_code kv1_mean_estimator_add(kv1_mean_estimator* estimator, kv1_tensor sample, kv1_error* error) {
    return kv1::detail::c_add_sample(estimator, sample, false, error);
}

kv1_code kv1_mean_estimator_means(const kv1_mean_estimator* estimator, float* means, kv1_error* error) {
    if (kv1::detail::c_any_null(estimator, means))
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_give_values(means, error, [&] { return estimator->estimator.means(); });
}

kv1_code kv1_moment_estimator_create(size_t kv_heads, size_t channels, kv1_moment_estimator** estimator,
                                     kv1_error* error) {
    return kv1::detail::c_create_estimator(kv_heads, channels, estimator, error);
}

void kv1_moment_estimator_destroy(kv1_moment_estimator* estimator) { delete estimator; }

kv1_code kv1_moment_estimator_add(kv1_moment_estimator* estimator, kv1_tensor sample, kv1_error* error) {
    return kv1::detail::c_add_sample(estimator, sample, true, error);
}

kv1_code kv1_moment_estimator_moments(const kv1_moment_estimator* estimator, float* moments,
                                      kv1_error* error) {
    if (kv1::detail::c_any_null(estimator, moments))
        return kv1::detail::c_refuse_null(error);
    return kv1::detail::c_give_values(moments, error, [&] { return estimator->estimator.moments(); });
}

} // extern "C"
