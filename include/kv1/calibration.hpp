// SPDX-License-Identifier: Apache-2.0
//
// Calibration: what a cache wants to know of a model, taken from a text that the model reads.
//
//   kv1::layer_description layer{kv_heads, head_dim, head_dim};
//   layer.rotary = {kv1::rotary_frequencies(10000.0, head_dim)};
//   kv1::cache_description shape = kv1::uniform_cache(layers, layer, tokens);
//   kv1::calibrator calibrator(kv1::parse_policy("balanced"), shape, {.model = kv1::fingerprint_of("my model")});
//   for (layer ...)                                           // W_o as [hidden][query heads][value_dim]
//       calibrator.set_output_projection(layer, {w_o, hidden, heads, head_dim});
//   for (chunk of the text ...)
//       for (layer ...)                                       // what the layer attends with, after RoPE
//           calibrator.add(layer, q, k, v);
//   kv1::calibration found = calibrator.finish();             // calibration_file.hpp keeps it
//   kv1::kv_cache cache(kv1::describe_cache(found, shape));
//
// Taken are the parts that the policy names, for keys and for values:
//
//   +mean    Means of channels. Keys of a layer that says how they turn (layer_description::rotary) are turned back
//            first, so that the mean holds at every position. Pairs of channels with small means are left out, since
//            each costs time in attention (calibration_options::mean_pairs).
//   +basis   An orthogonal basis: for keys the eigenvectors of the queries' second moment, sum of q q^T, for values
//            those of the values' second moment, weighted by the probability that tokens are given.
//   +ew      Error weights: what an error of a vector does to the layer's output, to first order. Query head a
//            gives token j the probability p_j. Its output is o = sum p_j v_j, and its part W of the output
//            projection takes o to the hidden state. An error e of key j changes the hidden state by
//            p_j (q . e) scale W (v_j - o), and an error f of value j changes it by p_j W f. The query heads
//            that share a KV head meet the same error, so their changes are added before they are squared:
//
//              keys    sum over queries and tokens of B^T B, B = sum over heads of p_j scale W (v_j - o) q^T
//              values  sum over queries and tokens of A^T A, A = sum over heads of p_j W
//
//            Tokens that are not quantized are left out: the policy's fp16 sinks, and for each query its fp16
//            window. They have most of the probability. On a model of 135M parameters leaving them out took a
//            quarter off the KL divergence (examples/evaluation/README.md).
//
// Bits of layers. layer_choice.hpp chooses a policy for each layer by costs that were measured with the parts found here.
//
// The text. A few thousand tokens of any text that the model was made for, and not the one that quality is
// measured on. Calibrate on contexts as long as those to be served: the slow pairs of RoPE turn by less than a
// circle in 1,024 tokens, and error weights from there do harm at 8,192. Half of the tokens in chunks of 1,024
// and half in chunks of 8,192 served both. Sums are over all queries alike, so that chunks count by their tokens.
//
// Cost. Over a chunk of n tokens error weights take n^2 / 2 (key_dim + value_dim) multiplications for each query
// head, and n^2 / 2 value_dim for each two of the query heads that share a KV head, a head with itself included.
// 1,024 tokens of a layer of 8 KV heads of 128 channels with 4 query heads each take 10 billion, and 5 more that
// grow with n alone: 3 s of a thread (Zen 4), 1.7 s compiled for AVX-512. calibration_options::query_stride = 8
// takes every eighth query, which is enough for chunks of 8,192 tokens: neighbours ask for similar things. Means
// take every token, in O(n).
//
// Memory. 36 layers of 8 KV heads of 128 channels with 4 query heads each: 216 MiB, of which 180 are products of
// the output projection (value_dim^2 floats for each two of the query heads that share a KV head), 36 sums of
// keys' error weights. +basis takes 72 MiB more. A call takes besides, for each token, 8 bytes for each two query
// heads that share a KV head, and 256 bytes for each of its tasks, which are up to 8 a KV head: 140 MiB for 8,192
// tokens. Nothing grows with the text.
//
// Determinism. Results are the same bits for any executor. How a text is cut into calls changes the order of sums
// in double, and so a rounding to fp16 now and then.
//
// Threads. Calls for different layers may run at once; calls for one layer may not.
#pragma once

