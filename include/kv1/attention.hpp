// SPDX-License-Identifier: Apache-2.0
//
// What the caller can say about attention: scale, mask, precision, the optional arguments of particular
// models; basic_kv_cache::attend() takes it. And merge_attention(), which joins results over disjoint sets of
// tokens.
//
// A query token i stands at a position p: n - m + i, or first_position + i where the mask gives one (n tokens
// cached, m queries). With all options, and natural logarithms:
//
//   s[t]  = scale * q . k[t]                                      for the tokens t that i sees
//   s[t]  = soft_cap * tanh(s[t] / soft_cap)                      where soft_cap > 0
//   s[t] += alibi_slopes[h] * (t - p)                             where given
//   out   = sum_t exp(s[t]) v[t] / D,  log_sum_exp = log D,  D = sum_t exp(s[t]) [+ exp(sinks[h])]
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/precision.hpp>
#include <kv1/status.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace kv1::inline KV1_ABI {

/// Which cached tokens a query sees. The number of cached tokens is n, the number of queries m.
class attention_mask {
public:
    /// The queries are the last m cached tokens: query i sees tokens 0 ... n - m + i.
    [[nodiscard]] static constexpr attention_mask causal() noexcept { return {}; }
    /// The queries stand at positions first_position + i: query i sees tokens 0 ... first_position + i.
    [[nodiscard]] static constexpr attention_mask causal_from(std::size_t first_position) noexcept {
        attention_mask mask;
        mask.first_position_ = first_position;
        return mask;
    }
    /// Every query sees every token, also those after its own position n - m + i.
    [[nodiscard]] static constexpr attention_mask none() noexcept {
        attention_mask mask;
        mask.causal_ = false;
        return mask;
    }
    /// Token trees, bidirectional blocks and other shapes: the queries are the last m cached tokens;
    /// visible[i * keys + j] != 0 says that query i sees token n - keys + j; every query sees all tokens
    /// before n - keys. Sliding windows and the like take off from what it shows. The span is read during
    /// attend() only.
    [[nodiscard]] static constexpr attention_mask
    explicit_for_last(std::size_t keys, std::span<const std::uint8_t> visible) noexcept {
        attention_mask mask;
        mask.causal_ = false;
        mask.keys_ = keys;
        mask.visible_ = visible;
        return mask;
    }

    /// What was asked for: explicit_keys() is 0 and visible() empty but for explicit_for_last.
    /// @{
    [[nodiscard]] constexpr bool is_causal() const noexcept { return causal_; }
    [[nodiscard]] constexpr std::optional<std::size_t> first_position() const noexcept {
        return first_position_;
    }
    [[nodiscard]] constexpr std::size_t explicit_keys() const noexcept { return keys_; }
    [[nodiscard]] constexpr std::span<const std::uint8_t> visible() const noexcept { return visible_; }
    /// @}

private:
    bool causal_ = true;
    std::optional<std::size_t> first_position_;
    std::size_t keys_ = 0;
    std::span<const std::uint8_t> visible_;
};

/// Which of the m newest tokens see which, [m][m], 1 where they do; for attention_mask::explicit_for_last. A
/// contiguous range that owns its bytes.
class token_visibility {
public:
    /// No token at all.
    token_visibility() = default;

    /// As the standard's containers have them.
    /// @{
    [[nodiscard]] const std::uint8_t* data() const noexcept { return bytes_.data(); }
    [[nodiscard]] std::size_t size() const noexcept { return bytes_.size(); }
    [[nodiscard]] bool empty() const noexcept { return bytes_.empty(); }
    [[nodiscard]] const std::uint8_t* begin() const noexcept { return bytes_.begin(); }
    [[nodiscard]] const std::uint8_t* end() const noexcept { return bytes_.end(); }
    [[nodiscard]] std::uint8_t operator[](std::size_t i) const noexcept { return bytes_[i]; }
    /// @}
    /// A copy. Throws std::bad_alloc.
    [[nodiscard]] operator std::vector<std::uint8_t>() const { return {begin(), end()}; }

private:
    friend result<token_visibility> try_tree_mask(std::span<const std::int32_t> parents) noexcept;
    friend result<token_visibility> try_block_mask(std::span<const std::int32_t> blocks) noexcept;

