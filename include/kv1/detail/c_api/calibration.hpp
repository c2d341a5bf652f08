// SPDX-License-Identifier: Apache-2.0
//
// The functions of kv1/c/calibration.h.
#pragma once

#include <kv1/c/calibration.h>
#include <kv1/detail/c_api/error.hpp>
#include <kv1/detail/c_api/saving.hpp>

#include <kv1/calibration_file.hpp>
#include <kv1/detail/arena.hpp>
#include <kv1/encoding.hpp>
#include <kv1/layer_choice.hpp>
#include <kv1/row.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <new>
#include <string>
#include <utility>
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
struct kv1_calibrator {
    kv1::calibrator calibrator; ///< of a model
};
struct kv1_calibration {
    kv1::calibration calibration; ///< of a model
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

// A handle of what a call made; null where it failed.
template <class Handle, class Made>
kv1_code c_give_handle(result<Made>&& made, Handle** out, kv1_error* error) noexcept {
    if (!made)
        return c_report(made.reason(), error);
    *out = new (std::nothrow) Handle{std::move(*made)};
    return c_report(*out != nullptr ? status{} : c_no_memory(), error);
}

inline result<calibrator> c_make_calibrator(const kv1_cache_options& shape,
                                            const kv1_calibrator_options& given) noexcept {
    kv1_calibrator_options o;
    if (const status s = c_take(given, o); !s)
        return s;
    if (o.policy == nullptr)
        return status(errc::invalid_argument, "a pointer is null");
    c_description d;
    if (const status s = c_take_options(shape, d); !s)
        return s;
    result<cache_policy> policy = try_parse_policy(o.policy);
    if (!policy)
        return policy.reason();
    return calibrator::create(std::move(*policy), d.description,
                              {.model = c_model(o.model),
                               .query_stride = (std::max)(o.query_stride, std::size_t{1}),
                               .scale = o.scale});
}

// The options' policies without their fp16 tokens and pages, and these, which they share.
inline status c_take_layer_options(std::span<const kv1_layer_option> given, buffer<layer_option>& out,
                                   cache_policy& shared) noexcept {
    if (!out.reserve(given.size()))
        return c_no_memory();
    for (const kv1_layer_option& o : given) {
        const error_location where{.layer = static_cast<std::int64_t>(o.layer)};
        if (o.policy == nullptr)
            return {errc::invalid_argument, "a pointer is null", where};
        const result<cache_policy> policy = try_parse_policy(o.policy);
        if (!policy)
            return {policy.reason().code(), policy.reason().rule(), where};
        if (!policy->layers.empty())
            return {errc::invalid_argument, "an option is a policy without layers of its own", where};
        if (out.empty()) {
            shared.fp16_sinks = policy->fp16_sinks;
            shared.fp16_window = policy->fp16_window;
            shared.page_tokens = policy->page_tokens;
        }
        if (policy->fp16_sinks != shared.fp16_sinks || policy->fp16_window != shared.fp16_window ||
            policy->page_tokens != shared.page_tokens)
            return {errc::invalid_argument, "options have the same fp16 tokens and pages", where};
        out.push_back({o.layer, policy->common, o.cost});
    }
    return {};
}

inline status c_choose_layers(const kv1_cache_options& shape, std::span<const kv1_layer_option> given,
                              double budget, std::string& text) noexcept {
    c_description d;
    if (const status s = c_take_options(shape, d); !s)
        return s;
    buffer<layer_option> options;
    cache_policy shared;
    if (const status s = c_take_layer_options(given, options, shared); !s)
        return s;
    if (shared.page_tokens != 0)
        d.description.page_tokens = shared.page_tokens;
    result<cache_policy> chosen = try_choose_layers(d.description, options.view(), budget);
    if (!chosen)
        return chosen.reason();
    chosen->fp16_sinks = shared.fp16_sinks;
    chosen->fp16_window = shared.fp16_window;
    chosen->page_tokens = shared.page_tokens;
    return write_policy(*chosen, text);
}

} // namespace kv1::inline KV1_ABI::detail

extern "C" {

kv1_code kv1_choose_layers(const kv1_cache_options* shape, const kv1_layer_option* options, size_t count,
                           double budget, char* policy, size_t size, size_t* length, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(shape, length) || (options == nullptr && count != 0) || (policy == nullptr && size != 0))
        return c_refuse_null(error);
    *length = 0;
    std::string text;
    if (const kv1::status s = c_choose_layers(*shape, {options, count}, budget, text); !s)
        return c_report(s, error);
    c_text out(policy, size);
    out.add(text);
    *length = out.length();
    return c_report({}, error);
}

kv1_code kv1_calibrator_create(const kv1_cache_options* shape, const kv1_calibrator_options* options,
                               kv1_calibrator** calibrator, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(shape, options, calibrator))
        return c_refuse_null(error);
    *calibrator = nullptr;
    return c_give_handle(c_make_calibrator(*shape, *options), calibrator, error);
}