#include <kv1/cache_policy.hpp>
#include <kv1/cache_views.hpp>
#include <kv1/detail/calibrated_layer.hpp>
#include <kv1/detail/calibration_sums.hpp>
#include <kv1/detail/eigenvectors.hpp>
#include <kv1/detail/try_copy.hpp>
#include <kv1/executor.hpp>
#include <kv1/model_fingerprint.hpp>
#include <kv1/rotary_embedding.hpp>
#include <kv1/status.hpp>
#include <kv1/tensor.hpp>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace kv1::inline KV1_ABI {

namespace detail {
struct calibration_access;
}

/// The calibrated parts of a model's layers, and the policy that they were taken for. Movable.
class calibration {
public:
    /// Without layers.
    calibration() = default;

    /// The policy that describe_cache() takes. Another may use the same parts: what it names has to be there.
    /// @{
    [[nodiscard]] const cache_policy& policy() const noexcept { return policy_; }
    void set_policy(cache_policy policy) noexcept { policy_ = std::move(policy); }
    /// @}
    /// Whose keys and values were calibrated; empty if that was not said. Another model may use the same parts: one that
    /// was trained from it, or whose weights are rounded otherwise.
    /// @{
    [[nodiscard]] const model_fingerprint& model() const noexcept { return model_; }
    void set_model(const model_fingerprint& model) noexcept { model_ = model; }
    /// @}
    /// The number of layers.
    [[nodiscard]] std::size_t layers() const noexcept { return size_; }

    /// A layer's parts, as vector_encoding has them; empty where they were not taken. Preconditions: a layer of
    /// the model. Allocate; error_weights() is O(kv_heads dim^3).
    /// @{
    [[nodiscard]] std::vector<float> means(std::size_t layer, kv_side side) const;
    [[nodiscard]] std::vector<float> error_weights(std::size_t layer, kv_side side) const;
    [[nodiscard]] std::vector<float> basis(std::size_t layer, kv_side side) const;
    /// @}
    /// How a layer's keys turn: its means are those of keys before that. Precondition: a layer of the model.
    [[nodiscard]] const rotary_embedding& rotary(std::size_t layer) const noexcept;

private:
    friend struct detail::calibration_access;

    cache_policy policy_ = {};
    model_fingerprint model_ = {};
    std::unique_ptr<detail::calibrated_layer[]> layers_;
    std::size_t size_ = 0;
};

/// What a calibrator is told beside policy and shape.
struct calibration_options {
    model_fingerprint model = {}; ///< whose text it is; kept with the result
    /// 1: all queries; n: every n-th. Means take all tokens all the same.
    std::size_t query_stride = 1;
    /// Of scores, as in attention; 0: 1 / sqrt(key_dim).
    float scale = 0.0f;
    /// Pairs of channels of keys that turn whose means are kept: those with the largest. 16 of 32 had 95 % of the
    /// means' energy, and all of their gain to within 2 %.
    std::size_t mean_pairs = 16;
};

/// Adds up what calibration takes from a model's layers, as a text goes through them.
class calibrator {
public:
    /// For the layers of `shape` (KV heads, head dims, sliding windows, rotary embedding) and the parts that the
    /// policy names. Errors: out_of_range for a policy with a layer that the shape does not have;
    /// invalid_argument for a layer without heads or channels, for a stride of 0, for error weights of a layer
    /// whose values lie in its keys; out_of_memory.
    [[nodiscard]] static result<calibrator> create(cache_policy policy, const cache_description& shape,
                                                   const calibration_options& options = {}) noexcept;