    // One byte for each pair of tokens, none of which sees the other. False: no memory.
    [[nodiscard]] bool resize(std::size_t m) noexcept {
        return (m == 0 || m <= (std::numeric_limits<std::size_t>::max)() / m) && bytes_.resize(m * m);
    }

    detail::buffer<std::uint8_t> bytes_;
};

/// Visibility of a token tree: token i of the m newest tokens sees itself and its ancestors. parents[i] is -1
/// for a child of the cached prefix, else less than i. O(m^2). Errors: invalid_argument, out_of_memory.
[[nodiscard]] inline result<token_visibility> try_tree_mask(std::span<const std::int32_t> parents) noexcept {
    const std::size_t m = parents.size();
    token_visibility visible;
    if (!visible.resize(m))
        return status{errc::out_of_memory, "an allocation failed"};
    std::uint8_t* const sees = visible.bytes_.data();
    for (std::size_t i = 0; i < m; ++i) {
        if (parents[i] < -1 || parents[i] >= static_cast<std::int64_t>(i))
            return status{errc::invalid_argument,
                          "a parent comes before its child",
                          {.token = static_cast<std::int64_t>(i)}};
        if (parents[i] >= 0)
            std::copy_n(sees + static_cast<std::size_t>(parents[i]) * m, i, sees + i * m);
        sees[i * m + i] = 1;
    }
    return visible;
}
#if KV1_EXCEPTIONS
/// As try_tree_mask; throws kv1::error.
[[nodiscard]] inline token_visibility tree_mask(std::span<const std::int32_t> parents) {
    return try_tree_mask(parents).value();
}
#endif

/// Visibility of bidirectional blocks, for attention_mask::explicit_for_last: of the m newest tokens token i
/// sees those up to itself and, where blocks[i] is not negative, all that have the same number (Gemma 3's
/// images). O(m^2). Errors: out_of_memory.
[[nodiscard]] inline result<token_visibility> try_block_mask(std::span<const std::int32_t> blocks) noexcept {
    const std::size_t m = blocks.size();
    token_visibility visible;
    if (!visible.resize(m))
        return status{errc::out_of_memory, "an allocation failed"};
    std::uint8_t* const sees = visible.bytes_.data();
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j)
            sees[i * m + j] = j <= i || (blocks[i] >= 0 && blocks[i] == blocks[j]) ? 1 : 0;
    return visible;
}
#if KV1_EXCEPTIONS
/// As try_block_mask; throws kv1::error.
[[nodiscard]] inline token_visibility block_mask(std::span<const std::int32_t> blocks) {
    return try_block_mask(blocks).value();
}
#endif

/// Tokens first ... last - 1 of a sequence, clipped to those that are cached.
struct token_range {
    std::size_t first = 0; ///< the first position
    /// One past the last position.
    std::size_t last = (std::numeric_limits<std::size_t>::max)();
};

/// How one call attends; the default is causal attention on the fast path.
struct attention_options {
    /// Factor of q . k before the softmax; 1 / sqrt(key head_dim) where absent.
    std::optional<float> scale = std::nullopt;
    /// Which tokens each query sees. In a batch it holds for each sequence by itself.
    attention_mask mask = attention_mask::causal();
    /// In a batch, where not empty, instead of mask: one a sequence (speculative trees, images, chunks of
    /// prompts at positions of their own). Explicit masks may cover different numbers of keys.
    std::span<const attention_mask> masks = {};
    /// Arithmetic; plain formats use fp32 in any case.
    precision mode = precision::fast;
    /// Where not empty: receives the natural logarithm of each softmax denominator, [tokens][query heads].
    std::span<float> log_sum_exp = {};
    /// Only tokens in here are attended to, beside what the mask says. Results over disjoint ranges join by
    /// merge_attention().
    token_range range = {};
    /// Sliding window: no token before p + 1 - window is seen; 0: all are.
    std::size_t window = 0;
    /// Logit soft cap (Gemma 2); 0: none.
    float soft_cap = 0.0f;
    /// Where not empty, one a query head: ALiBi's slopes.
    std::span<const float> alibi_slopes = {};
    /// Where not empty, one a query head: logits that take part in the softmax without a value (gpt-oss).
    /// Where ranges are joined, give them to one of the calls only.
    std::span<const float> sinks = {};
};

