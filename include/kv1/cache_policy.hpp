// SPDX-License-Identifier: Apache-2.0
//
// A cache policy: how keys and values are kept, whatever the model. As a value, and as text of one line for
// options and configuration files. A cache of the policy `safe` for 36 layers, 8 KV heads of 128 channels and
// 131,072 tokens:
//
//   kv1::cache_description shape = kv1::uniform_cache(36, {8, 128, 128}, 131072);
//   kv1::kv_cache cache(kv1::describe_cache(kv1::parse_policy("safe"), shape));
//
// +mean and +ew, and so the presets that have them, need a calibration: numbers that are taken from the model
// once, while it reads some text (calibration.hpp).
//
//   policy   SIDES[/LAYER:SIDES]...[@SINKS:WINDOW][#TOKENS], or a preset in the place of the first SIDES
//   SIDES    KEYS,VALUES, or one for both
//   KEYS     FORMAT[+ls|+cs][+basis][+had][+mean][+ew][+channel][+gCHANNELS], VALUES the same without +channel
//   FORMAT   a short name (format.hpp): 1, 1.5, 2, 3, 4, 8, 16, 32, c2, c3, c4 (compact), cb2, cb4 (codebook)
//
//   +ls, +cs   levels by least squares, by a clip search; neither: the vector's minimum and maximum
//   +basis     turned into an orthogonal basis, before they are rotated (calibrated)
//   +had       rotated by a Hadamard transform, as many channels together as the head dim permits
//              (rotation_width())
//   +mean      less the means of the channels (calibrated); keys of a layer whose rotary embedding is known: less
//              the means that turn with their position (layer_description::rotary)
//   +ew        error weights choose the codes (calibrated); with +ls or +cs
//   +channel   keys alone: a scale and minimum for each channel of a page
//   +g32       a scale and minimum for every 32 channels
//   /7:c4,c3   layer 7 differs
//   @4:32      the first 4 tokens and the newest 32 in fp16
//   #256       pages of 256 tokens
//
// Presets (policy_presets). Bytes are those of a vector of 64 and of 128 channels, averaged over K and V, with
// all metadata; fp16 takes 128 and 256. So a token of 8 KV heads of 128 channels takes 2 * 8 * 42 bytes a layer
// in `safe`. The fp16 tokens are a constant number and not in them. The other figures are the KL divergence
// from the same model with an fp32 cache, in nats a token, on WikiText-2:
//
//   name           bytes   SmolLM2  8,192   kv1-8m  policy
//   safe           22, 42  0.041    0.063   0.015   c3+ls+had,c2+ls+had@4:32: any model, nothing calibrated
//   balanced       22, 42  0.016    0.023   0.010   c3+ls+had+mean+ew,c2+ls+had+ew@4:32: the recommended one
//   small          18, 34  0.042    0.062   0.017   c2+ls+had+mean+ew,c2+ls+had+ew@4:32: two bits for both
//   near-lossless  34, 66  0.0021   0.0028  0.0018  cb4+ls+had+mean+ew,cb4+ls+had+ew@4:8
//   reference      20, 36  3.42     3.37    0.156   2,2: minimum and maximum, bit for bit the KV1 reference's; for
//                                                   models that were trained with it, as kv1-8m was
//
// SmolLM2 is SmolLM2-135M-Instruct, 64 channels, not trained for any cache: 8 chunks of 1,024 tokens, and the last
// 2,048 positions of two chunks of 8,192. Calibrated on chunks of both lengths (examples/real_model has the commands,
// and more rows). kv1-8m is the shipped model of 32 channels: 12 chunks of 1,024. +basis for both sides makes 0.016
// 0.014, 0.042 0.034, 0.062 0.053 and 0.0021 0.0018, at a cost in time.
#pragma once

#include <kv1/cache_description.hpp>
#include <kv1/detail/try_copy.hpp>
#include <kv1/hadamard.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kv1::inline KV1_ABI {