    /// Sets a layer's output projection, which error weights need before the first token: [outputs][query
    /// heads][value_dim], row-major as most models keep it (o_proj.weight). It is read now, and not kept.
    /// O(outputs query_heads^2 / kv_heads value_dim^2). Errors: out_of_range for a layer that there is not;
    /// shape_mismatch; non_finite; not_representable; invalid_argument after tokens; out_of_memory.
    template <executor E = inline_executor>
    status try_set_output_projection(std::size_t layer, const tensor_view& projection,
                                     E&& run = {}) noexcept {
        return take_projection(layer, projection, run);
    }
    /// The same from its products W_a^T W_b of every two query heads that share a KV head: [kv_heads][g][g]
    /// [value_dim][value_dim]. Errors: the same.
    status try_set_output_products(std::size_t layer, std::span<const float> products) noexcept;

    /// The sliding window of the queries that are added from here on, 0: they see all tokens before them. For engines
    /// that read windows off their masks, when a text has become longer than one. Otherwise the shape says it, which
    /// also says that such a layer keeps no fp16 tokens. Errors: out_of_range for a layer that there is not.
    status try_set_sliding_window(std::size_t layer, std::size_t tokens) noexcept {
        if (layer >= size_)
            return {
                errc::out_of_range, "there is no such layer", {.layer = static_cast<std::int64_t>(layer)}};
        layers_[layer].set_sliding_window(tokens);
        return {};
    }

    /// Adds tokens that a layer attends with, all after RoPE: queries [m][query heads][key_dim]; keys
    /// [n][kv_heads][key_dim] and values [n][kv_heads][value_dim] of these m tokens and of those before them,
    /// m <= n. The first of keys and values is at first_position of its text (0 but where keys behind a sliding
    /// window are left out). A text may come in one call, or in several with growing n. Errors: out_of_range,
    /// shape_mismatch, non_finite with KV head, token and channel, not_representable, out_of_memory;
    /// invalid_argument where the output projection is missing. If it fails, nothing was added.
    template <executor E = inline_executor>
    status try_add(std::size_t layer, const tensor_view& queries, const tensor_view& keys,
                   const tensor_view& values, std::size_t first_position = 0, E&& run = {}) noexcept {
        return add_tokens(layer, queries, keys, values, first_position, run);
    }

    /// What was found so far. O(layers kv_heads dim^3). Errors: invalid_argument for a layer that has no tokens
    /// yet and is asked for parts, naming it; not_representable for means that fp16 does not hold; out_of_memory.
    template <executor E = inline_executor>
    [[nodiscard]] result<calibration> try_finish(E&& run = {}) const noexcept {
        return take_parts(run);
    }

#if KV1_EXCEPTIONS
    /// For the layers of `shape` and the parts that the policy names. Throws kv1::error, for the reasons that
    /// create() gives.
    calibrator(cache_policy policy, const cache_description& shape, const calibration_options& options = {})
        : calibrator(create(std::move(policy), shape, options).value()) {}
    /// Sets a layer's output projection, [outputs][query heads][value_dim]. Throws kv1::error.
    template <executor E = inline_executor>
    void set_output_projection(std::size_t layer, const tensor_view& projection, E&& run = {}) {
        detail::throw_if_error(try_set_output_projection(layer, projection, run));
    }
    /// The same from products, [kv_heads][g][g][value_dim][value_dim]. Throws kv1::error.
    void set_output_products(std::size_t layer, std::span<const float> products) {
        detail::throw_if_error(try_set_output_products(layer, products));
    }
    /// The sliding window of the queries that are added from here on, 0: none. Throws kv1::error.
    void set_sliding_window(std::size_t layer, std::size_t tokens) {
        detail::throw_if_error(try_set_sliding_window(layer, tokens));
    }
    /// Adds tokens that a layer attends with: queries [m][query heads][key_dim], keys and values [n][kv_heads]
    /// [...] of them and of the tokens before them. Throws kv1::error; nothing was added then.
    template <executor E = inline_executor>
    void add(std::size_t layer, const tensor_view& queries, const tensor_view& keys,
             const tensor_view& values, std::size_t first_position = 0, E&& run = {}) {
        detail::throw_if_error(try_add(layer, queries, keys, values, first_position, run));
    }
    /// What was found so far. Throws kv1::error for a layer that has no tokens yet.
    template <executor E = inline_executor>
    [[nodiscard]] calibration finish(E&& run = {}) const {
        return try_finish(run).value();
    }
#endif

private:
    calibrator() = default;
    status take_projection(std::size_t layer, const tensor_view& w, detail::executor_view run) noexcept;
    status add_tokens(std::size_t layer, const tensor_view& queries, const tensor_view& keys,
                      const tensor_view& values, std::size_t first_position,
                      detail::executor_view run) noexcept;
    [[nodiscard]] result<calibration> take_parts(detail::executor_view run) const noexcept;
    [[nodiscard]] status check_projection(std::size_t layer, bool fits) const noexcept;

