// SPDX-License-Identifier: Apache-2.0
//
// Which cached tokens a query sees: masks, and the visibility of token trees and bidirectional blocks.
#pragma once

#include <kv1/detail/buffer.hpp>
#include <kv1/status.hpp>

#include <algorithm>
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

} // namespace kv1::inline KV1_ABI