/// How keys, or values, are kept.
struct vector_policy {
    kv_format format = kv_format::affine2;                 ///< what is stored
    level_choice levels = level_choice::min_max;           ///< +ls, +cs
    bool basis = false;                                    ///< +basis: in a calibrated orthogonal basis
    bool hadamard = false;                                 ///< +had
    bool means = false;                                    ///< +mean: calibrated means are taken off
    bool error_weights = false;                            ///< +ew: calibrated error weights choose codes
    quantization_axis axis = quantization_axis::per_token; ///< +channel; of keys alone
    std::size_t group = 0; ///< +g32: channels that share a scale and minimum; 0: all of a vector
    /// Whether all fields are the same.
    friend bool operator==(const vector_policy&, const vector_policy&) = default;
};

/// How a layer is kept.
struct layer_policy {
    vector_policy key = {};   ///< of K
    vector_policy value = {}; ///< of V
    /// Whether both are the same.
    friend bool operator==(const layer_policy&, const layer_policy&) = default;
};

/// A layer that differs from the others.
struct layer_exception {
    std::size_t layer = 0;    ///< from 0
    layer_policy policy = {}; ///< its own
    /// Whether all fields are the same.
    friend bool operator==(const layer_exception&, const layer_exception&) = default;
};

/// How the layers of a model are kept. The default is the reference's: two bits, minimum and maximum.
struct cache_policy {
    layer_policy common = {};                 ///< of the layers that are not named below
    std::vector<layer_exception> layers = {}; ///< layers that differ, in ascending order
    std::size_t fp16_sinks = 0;               ///< @4:32: the first tokens of a sequence
    std::size_t fp16_window = 0;              ///< and the newest
    std::size_t page_tokens = 0;              ///< #256; 0: as the cache's shape says

    /// The policy of a layer. O(log layers).
    [[nodiscard]] const layer_policy& of(std::size_t layer) const noexcept {
        const auto own =
            std::lower_bound(layers.begin(), layers.end(), layer,
                             [](const layer_exception& e, std::size_t i) { return e.layer < i; });
        return own == layers.end() || own->layer != layer ? common : own->policy;
    }
    /// Whether any layer takes calibrated means; whether any takes error weights, or a basis.
    /// @{
    [[nodiscard]] bool needs_means() const noexcept {
        return any([](const vector_policy& side) { return side.means; });
    }
    [[nodiscard]] bool needs_error_weights() const noexcept {
        return any([](const vector_policy& side) { return side.error_weights; });
    }
    [[nodiscard]] bool needs_basis() const noexcept {
        return any([](const vector_policy& side) { return side.basis; });
    }
    /// @}
    /// Whether all fields are the same.
    friend bool operator==(const cache_policy&, const cache_policy&) = default;

private:
    template <class Wanted>
    [[nodiscard]] bool any(Wanted wanted) const noexcept {
        const auto either = [&](const layer_policy& l) { return wanted(l.key) || wanted(l.value); };
        return either(common) || std::any_of(layers.begin(), layers.end(),
                                             [&](const layer_exception& e) { return either(e.policy); });
    }
};

/// A policy with a name.
struct policy_preset {
    std::string_view name; ///< as try_parse_policy() takes it
    std::string_view text; ///< what it stands for
};

/// The presets; the head of this file has what they cost.
inline constexpr std::array<policy_preset, 5> policy_presets{
    {{"safe", "c3+ls+had,c2+ls+had@4:32"},
     {"balanced", "c3+ls+had+mean+ew,c2+ls+had+ew@4:32"},
     {"small", "c2+ls+had+mean+ew,c2+ls+had+ew@4:32"},
     {"near-lossless", "cb4+ls+had+mean+ew,cb4+ls+had+ew@4:8"},
     {"reference", "2,2"}}};

/// Reads a policy: the grammar at the head of this file, or a preset, whose fp16 tokens and pages what follows
/// the name replaces ("balanced@64:256"). Errors: invalid_argument, out_of_range for a number that no
/// std::size_t holds, both with the place (error_location::position); out_of_memory. Allocates for the layers
/// that differ alone. O(text + layers^2).
[[nodiscard]] result<cache_policy> try_parse_policy(std::string_view text) noexcept;

/// The text of a policy, which try_parse_policy() takes back: KEYS,VALUES in full, layers, fp16 tokens and
/// pages where there are any. Allocates.
/// @{
[[nodiscard]] std::string to_string(const vector_policy& side);
[[nodiscard]] std::string to_string(const layer_policy& layer);
[[nodiscard]] std::string to_string(const cache_policy& policy);
/// @}