    cache_policy policy_ = {};
    model_fingerprint model_ = {};
    std::unique_ptr<detail::layer_sums[]> layers_;
    std::size_t size_ = 0, mean_pairs_ = 0;
};

/// The cache of a calibration's policy for a model: `shape` with formats, encodings and fp16 tokens
/// (cache_policy.hpp). A layer of the shape that does not say how its keys turn turns them as the calibrated one
/// does. Errors: different_cache where a layer of the shape has other KV heads, head dims or another rotary
/// embedding than the layer that was calibrated, naming it, or where there are more or fewer layers; those of
/// try_describe_cache() for a policy. O(layers kv_heads dim^3).
[[nodiscard]] result<cache_description> try_describe_cache(const calibration& found,
                                                           cache_description shape) noexcept;
#if KV1_EXCEPTIONS
/// The cache of a calibration's policy for a model: `shape` with formats, encodings and fp16 tokens. Throws
/// kv1::error where the calibration is not of such a model, or lacks a part that the policy names.
[[nodiscard]] inline cache_description describe_cache(const calibration& found, cache_description shape) {
    return try_describe_cache(found, std::move(shape)).value();
}
#endif

namespace detail {

// For what keeps calibrations in files.
struct calibration_access {
    static std::span<const calibrated_layer> layers(const calibration& c) noexcept {
        return {c.layers_.get(), c.size_};
    }
    static std::span<calibrated_layer> layers(calibration& c) noexcept { return {c.layers_.get(), c.size_}; }
    // Makes room for layers. Errors: out_of_memory.
    static status create(calibration& c, std::size_t layers, const model_fingerprint& model) noexcept {
        c.layers_.reset(new (std::nothrow) calibrated_layer[layers]);
        if (c.layers_ == nullptr)
            return {errc::out_of_memory, "an allocation failed"};
        c.size_ = layers;
        c.model_ = model;
        return {};
    }
};

inline constexpr const char* rule_layer_shape = "layers have KV heads, and keys and values channels";

// Parts of a layer that a policy names.
// @{
inline calibrated_quantities quantities_of(const layer_policy& p, bool values_in_keys) noexcept {
    calibrated_quantities q;
    for (const vector_policy* side : {&p.key, &p.value}) {
        if (side == &p.value && values_in_keys)
            continue;
        q.means = q.means || side->means;
        q.error_weights = q.error_weights || side->error_weights;
        q.moments = q.moments || side->basis;
    }
    return q;
}
// @}

inline status copy_rotary(const rotary_embedding& from, rotary_embedding& to) noexcept {
    if (const status s = seek_memory(from.frequencies.size() * sizeof(float)); !s)
        return s;
    return guarded([&] { to = from; });
}

// The first element that is no finite number.
inline status check_finite(const tensor_view& x, error_location where) noexcept {
    for (std::size_t t = 0; t < x.tokens(); ++t)
        for (std::size_t h = 0; h < x.heads(); ++h)
            for (std::size_t c = 0; c < x.channels(); ++c)
                if (!is_finite(element(x, t, h, c))) {
                    where.token = static_cast<std::int64_t>(t);
                    where.kv_head = static_cast<std::int64_t>(h);
                    where.channel = static_cast<std::int64_t>(c);
                    return {errc::non_finite, "calibration takes finite numbers", where};
                }
    return {};
}

inline status copy_policy(const cache_policy& from, calibration& to) noexcept {
    cache_policy own;
    if (const status s = seek_memory(from.layers.size() * sizeof(layer_exception)); !s)
        return s;
    if (const status s = guarded([&] { own = from; }); !s)
        return s;
    to.set_policy(std::move(own));
    return {};
}

inline status no_calibration_memory() noexcept { return {errc::out_of_memory, "an allocation failed"}; }

// Takes a layer's parts from its sums. One task a KV head and side.
class calibrated_parts {
public:
    // Makes room. Errors: out_of_memory.
    static status create(const layer_sums& from, const layer_policy& policy, calibrated_layer& to) noexcept {
        to.kv_heads = from.kv_heads();
        to.key_dim = from.key_dim();
        to.value_dim = from.value_dim();
        if (const status s = copy_rotary(from.rotary(), to.rotary); !s)
            return s;
        for (const std::size_t side : {0u, 1u}) {
            const vector_policy& p = side == 0 ? policy.key : policy.value;
            const std::size_t dim = to.dim(side);
            calibrated_side& out = to.sides[side];
            if (p.means && from.wanted().means && !out.means.resize(to.kv_heads * dim))
                return no_calibration_memory();
            if (p.error_weights && from.wanted().error_weights && !out.error_weights.create(to.kv_heads, dim))
                return no_calibration_memory();
            if (p.basis && from.wanted().moments && !out.basis.resize(to.kv_heads * dim * dim))
                return no_calibration_memory();
        }
        return {};
    }
    // False: no memory.
    static bool fill(const layer_sums& from, std::size_t side, std::size_t head, std::size_t mean_pairs,
                     calibrated_layer& to) noexcept {
        const std::size_t dim = to.dim(side);
        calibrated_side& out = to.sides[side];
        buffer<double> work, vectors;
        if (!work.resize(dim * dim) || !vectors.resize(out.basis.empty() ? 0 : dim * dim))
            return false;
        if (!out.means.empty()) {
            const std::span<double> means(work.data(), dim);
            side == 0 ? from.key_means(head, means) : from.value_means(head, means);
            if (side == 0)
                keep_largest_pairs(to.rotary, mean_pairs, means);
            for (std::size_t c = 0; c < dim; ++c)
                out.means[head * dim + c] = float_to_half(static_cast<float>(means[c]));
        }
        if (!out.error_weights.empty()) {
            const std::span<double> weights(work.data(), dim * dim);
            side == 0 ? from.key_weights(head, weights) : from.value_weights(head, weights);
            out.error_weights.pack(head, weights, dim);
        }
        if (!out.basis.empty()) {
            const std::span<double> moments(work.data(), dim * dim);
            side == 0 ? from.query_moments(head, moments) : from.value_moments(head, moments);
            symmetric_eigenvectors(moments, dim, {vectors.data(), dim * dim});
            for (std::size_t i = 0; i < dim * dim; ++i)
                out.basis[head * dim * dim + i] = static_cast<float>(vectors[i]);
        }
        return true;
    }

private:
    // Leaves the means of so many pairs, the largest; the others become zero.
    static void keep_largest_pairs(const rotary_embedding& r, std::size_t kept,
                                   std::span<double> means) noexcept {
        const std::size_t pairs = r.frequencies.size();
        const auto energy = [&](std::size_t j) {
            const double a = means[r.first_of(j)], b = means[r.second_of(j)];
            return a * a + b * b;
        };
        for (std::size_t n = pairs; n > kept; --n) { // the smallest of those that are left
            std::size_t least = pairs;
            for (std::size_t j = 0; j < pairs; ++j)
                if (energy(j) > 0.0 && (least == pairs || energy(j) < energy(least)))
                    least = j;
            if (least == pairs)
                return;
            means[r.first_of(least)] = means[r.second_of(least)] = 0.0;
        }
    }
};

} // namespace detail