void kv1_calibrator_destroy(kv1_calibrator* calibrator) { delete calibrator; }

kv1_code kv1_calibrator_set_output_projection(kv1_calibrator* calibrator, size_t layer, kv1_tensor projection,
                                              const kv1_executor* executor, kv1_error* error) {
    using namespace kv1::detail;
    if (calibrator == nullptr)
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(projection); !s)
        return c_report(s, error);
    return c_report(
        calibrator->calibrator.try_set_output_projection(layer, c_view(projection), c_executor{executor}),
        error);
}

kv1_code kv1_calibrator_set_output_products(kv1_calibrator* calibrator, size_t layer, const float* products,
                                            size_t count, kv1_error* error) {
    using namespace kv1::detail;
    if (calibrator == nullptr || (products == nullptr && count != 0))
        return c_refuse_null(error);
    return c_report(calibrator->calibrator.try_set_output_products(layer, {products, count}), error);
}

kv1_code kv1_calibrator_add(kv1_calibrator* calibrator, size_t layer, kv1_tensor queries, kv1_tensor keys,
                            kv1_tensor values, size_t first_position, const kv1_executor* executor,
                            kv1_error* error) {
    using namespace kv1::detail;
    if (calibrator == nullptr)
        return c_refuse_null(error);
    if (const kv1::status s = c_check_types(queries, keys, values); !s)
        return c_report(s, error);
    return c_report(calibrator->calibrator.try_add(layer, c_view(queries), c_view(keys), c_view(values),
                                                   first_position, c_executor{executor}),
                    error);
}

kv1_code kv1_calibrator_finish(const kv1_calibrator* calibrator, const kv1_executor* executor,
                               kv1_calibration** calibration, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibrator, calibration))
        return c_refuse_null(error);
    *calibration = nullptr;
    return c_give_handle(calibrator->calibrator.try_finish(c_executor{executor}), calibration, error);
}

void kv1_calibration_destroy(kv1_calibration* calibration) { delete calibration; }

size_t kv1_calibration_policy(const kv1_calibration* calibration, char* text, size_t size) {
    kv1::detail::c_text out(text, size);
    if (calibration == nullptr)
        return 0;
    std::string policy;
    if (!kv1::detail::write_policy(calibration->calibration.policy(), policy))
        return 0;
    out.add(policy);
    return out.length();
}

kv1_code kv1_calibration_set_policy(kv1_calibration* calibration, const char* policy, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibration, policy))
        return c_refuse_null(error);
    kv1::result<kv1::cache_policy> parsed = kv1::try_parse_policy(policy);
    if (parsed)
        calibration->calibration.set_policy(std::move(*parsed));
    return c_report(parsed.reason(), error);
}

kv1_code kv1_calibration_save_file(const kv1_calibration* calibration, const char* path, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibration, path))
        return c_refuse_null(error);
    return c_report(c_with_path(path,
                                [&](const std::filesystem::path& native) {
                                    return kv1::try_save_calibration(calibration->calibration, native);
                                }),
                    error);
}

kv1_code kv1_calibration_save(const kv1_calibration* calibration, kv1_sink sink, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibration, sink.write))
        return c_refuse_null(error);
    return c_report(kv1::try_save_calibration(calibration->calibration, c_byte_sink{sink}), error);
}

kv1_code kv1_calibration_load_file(const char* path, const kv1_fingerprint* model,
                                   kv1_calibration** calibration, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(path, calibration))
        return c_refuse_null(error);
    *calibration = nullptr;
    kv1::result<kv1::calibration> loaded = kv1::status(kv1::errc::io_error, "");
    const kv1::status s = c_with_path(path, [&](const std::filesystem::path& native) {
        loaded = kv1::try_load_calibration(native, c_model(model));
        return loaded.reason();
    });
    return s ? c_give_handle(std::move(loaded), calibration, error) : c_report(s, error);
}

kv1_code kv1_calibration_load(kv1_source source, const kv1_fingerprint* model, kv1_calibration** calibration,
                              kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibration, source.read))
        return c_refuse_null(error);
    *calibration = nullptr;
    return c_give_handle(kv1::try_load_calibration(c_byte_source{source}, c_model(model)), calibration,
                         error);
}

kv1_code kv1_cache_create_calibrated(const kv1_calibration* calibration, const kv1_cache_options* options,
                                     kv1_cache** cache, kv1_error* error) {
    using namespace kv1::detail;
    if (c_any_null(calibration, options, cache))
        return c_refuse_null(error);
    *cache = nullptr;
    c_description d;
    if (const kv1::status s = c_take_options(*options, d); !s)
        return c_report(s, error);
    kv1::result<kv1::cache_description> described =
        kv1::try_describe_cache(calibration->calibration, std::move(d.description));
    if (!described)
        return c_report(described.reason(), error);
    d.description = std::move(*described);
    return c_give_handle(c_make(std::move(d)), cache, error);
}

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