/// The calibrated parts of a layer, as vector_encoding has them. Those that its policy does not name may be
/// empty, and are not used.
struct layer_calibration {
    /// [kv_heads][key_dim]; before rotary embedding where the shape's layer has one (layer_description::rotary)
    std::span<const float> key_means = {};
    std::span<const float> value_means = {};         ///< [kv_heads][value_dim]
    std::span<const float> key_error_weights = {};   ///< [kv_heads][key_dim][key_dim]
    std::span<const float> value_error_weights = {}; ///< [kv_heads][value_dim][value_dim]
    std::span<const float> key_basis = {};           ///< [kv_heads][key_dim][key_dim]
    std::span<const float> value_basis = {};         ///< [kv_heads][value_dim][value_dim]
};

/// The cache of a policy for a model: `shape` with formats, encodings, groups and axis of every layer, fp16
/// sinks and window, and the page size where the policy names one. KV heads, head dims, sliding windows,
/// capacity and the rest are the shape's. Where values lie in keys, they are kept as the keys' policy says.
/// `calibration` has an entry for each layer, or none at all; it is copied. Errors: out_of_range for a layer
/// that the shape does not have; invalid_argument for a policy whose layers are not in ascending order, or
/// whose values are per channel; shape_mismatch where a calibrated part is missing or of another size, with
/// the layer; out_of_memory. What only a cache can tell (a group that does not divide a head dim), creating
/// it tells. O(layers + calibrated values).
[[nodiscard]] result<cache_description>
try_describe_cache(const cache_policy& policy, cache_description shape,
                   std::span<const layer_calibration> calibration = {}) noexcept;

#if KV1_EXCEPTIONS
/// Reads a policy: "c3+ls+had,c2+ls+had@4:32", or a preset such as "balanced". Throws kv1::error for any other
/// text, with the place where it goes wrong, and where memory runs out. The grammar is at the head of this
/// file.
[[nodiscard]] inline cache_policy parse_policy(std::string_view text) {
    return try_parse_policy(text).value();
}
/// The cache of a policy for a model: `shape` with the policy's formats, encodings and fp16 tokens.
/// `calibration` has an entry for each layer, or none at all, and is copied. Throws kv1::error for a layer
/// that the shape does not have, for a calibrated part that is missing, and where memory runs out.
[[nodiscard]] inline cache_description describe_cache(const cache_policy& policy, cache_description shape,
                                                      std::span<const layer_calibration> calibration = {}) {
    return try_describe_cache(policy, std::move(shape), calibration).value();
}
#endif

namespace detail {

inline constexpr const char* rule_policy_start =
    "a policy begins with a format (1, 1.5, 2, 3, 4, 8, 16, 32, c2, c3, c4, cb2, cb4) or is a preset (safe, "
    "balanced, small, near-lossless, reference)";
inline constexpr const char* rule_policy_format =
    "a format is 1, 1.5, 2, 3, 4, 8, 16, 32, c2, c3, c4, cb2 or cb4";
inline constexpr const char* rule_policy_option =
    "an option is ls, cs, basis, had, mean, ew, channel, or g and a number of channels";
inline constexpr const char* rule_policy_twice = "an option is named once";
inline constexpr const char* rule_policy_levels = "levels are chosen by ls or by cs";
inline constexpr const char* rule_policy_channel = "channel is for keys alone";
inline constexpr const char* rule_policy_number = "a decimal number is missing";
inline constexpr const char* rule_policy_too_large = "a number is too large";
inline constexpr const char* rule_policy_group = "a group has at least one channel";
inline constexpr const char* rule_policy_page = "a page has at least one token";
inline constexpr const char* rule_policy_layer = "a layer that differs is written /LAYER:KEYS,VALUES";
inline constexpr const char* rule_policy_layer_twice = "a layer is named once";
inline constexpr const char* rule_policy_window = "fp16 tokens are written @SINKS:WINDOW";
inline constexpr const char* rule_policy_rest =
    "after keys and values come /LAYER:KEYS,VALUES, then @SINKS:WINDOW, then #TOKENS";

// Reads from left to right. The first error stays: what is read after it is thrown away.
class policy_parser {
public:
    explicit policy_parser(std::string_view text) noexcept : text_(text) {}