inline result<calibrator> calibrator::create(cache_policy policy, const cache_description& shape,
                                             const calibration_options& options) noexcept {
    if (options.query_stride == 0)
        return status(errc::invalid_argument, "at least every query is taken: a stride of 1");
    if (!(options.scale >= 0.0f && detail::is_finite(options.scale)))
        return status(errc::invalid_argument, "a scale is a positive number, or 0 for the default");
    if (!policy.layers.empty() && policy.layers.back().layer >= shape.layers.size())
        return status(errc::out_of_range, "the policy names a layer that the cache does not have",
                      {.layer = static_cast<std::int64_t>(policy.layers.back().layer)});
    calibrator c;
    c.layers_.reset(new (std::nothrow) detail::layer_sums[shape.layers.size()]);
    if (c.layers_ == nullptr)
        return detail::no_calibration_memory();
    for (; c.size_ < shape.layers.size(); ++c.size_) {
        const layer_description& l = shape.layers[c.size_];
        const error_location where{.layer = static_cast<std::int64_t>(c.size_)};
        if (l.kv_heads == 0 || l.key_dim == 0 || l.value_dim == 0 || l.key_dim > max_vector_length ||
            l.value_dim > max_vector_length)
            return status(errc::invalid_argument, detail::rule_layer_shape, where);
        const layer_policy& p = policy.of(c.size_);
        detail::calibrated_quantities wanted = detail::quantities_of(p, l.values_in_keys);
        if (wanted.error_weights && l.values_in_keys)
            return status(errc::invalid_argument,
                          "error weights are not taken of layers whose values lie in their keys", where);
        if (l.sliding_window == 0) {
            wanted.sinks = policy.fp16_sinks;
            wanted.window = policy.fp16_window;
        }
        wanted.query_stride = options.query_stride;
        wanted.scale = options.scale != 0.0f ? static_cast<double>(options.scale)
                                             : 1.0 / std::sqrt(static_cast<double>(l.key_dim));
        rotary_embedding rotary;
        if (const status s = detail::copy_rotary(l.rotary, rotary); !s)
            return s;
        if (const status s = c.layers_[c.size_].create(l, std::move(rotary), wanted); !s)
            return s;
    }
    c.policy_ = std::move(policy);
    c.model_ = options.model;
    c.mean_pairs_ = options.mean_pairs;
    return result<calibrator>(std::move(c));
}

