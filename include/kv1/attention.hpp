// SPDX-License-Identifier: Apache-2.0
//
// What the caller can say about attention: scale, mask, precision. basic_kv_cache::attend() takes it.
//
// Optional arguments of particular models (sliding window, logit soft cap, sink logits, ALiBi slopes) belong
// in attention_options and will be added to it; partial results are joined by their log-sum-exp.
#pragma once

#include <kv1/detail/kernels/interface.hpp>
#include <kv1/status.hpp>

#include <cstddef>
#include <cstdint>
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
    /// Every query sees every token.
    [[nodiscard]] static constexpr attention_mask none() noexcept {
        attention_mask mask;
        mask.causal_ = false;
        return mask;
    }
    /// Speculative decoding and other shapes: visible[i * keys + j] != 0 says that query i sees token n -
    /// keys + j; every query sees all tokens before n - keys. The span is read during attend() only.
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

/// Visibility of a token tree, for attention_mask::explicit_for_last: token i of the m newest tokens sees
/// itself and its ancestors. parents[i] is -1 for a child of the cached prefix, else less than i. O(m^2).
[[nodiscard]] inline result<std::vector<std::uint8_t>> try_tree_mask(std::span<const std::int32_t> parents) {
    const std::size_t m = parents.size();
    std::vector<std::uint8_t> visible(m * m, 0);
    for (std::size_t i = 0; i < m; ++i) {
        if (parents[i] < -1 || parents[i] >= static_cast<std::int64_t>(i))
            return status{errc::invalid_argument,
                          "a parent comes before its child",
                          {.token = static_cast<std::int64_t>(i)}};
        if (parents[i] >= 0)
            for (std::size_t j = 0; j < i; ++j)
                visible[i * m + j] = visible[static_cast<std::size_t>(parents[i]) * m + j];
        visible[i * m + i] = 1;
    }
    return visible;
}
#if KV1_EXCEPTIONS
/// As try_tree_mask; throws kv1::error.
[[nodiscard]] inline std::vector<std::uint8_t> tree_mask(std::span<const std::int32_t> parents) {
    return try_tree_mask(parents).value();
}
#endif

/// How one call attends; the default is causal attention on the fast path.
struct attention_options {
    /// Factor of q . k before the softmax; 1 / sqrt(key head_dim) where absent.
    std::optional<float> scale = std::nullopt;
    /// Which tokens each query sees.
    attention_mask mask = attention_mask::causal();
    /// Arithmetic; plain formats use fp32 in any case.
    precision mode = precision::fast;
    /// Where not empty: receives the natural logarithm of each softmax denominator, [tokens][query heads].
    std::span<float> log_sum_exp = {};
};

} // namespace kv1::inline KV1_ABI
