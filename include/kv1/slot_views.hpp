// SPDX-License-Identifier: Apache-2.0
//
// What calls of a slot store (slot_store.hpp) are given beside tensors: which slots, and which of them a query sees.
//
//   slot_view      the slots of one stream, in the order of its mask's columns: a range, a list, a block table
//   slot_mask      which columns a query sees: all, by order, by position, by bytes, by an additive mask
//   slot_stream    some queries of a call, their slots and their mask
//   slot_sequence  the slots of one sequence with their positions, for settle()
//
// Example: blocks of 64 slots, and a sequence of 150 tokens whose pages lie in blocks 7, 3, 9. In
// slot_view::table({7, 3, 9}, 150) column 130 is slot 9 * 64 + 2 = 578.
#pragma once

#include <kv1/float16.hpp>
#include <kv1/precision.hpp>
#include <kv1/tensor.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace kv1::inline KV1_ABI {

/// How a slot_view names its slots.
enum class slot_view_kind : std::uint8_t { range, list, table };

/// The slots of one stream. Column c of its mask is slot c of the view. Spans are read during the call only, or until
/// a plan is finished.
class slot_view {
public:
    /// No slot.
    constexpr slot_view() = default;
    /// Slots first ... first + count - 1, such as the cells of llama.cpp. It costs what these slots cost.
    [[nodiscard]] static constexpr slot_view range(std::size_t first, std::size_t count) noexcept {
        slot_view v;
        v.first_ = first;
        v.size_ = count;
        return v;
    }
    /// Any slots in any order, none of them twice. Attention walks every page that has one of them, so a list costs
    /// its pages. Under a mask of bytes or an additive mask, it also costs a copy of the mask by pages.
    [[nodiscard]] static constexpr slot_view list(std::span<const std::uint32_t> slots) noexcept {
        slot_view v;
        v.kind_ = slot_view_kind::list;
        v.items_ = slots;
        v.size_ = slots.size();
        return v;
    }
    /// The first `tokens` slots of these blocks, one after the other; block b is slots b * page_tokens and on. No block
    /// comes twice among those that tokens reach; blocks past them are not read (vLLM pads its tables).
    [[nodiscard]] static constexpr slot_view table(std::span<const std::uint32_t> blocks,
                                                   std::size_t tokens) noexcept {
        slot_view v;
        v.kind_ = slot_view_kind::table;
        v.items_ = blocks;
        v.size_ = tokens;
        return v;
    }

    /// What it was made with; first() is 0 but for a range, and items() are empty for one.
    /// @{
    [[nodiscard]] constexpr slot_view_kind kind() const noexcept { return kind_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr std::size_t first() const noexcept { return first_; }
    [[nodiscard]] constexpr std::span<const std::uint32_t> items() const noexcept { return items_; }
    /// @}

private:
    slot_view_kind kind_ = slot_view_kind::range;
    std::size_t first_ = 0, size_ = 0;
    std::span<const std::uint32_t> items_;
};

/// How a slot_mask says what a query sees.
enum class slot_mask_kind : std::uint8_t { none, causal, by_position, bytes, additive };

/// Which columns each query of a stream sees. Below, n is the number of columns and m the number of queries. Data are
/// read during the call only, or until a plan is finished.
class slot_mask {
public:
    /// Every query sees every column. Query i stands at n - m + i, and column c at c, for windows and ALiBi.
    [[nodiscard]] static constexpr slot_mask none() noexcept { return {}; }
    /// The queries are the last m columns. Query i sees columns 0 ... n - m + i.
    [[nodiscard]] static constexpr slot_mask causal() noexcept {
        slot_mask mask;
        mask.kind_ = slot_mask_kind::causal;
        return mask;
    }
    /// Query i sees the columns whose position is not negative and not after queries[i]. An empty slot has -1.
    /// queries is [m], columns [n].
    [[nodiscard]] static constexpr slot_mask by_position(std::span<const std::int32_t> queries,
                                                         std::span<const std::int32_t> columns) noexcept {
        slot_mask mask;
        mask.kind_ = slot_mask_kind::by_position;
        mask.query_positions_ = queries;
        mask.column_positions_ = columns;
        return mask;
    }
    /// Query i sees column c if visible[i * stride + c] is not 0. visible has at least (m - 1) * stride + n bytes.
    [[nodiscard]] static constexpr slot_mask bytes(std::span<const std::uint8_t> visible,
                                                   std::size_t stride) noexcept {
        slot_mask mask;
        mask.kind_ = slot_mask_kind::bytes;
        mask.visible_ = visible;
        mask.query_stride_ = static_cast<std::ptrdiff_t>(stride);
        return mask;
    }
    /// mask[i * query_stride + h * head_stride + c] is added to the score of query i, query head h and column c, after
    /// the soft cap; -infinity, and the lowest number of fp32, hide the column. A head_stride of 0 gives all heads the
    /// same mask. With alibi_slopes in the options it is multiplied by them first, as ggml does.
    template <scalar T>
    [[nodiscard]] static constexpr slot_mask additive(const T* mask, std::ptrdiff_t query_stride,
                                                      std::ptrdiff_t head_stride = 0) noexcept {
        slot_mask m;
        m.kind_ = slot_mask_kind::additive;
        m.added_ = mask;
        m.type_ = scalar_type_of<T>;
        m.query_stride_ = query_stride;
        m.head_stride_ = head_stride;
        return m;
    }