inline status calibrator::check_projection(std::size_t layer, bool fits) const noexcept {
    const error_location where{.layer = static_cast<std::int64_t>(layer)};
    if (layer >= size_)
        return {errc::out_of_range, "there is no such layer", where};
    if (layers_[layer].tokens() != 0)
        return {errc::invalid_argument, "the output projection comes before the first token", where};
    if (!fits)
        return {errc::shape_mismatch,
                "an output projection has a multiple of the layer's KV heads, and its channels of values",
                where};
    return {};
}

inline status calibrator::take_projection(std::size_t layer, const tensor_view& w,
                                          detail::executor_view run) noexcept {
    const bool there = layer < size_;
    const bool fits = there && !w.has_negative_extent() && w.heads() != 0 && w.tokens() != 0 &&
                      w.data() != nullptr && w.heads() % layers_[layer].kv_heads() == 0 &&
                      w.channels() == layers_[layer].value_dim();
    if (const status s = check_projection(layer, fits); !s)
        return s;
    if (const status s = detail::check_finite(w, {.layer = static_cast<std::int64_t>(layer)}); !s)
        return s;
    return layers_[layer].set_projection(w, run);
}

inline status calibrator::try_set_output_products(std::size_t layer,
                                                  std::span<const float> products) noexcept {
    std::size_t group = 0;
    if (layer < size_) {
        const std::size_t one =
            layers_[layer].kv_heads() * layers_[layer].value_dim() * layers_[layer].value_dim();
        while (group * group * one < products.size())
            ++group;
        group = group * group * one == products.size() ? group : 0;
    }
    if (const status s = check_projection(layer, group != 0); !s)
        return s;
    for (const float x : products)
        if (!detail::is_finite(x))
            return {errc::non_finite,
                    "calibration takes finite numbers",
                    {.layer = static_cast<std::int64_t>(layer)}};
    return layers_[layer].set_products(group, products);
}