    [[nodiscard]] result<cache_policy> run() noexcept {
        cache_policy p;
        if (const policy_preset* preset = preset_here()) {
            result<cache_policy> named = policy_parser(preset->text).run();
            if (!named)
                return named;
            p = std::move(*named);
            at_ += preset->name.size();
        } else {
            p.common = sides(rule_policy_start);
        }
        // room for every layer that is named: nothing after it allocates
        const auto room = static_cast<std::size_t>(std::count(text_.begin(), text_.end(), '/'));
        if (room != 0 && so_far_)
            so_far_ = seek_memory(room * sizeof(layer_exception));
        if (room != 0 && so_far_)
            so_far_ = guarded([&] { p.layers.reserve(room); });
        while (so_far_ && take('/'))
            exception(p);
        if (so_far_ && take('@')) {
            p.fp16_sinks = number();
            expect(':', rule_policy_window);
            p.fp16_window = number();
        }
        if (so_far_ && take('#'))
            p.page_tokens = positive(rule_policy_page);
        if (at_ != text_.size())
            refuse(rule_policy_rest, at_);
        if (!so_far_)
            return so_far_;
        return result<cache_policy>(std::move(p));
    }

private:
    static constexpr std::string_view marks = ",/@#+:";

    void refuse(const char* rule, std::size_t at, errc code = errc::invalid_argument) noexcept {
        if (so_far_)
            so_far_ = status(code, rule, {.position = static_cast<std::int64_t>(at)});
    }
    [[nodiscard]] bool take(char mark) noexcept {
        const bool here = at_ < text_.size() && text_[at_] == mark;
        at_ += here ? 1 : 0;
        return here;
    }
    void expect(char mark, const char* rule) noexcept {
        if (so_far_ && !take(mark))
            refuse(rule, at_);
    }
    // What stands before the next mark.
    [[nodiscard]] std::string_view word() const noexcept {
        const std::string_view rest = text_.substr(at_);
        return rest.substr(0, (std::min)(rest.find_first_of(marks), rest.size()));
    }
    [[nodiscard]] const policy_preset* preset_here() const noexcept {
        const std::string_view name = word();
        for (const policy_preset& p : policy_presets)
            if (p.name == name)
                return &p;
        return nullptr;
    }

    std::size_t number() noexcept {
        if (!so_far_)
            return 0;
        std::size_t n = 0;
        const char* const first = text_.data() + at_;
        const auto [end, error] = std::from_chars(first, text_.data() + text_.size(), n);
        if (end == first)
            refuse(rule_policy_number, at_);
        else if (error != std::errc())
            refuse(rule_policy_too_large, at_, errc::out_of_range);
        else
            at_ += static_cast<std::size_t>(end - first);
        return n;
    }
    std::size_t positive(const char* rule) noexcept {
        const std::size_t at = at_, n = number();
        if (n == 0)
            refuse(rule, at);
        return n;
    }

    kv_format format(const char* rule) noexcept {
        const std::string_view name = word();
        if (const std::optional<kv_format> named = format_from_short_name(name)) {
            at_ += name.size();
            return *named;
        }
        refuse(rule, at_);
        return {};
    }
    void set(bool& flag, std::size_t at) noexcept {
        if (flag)
            refuse(rule_policy_twice, at);
        flag = true;
    }
    void set(level_choice& levels, level_choice choice, std::size_t at) noexcept {
        if (levels != level_choice::min_max)
            refuse(levels == choice ? rule_policy_twice : rule_policy_levels, at);
        levels = choice;
    }
    // channel: where +channel stands, if it does
    vector_policy side(const char* rule, std::optional<std::size_t>& channel) noexcept {
        vector_policy p;
        p.format = format(rule);
        while (so_far_ && take('+')) {
            const std::size_t at = at_;
            const std::string_view name = word();
            if (name.starts_with('g')) {
                ++at_;
                if (p.group != 0)
                    refuse(rule_policy_twice, at);
                p.group = positive(rule_policy_group);
                if (so_far_ && at_ != at + name.size())
                    refuse(rule_policy_option, at);
                continue;
            }
            at_ += name.size();
            if (name == "ls") {
                set(p.levels, level_choice::least_squares, at);
            } else if (name == "cs") {
                set(p.levels, level_choice::clip_search, at);
            } else if (name == "basis") {
                set(p.basis, at);
            } else if (name == "had") {
                set(p.hadamard, at);
            } else if (name == "mean") {
                set(p.means, at);
            } else if (name == "ew") {
                set(p.error_weights, at);
            } else if (name == "channel") {
                if (channel)
                    refuse(rule_policy_twice, at);
                channel = at;
                p.axis = quantization_axis::per_channel;
            } else {
                refuse(rule_policy_option, at);
            }
        }
        return p;
    }
    layer_policy sides(const char* rule) noexcept {
        std::optional<std::size_t> of_keys, of_values;
        layer_policy p;
        p.key = side(rule, of_keys);
        if (so_far_ && take(',')) {
            p.value = side(rule_policy_format, of_values);
        } else {
            p.value = p.key;
            of_values = of_keys;
        }
        if (of_values)
            refuse(rule_policy_channel, *of_values);
        return p;
    }
    // Precondition: room for it.
    void exception(cache_policy& p) noexcept {
        const std::size_t at = at_;
        layer_exception e;
        e.layer = number();
        expect(':', rule_policy_layer);
        if (!so_far_)
            return;
        e.policy = sides(rule_policy_format);
        const auto place =
            std::lower_bound(p.layers.begin(), p.layers.end(), e.layer,
                             [](const layer_exception& own, std::size_t i) { return own.layer < i; });
        if (place != p.layers.end() && place->layer == e.layer)
            refuse(rule_policy_layer_twice, at);
        if (so_far_)
            p.layers.insert(place, e);
    }