/// Attention of the same query rows over one of several disjoint sets of tokens: what attend() gives with
/// log_sum_exp asked for, or what an engine's own kernel gives for tokens that it keeps elsewhere (an fp16
/// tail, a prefix that sequences share).
struct attention_part {
    std::span<const float> outputs;     ///< [rows][channels], each row divided by its denominator
    std::span<const float> log_sum_exp; ///< [rows]; -infinity where a row saw no token
};

/// Joins the parts to attention over all of their tokens: out = sum_i e^(l_i - l) out_i, l = log sum_i e^l_i.
/// outputs is [rows][channels] and may be one of the parts; so may log_sum_exp, which may also be empty. A
/// row that no part saw becomes zeros and -infinity. The result depends on the order of the parts by rounding
/// only. O(parts * rows * channels), no allocation. Errors: invalid_argument, shape_mismatch.
inline status try_merge_attention(std::span<const attention_part> parts, std::size_t channels,
                                  std::span<float> outputs, std::span<float> log_sum_exp = {}) noexcept {
    if (channels == 0)
        return {errc::invalid_argument, "rows have channels"};
    const std::size_t rows = outputs.size() / channels;
    if (rows * channels != outputs.size() || (!log_sum_exp.empty() && log_sum_exp.size() != rows))
        return {errc::shape_mismatch, "outputs are whole rows, with one log-sum-exp each"};
    for (const attention_part& p : parts)
        if (p.outputs.size() != outputs.size() || p.log_sum_exp.size() != rows)
            return {errc::shape_mismatch, "every part has the same rows"};
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    for (std::size_t r = 0; r < rows; ++r) {
        float maximum = nothing;
        for (const attention_part& p : parts)
            maximum = p.log_sum_exp[r] > maximum ? p.log_sum_exp[r] : maximum;
        const auto weight = [&](const attention_part& p) {
            return p.log_sum_exp[r] == nothing ? 0.0f : std::exp(p.log_sum_exp[r] - maximum);
        };
        float sum = 0.0f;
        for (const attention_part& p : parts)
            sum += weight(p);
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        // a few channels at a time, so that what is overwritten has been read and each weight is computed
        // seldom
        constexpr std::size_t step = 256;
        for (std::size_t first = r * channels; first < (r + 1) * channels; first += step) {
            const std::size_t n = (std::min)(step, (r + 1) * channels - first);
            float joined[step] = {};
            for (const attention_part& p : parts) {
                const float w = weight(p) * inverse;
                if (w != 0.0f)
                    for (std::size_t c = 0; c < n; ++c)
                        joined[c] += w * p.outputs[first + c];
            }
            std::copy_n(joined, n, outputs.begin() + static_cast<std::ptrdiff_t>(first));
        }
        if (!log_sum_exp.empty())
            log_sum_exp[r] = sum > 0.0f ? maximum + std::log(sum) : nothing;
    }
    return {};
}
#if KV1_EXCEPTIONS
/// As try_merge_attention; throws kv1::error.
inline void merge_attention(std::span<const attention_part> parts, std::size_t channels,
                            std::span<float> outputs, std::span<float> log_sum_exp = {}) {
    detail::throw_if_error(try_merge_attention(parts, channels, outputs, log_sum_exp));
}
#endif

} // namespace kv1::inline KV1_ABI