inline status calibrator::add_tokens(std::size_t layer, const tensor_view& queries, const tensor_view& keys,
                                     const tensor_view& values, std::size_t first_position,
                                     detail::executor_view run) noexcept {
    const error_location where{.layer = static_cast<std::int64_t>(layer)};
    if (layer >= size_)
        return {errc::out_of_range, "there is no such layer", where};
    detail::layer_sums& sums = layers_[layer];
    for (const tensor_view* x : {&queries, &keys, &values})
        if (x->has_negative_extent())
            return {errc::invalid_argument, detail::rule_extents, where};
    if (keys.heads() != sums.kv_heads() || values.heads() != sums.kv_heads() ||
        keys.channels() != sums.key_dim() || values.channels() != sums.value_dim())
        return {errc::shape_mismatch, "keys and values have the layer's KV heads and head dims", where};
    if (queries.heads() == 0 || queries.heads() % sums.kv_heads() != 0 ||
        queries.channels() != sums.key_dim())
        return {errc::shape_mismatch,
                "queries have a multiple of the layer's KV heads, and its key_dim channels", where};
    if (keys.tokens() != values.tokens() || queries.tokens() > keys.tokens())
        return {errc::shape_mismatch, "keys and values are of the queries' tokens and of those before them",
                where};
    if (queries.tokens() == 0)
        return {};
    if (queries.data() == nullptr || keys.data() == nullptr || values.data() == nullptr)
        return {errc::invalid_argument, "a pointer is null", where};
    if (sums.wanted().error_weights && sums.group() * sums.kv_heads() != queries.heads())
        return sums.group() == 0
                   ? status{errc::invalid_argument, "error weights need the layer's output projection first",
                            where}
                   : status{errc::shape_mismatch, "queries have the output projection's heads", where};
    for (const tensor_view* x : {&queries, &keys, &values})
        if (const status s = detail::check_finite(*x, where); !s)
            return s;
    return sums.add(queries, keys, values, first_position, run);
}

inline result<calibration> calibrator::take_parts(detail::executor_view run) const noexcept {
    calibration found;
    if (const status s = detail::calibration_access::create(found, size_, model_); !s)
        return s;
    if (const status s = detail::copy_policy(policy_, found); !s)
        return s;
    const std::span<detail::calibrated_layer> out = detail::calibration_access::layers(found);
    std::atomic<bool> starved{false};
    for (std::size_t i = 0; i < size_; ++i) {
        const detail::layer_sums& sums = layers_[i];
        const error_location where{.layer = static_cast<std::int64_t>(i)};
        if (sums.tokens() == 0 && sums.wanted().any())
            return status(errc::invalid_argument, "a layer has seen no tokens yet", where);
        if (const status s = detail::calibrated_parts::create(sums, policy_.of(i), out[i]); !s)
            return s;
        const auto task = [&](std::size_t k) {
            if (!detail::calibrated_parts::fill(sums, k % 2, k / 2, mean_pairs_, out[i]))
                starved = true;
        };
        run(2 * sums.kv_heads(), task);
        for (const detail::calibrated_side& side : out[i].sides)
            for (const std::uint16_t m : side.means)
                if (!detail::is_finite(detail::half_to_float(m)))
                    return status(errc::not_representable, "means are fp16 numbers", where);
    }
    if (starved)
        return detail::no_calibration_memory();
    return result<calibration>(std::move(found));
}

