// SPDX-License-Identifier: Apache-2.0
//
// Which cached tokens a query sees: masks, and the visibility of token trees and bidirectional blocks.
//
// A tree of guessed tokens is appended as if it were a text, and attended to under its mask:
//
//   const kv1::token_visibility tree = kv1::tree_mask(std::array{-1, 0, 0});  // token 0, then 1 or 2
//   cache.attend(sequence, layer, q, out, {.mask = kv1::attention_mask::explicit_for_last(3, tree)});
//
// Tokens take the positions in which they were appended; the caller gives keys and queries the RoPE of their
// depth in the tree. Accepted tokens that do not follow each other are appended anew: rollback(), or
// truncate(), then append those that were accepted.
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

/// Which cached tokens each query sees. Below, n is the number of cached tokens and m the number of queries.
class attention_mask {
public:
    /// The queries are the last m cached tokens. Query i sees tokens 0 ... n - m + i: with 10 tokens and 2
    /// queries, the first sees tokens 0-8, the second 0-9.
    [[nodiscard]] static constexpr attention_mask causal() noexcept { return {}; }
    /// Query i has the position first_position + i, and sees tokens 0 ... first_position + i.
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
    /// Token trees, bidirectional blocks and other shapes. The queries are the last m cached tokens. Every
    /// query sees all tokens before n - keys. Query i sees token n - keys + j if visible[i * keys + j] is not
    /// 0. Sliding windows and ranges hide tokens that the mask shows. The span is read during attend() only.
    [[nodiscard]] static constexpr attention_mask
    explicit_for_last(std::size_t keys, std::span<const std::uint8_t> visible) noexcept {
        attention_mask mask;
        mask.causal_ = false;
        mask.keys_ = keys;
        mask.visible_ = visible;
        return mask;
    }

    /// What the mask was made with. explicit_keys() is 0 and visible() is empty unless it came from
    /// explicit_for_last().
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

/// A mask of the m newest tokens for attention_mask::explicit_for_last: bytes [m][m], 1 where token i sees
/// token j. It is a contiguous range and owns its bytes.
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

    // Makes [m][m] bytes, all 0. False: no memory.
    [[nodiscard]] bool resize(std::size_t m) noexcept {
        return (m == 0 || m <= (std::numeric_limits<std::size_t>::max)() / m) && bytes_.resize(m * m);
    }

    detail::buffer<std::uint8_t> bytes_;
};

/// The mask of a token tree. Token i of the m newest tokens sees itself and its ancestors. parents[i] is the
/// index of its parent, less than i, or -1 if its parent is the last token before them. Example: parents {-1,
/// 0, 0} has two branches, and token 2 sees tokens 0 and 2. O(m^2). Errors: invalid_argument, out_of_memory.
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
/// The mask of a token tree: token i of the m newest tokens sees itself and its ancestors. parents[i] is less
/// than i, or -1. Throws kv1::error: invalid_argument for another parent; out_of_memory.
[[nodiscard]] inline token_visibility tree_mask(std::span<const std::int32_t> parents) {
    return try_tree_mask(parents).value();
}
#endif

/// The mask of bidirectional blocks. Token i of the m newest tokens sees those up to itself. If blocks[i] is
/// not negative, it also sees all tokens with the same number (Gemma 3's images). Example: blocks {-1, 0, 0}
/// lets tokens 1 and 2 see each other. O(m^2). Errors: out_of_memory.
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
/// The mask of bidirectional blocks: token i of the m newest tokens sees those up to itself and, if blocks[i]
/// is not negative, all tokens with the same number. Throws kv1::error: out_of_memory.
[[nodiscard]] inline token_visibility block_mask(std::span<const std::int32_t> blocks) {
    return try_block_mask(blocks).value();
}
#endif

} // namespace kv1::inline KV1_ABI