    std::string_view text_;
    std::size_t at_ = 0;
    status so_far_;
};

// What a policy makes of one side of a layer.
struct policy_side {
    std::span<const float> means, error_weights, basis;
    const char *no_means, *no_weights, *no_basis;

    [[nodiscard]] status check(const vector_policy& p, std::size_t heads, std::size_t dim,
                               const error_location& where) const noexcept {
        if (p.means && means.size() != heads * dim)
            return {errc::shape_mismatch, no_means, where};
        if (p.error_weights && error_weights.size() != heads * dim * dim)
            return {errc::shape_mismatch, no_weights, where};
        if (p.basis && basis.size() != heads * dim * dim)
            return {errc::shape_mismatch, no_basis, where};
        return {};
    }
    [[nodiscard]] std::size_t bytes(const vector_policy& p) const noexcept {
        return ((p.means ? means.size() : 0) + (p.error_weights ? error_weights.size() : 0) +
                (p.basis ? basis.size() : 0)) *
               sizeof(float);
    }
    // Throws std::bad_alloc.
    void encode(const vector_policy& p, std::size_t block, vector_encoding& e) const {
        e.levels = p.levels;
        e.hadamard = p.hadamard ? block : 0;
        e.means.clear();
        e.error_weights.clear();
        e.basis.clear();
        if (p.means)
            e.means.assign(means.begin(), means.end());
        if (p.error_weights)
            e.error_weights.assign(error_weights.begin(), error_weights.end());
        if (p.basis)
            e.basis.assign(basis.begin(), basis.end());
    }
};

inline policy_side keys_of(const layer_calibration& c) noexcept {
    return {
        c.key_means,
        c.key_error_weights,
        c.key_basis,
        "the policy takes means off keys (+mean): the calibration has to have [kv_heads][key_dim] of them",
        "the policy weighs errors of keys (+ew): the calibration has to have [kv_heads][key_dim][key_dim] "
        "error weights",
        "the policy turns keys into a basis (+basis): the calibration has to have "
        "[kv_heads][key_dim][key_dim] numbers of it"};
}

inline policy_side values_of(const layer_calibration& c) noexcept {
    return {c.value_means,
            c.value_error_weights,
            c.value_basis,
            "the policy takes means off values (+mean): the calibration has to have [kv_heads][value_dim] of "
            "them",
            "the policy weighs errors of values (+ew): the calibration has to have "
            "[kv_heads][value_dim][value_dim] error weights",
            "the policy turns values into a basis (+basis): the calibration has to have "
            "[kv_heads][value_dim][value_dim] numbers of it"};
}

// Throws std::bad_alloc.
inline void apply_policy(const layer_policy& p, const layer_calibration& c, layer_description& l) {
    std::size_t key_block = rotation_width(l.key_dim);
    if (l.values_in_keys) // a block lies on one side of the values' end
        key_block = (std::min)(key_block, rotation_width(l.value_dim));
    l.key_format = p.key.format;
    l.key_group = p.key.group;
    l.key_axis = p.key.axis;
    keys_of(c).encode(p.key, key_block, l.key_encoding);
    l.value_format = l.values_in_keys ? p.key.format : p.value.format;
    l.value_group = l.values_in_keys ? p.key.group : p.value.group;
    values_of(c).encode(l.values_in_keys ? vector_policy{} : p.value, rotation_width(l.value_dim),
                        l.value_encoding);
}

} // namespace detail

