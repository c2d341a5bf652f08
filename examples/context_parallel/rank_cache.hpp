// SPDX-License-Identifier: Apache-2.0
//
// One rank's share of every sequence. Nothing here talks to other ranks: positions are the whole sequence's,
// and so is what queries see; the rank's tokens among them are found by the distribution.
//
// fp16 windows. kv1's window would be the newest tokens of each rank; here it is the newest of all. So a
// rank's cache quantizes everything, and a second one keeps its share of the window in fp16.
#pragma once

#include "distribution.hpp"
#include "visibility.hpp"

#include <kv1/kv_cache.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace context_parallel {

using thread_source = std::function<void(std::size_t, kv1::task_view)>; ///< a kv1::executor

/// A sequence in a rank's caches.
struct rank_sequence {
    kv1::sequence_id body, recent;
    std::size_t recent_base = 0; ///< the rank's place of the first token that `recent` counts from
    friend bool operator==(const rank_sequence&, const rank_sequence&) = default;
};

/// Room that attention of a rank takes, [query rows].
struct rank_scratch {
    std::vector<float> part; ///< [channels + 1] each; where needs_part()
    std::vector<float> log_sum_exp;
    std::vector<std::uint8_t> visible; ///< an explicit mask's, of this rank's places
};

class rank_cache {
public:
    /// `whole` describes the cache that all ranks make up; its capacity is dealt like positions.
    kv1::status open(const kv1::cache_description& whole, const distribution& positions, std::size_t rank);

    /// Whether a layer's newest tokens are kept in fp16; whether that, or fp16 sinks, concerns it at all.
    /// @{
    [[nodiscard]] bool has_window(std::size_t layer) const noexcept;
    [[nodiscard]] static bool has_copies(const kv1::layer_description& layer) noexcept;
    /// @}

    [[nodiscard]] kv1::result<rank_sequence> create() noexcept;
    /// Precondition: layers hold the same number of tokens.
    [[nodiscard]] kv1::result<rank_sequence> fork(const rank_sequence& s) noexcept;
    void destroy(const rank_sequence& s) noexcept;
    /// Cuts what lies at `position` and behind it. `changed` becomes true once anything is cut.
    kv1::status truncate(rank_sequence& s, std::size_t position, bool& changed) noexcept;
    /// No later query sees tokens before `fp16_from` in fp16.
    kv1::status commit(const rank_sequence& s, std::size_t fp16_from) noexcept;
    /// Whether the rank has its tokens of a layer that holds `length`.
    [[nodiscard]] bool holds(const rank_sequence& s, std::size_t layer, std::size_t length) const noexcept;

    /// Appends the rank's own tokens. `changed` becomes true once any cache has taken them.
    kv1::status append(std::span<const rank_sequence> batch, std::size_t layer,
                       std::span<const std::size_t> indptr, const kv1::tensor_view& keys,
                       const kv1::tensor_view& values, const thread_source& run, bool& changed);
    /// Whether attend() takes scratch.part: its results come from several calls of a cache.
    [[nodiscard]] bool needs_part(std::size_t layer, const query_sight& sight) const noexcept;
    /// Attention over the rank's own tokens of a layer that holds `length`. rows, [query rows][channels + 1],
    /// begin as rows that saw nothing. Of the options scale, precision and soft cap are used; `sight` has the
    /// rest.
    kv1::status attend(const rank_sequence& s, std::size_t layer, std::size_t length,
                       const kv1::tensor_view& queries, const query_sight& sight,
                       const kv1::attention_options& options, std::span<float> rows, rank_scratch& scratch,
                       const thread_source& run) const;

    /// No token has this position, or one behind it: where means turn with positions, a rank's places have to
    /// follow each other as positions do, so that each rank has one range.
    [[nodiscard]] std::size_t position_limit() const noexcept { return position_limit_; }
    [[nodiscard]] std::size_t bytes_in_use() const noexcept;
    /// The cache of all layers; to look at, and for tests to harm.
    [[nodiscard]] kv1::kv_cache& body() noexcept { return *body_; }

private:
    [[nodiscard]] std::size_t owned(std::size_t position) const noexcept {
        return positions_.owned_before(rank_, position);
    }

    std::size_t page_ = 1, rank_ = 0, position_limit_ = static_cast<std::size_t>(-1);
    distribution positions_ = distribution::pages(1, 1);
    std::optional<kv1::kv_cache> body_, recent_;
    std::vector<std::size_t> recent_layer_; // of `recent_`, by layer; none where it has no window
};

} // namespace context_parallel