    /// What it was made with.
    /// @{
    [[nodiscard]] constexpr slot_mask_kind kind() const noexcept { return kind_; }
    [[nodiscard]] constexpr std::span<const std::int32_t> query_positions() const noexcept {
        return query_positions_;
    }
    [[nodiscard]] constexpr std::span<const std::int32_t> column_positions() const noexcept {
        return column_positions_;
    }
    [[nodiscard]] constexpr std::span<const std::uint8_t> visible() const noexcept { return visible_; }
    [[nodiscard]] constexpr const void* added() const noexcept { return added_; }
    [[nodiscard]] constexpr scalar_type type() const noexcept { return type_; }
    [[nodiscard]] constexpr std::ptrdiff_t query_stride() const noexcept { return query_stride_; }
    [[nodiscard]] constexpr std::ptrdiff_t head_stride() const noexcept { return head_stride_; }
    /// @}

private:
    slot_mask_kind kind_ = slot_mask_kind::none;
    scalar_type type_ = scalar_type::fp32;
    std::span<const std::int32_t> query_positions_, column_positions_;
    std::span<const std::uint8_t> visible_;
    const void* added_ = nullptr;
    std::ptrdiff_t query_stride_ = 0, head_stride_ = 0; // in elements
};

/// The next `queries` queries of a call, the slots that they attend to, and what they see of them.
struct slot_stream {
    std::size_t queries = 0;            ///< tokens of the query tensor, after those of the streams before
    slot_view slots;                    ///< the columns of the mask
    slot_mask mask = slot_mask::none(); ///< which columns a query sees
};

/// The slots of one sequence, and where its tokens stand.
struct slot_sequence {
    slot_view slots; ///< in any order
    /// Of each slot; negative: the slot is empty. Empty: slot c of the view stands at c.
    std::span<const std::int32_t> positions = {};
};

/// How one call attends. attention.hpp has the formula; an additive mask is added where ALiBi's bias is.
struct slot_attention_options {
    /// Factor of q . k before the softmax; 1 / sqrt(key head_dim) where absent.
    std::optional<float> scale = std::nullopt;
    /// Arithmetic; plain formats use fp32 in any case.
    precision mode = precision::fast;
    /// Receives the natural logarithm of each softmax denominator, [queries][query heads]; empty: not wanted.
    std::span<float> log_sum_exp = {};
    /// A query at position p sees none before p + 1 - window; 0: no window. Not with additive masks, which have
    /// theirs.
    std::size_t window = 0;
    /// Logit soft cap (Gemma 2); 0: none.
    float soft_cap = 0.0f;
    /// ALiBi's slopes, [query heads], of the distance between a column's position and the query's, or of the
    /// additive mask; empty: none.
    std::span<const float> alibi_slopes = {};
    /// Sink logits, [query heads]: logits that join the softmax without a value (gpt-oss); empty: none.
    std::span<const float> sink_logits = {};
};

} // namespace kv1::inline KV1_ABI