inline result<cache_policy> try_parse_policy(std::string_view text) noexcept {
    return detail::policy_parser(text).run();
}

inline std::string to_string(const vector_policy& side) {
    std::string text(info_of(side.format).short_name);
    text.append(side.levels == level_choice::least_squares ? "+ls"
                : side.levels == level_choice::clip_search ? "+cs"
                                                           : "");
    text.append(side.basis ? "+basis" : "")
        .append(side.hadamard ? "+had" : "")
        .append(side.means ? "+mean" : "");
    text.append(side.error_weights ? "+ew" : "");
    text.append(side.axis == quantization_axis::per_channel ? "+channel" : "");
    if (side.group != 0)
        text.append("+g").append(std::to_string(side.group));
    return text;
}

inline std::string to_string(const layer_policy& layer) {
    return to_string(layer.key).append(",").append(to_string(layer.value));
}

inline std::string to_string(const cache_policy& policy) {
    std::string text = to_string(policy.common);
    for (const layer_exception& e : policy.layers)
        text.append("/").append(std::to_string(e.layer)).append(":").append(to_string(e.policy));
    if (policy.fp16_sinks != 0 || policy.fp16_window != 0)
        text.append("@")
            .append(std::to_string(policy.fp16_sinks))
            .append(":")
            .append(std::to_string(policy.fp16_window));
    if (policy.page_tokens != 0)
        text.append("#").append(std::to_string(policy.page_tokens));
    return text;
}

inline result<cache_description> try_describe_cache(const cache_policy& policy, cache_description shape,
                                                    std::span<const layer_calibration> calibration) noexcept {
    for (std::size_t i = 0; i < policy.layers.size(); ++i) {
        const std::size_t layer = policy.layers[i].layer;
        if (i != 0 && policy.layers[i - 1].layer >= layer)
            return status(errc::invalid_argument, "a policy's layers are in ascending order");
        if (layer >= shape.layers.size())
            return status(errc::out_of_range, "the policy names a layer that the cache does not have",
                          {.layer = static_cast<std::int64_t>(layer)});
    }
    if (!calibration.empty() && calibration.size() != shape.layers.size())
        return status(errc::shape_mismatch, "a calibration has an entry for each layer");
    const layer_calibration nothing;
    const auto calibrated = [&](std::size_t i) -> const layer_calibration& {
        return calibration.empty() ? nothing : calibration[i];
    };
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < shape.layers.size(); ++i) {
        const layer_description& l = shape.layers[i];
        const layer_policy& p = policy.of(i);
        const vector_policy value = l.values_in_keys ? vector_policy{} : p.value;
        const error_location where{.layer = static_cast<std::int64_t>(i)};
        if (value.axis == quantization_axis::per_channel)
            return status(errc::invalid_argument, detail::rule_policy_channel, where);
        const detail::policy_side keys = detail::keys_of(calibrated(i)),
                                  values = detail::values_of(calibrated(i));
        if (const status s = keys.check(p.key, l.kv_heads, l.key_dim, where); !s)
            return s;
        if (const status s = values.check(value, l.kv_heads, l.value_dim, where); !s)
            return s;
        bytes += keys.bytes(p.key) + values.bytes(value);
    }
    if (const status s = detail::seek_memory(bytes); !s)
        return s;
    const status made = detail::guarded([&] {
        for (std::size_t i = 0; i < shape.layers.size(); ++i)
            detail::apply_policy(policy.of(i), calibrated(i), shape.layers[i]);
    });
    if (!made)
        return made;
    shape.fp16_sinks = policy.fp16_sinks;
    shape.fp16_window = policy.fp16_window;
    if (policy.page_tokens != 0)
        shape.page_tokens = policy.page_tokens;
    return result<cache_description>(std::move(shape));
}

} // namespace kv1::inline KV1_ABI