inline result<cache_description> try_describe_cache(const calibration& found,
                                                    cache_description shape) noexcept {
    const std::span<const detail::calibrated_layer> layers = detail::calibration_access::layers(found);
    if (layers.size() != shape.layers.size())
        return status(errc::different_cache,
                      "the calibration is of more layers, or fewer, than the cache has");
    std::size_t floats = 0, largest = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const detail::calibrated_layer& own = layers[i];
        layer_description& l = shape.layers[i];
        const error_location where{.layer = static_cast<std::int64_t>(i)};
        if (own.kv_heads != l.kv_heads)
            return status(errc::different_cache, "the calibrated layer has another number of KV heads",
                          where);
        if (own.key_dim != l.key_dim)
            return status(errc::different_cache, "the calibrated layer's keys have another head dim", where);
        if (own.value_dim != l.value_dim)
            return status(errc::different_cache, "the calibrated layer's values have another head dim",
                          where);
        if (l.rotary.empty())
            if (const status s = detail::copy_rotary(own.rotary, l.rotary); !s)
                return s;
        if (own.rotary != l.rotary)
            return status(errc::different_cache,
                          "the calibrated layer's keys turn otherwise with their positions", where);
        for (const std::size_t side : {0u, 1u}) {
            const detail::calibrated_side& s = own.sides[side];
            const std::size_t square = own.dim(side) * own.dim(side);
            floats += s.means.size() + (s.error_weights.empty() ? 0 : own.kv_heads * square);
            largest = (std::max)(largest, square);
        }
    }
    detail::buffer<layer_calibration> parts;
    detail::buffer<float> values, work;
    if (!parts.resize(layers.size()) || !values.reserve(floats) || !work.resize(largest))
        return detail::no_calibration_memory();
    values.set_size(floats);
    std::size_t used = 0;
    const auto take = [&](std::size_t n) {
        used += n;
        return std::span<float>(values.data() + (used - n), n);
    };
    for (std::size_t i = 0; i < layers.size(); ++i)
        for (const std::size_t side : {0u, 1u}) {
            const detail::calibrated_side& s = layers[i].sides[side];
            const std::size_t dim = layers[i].dim(side);
            const std::span<float> means = take(s.means.size());
            for (std::size_t k = 0; k < means.size(); ++k)
                means[k] = detail::half_to_float(s.means[k]);
            const std::span<float> weights =
                take(s.error_weights.empty() ? 0 : layers[i].kv_heads * dim * dim);
            for (std::size_t h = 0; h < s.error_weights.scales.size(); ++h)
                s.error_weights.unpack(h, dim, weights.subspan(h * dim * dim, dim * dim),
                                       {work.data(), dim * dim});
            (side == 0 ? parts[i].key_means : parts[i].value_means) = means;
            (side == 0 ? parts[i].key_error_weights : parts[i].value_error_weights) = weights;
            (side == 0 ? parts[i].key_basis : parts[i].value_basis) = s.basis.view();
        }
    return try_describe_cache(found.policy(), std::move(shape), parts.view());
}

inline std::vector<float> calibration::means(std::size_t layer, kv_side side) const {
    std::vector<float> all;
    for (const std::uint16_t m : layers_[layer].sides[static_cast<std::size_t>(side)].means)
        all.push_back(detail::half_to_float(m));
    return all;
}

inline std::vector<float> calibration::error_weights(std::size_t layer, kv_side side) const {
    const std::size_t dim = layers_[layer].dim(static_cast<std::size_t>(side));
    const detail::packed_weights& packed = layers_[layer].sides[static_cast<std::size_t>(side)].error_weights;
    std::vector<float> all(packed.scales.size() * dim * dim), work(dim * dim);
    for (std::size_t h = 0; h < packed.scales.size(); ++h)
        packed.unpack(h, dim, std::span(all).subspan(h * dim * dim, dim * dim), work);
    return all;
}

inline std::vector<float> calibration::basis(std::size_t layer, kv_side side) const {
    const std::span<const float> own = layers_[layer].sides[static_cast<std::size_t>(side)].basis.view();
    return {own.begin(), own.end()};
}

inline const rotary_embedding& calibration::rotary(std::size_t layer) const noexcept {
    return layers_[layer].rotary;
}

} // namespace kv1::inline KV1_ABI
